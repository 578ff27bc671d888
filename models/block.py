"""One layer of the decoder. Axis letters as in `layers`."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from refine_af.models import rotary as rotary_lib
from refine_af.models.cache import Stored
from refine_af.models.config import LoraConfig, ModelConfig
from refine_af.models.layers import Axes, FeedForward, Linear, RMSNorm
from refine_af.models.rotary import Rotary

# (queries, keys and values) of the new columns -> (what they see, what a cache keeps). It knows
# masks and caches; a layer does not.
Attend = Callable[[Float[Array, "B N T H"], Stored], tuple[Float[Array, "B N T H"], Stored]]


class Attention(nnx.Module):
    """Rotary grouped-query self-attention."""

    def __init__(self, config: ModelConfig, *, lora: LoraConfig | None, rngs: nnx.Rngs) -> None:
        """Four linears named q, k, v and o."""
        param_dtype = jnp.dtype(config.param_dtype)

        def linear(name: str, in_dim: int, out_dim: int, axes: Axes, bias: bool) -> Linear:
            return Linear(
                name,
                in_dim,
                out_dim,
                axes,
                bias=bias,
                int8=config.int8_weights,
                lora=lora,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        embed_dim, bias = config.embed_dim, config.qkv_bias
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        self.q = linear("q", embed_dim, queries, ("embed", "heads"), bias)
        self.k = linear("k", embed_dim, keys, ("embed", "kv_heads"), bias)
        self.v = linear("v", embed_dim, keys, ("embed", "kv_heads"), bias)
        self.o = linear("o", queries, embed_dim, ("heads", "embed"), bias=False)
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config)
            self.k_norm = RMSNorm(config.head_dim, config)

    def __call__(
        self, x: Float[Array, "B T D"], rotary: Rotary, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Stored]:
        """Project, rotate, attend, project back."""
        query, keys, values = (self._heads(linear(x)) for linear in (self.q, self.k, self.v))
        if self.qk_norm:
            query, keys = self.q_norm(query), self.k_norm(keys)
        query, keys = rotary_lib.rotate(query, rotary), rotary_lib.rotate(keys, rotary)
        mixed, kept = attend(query, Stored(keys, values))
        b, n, t, h = mixed.shape
        return self.o(mixed.transpose(0, 2, 1, 3).reshape(b, t, n * h)), kept

    def _heads(self, x: Float[Array, "B T NH"]) -> Float[Array, "B N T H"]:
        b, t, _ = x.shape
        return x.reshape(b, t, -1, self.head_dim).transpose(0, 2, 1, 3)


class Block(nnx.Module):
    """Pre-norm residual block: attention, then feed-forward; the residual stream is float32."""

    def __init__(self, config: ModelConfig, *, lora: LoraConfig | None, rngs: nnx.Rngs) -> None:
        """Random weights of one layer."""
        self.attention_norm = RMSNorm(config.embed_dim, config)
        self.attention = Attention(config, lora=lora, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.embed_dim, config)
        self.feed_forward = FeedForward(config, lora=lora, rngs=rngs)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.attention_post_norm = RMSNorm(config.embed_dim, config)
            self.feed_forward_post_norm = RMSNorm(config.embed_dim, config)

    def __call__(
        self, x: Float[Array, "B T D"], rotary: Rotary, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Stored]:
        """One layer; returns also the keys and values that a cache keeps."""
        mixed, kept = self.attention(self.attention_norm(x), rotary, attend)
        if self.post_norms:
            mixed = self.attention_post_norm(mixed)
        x = x + mixed.astype(x.dtype)
        fed = self.feed_forward(self.feed_forward_norm(x))
        if self.post_norms:
            fed = self.feed_forward_post_norm(fed)
        return x + fed.astype(x.dtype), kept
