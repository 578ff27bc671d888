"""Parts of the decoder: linear maps (with optional LoRA), RMSNorm, gated feed-forward.

Axis letters: B batch, T query, S key, D embed, N heads, K kv heads, G = N/K, H head_dim,
F hidden, V vocab, R rank.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int8

from refine_af.models.config import LoraConfig
from refine_af.models.contraction import project

Axes = tuple[str, ...]
LINEAR = "linear"  # name that a remat policy knows the results of linear maps by


class Linear(nnx.Module):
    """`x @ kernel` (`.T` if transposed), a bias, a low-rank adapter when `lora` names this linear.

    Attributes:
        kernel: [in, out], logical axes `axes`; int8 with `int8`. [out, in] once `transpose`d.
        kernel_scale: [out], float32, factor of each column of an int8 kernel.
        bias: [out]; only where asked for.
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
        bias: bool = False,
        int8: bool = False,
        lora: LoraConfig | None,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Draw a random kernel; `name` is what `LoraConfig.pattern` is matched against."""
        init = jax.nn.initializers.normal(0.02)
        kernel = init(rngs.params(), (in_dim, out_dim), param_dtype)
        self.int8 = int8
        if int8:
            kernel, scale = quantize(kernel)
            self.kernel_scale = nnx.Param(scale, axes=axes[1:])
        self.kernel = nnx.Param(kernel, axes=axes)
        self.biased = bias
        if bias:
            self.bias = nnx.Param(jnp.zeros((out_dim,), param_dtype), axes=axes[1:])
        adapted = lora is not None and re.fullmatch(lora.pattern, name) is not None
        self.lora_scale = lora.scale if lora is not None and adapted else 0.0
        if lora is not None and adapted:
            bound = in_dim**-0.5
            a = jax.random.uniform(rngs.lora(), (in_dim, lora.rank), jnp.float32, -bound, bound)
            b = jnp.zeros((lora.rank, out_dim), jnp.float32)
            self.lora_a = nnx.LoRAParam(a, axes=(axes[0], "rank"))
            self.lora_b = nnx.LoRAParam(b, axes=("rank", axes[1]))
        self.adapted = adapted
        self.in_axis = 0

    def transpose(self) -> None:
        """Keep the kernel as [out, in] from now on: decoding is faster so (`rows_times`)."""
        axes = self.kernel.get_metadata()["axes"]
        self.kernel = nnx.Param(self.kernel[...].T, axes=axes[::-1])
        self.in_axis = 1 - self.in_axis

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Map the last axis; the result has the dtype of `x`."""
        scale = self.kernel_scale[...] if self.int8 else None
        y = project(x, self.kernel[...], scale, self.in_axis)
        if self.biased:
            y = (y + along_last(self.bias[...], y.ndim)).astype(x.dtype)
        if self.adapted:
            low = project(x, self.lora_a[...]) * self.lora_scale
            y = y + project(_named(low), self.lora_b[...])
        return _named(y)


@jax.custom_vjp
def _named(y: Array) -> Array:
    """`y`, known to remat policies as `LINEAR`.

    What is kept of a bfloat16 array are its bits as integers: XLA for CPUs would convert the stack
    of all layers' results to float32 and back whenever one is written to it.
    """
    return y


def _named_forward(y: Array) -> tuple[Array, None]:
    if y.dtype != jnp.bfloat16:
        return checkpoint_name(y, LINEAR), None
    bits = checkpoint_name(jax.lax.bitcast_convert_type(y, jnp.uint16), LINEAR)
    return jax.lax.bitcast_convert_type(bits, y.dtype), None


_named.defvjp(_named_forward, lambda _, g: (g,))


def quantize(
    kernel: Float[Array, "*L in out"],
) -> tuple[Int8[Array, "*L in out"], Float[Array, "*L out"]]:
    """int8 kernel and the factor of each column: its largest entry over 127."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=-2) / 127.0, 1e-30)
    return jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), scale


def along_last(vector: Float[Array, "D"], ndim: int) -> Float[Array, "... D"]:
    """`vector` in float32 with `ndim` axes, the last one its own."""
    return vector.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


class NormConfig(Protocol):
    """What `RMSNorm` reads of a model's config; see `ModelConfig`."""

    @property
    def norm_eps(self) -> float: ...  # noqa: D102
    @property
    def norm_offset(self) -> float: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def param_dtype(self) -> str: ...  # noqa: D102


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, config: NormConfig) -> None:
        """Factor one for each of `dim` features; results have the model's dtype."""
        initial = jnp.full((dim,), 1.0 - config.norm_offset, config.param_dtype)
        self.scale = nnx.Param(initial, axes=("norm",))
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        self.dtype = jnp.dtype(config.dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """`x / sqrt(mean(x^2) + eps) * (scale + offset)`."""
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        factor = along_last(self.scale[...], x.ndim) + self.offset
        return (x32 * inverse * factor).astype(self.dtype)


class FeedForwardConfig(Protocol):
    """What `FeedForward` reads of a model's config; see `ModelConfig`."""

    @property
    def embed_dim(self) -> int: ...  # noqa: D102
    @property
    def hidden_dim(self) -> int: ...  # noqa: D102
    @property
    def activation(self) -> str: ...  # noqa: D102
    @property
    def int8_weights(self) -> bool: ...  # noqa: D102
    @property
    def param_dtype(self) -> str: ...  # noqa: D102


class FeedForward(nnx.Module):
    """Gated unit (Shazeer, arXiv 2002.05202): `down(activation(gate(x)) * up(x))`."""

    def __init__(
        self, config: FeedForwardConfig, *, lora: LoraConfig | None, rngs: nnx.Rngs
    ) -> None:
        """Three linears named gate, up and down."""

        def linear(name: str, in_dim: int, out_dim: int, axes: Axes) -> Linear:
            param_dtype = jnp.dtype(config.param_dtype)
            return Linear(
                name,
                in_dim,
                out_dim,
                axes,
                int8=config.int8_weights,
                lora=lora,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.gate = linear("gate", config.embed_dim, config.hidden_dim, ("embed", "hidden"))
        self.up = linear("up", config.embed_dim, config.hidden_dim, ("embed", "hidden"))
        self.down = linear("down", config.hidden_dim, config.embed_dim, ("hidden", "embed"))
        self.activation = _ACTIVATIONS[config.activation]

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every position on its own."""
        gate, up = self.gate(x).astype(jnp.float32), self.up(x).astype(jnp.float32)
        return self.down((self.activation(gate) * up).astype(x.dtype))


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


Module = TypeVar("Module", bound=nnx.Module)


def stack(make: Callable[[nnx.Rngs], Module], count: int, rngs: nnx.Rngs) -> Module:
    """`count` modules as one whose arrays have a leading [count] axis, for `scan`."""
    stacked: Module = nnx.vmap(make)(rngs.split(count))
    return stacked


def scan(
    stacked: nnx.Module, layer: Callable[[Any, Float[Array, "..."]], Array], x: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`layer(module, x)` for one module of a `stack` after the other: short to compile."""
    definition, params = nnx.split(stacked)

    def body(x: Array, params: nnx.State) -> tuple[Array, None]:
        return layer(nnx.merge(definition, params), x), None

    return jax.lax.scan(body, x, params)[0]
