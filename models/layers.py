"""Parts of the decoder: linear maps (with optional LoRA), RMSNorm, rotary positions, SwiGLU.

Axis letters: B batch, T query, S key, D embed, N heads, K kv heads, G = N/K, H head_dim,
F hidden, V vocab, R rank.
"""

import re

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from refine_af.models.config import LoraConfig
from refine_af.models.contraction import project

Axes = tuple[str, ...]


class Linear(nnx.Module):
    """`x @ kernel`, plus a low-rank adapter when `lora` names this linear.

    Attributes:
        kernel: [in, out], logical axes `axes`.
        lora_a: [in, R], uniform in +-1/sqrt(in) as in PEFT; only with an adapter.
        lora_b: [R, out], zero at the start: a new adapter changes nothing; only with an adapter.
    """

    def __init__(
        self,
        name: str,
        in_dim: int,
        out_dim: int,
        axes: Axes,
        *,
        lora: LoraConfig | None,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Draw a random kernel; `name` is what `LoraConfig.pattern` is matched against."""
        init = jax.nn.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (in_dim, out_dim), param_dtype), axes=axes)
        adapted = lora is not None and re.fullmatch(lora.pattern, name) is not None
        self.lora_scale = lora.scale if lora is not None and adapted else 0.0
        if lora is not None and adapted:
            bound = in_dim**-0.5
            a = jax.random.uniform(rngs.lora(), (in_dim, lora.rank), jnp.float32, -bound, bound)
            b = jnp.zeros((lora.rank, out_dim), jnp.float32)
            self.lora_a = nnx.LoRAParam(a, axes=(axes[0], "rank"))
            self.lora_b = nnx.LoRAParam(b, axes=("rank", axes[1]))
        self.adapted = adapted

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Map the last axis; the result has the dtype of `x`."""
        y = project(x, self.kernel[...])
        if not self.adapted:
            return y
        low = project(x, self.lora_a[...]) * self.lora_scale
        return y + project(low, self.lora_b[...])


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float, param_dtype: jnp.dtype, dtype: str) -> None:
        """Scale one for each of `dim` features; results have `dtype`."""
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype), axes=("norm",))
        self.eps = eps
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """`x / sqrt(mean(x^2) + eps) * scale`."""
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * inverse * scale).astype(self.dtype)


def rotary_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B 1 T H/2"], Float[Array, "B 1 T H/2"]]:
    """Cosines and sines of `position * theta^(-2i/H)` (RoFormer, arXiv 2104.09864), float32."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions.astype(jnp.float32)[:, None, :, None] * (theta**-exponents)[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B N T H"], cos: Float[Array, "B 1 T H/2"], sin: Float[Array, "B 1 T H/2"]
) -> Float[Array, "B N T H"]:
    """Rotate the pairs `(x[i], x[i + H/2])`, the order in which Hugging Face stores q and k."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202): `down(silu(gate(x)) * up(x))`."""

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        lora: LoraConfig | None,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Three linears named gate, up and down."""

        def linear(name: str, in_dim: int, out_dim: int, axes: Axes) -> Linear:
            return Linear(
                name, in_dim, out_dim, axes, lora=lora, param_dtype=param_dtype, rngs=rngs
            )

        self.gate = linear("gate", embed_dim, hidden_dim, ("embed", "hidden"))
        self.up = linear("up", embed_dim, hidden_dim, ("embed", "hidden"))
        self.down = linear("down", hidden_dim, embed_dim, ("hidden", "embed"))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every position on its own."""
        gate, up = self.gate(x).astype(jnp.float32), self.up(x).astype(jnp.float32)
        return self.down((jax.nn.silu(gate) * up).astype(x.dtype))
