"""Products of two arrays that add up in float32, forward and backward, whatever the inputs' dtype.

In bfloat16 this is both better and faster than a plain product: XLA's CPU back end has its fast
matrix kernels for bfloat16 in, float32 out only (4.9 against 24 ms for [2048, 576] x [576, 1536]
on 2 cores with AMX, jax 0.10.2). The transposes that autodiff would make mix float32 and bfloat16
operands and miss those kernels again, hence the rule of our own.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_FEW_ROWS = 32  # of bfloat16: up to so many, a kernel [F, D] may be the faster first operand


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`einsum(spec, a, b)` in float32.

    Args:
        spec: explicit two-operand einsum, such as "td,df->tf", in which every letter of an operand
            also stands in the other one or in the result.
        a: first operand. b: second operand, of the same dtype.
    """
    assert a.dtype == b.dtype, (spec, a.dtype, b.dtype)
    return _einsum(spec, a, b)


def _einsum(spec: str, a: Array, b: Array) -> Array:
    # By default accelerators multiply float32 in fewer bits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _forward(spec: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return contract(spec, a, b), (a, b)


def _backward(spec: str, operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, b = operands
    operand_letters, out = spec.split("->")
    left, right = operand_letters.split(",")
    g = g.astype(a.dtype)
    da = _einsum(f"{out},{right}->{left}", g, b)
    db = _einsum(f"{left},{out}->{right}", a, g)
    return da.astype(a.dtype), db.astype(b.dtype)


contract.defvjp(_forward, _backward)


def rows_times(
    x: Float[Array, "T D"], kernel: Float[Array, "..."], axis: int = 0
) -> Float[Array, "T F"]:
    """Product of rows and a kernel, which is cast to their dtype first, in float32.

    XLA's CPU back end lays out a product's second operand anew each time. Where few rows meet a
    kernel [F, D], the kernel may be the first operand instead. With AMX that is the faster way (16
    bfloat16 rows, kernel 1536 x 576: 113 us, as the second operand [D, F] 294), without it where
    D > F (576 x 1536: 70 us, second 96; 1536 x 576: 114, second 89; 2 cores each, jax 0.10.2). A
    single row is doubled: two take as long as 16 with AMX, and one takes 2 to 12 times as long.

    Args:
        kernel: [D, F], or [F, D].
        axis: the kernel's axis of size D, 0 or 1.
    """
    kernel = kernel.astype(x.dtype)
    rows = x.shape[0]
    few = x.dtype == jnp.bfloat16 and rows <= _FEW_ROWS
    if few and rows == 1:
        x = jnp.concatenate([x, x])
    if axis == 0:
        y = contract("td,df->tf", x, kernel)
    elif few and _comes_first(rows, kernel.shape):
        # Tied down, or the compiler would exchange the operands.
        y = jax.lax.optimization_barrier(contract("fd,td->ft", kernel, x)).T
    else:
        y = contract("td,fd->tf", x, kernel)
    return y[:rows]


def _comes_first(rows: int, shape: tuple[int, ...]) -> bool:
    """Whether a kernel [F, D] is the first operand of a product with few rows."""
    return _has_amx() or (rows > 1 and shape[1] > shape[0])


@functools.cache
def _has_amx() -> bool:
    """Whether this host's processor multiplies bfloat16 tiles (Intel's AMX)."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: no such processor that JAX runs on
        return False


def project(
    x: Float[Array, "*B D"],
    kernel: Float[Array, "..."],
    scale: Float[Array, "F"] | None = None,
    axis: int = 0,
) -> Float[Array, "*B F"]:
    """`rows_times` of the last axis, times `scale`, in the dtype of `x`."""
    flat = x.reshape(-1, x.shape[-1])
    y = rows_times(flat, kernel, axis)
    y = (y if scale is None else y * scale[None]).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])
