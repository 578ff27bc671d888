"""T5 v1.1 as a yes/no judge: UniEval-dialog.

T5 (arXiv 1910.10683), gated units (arXiv 2002.05202), UniEval (arXiv 2210.07197). The encoder reads
a question; the answer is read off the decoder's first position, whose only input is the start
token. With a single position the decoder needs less than it has: self-attention over one position
is its value, whatever queries, keys and position biases are, so these are not loaded.

Axis letters as in `layers`.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from refine_af.models import attention, hf_config, layers, transformer
from refine_af.models.config import DTYPES
from refine_af.models.contraction import contract, rows_times
from refine_af.models.family import Keys
from refine_af.models.hf import TableWeights
from refine_af.models.hf_config import Raw
from refine_af.models.layers import Axes, FeedForward, Linear, RMSNorm
from refine_af.models.tensor_files import open_any
from refine_af.models.transformer import Params, rows_of
from refine_af.models.weights import shapes_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Numbers that define a T5 v1.1.

    Raises:
        ValueError: a size is not positive, or buckets cannot be halved twice.
    """

    vocab_size: int
    embed_dim: int
    hidden_dim: int  # feed-forward width
    num_layers: int  # of the encoder
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    tie_embeddings: bool  # the head is the embedding, and hidden states are scaled down before it
    num_buckets: int = 32  # of relative positions, a half for each direction
    max_distance: int = 128  # tokens from which on all distances share a bucket
    norm_eps: float = 1e-6
    start_id: int = 0  # input of the decoder's first position
    activation: str = "gelu_tanh"  # of the feed-forward's gate
    dtype: str = "float32"  # of activations and products, one of DTYPES
    param_dtype: str = "float32"  # of the weights in memory

    def __post_init__(self) -> None:
        """Refuse shapes that no weights can have."""
        sizes = ("vocab_size", "num_layers", "num_decoder_layers", "num_heads")
        for name in (*sizes, "embed_dim", "hidden_dim", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"T5Config.{name}={getattr(self, name)}: expected at least 1")
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise ValueError(f"T5Config.num_buckets={self.num_buckets}: expected a multiple of 4")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"T5Config.max_distance={self.max_distance}: expected more than a quarter of "
                f"num_buckets={self.num_buckets}"
            )
        if not 0 <= self.start_id < self.vocab_size:
            raise ValueError(f"T5Config.start_id={self.start_id}: expected an id of the vocabulary")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"T5Config.{name}={getattr(self, name)!r}: expected {DTYPES}")

    @property
    def norm_offset(self) -> float:
        """Norm scales are stored as they are."""
        return 0.0

    @property
    def int8_weights(self) -> bool:
        """Never."""
        return False


PRESETS: dict[str, T5Config] = {
    # https://huggingface.co/google/t5-v1_1-large, on which UniEval-dialog is built
    "t5-v1.1-large": T5Config(
        vocab_size=32_128,
        embed_dim=1024,
        hidden_dim=2816,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=16,
        head_dim=64,
        tie_embeddings=False,
    ),
}


def _layer_keys(ours: str, theirs: str, norms: dict[str, str], linears: dict[str, str]) -> Keys:
    scales = {f"{ours}/{path}/scale": (f"{theirs}.{k}.weight", False) for path, k in norms.items()}
    linears = {f"{path}/kernel": key for path, key in linears.items()}
    return scales | {
        f"{ours}/{path}": (f"{theirs}.{k}.weight", True) for path, k in linears.items()
    }


KEYS: Keys = {
    "embedding": ("shared.weight", False),
    "encoder_bias": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", False),
    "encoder_norm/scale": ("encoder.final_layer_norm.weight", False),
    "decoder_norm/scale": ("decoder.final_layer_norm.weight", False),
    "head": ("lm_head.weight", True),
    **_layer_keys(
        "encoder",
        "encoder.block.{}",
        {"attention_norm": "layer.0.layer_norm", "feed_forward_norm": "layer.1.layer_norm"},
        {
            **{name: f"layer.0.SelfAttention.{name}" for name in "qkvo"},
            "feed_forward/gate": "layer.1.DenseReluDense.wi_0",
            "feed_forward/up": "layer.1.DenseReluDense.wi_1",
            "feed_forward/down": "layer.1.DenseReluDense.wo",
        },
    ),
    **_layer_keys(
        "decoder",
        "decoder.block.{}",
        {
            "self_norm": "layer.0.layer_norm",
            "cross_norm": "layer.1.layer_norm",
            "feed_forward_norm": "layer.2.layer_norm",
        },
        {
            "self_v": "layer.0.SelfAttention.v",
            "self_o": "layer.0.SelfAttention.o",
            **{name: f"layer.1.EncDecAttention.{name}" for name in "qkvo"},
            "feed_forward/gate": "layer.2.DenseReluDense.wi_0",
            "feed_forward/up": "layer.2.DenseReluDense.wi_1",
            "feed_forward/down": "layer.2.DenseReluDense.wo",
        },
    ),
}
# Left out on purpose: copies of the embedding, what a single decoder position does not need, and
# a table that the conversion from TensorFlow left in some files and that nothing reads.
DROPPED = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"decoder\.block\.\d+\.layer\.0\.SelfAttention\.[qk]\.weight",
    r"decoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
# Also when the config ties the head: transformers before 5 saved it as a copy of the embedding.
DROPPED_TIED = (r"lm_head\.weight",)


def from_hf_config(
    raw: Raw,
    where: str = "config.json",
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> T5Config:
    """Our config of a config.json's content.

    `tie_word_embeddings` says whether the head is the embedding; transformers 5 writes it as true
    always and what it meant as `scale_decoder_outputs`.

    Raises:
        ValueError: the architecture, or an option that would change the numbers, is not supported.
    """
    if raw.get("model_type") != "t5":
        raise ValueError(f"{where}: model_type={raw.get('model_type')!r}: expected 't5'")
    if raw.get("feed_forward_proj") != "gated-gelu":
        raise ValueError(
            f"{where}: feed_forward_proj={raw.get('feed_forward_proj')!r}: expected 'gated-gelu', "
            "T5 v1.1's"
        )
    hf_config.only(raw, {"is_encoder_decoder": True}, where)
    tied = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True))
    if not isinstance(tied, bool):
        raise ValueError(f"{where}: tie_word_embeddings={tied!r}: expected true or false")
    start = raw.get("decoder_start_token_id")
    start = raw.get("pad_token_id", 0) if start is None else start
    if type(start) is not int:
        raise ValueError(f"{where}: decoder_start_token_id={start!r}: expected a token's id")
    count = functools.partial(hf_config.count, raw, where=where)
    num_layers = count("num_layers")
    sizes: dict[str, Any] = {
        "vocab_size": count("vocab_size"),
        "embed_dim": count("d_model"),
        "hidden_dim": count("d_ff"),
        "num_layers": num_layers,
        "num_decoder_layers": count("num_decoder_layers", default=num_layers),
        "num_heads": count("num_heads"),
        "head_dim": count("d_kv"),
        "num_buckets": count("relative_attention_num_buckets", default=32),
        "max_distance": count("relative_attention_max_distance", default=128),
    }
    norm_eps = hf_config.number(raw, "layer_norm_epsilon", where, 1e-6)
    try:
        return T5Config(
            **sizes,
            tie_embeddings=tied,
            norm_eps=norm_eps,
            start_id=start,
            dtype=dtype,
            param_dtype=param_dtype,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def buckets(distances: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each relative position, in both directions.

    Half of the buckets are for keys after the query. In each half, the first half is one bucket a
    distance; the others grow as the logarithm up to `max_distance`. float32 as in transformers: a
    distance on an edge depends on its rounding.

    Args:
        distances: int, position of the key less that of the query.
    """
    half = num_buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distances), 1).astype(np.float32)
    logarithm = np.log(far / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    grown = exact + (logarithm * np.float32(half - exact)).astype(np.int32)
    near = np.abs(distances) < exact
    bucket = np.where(near, np.abs(distances), np.minimum(grown, half - 1))
    return (bucket + np.where(distances > 0, half, 0)).astype(np.int32)


def _linear(config: T5Config, rngs: nnx.Rngs, name: str, axes: Axes) -> Linear:
    sizes = {"embed": config.embed_dim, "heads": config.num_heads * config.head_dim}
    in_dim, out_dim = (sizes[axis] for axis in axes)
    param_dtype = jnp.dtype(config.param_dtype)
    return Linear(name, in_dim, out_dim, axes, lora=None, param_dtype=param_dtype, rngs=rngs)


class EncoderBlock(nnx.Module):
    """Self-attention with relative positions, then the gated unit; the stream is float32."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        """Random weights."""
        self.config = config
        self.attention_norm = RMSNorm(config.embed_dim, config)
        self.q, self.k, self.v = (_linear(config, rngs, name, ("embed", "heads")) for name in "qkv")
        self.o = _linear(config, rngs, "o", ("heads", "embed"))
        self.feed_forward_norm = RMSNorm(config.embed_dim, config)
        self.feed_forward = FeedForward(config, lora=None, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B 1 T"], bias: Float[Array, "N T T"]
    ) -> Float[Array, "B T D"]:
        """Scores are not divided by anything: the initialisation of T5 makes up for it."""
        normed = self.attention_norm(x)
        query, keys, values = (self._heads(linear(normed)) for linear in (self.q, self.k, self.v))
        mixed = attention.attend_whole(query, keys, values, mask, scale=1.0, bias=bias)
        b, n, t, h = mixed.shape
        x = x + self.o(mixed.transpose(0, 2, 1, 3).reshape(b, t, n * h)).astype(x.dtype)
        return x + self.feed_forward(self.feed_forward_norm(x)).astype(x.dtype)

    def _heads(self, x: Float[Array, "B T NH"]) -> Float[Array, "B N T H"]:
        b, t, _ = x.shape
        return x.reshape(b, t, self.config.num_heads, -1).transpose(0, 2, 1, 3)


class DecoderBlock(nnx.Module):
    """One position: its own value, what it reads of the encoder, then the gated unit."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        """Random weights."""
        self.config = config
        self.self_norm = RMSNorm(config.embed_dim, config)
        self.self_v = _linear(config, rngs, "self_v", ("embed", "heads"))
        self.self_o = _linear(config, rngs, "self_o", ("heads", "embed"))
        self.cross_norm = RMSNorm(config.embed_dim, config)
        self.q, self.k, self.v = (_linear(config, rngs, name, ("embed", "heads")) for name in "qkv")
        self.o = _linear(config, rngs, "o", ("heads", "embed"))
        self.feed_forward_norm = RMSNorm(config.embed_dim, config)
        self.feed_forward = FeedForward(config, lora=None, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B D"], encoded: Float[Array, "B S D"], mask: Bool[Array, "B S"]
    ) -> Float[Array, "B D"]:
        """The same position after this layer."""
        x = x + self.self_o(self.self_v(self.self_norm(x))).astype(x.dtype)
        x = x + self._read(self.cross_norm(x), encoded, mask).astype(x.dtype)
        return x + self.feed_forward(self.feed_forward_norm(x)).astype(x.dtype)

    def _read(self, x: Array, encoded: Array, mask: Array) -> Array:
        """Cross-attention.

        `q . (W_k e) = (W_k^T q) . e`, and likewise for values: of a single query it is cheaper to
        go to the encoder's space than to project all of its states.
        """
        dtype, heads = x.dtype, (self.config.embed_dim, self.config.num_heads, -1)
        keys, values = (w.kernel[...].astype(dtype).reshape(heads) for w in (self.k, self.v))
        query = self.q(x).reshape(x.shape[0], self.config.num_heads, -1)
        query = contract("bnh,dnh->bnd", query, keys).astype(dtype)
        scores = contract("bnd,bsd->bns", query, encoded)
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        mixed = contract("bns,bsd->bnd", weights, encoded).astype(dtype)
        mixed = contract("bnd,dnh->bnh", mixed, values).astype(dtype)
        return self.o(mixed.reshape(x.shape[0], -1))


class T5(nnx.Module):
    """Encoder and the first decoder position; layers are stacked.

    Attributes:
        encoder_bias: [buckets, N], added to the scores of all encoder layers.
        head: [D, V], unless the embedding is the head.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        """Random weights."""
        init = jax.nn.initializers.normal(0.02)
        param_dtype = jnp.dtype(config.param_dtype)
        table = (config.vocab_size, config.embed_dim)
        bias = (config.num_buckets, config.num_heads)
        self.config = config
        self.embedding = nnx.Param(init(rngs.params(), table, param_dtype), axes=("vocab", "embed"))
        self.encoder_bias = nnx.Param(
            init(rngs.params(), bias, param_dtype), axes=("buckets", "bucket_heads")
        )
        self.encoder = layers.stack(lambda r: EncoderBlock(config, rngs=r), config.num_layers, rngs)
        self.encoder_norm = RMSNorm(config.embed_dim, config)
        self.decoder = layers.stack(
            lambda r: DecoderBlock(config, rngs=r), config.num_decoder_layers, rngs
        )
        self.decoder_norm = RMSNorm(config.embed_dim, config)
        if not config.tie_embeddings:
            self.head = nnx.Param(
                init(rngs.params(), table[::-1], param_dtype), axes=("embed", "vocab")
            )

    def encode(self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B T D"]:
        """Encoder states; those at padding, on the right, are meaningless."""
        mask = _inside(tokens, lengths)[:, None]
        bias = self._bias(tokens.shape[1])
        x = rows_of(self.embedding[...], tokens).astype(jnp.float32)
        return self.encoder_norm(layers.scan(self.encoder, lambda m, x: m(x, mask, bias), x))

    def _bias(self, length: int) -> Float[Array, "N T T"]:
        distances = np.arange(1 - length, length)
        bucket = buckets(distances, self.config.num_buckets, self.config.max_distance)
        of_distance = self.encoder_bias[...].astype(jnp.float32).T[:, bucket]
        columns = jnp.arange(length, dtype=jnp.int32)
        return of_distance[:, columns[None] - columns[:, None] + length - 1]

    def first_logits(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
    ) -> Float[Array, "B V"]:
        """Logits of the decoder's first position, float32."""
        encoded, mask = self.encode(tokens, lengths), _inside(tokens, lengths)
        start = jnp.full(tokens.shape[:1], self.config.start_id, jnp.int32)
        x = rows_of(self.embedding[...], start).astype(jnp.float32)
        x = self.decoder_norm(layers.scan(self.decoder, lambda m, x: m(x, encoded, mask), x))
        if not self.config.tie_embeddings:
            return rows_times(x, self.head[...])
        return rows_times(x, self.embedding[...], axis=1) * self.config.embed_dim**-0.5


def _inside(tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Bool[Array, "B T"]:
    return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]


@functools.lru_cache(maxsize=8)
def _abstract(config: T5Config) -> tuple[nnx.GraphDef, nnx.State]:
    graph, state = nnx.split(nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0))))
    return graph, state


def logical_axes(config: T5Config) -> Params:
    """Tree of (shape and dtype, logical axes) of every array; makes none."""
    return transformer.axes_of(_abstract(config)[1])


def open_weights(directory: Path, config: T5Config) -> TableWeights:
    """Weights of a Hugging Face directory, in safetensors or torch files.

    Raises:
        ValueError: a file cannot be read, or tensors do not fit the config.
    """
    shapes = shapes_of(logical_axes(config))
    dropped = DROPPED + (DROPPED_TIED if config.tie_embeddings else ())
    return TableWeights(open_any(directory), KEYS, shapes, dropped=dropped, where=str(directory))


def bind(config: T5Config, params: Params) -> T5:
    """Module of these parameters, to be called inside traced code; costs nothing at run time."""
    return nnx.merge(_abstract(config)[0], nnx.State(params))


@functools.partial(jax.jit, static_argnums=0)
def yes_probability(
    config: T5Config,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    yes_id: int | Int[Array, ""],
    no_id: int | Int[Array, ""],
) -> Float[Array, "B"]:
    """`P(Yes) / (P(Yes) + P(No))` of each question.

    Args:
        tokens: ids, padded on the right with anything; the end token belongs to the text.
        lengths: tokens of each question, at least 1.
        yes_id: token of one answer. no_id: token of the other.

    Returns:
        float32, in [0, 1].
    """
    logits = bind(config, params).first_logits(tokens, lengths)
    return jax.nn.sigmoid(logits[:, yes_id] - logits[:, no_id])
