"""Shape of a decoder and of its low-rank adapters."""

import dataclasses
import math

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "gelu_tanh")
# What a damaged file may claim, before anything is made in that size.
MOST, MOST_LAYERS = 2**31 - 1, 10_000
KERNELS = ("auto", "xla", "cudnn", "splash")
DECODE_KERNELS = ("xla", "pallas")


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Positions divided by `factor` (Chen et al., arXiv 2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        """Refuse a factor that gives no positions."""
        _check_factor(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """LLaMA-3.1's scaling (arXiv 2407.21783): only slow rotations are divided by `factor`.

    A rotation is slow when `original_positions` tokens hold fewer than `low_freq_factor` of its
    turns, and fast, left as it is, from `high_freq_factor` turns on; between the two it is a
    mixture.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def __post_init__(self) -> None:
        """Refuse numbers between which nothing is slow, fast or a mixture."""
        _check_factor(self)
        low, high = self.low_freq_factor, self.high_freq_factor
        if not 0 < low < high < math.inf:
            raise ValueError(
                f"Llama3Rope: low_freq_factor={low} must be above 0 and below "
                f"high_freq_factor={high}"
            )
        if self.original_positions < 1:
            raise ValueError(
                f"Llama3Rope.original_positions={self.original_positions}: expected at least 1"
            )


def _check_factor(rope: LinearRope | Llama3Rope) -> None:
    if not 0 < rope.factor < math.inf:
        raise ValueError(f"{type(rope).__name__}.factor={rope.factor}: expected a number above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Numbers that define a decoder; one instance per preset.

    Raises:
        ValueError: heads cannot be grouped, or a size is not positive.
    """

    vocab_size: int
    embed_dim: int
    hidden_dim: int  # feed-forward width
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int  # longest context the model was trained for, tokens
    rope_theta: float  # rotary base
    norm_eps: float
    tie_embeddings: bool  # the output head is the transposed embedding
    rope_scaling: LinearRope | Llama3Rope | None = None
    sliding_window: int | None = None  # tokens a query sees, itself included; None: all
    global_layers: tuple[int, ...] = ()  # layers that see all in spite of `sliding_window`
    local_rope_theta: float | None = None  # of layers with a window; None: as in the others
    qkv_bias: bool = False  # q, k and v add a bias
    qk_norm: bool = False  # queries and keys go through an RMSNorm of each head, before rotation
    post_norms: bool = False  # attention and feed-forward are normed after, too, before they add
    norm_offset: float = 0.0  # added to the stored scale of every norm
    activation: str = "silu"  # of the feed-forward's gate, one of ACTIVATIONS
    scale_embeddings: bool = False  # multiply by sqrt(embed_dim), rounded to `dtype`
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim
    attention_softcap: float | None = None  # scores become `cap * tanh(score / cap)`
    logit_softcap: float | None = None
    family: str = "llama"  # key of `registry.FAMILIES`
    dtype: str = "float32"  # of activations and products, one of DTYPES
    param_dtype: str = "float32"  # of the stored weights
    attention_kernel: str = "auto"  # of whole sequences, one of KERNELS; auto: by the device
    decode_kernel: str = "xla"  # of one new column and a cache, one of DECODE_KERNELS
    int8_weights: bool = False  # kernels of linears are int8, with a scale for each output
    int8_cache: bool = False  # cached keys and values are int8, with a scale for each vector

    def __post_init__(self) -> None:
        """Refuse shapes that no weights can have."""
        counts = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "max_positions")
        widths = ("embed_dim", "hidden_dim", "head_dim")
        for name in counts + widths:
            value = getattr(self, name)
            most = MOST_LAYERS if name == "num_layers" else MOST
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(
                    f"ModelConfig.{name}={value!r}: expected a whole number from 1 to {most}"
                )
        scalars = ("query_pre_attn_scalar", "attention_softcap", "logit_softcap")
        for name in ("rope_theta", "norm_eps", "local_rope_theta", *scalars):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"ModelConfig.{name}={value!r}: expected a number above 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        choices = {"dtype": DTYPES, "param_dtype": DTYPES, "activation": ACTIVATIONS}
        choices |= {"attention_kernel": KERNELS, "decode_kernel": DECODE_KERNELS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"ModelConfig.{name}={getattr(self, name)!r}: expected {known}")
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig.head_dim={self.head_dim}: rotary needs an even size")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"ModelConfig.sliding_window={self.sliding_window}: expected >= 1")

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer, None where it sees everything."""
        return None if layer in self.global_layers else self.sliding_window


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., arXiv 2106.09685): `y = xW + (alpha / rank) xAB`."""

    rank: int
    alpha: float
    pattern: (
        str  # regular expression, matched in full against a linear's name: q k v o gate up down
    )

    def __post_init__(self) -> None:
        """Refuse a rank that cannot be trained."""
        if self.rank < 1:
            raise ValueError(f"LoraConfig.rank={self.rank}: expected at least 1")

    @property
    def scale(self) -> float:
        """Factor of the low-rank product."""
        return self.alpha / self.rank
