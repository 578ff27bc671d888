"""Shape of a decoder and of its low-rank adapters."""

import dataclasses

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Numbers that define a LLaMA-style decoder; one instance per preset.

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
    sliding_window: int | None = None  # tokens a query sees, itself included; None: all
    family: str = "llama"  # key of `registry.FAMILIES`
    dtype: str = "float32"  # of activations and products, one of DTYPES
    param_dtype: str = "float32"  # of the stored weights

    def __post_init__(self) -> None:
        """Refuse shapes that no weights can have."""
        counts = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "max_positions")
        widths = ("embed_dim", "hidden_dim", "head_dim")
        for name in counts + widths:
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name}={getattr(self, name)}: expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"ModelConfig.{name}={getattr(self, name)!r}: expected {DTYPES}")
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig.head_dim={self.head_dim}: rotary needs an even size")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"ModelConfig.sliding_window={self.sliding_window}: expected >= 1")


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
