"""The one decoder: it trains, scores and samples.

`Transformer` is a Flax NNX module. Programs split it once (`define`) and from then on work on
pytrees: `apply(definition, params, ...)`. Layers are stacked and scanned (short compile, cheap
rematerialisation); for decoding `unstack_layers` lays the same parameters out one by one, where a
loop over stacked weights would copy every layer's slice at each token, and kernels as [out, in].

Axis letters as in `layers`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from refine_af.models import cache as cache_lib
from refine_af.models import context, rotary
from refine_af.models.block import Attend, Block
from refine_af.models.cache import KVCache, Prefix, Stored, Tail
from refine_af.models.config import LoraConfig, ModelConfig
from refine_af.models.context import LayerState
from refine_af.models.contraction import rows_times
from refine_af.models.kernels import num_parts
from refine_af.models.layers import LINEAR, Axes, Linear, RMSNorm, quantize
from refine_af.models.rotary import Rotary

Params = dict[str, Any]  # nested, leaves are arrays


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
        self.layout: NamedSharding | None = None  # see `Definition`
        self.embedding = nnx.Param(init(rngs.params(), table, param_dtype), axes=("vocab", "embed"))
        if stacked:
            make = nnx.vmap(lambda r: Block(config, lora=lora, rngs=r))
            self.layers: Any = make(rngs.split(config.num_layers))
        else:
            blocks = [Block(config, lora=lora, rngs=rngs) for _ in range(config.num_layers)]
            self.layers = nnx.List(blocks)
            for _, module in nnx.iter_modules(self.layers):
                if isinstance(module, Linear):
                    module.transpose()
        self.final_norm = RMSNorm(config.embed_dim, config)
        if not config.tie_embeddings:
            shape, axes = (
                (table[::-1], ("embed", "vocab")) if stacked else (table, ("vocab", "embed"))
            )
            self.head = nnx.Param(init(rngs.params(), shape, param_dtype), axes=axes)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        start: Int[Array, "B *T"],
        *,
        cache: KVCache | Tail | None = None,
        prefix: Prefix | None = None,
        offset: Int[Array, "B *T"] | None = None,
        rotaries: tuple[Rotary, Rotary] | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Final hidden states (after the last norm), for `logits` or a value head; and the cache.

        It is a `Tail` where one was given, else a `KVCache`.

        Args:
            tokens: ids; columns before a row's `start` are left padding, anything after its real
                tokens is right padding. Outputs at padding are meaningless.
            start: first column of each row's text; or of the text that each token belongs to, where
                several are packed into a row. Positions count from there.
            cache: what was computed for the columns before these; needs unstacked layers. Without
                one the columns are 0..T-1 and the returned cache holds exactly those.
            prefix: what stands before column `start` of texts that begin alike; needs unstacked
                layers.
            offset: number of prefix tokens before each text (or each token's): all of them or 0.
            rotaries: of these columns, where `rotaries_of` was called before, for several steps.
            remat: what the backward pass computes again: `none` of a layer, `full`, all of it, or
                `cheap`, all but its linear maps.
        """
        end = jnp.zeros((), jnp.int32) if cache is None else cache.end
        tail = cache if isinstance(cache, Tail) else None
        if tail is None:
            columns = (end + jnp.arange(tokens.shape[1], dtype=jnp.int32))[None]
        else:
            columns = tail.next_columns(tokens.shape[1])
        start = start.reshape(tokens.shape[0], -1)
        offset = jnp.zeros_like(start) if offset is None else offset.reshape(tokens.shape[0], -1)
        positions = _positions(columns, start, offset)
        if tail is not None:
            rotaries = tail.next_rotaries(tokens.shape[1])
        elif rotaries is None:
            rotaries = self._rotaries(positions)
        x = self._split_rows(self._embed(tokens))
        if cache is None and prefix is None and self.stacked:
            x, kept = self._scan(x, rotaries, start, remat=remat)
            layers = [jax.tree.map(lambda x, i=i: x[i], kept) for i in range(len(self.kinds))]
        else:
            assert not self.stacked, "decoding needs unstacked layers"
            before = context.SharedPrefix(positions, offset)
            if cache is None:
                attend = context.SelfAttention(
                    self.config, self.layout, start, tokens.shape[1]
                ).attend
            else:
                attend = context.CachedAttention(self.config, start, columns, cache).attend
            x, layers = self._unrolled(
                x,
                rotaries,
                context.layer_states(len(self.kinds), cache, prefix),
                lambda window, held: attend(window, held, before.seen(window, held.prefix)),
            )
        written = KVCache(tuple(layers), end + tokens.shape[1])
        return self.final_norm(x), written if tail is None else tail._replace(recent=written)

    def tail(
        self, cache: KVCache, start: Int[Array, "B"], offset: Int[Array, "B"], places: int
    ) -> Tail:
        """The same cache for a loop that writes `places` more columns of these texts."""
        recent = cache_lib.empty(self.config, len(start), places, windows=False)
        recent = recent._replace(end=cache.end)
        own = jnp.full((len(start), places), cache_lib.NO_COLUMN, jnp.int32)
        return Tail(cache, recent, self.rotaries_of(cache.end, start, offset, places), own)

    def rotaries_of(
        self, end: Int[Array, ""], start: Int[Array, "B"], offset: Int[Array, "B"], count: int
    ) -> tuple[Rotary, Rotary]:
        """Rotations of the `count` columns from `end` on, of texts as `__call__` takes them."""
        columns = (end + jnp.arange(count, dtype=jnp.int32))[None]
        return self._rotaries(_positions(columns, start[:, None], offset[:, None]))

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Start of the residual stream, float32."""
        x = rows_of(self.embedding[...], tokens).astype(jnp.float32)
        if not self.config.scale_embeddings:
            return x
        return x * jnp.asarray(self.config.embed_dim**0.5, self.config.dtype).astype(jnp.float32)

    def _split_rows(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Keep the residual stream split by rows, and columns, where the devices divide these.

        Left alone, the compiler may rather gather the batch than the weights.
        """
        if self.layout is None:
            return x
        mesh, (rows, _, columns) = self.layout.mesh, self.layout.spec
        axes = [
            PartitionSpec.UNCONSTRAINED if size % num_parts(mesh, axis) else axis
            for size, axis in zip(x.shape, (rows, columns), strict=False)
        ]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def row_parts(self, num_rows: int) -> int:
        """Parts that so many rows are split into over the devices; 1 where these do not divide."""
        if self.layout is None:
            return 1
        parts = num_parts(self.layout.mesh, self.layout.spec[0])
        return 1 if num_rows % parts else parts

    def _rotaries(self, positions: Int[Array, "B T"]) -> tuple[Rotary, Rotary]:
        """Tables of the layers that see everything, and of those with a window."""
        c = self.config
        plain = rotary.tables(
            positions, rotary.frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        )
        if c.local_rope_theta is None:
            return plain, plain
        local = rotary.frequencies(c.head_dim, c.local_rope_theta, None)
        return plain, rotary.tables(positions, local)

    @property
    def kinds(self) -> list[bool]:
        """Of each layer, whether it sees everything."""
        return [self.config.window(i) is None for i in range(self.config.num_layers)]

    def _scan(
        self, x: Array, rotaries: tuple[Rotary, Rotary], start: Array, *, remat: str
    ) -> tuple[Array, Stored]:
        definition, stacked = nnx.split(self.layers)
        kinds = self.kinds
        whole = context.SelfAttention(self.config, self.layout, start, x.shape[1])

        def layer(x: Array, scanned: tuple[nnx.State, Array]) -> tuple[Array, Stored]:
            params, flag = scanned
            is_global = kinds[0] if len(set(kinds)) == 1 else flag
            tables = context.pick(is_global, *rotaries)
            y, kept = nnx.merge(definition, params)(x, tables, whole.of_kind(is_global))
            return self._split_rows(y), kept

        keep = jax.checkpoint_policies.save_only_these_names(LINEAR) if remat == "cheap" else None
        body = layer if remat == "none" else jax.checkpoint(layer, policy=keep)
        return jax.lax.scan(body, x, (stacked, jnp.asarray(kinds)))

    def _unrolled(
        self,
        x: Array,
        rotaries: tuple[Rotary, Rotary],
        held: Sequence[LayerState],
        attend: Callable[[int | None, LayerState], Attend],
    ) -> tuple[Array, list[Stored]]:
        """Layers one by one; as functions of their own, those that are alike are traced once."""

        @functools.partial(jax.jit, static_argnums=(0, 1))
        def layer(
            definition: nnx.GraphDef,
            window: int | None,
            params: nnx.State,
            held: LayerState,
            x: Array,
        ) -> tuple[Array, Stored]:
            tables = context.pick(window is None, *rotaries)
            made: tuple[Array, Stored] = nnx.merge(definition, params)(
                x, tables, attend(window, held)
            )
            return made

        layers = []
        for i, block in enumerate(self.layers):
            definition, params = nnx.split(block)
            x, kept = layer(definition, self.config.window(i), params, held[i], x)
            layers.append(kept)
        return x, layers

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits in float32."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        axis = vocabulary_axis(self.config, stacked=self.stacked)
        return logits_of(self.config, flat, self.head_kernel, axis).reshape(*hidden.shape[:-1], -1)

    @property
    def head_kernel(self) -> Array:
        """What hidden states are multiplied with; see `vocabulary_axis` for its layout."""
        return self.embedding[...] if self.config.tie_embeddings else self.head[...]


def vocabulary_axis(config: ModelConfig, *, stacked: bool = True) -> int:
    """0 for a `head_kernel` [V, D], 1 for one [D, V]: not tied, and layers stacked."""
    return 1 if stacked and not config.tie_embeddings else 0


def logits_of(
    config: ModelConfig, hidden: Float[Array, "T D"], kernel: Float[Array, "..."], axis: int
) -> Float[Array, "T V"]:
    """Logits, float32, of the vocabulary entries that `kernel`, a part of the head's, has.

    Args:
        axis: as of `vocabulary_axis`.
    """
    logits = rows_times(hidden, kernel, 1 - axis)
    cap = config.logit_softcap
    return logits if cap is None else jnp.tanh(logits / cap) * cap


@jax.custom_vjp
def rows_of(table: Float[Array, "V D"], ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """`table[ids]`.

    In 16 bits the table is looked at as integers: XLA's CPU back end has no other 16-bit gather,
    and would convert the whole table to float32 for each call of a program (82 ms for 49,152 x 576
    on 2 cores, jax 0.10.2).
    """
    if table.dtype.itemsize != 2:
        return table[ids]
    # Tied to the ids, or the compiler would move this out of a decoding loop and make a copy.
    table, ids = jax.lax.optimization_barrier((table, ids))
    rows = jax.lax.bitcast_convert_type(table, jnp.uint16)[ids]
    return jax.lax.bitcast_convert_type(rows, table.dtype)


def _rows_forward(table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return rows_of(table, ids), (table, ids)


def _rows_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    table, ids = saved
    total = jnp.zeros(table.shape, jnp.float32).at[ids].add(g.astype(jnp.float32))
    return total.astype(table.dtype), None


rows_of.defvjp(_rows_forward, _rows_backward)


def _positions(
    columns: Int[Array, "1|B T"], start: Int[Array, "B 1|T"], offset: Int[Array, "B 1|T"]
) -> Int[Array, "B T"]:
    return jnp.maximum(columns - start + offset, 0)


@dataclasses.dataclass(frozen=True)
class Definition:
    """The static half of a split `Transformer`: hashable, to be closed over by jitted code.

    Attributes:
        layout: of queries [B, N, T, H] over the devices: mesh axes of B, N and T. The residual
            stream [B, T, D] is split along B and T alike. None: as the compiler likes.
    """

    graph: nnx.GraphDef = dataclasses.field(hash=False)  # its hash takes 2 ms, and jit asks often
    config: ModelConfig
    lora: LoraConfig | None
    layout: NamedSharding | None = None


def _build(config: ModelConfig, lora: LoraConfig | None, stacked: bool, key: Array) -> Transformer:
    base_key, lora_key = jax.random.split(key)
    return Transformer(
        config, lora=lora, stacked=stacked, rngs=nnx.Rngs(params=base_key, lora=lora_key)
    )


@functools.lru_cache(maxsize=64)
def define(
    config: ModelConfig,
    lora: LoraConfig | None = None,
    *,
    stacked: bool = True,
    layout: NamedSharding | None = None,
) -> Definition:
    """Definition of a decoder without making any array."""
    model = nnx.eval_shape(lambda: _build(config, lora, stacked, jax.random.key(0)))
    return Definition(nnx.split(model)[0], config, lora, layout)


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
    return axes_of(base), axes_of(adapter)


def axes_of(state: nnx.State) -> Params:
    """Tree as of `logical_axes`, of the abstract state of any module."""

    def named(variable: nnx.Variable) -> tuple[jax.ShapeDtypeStruct, Axes]:
        shape = variable.get_value()
        axes: Axes = variable.get_metadata()["axes"]
        return shape, ("layers",) * (len(shape.shape) - len(axes)) + axes

    return _nest({path: named(variable) for path, variable in nnx.to_flat_state(state)})


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
    model: Transformer = nnx.merge(definition.graph, *states)
    model.layout = definition.layout
    return model


def unstack_layers(base: Params) -> Params:
    """Stacked layout -> one subtree a layer, for `define(..., stacked=False)`.

    There kernels are [out, in], and a head that is not tied [V, D].
    """
    num_layers = jax.tree.leaves(base["layers"])[0].shape[0]

    def layer(index: int) -> Params:
        one = jax.tree.map(lambda x: x[index], base["layers"])
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x.T if path[-1].key == "kernel" else x, one
        )

    unstacked = {**base, "layers": {i: layer(i) for i in range(num_layers)}}
    return unstacked | {"head": base["head"].T} if "head" in base else unstacked


def int8_kernels(base: Params) -> Params:
    """For `ModelConfig.int8_weights`: stacked kernels as int8 with a factor a column."""

    def convert(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "kernel" in node:
            kernel, scale = quantize(node["kernel"])
            return {**node, "kernel": kernel, "kernel_scale": scale}
        return {key: convert(child) for key, child in node.items()}

    return convert(base)
