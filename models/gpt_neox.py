"""GPT-NeoX with a scalar head: OpenAssistant's Pythia reward model.

GPT-NeoX-20B (arXiv 2204.06745), Pythia (arXiv 2304.01373), OpenAssistant (arXiv 2304.07327). The
score of a text is `out_proj` of the final hidden state at its last token.

Axis letters as in `layers`.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from refine_af.models import attention, hf_config, layers, rotary, transformer
from refine_af.models.config import DTYPES
from refine_af.models.family import Keys
from refine_af.models.hf import TableWeights
from refine_af.models.hf_config import Raw
from refine_af.models.layers import Axes, Linear, along_last
from refine_af.models.rotary import Rotary
from refine_af.models.tensor_files import open_any
from refine_af.models.transformer import Params, rows_of
from refine_af.models.weights import shapes_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig:
    """Numbers that define a GPT-NeoX reward model.

    Raises:
        ValueError: heads do not divide the width, or a size is not positive.
    """

    vocab_size: int
    embed_dim: int
    hidden_dim: int  # feed-forward width
    num_layers: int
    num_heads: int
    max_positions: int  # longest context the model was trained for, tokens
    rotary_dim: int  # first entries of each head that are rotated
    rope_theta: float = 10_000.0  # rotary base
    norm_eps: float = 1e-5
    parallel_residual: bool = True  # attention and feed-forward read the same stream
    dtype: str = "float32"  # of activations and products, one of DTYPES
    param_dtype: str = "float32"  # of the weights in memory

    def __post_init__(self) -> None:
        """Refuse shapes that no weights can have."""
        for name in ("vocab_size", "embed_dim", "hidden_dim", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTNeoXConfig.{name}={getattr(self, name)}: expected at least 1")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"GPTNeoXConfig: embed_dim={self.embed_dim} must be a multiple of "
                f"num_heads={self.num_heads}"
            )
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"GPTNeoXConfig.rotary_dim={self.rotary_dim}: expected an even number from 2 to "
                f"the head's {self.head_dim}"
            )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"GPTNeoXConfig.{name}={getattr(self, name)!r}: expected {DTYPES}")

    @property
    def head_dim(self) -> int:
        """Entries of a head."""
        return self.embed_dim // self.num_heads


PRESETS: dict[str, GPTNeoXConfig] = {
    # https://huggingface.co/OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5
    "oasst-rm-2.1-pythia-1.4b": GPTNeoXConfig(
        vocab_size=50_288,
        embed_dim=2048,
        hidden_dim=8192,
        num_layers=24,
        num_heads=16,
        max_positions=2048,
        rotary_dim=32,
    ),
}

_LAYER = "gpt_neox.layers.{}"
KEYS: Keys = {
    "embedding": ("gpt_neox.embed_in.weight", False),
    **{
        f"layers/{ours}/{leaf}": (f"{_LAYER}.{theirs}.{their_leaf}", leaf == "kernel")
        for ours, theirs, kind in (
            ("attention_norm", "input_layernorm", "scale"),
            ("feed_forward_norm", "post_attention_layernorm", "scale"),
            ("qkv", "attention.query_key_value", "kernel"),
            ("o", "attention.dense", "kernel"),
            ("up", "mlp.dense_h_to_4h", "kernel"),
            ("down", "mlp.dense_4h_to_h", "kernel"),
        )
        for leaf, their_leaf in ((kind, "weight"), ("bias", "bias"))
    },
    "final_norm/scale": ("gpt_neox.final_layer_norm.weight", False),
    "final_norm/bias": ("gpt_neox.final_layer_norm.bias", False),
    "out_proj/kernel": ("out_proj.weight", True),
    "out_proj/bias": ("out_proj.bias", False),
}
# Left out on purpose: buffers of older releases, the causal mask and the rotary table.
DROPPED = (r".*\.attention\.(bias|masked_bias)", r".*rotary_emb\.inv_freq")


def from_hf_config(
    raw: Raw,
    where: str = "config.json",
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> GPTNeoXConfig:
    """Our config of a config.json's content.

    Raises:
        ValueError: the architecture, or an option that would change the numbers, is not supported.
    """
    kinds = ("gpt_neox", "gpt_neox_reward_model")
    if raw.get("model_type") not in kinds:
        raise ValueError(f"{where}: model_type={raw.get('model_type')!r}: expected one of {kinds}")
    hf_config.only(raw, {"hidden_act": "gelu", "attention_bias": True, "pooling": "last"}, where)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{where}: rope_parameters={rope!r}: expected an object")
    hf_config.only(rope, {"rope_type": "default", "type": "default"}, f"{where}: rope_parameters")
    rope = {"rope_theta": raw.get("rotary_emb_base"), "rotary_pct": raw.get("rotary_pct")} | rope
    rope.setdefault("partial_rotary_factor", rope["rotary_pct"])
    count = functools.partial(hf_config.count, raw, where=where)
    sizes = {
        "vocab_size": count("vocab_size"),
        "embed_dim": count("hidden_size"),
        "hidden_dim": count("intermediate_size"),
        "num_layers": count("num_hidden_layers"),
        "num_heads": count("num_attention_heads"),
        "max_positions": count("max_position_embeddings"),
    }
    part = hf_config.number(rope, "partial_rotary_factor", where, 0.25)
    theta = hf_config.number(rope, "rope_theta", where, 10_000.0)
    norm_eps = hf_config.number(raw, "layer_norm_eps", where, 1e-5)
    parallel = raw.get("use_parallel_residual", True)
    if not isinstance(parallel, bool):
        raise ValueError(f"{where}: use_parallel_residual={parallel!r}: expected true or false")
    try:
        return GPTNeoXConfig(
            **sizes,
            rotary_dim=int(sizes["embed_dim"] // sizes["num_heads"] * part),
            rope_theta=theta,
            norm_eps=norm_eps,
            parallel_residual=parallel,
            dtype=dtype,
            param_dtype=param_dtype,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


class LayerNorm(nnx.Module):
    """Layer norm (arXiv 1607.06450) with a bias, computed in float32."""

    def __init__(self, config: GPTNeoXConfig, dtype: str) -> None:
        """Scale one and bias zero; results have `dtype`."""
        self.scale = nnx.Param(jnp.ones((config.embed_dim,), config.param_dtype), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((config.embed_dim,), config.param_dtype), axes=("norm",))
        self.eps = config.norm_eps
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """`(x - mean) / sqrt(variance + eps) * scale + bias`."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        scale, bias = (along_last(p[...], x.ndim) for p in (self.scale, self.bias))
        return (x * inverse * scale + bias).astype(self.dtype)


class Block(nnx.Module):
    """One layer; the residual stream is float32.

    Attributes:
        qkv: kernel [D, N*3*H]: query, key and value of a head stand side by side.
    """

    def __init__(self, config: GPTNeoXConfig, *, rngs: nnx.Rngs) -> None:
        """Random weights."""
        param_dtype = jnp.dtype(config.param_dtype)

        def linear(name: str, in_dim: int, out_dim: int, axes: Axes) -> Linear:
            return Linear(
                name,
                in_dim,
                out_dim,
                axes,
                bias=True,
                lora=None,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        embed, hidden = config.embed_dim, config.hidden_dim
        self.attention_norm = LayerNorm(config, config.dtype)
        self.qkv = linear("qkv", embed, 3 * embed, ("embed", "heads"))
        self.o = linear("o", embed, embed, ("heads", "embed"))
        self.feed_forward_norm = LayerNorm(config, config.dtype)
        self.up = linear("up", embed, hidden, ("embed", "hidden"))
        self.down = linear("down", hidden, embed, ("hidden", "embed"))
        self.config = config

    def __call__(
        self, x: Float[Array, "B T D"], turns: Rotary, mask: Bool[Array, "1 T T"]
    ) -> Float[Array, "B T D"]:
        """Attention and feed-forward, of the same stream or one after the other."""
        mixed = self._attend(self.attention_norm(x), turns, mask).astype(x.dtype)
        if not self.config.parallel_residual:
            x, mixed = x + mixed, jnp.zeros_like(mixed)
        hidden = self.up(self.feed_forward_norm(x))
        activated = jax.nn.gelu(hidden.astype(jnp.float32), approximate=False)
        return x + mixed + self.down(activated.astype(hidden.dtype)).astype(x.dtype)

    def _attend(self, x: Array, turns: Rotary, mask: Array) -> Array:
        b, t, d = x.shape
        heads = self.qkv(x).reshape(b, t, self.config.num_heads, 3, self.config.head_dim)
        query, keys, values = jnp.moveaxis(heads.transpose(0, 2, 1, 3, 4), 3, 0)
        mixed = attention.attend_whole(
            self._rotate(query, turns),
            self._rotate(keys, turns),
            values,
            mask,
            scale=self.config.head_dim**-0.5,
        )
        return self.o(mixed.transpose(0, 2, 1, 3).reshape(b, t, d))

    def _rotate(self, x: Float[Array, "B N T H"], turns: Rotary) -> Float[Array, "B N T H"]:
        n = self.config.rotary_dim
        return jnp.concatenate([rotary.rotate(x[..., :n], turns), x[..., n:]], axis=-1)


class GPTNeoX(nnx.Module):
    """The reward model; layers are stacked."""

    def __init__(self, config: GPTNeoXConfig, *, rngs: nnx.Rngs) -> None:
        """Random weights."""
        init = jax.nn.initializers.normal(0.02)
        param_dtype = jnp.dtype(config.param_dtype)
        table = init(rngs.params(), (config.vocab_size, config.embed_dim), param_dtype)
        self.config = config
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))
        self.layers = layers.stack(lambda r: Block(config, rngs=r), config.num_layers, rngs)
        self.final_norm = LayerNorm(config, "float32")
        self.out_proj = Linear(
            "out_proj",
            config.embed_dim,
            1,
            ("embed", "score"),
            bias=True,
            lora=None,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Final hidden states (after the last norm), float32; padding stands on the right."""
        length = tokens.shape[1]
        columns = jnp.arange(length, dtype=jnp.int32)
        radians = rotary.frequencies(self.config.rotary_dim, self.config.rope_theta, None)
        turns = rotary.tables(columns[None], radians)
        start = jnp.zeros((1, 1), jnp.int32)
        mask = attention.visible(start, columns, columns, None)
        x = rows_of(self.embedding[...], tokens).astype(jnp.float32)
        return self.final_norm(layers.scan(self.layers, lambda m, x: m(x, turns, mask), x))

    def reward(self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B"]:
        """Score of each row, float32."""
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        hidden = jnp.take_along_axis(self(tokens), last, axis=1)
        return self.out_proj(hidden)[:, 0, 0]


@functools.lru_cache(maxsize=8)
def _abstract(config: GPTNeoXConfig) -> tuple[nnx.GraphDef, nnx.State]:
    graph, state = nnx.split(nnx.eval_shape(lambda: GPTNeoX(config, rngs=nnx.Rngs(0))))
    return graph, state


def logical_axes(config: GPTNeoXConfig) -> Params:
    """Tree of (shape and dtype, logical axes) of every array; makes none."""
    return transformer.axes_of(_abstract(config)[1])


def open_weights(directory: Path, config: GPTNeoXConfig) -> TableWeights:
    """Weights of a Hugging Face directory, in safetensors or torch files.

    Raises:
        ValueError: a file cannot be read, or tensors do not fit the config.
    """
    shapes = shapes_of(logical_axes(config))
    return TableWeights(open_any(directory), KEYS, shapes, dropped=DROPPED, where=str(directory))


def bind(config: GPTNeoXConfig, params: Params) -> GPTNeoX:
    """Module of these parameters, to be called inside traced code; costs nothing at run time."""
    return nnx.merge(_abstract(config)[0], nnx.State(params))


@functools.partial(jax.jit, static_argnums=0)
def rewards(
    config: GPTNeoXConfig, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> Float[Array, "B"]:
    """Score of each text.

    Args:
        tokens: ids, padded on the right with anything.
        lengths: tokens of each text, at least 1.

    Returns:
        float32, in the reward model's own unit.
    """
    return bind(config, params).reward(tokens, lengths)
