"""The one decoder: it trains, scores and samples.

`Transformer` is a Flax NNX module. Programs split it once (`define`) and from then on work on
pytrees: `apply(definition, params, ...)`. Layers are stacked and scanned (short compile, cheap
rematerialisation); for decoding `unstack_layers` lays the same parameters out one by one, where a
loop over stacked weights would copy every layer's slice at each token.

Axis letters as in `layers`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from refine_af.models import attention
from refine_af.models.cache import KVCache, write
from refine_af.models.config import LoraConfig, ModelConfig
from refine_af.models.contraction import contract
from refine_af.models.layers import Axes, FeedForward, Linear, RMSNorm, rotary_tables, rotate

Params = dict[str, Any]  # nested, leaves are arrays
Rotary = tuple[Float[Array, "B 1 T H/2"], Float[Array, "B 1 T H/2"]]


class Attention(nnx.Module):
    """Rotary grouped-query self-attention with an optional cache."""

    def __init__(self, config: ModelConfig, *, lora: LoraConfig | None, rngs: nnx.Rngs) -> None:
        """Four linears named q, k, v and o."""
        param_dtype = jnp.dtype(config.param_dtype)

        def linear(name: str, in_dim: int, out_dim: int, axes: Axes) -> Linear:
            return Linear(
                name, in_dim, out_dim, axes, lora=lora, param_dtype=param_dtype, rngs=rngs
            )

        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        self.q = linear("q", config.embed_dim, queries, ("embed", "heads"))
        self.k = linear("k", config.embed_dim, keys, ("embed", "kv_heads"))
        self.v = linear("v", config.embed_dim, keys, ("embed", "kv_heads"))
        self.o = linear("o", queries, config.embed_dim, ("heads", "embed"))
        self.head_dim = config.head_dim

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: Rotary,
        mask: Bool[Array, "B T S"],
        stored: tuple[Array, Array] | None,
        end: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Attend to `x` itself, or to the cache `stored` with `x` written at column `end`."""
        query = rotate(self._heads(self.q(x)), *rotary)
        keys = rotate(self._heads(self.k(x)), *rotary)
        values = self._heads(self.v(x))
        if stored is not None:
            keys, values = write(stored[0], keys, end), write(stored[1], values, end)
        mixed = attention.attend(query, keys, values, mask)
        b, n, t, h = mixed.shape
        return self.o(mixed.transpose(0, 2, 1, 3).reshape(b, t, n * h)), (keys, values)

    def _heads(self, x: Float[Array, "B T NH"]) -> Float[Array, "B N T H"]:
        b, t, _ = x.shape
        return x.reshape(b, t, -1, self.head_dim).transpose(0, 2, 1, 3)


class Block(nnx.Module):
    """Pre-norm residual block: attention, then feed-forward; the residual stream is float32."""

    def __init__(self, config: ModelConfig, *, lora: LoraConfig | None, rngs: nnx.Rngs) -> None:
        """Random weights of one layer."""
        param_dtype = jnp.dtype(config.param_dtype)
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, param_dtype, config.dtype)
        self.attention = Attention(config, lora=lora, rngs=rngs)
        self.feed_forward_norm = RMSNorm(
            config.embed_dim, config.norm_eps, param_dtype, config.dtype
        )
        self.feed_forward = FeedForward(
            config.embed_dim, config.hidden_dim, lora=lora, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: Rotary,
        mask: Bool[Array, "B T S"],
        stored: tuple[Array, Array] | None,
        end: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """One layer; returns also the keys and values that a cache keeps."""
        mixed, kept = self.attention(self.attention_norm(x), rotary, mask, stored, end)
        x = x + mixed.astype(x.dtype)
        return x + self.feed_forward(self.feed_forward_norm(x)).astype(x.dtype), kept


class Transformer(nnx.Module):
    """Decoder-only language model; see the module's docstring for the two layouts of layers."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        lora: LoraConfig | None = None,
        stacked: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        """Random weights: stacked layers have a leading [num_layers] axis."""
        param_dtype = jnp.dtype(config.param_dtype)
        init = jax.nn.initializers.normal(0.02)
        table = (config.vocab_size, config.embed_dim)
        self.config = config
        self.stacked = stacked
        self.embedding = nnx.Param(init(rngs.params(), table, param_dtype), axes=("vocab", "embed"))
        if stacked:
            make = nnx.vmap(lambda r: Block(config, lora=lora, rngs=r))
            self.layers: Any = make(rngs.split(config.num_layers))
        else:
            blocks = [Block(config, lora=lora, rngs=rngs) for _ in range(config.num_layers)]
            self.layers = nnx.List(blocks)
        self.final_norm = RMSNorm(config.embed_dim, config.norm_eps, param_dtype, config.dtype)
        if not config.tie_embeddings:
            self.head = nnx.Param(
                init(rngs.params(), table[::-1], param_dtype), axes=("embed", "vocab")
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        start: Int[Array, "B"],
        *,
        cache: KVCache | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Final hidden states (after the last norm), for `logits` or a value head.

        Args:
            tokens: ids; columns before `start[b]` are left padding, anything after a row's real
                tokens is right padding. Outputs at padding are meaningless.
            start: first real column of each row. Positions count from there.
            cache: what was computed for the columns before these; needs unstacked layers.
                Without it the columns are 0..T-1 and the returned cache holds exactly those.
            remat: recompute each layer in the backward pass instead of keeping its activations.
        """
        length = tokens.shape[1]
        end = jnp.zeros((), jnp.int32) if cache is None else cache.end
        num_keys = length if cache is None else cache.keys[0].shape[2]
        columns = end + jnp.arange(length, dtype=jnp.int32)[None]
        positions = jnp.maximum(columns - start[:, None], 0)
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        mask = attention.visible(start, end, length, num_keys, self.config.sliding_window)
        x = self.embedding[...][tokens].astype(jnp.float32)  # the residual stream
        if self.stacked:
            assert cache is None, "decoding needs unstacked layers"
            x, (keys, values) = self._scan(x, rotary, mask, end, remat=remat)
        else:
            x, keys, values = self._unrolled(x, rotary, mask, cache, end)
        return self.final_norm(x), KVCache(tuple(keys), tuple(values), end + length)

    def _scan(self, x: Array, rotary: Rotary, mask: Array, end: Array, *, remat: bool) -> Any:
        definition, stacked = nnx.split(self.layers)

        def layer(x: Array, params: nnx.State) -> tuple[Array, tuple[Array, Array]]:
            return nnx.merge(definition, params)(x, rotary, mask, None, end)

        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, stacked)

    def _unrolled(
        self, x: Array, rotary: Rotary, mask: Array, cache: KVCache | None, end: Array
    ) -> tuple[Array, list[Array], list[Array]]:
        keys, values = [], []
        for i, block in enumerate(self.layers):
            stored = None if cache is None else (cache.keys[i], cache.values[i])
            x, (key, value) = block(x, rotary, mask, stored, end)
            keys.append(key)
            values.append(value)
        return x, keys, values

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits in float32."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.config.tie_embeddings:
            logits = contract("td,vd->tv", flat, self.embedding[...].astype(hidden.dtype))
        else:
            logits = contract("td,dv->tv", flat, self.head[...].astype(hidden.dtype))
        return logits.reshape(*hidden.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class Definition:
    """The static half of a split `Transformer`: hashable, to be closed over by jitted code."""

    graph: nnx.GraphDef
    config: ModelConfig
    lora: LoraConfig | None


def _build(config: ModelConfig, lora: LoraConfig | None, stacked: bool, key: Array) -> Transformer:
    base_key, lora_key = jax.random.split(key)
    return Transformer(
        config, lora=lora, stacked=stacked, rngs=nnx.Rngs(params=base_key, lora=lora_key)
    )


@functools.lru_cache(maxsize=64)
def define(
    config: ModelConfig, lora: LoraConfig | None = None, *, stacked: bool = True
) -> Definition:
    """Definition of a decoder without making any array."""
    model = nnx.eval_shape(lambda: _build(config, lora, stacked, jax.random.key(0)))
    return Definition(nnx.split(model)[0], config, lora)


def _split(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, adapter, base)."""
    graph, *states = nnx.split(model, nnx.LoRAParam, ...)
    return graph, states[0], states[1]


def init(
    config: ModelConfig, lora: LoraConfig | None = None, *, key: Array
) -> tuple[Params, Params]:
    """Random (base, adapter) parameters of stacked layout; the adapter is {} without `lora`."""
    _, adapter, base = _split(_build(config, lora, True, key))
    return nnx.to_pure_dict(base), nnx.to_pure_dict(adapter)


def logical_axes(
    config: ModelConfig, lora: LoraConfig | None = None, *, stacked: bool = True
) -> tuple[Params, Params]:
    """(base, adapter) trees whose leaves are `jax.ShapeDtypeStruct` with logical axis names.

    The names stand in a tuple per array, `layers` first where layers are stacked.
    """
    model = nnx.eval_shape(lambda: _build(config, lora, stacked, jax.random.key(0)))
    _, adapter, base = _split(model)

    def named(variable: nnx.Variable) -> tuple[jax.ShapeDtypeStruct, Axes]:
        shape = variable.get_value()
        axes: Axes = variable.get_metadata()["axes"]
        return shape, ("layers",) * (len(shape.shape) - len(axes)) + axes

    def tree(state: nnx.State) -> Params:
        flat = {path: named(variable) for path, variable in nnx.to_flat_state(state)}
        return _nest(flat)

    return tree(base), tree(adapter)


def _nest(flat: dict[tuple[Any, ...], Any]) -> Params:
    nested: Params = {}
    for path, leaf in flat.items():
        node = nested
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return nested


def bind(definition: Definition, base: Params, adapter: Params | None = None) -> Transformer:
    """Module of these parameters, to be called inside traced code; costs nothing at run time."""
    states = [nnx.State(base)] if adapter is None else [nnx.State(adapter), nnx.State(base)]
    return nnx.merge(definition.graph, *states)


def unstack_layers(base: Params) -> Params:
    """Stacked layout -> one subtree a layer, for `define(..., stacked=False)`."""
    num_layers = jax.tree.leaves(base["layers"])[0].shape[0]
    layers = {i: jax.tree.map(lambda x, i=i: x[i], base["layers"]) for i in range(num_layers)}
    return {**base, "layers": layers}
