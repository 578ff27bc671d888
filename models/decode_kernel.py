"""Attention of one new column to a cache on a GPU: a Pallas kernel, through Triton.

It reads each key and value once and keeps the scores to itself (FlashDecoding: a cache is cut into
parts, each of which gives a partial softmax). Axis letters as in `layers`; G queries share a kv
head.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from refine_af.models.cache import Stored
from refine_af.models.config import ModelConfig

_LEAST_ROWS = 16  # of a tensor core's product
_BLOCKS = (128, 64, 32, 16)  # keys that are read in one go
_PROGRAMS = 512  # a GPU wants so many at least
HIDDEN = -1e30  # score of what is not seen


class Partial(NamedTuple):
    """A softmax over some of the keys: exponentials count from the largest score."""

    mixed: Float[Array, "B K G H"]  # sum of values times exponentials, float32
    top: Float[Array, "B K G"]  # largest score
    total: Float[Array, "B K G"]  # sum of exponentials


def merged(parts: list[Partial]) -> Float[Array, "B K G H"]:
    """Softmax over the keys of all parts."""
    top = functools.reduce(jnp.maximum, [part.top for part in parts])
    scales = [jnp.exp(part.top - top) for part in parts]
    total = sum(part.total * scale for part, scale in zip(parts, scales, strict=True))
    mixed = sum(part.mixed * scale[..., None] for part, scale in zip(parts, scales, strict=True))
    return jnp.asarray(mixed / jnp.maximum(jnp.asarray(total), 1e-30)[..., None])


def obstacle(config: ModelConfig, devices: Sequence[jax.Device]) -> str | None:
    """What keeps the kernel from computing this model's attention; None when nothing does."""
    if config.dtype not in ("bfloat16", "float16"):
        return f"it needs bfloat16 or float16, not {config.dtype}"
    if config.int8_cache:
        return "it reads no int8 cache"
    if config.attention_softcap is not None:
        return "it has no soft cap of scores"
    if config.head_dim & (config.head_dim - 1) or config.head_dim < _LEAST_ROWS:
        return f"it needs a head_dim that is a power of two from 16 on, not {config.head_dim}"
    if devices[0].platform != "gpu":
        return "it needs a GPU"
    return f"it works on one device, not {len(devices)}" if len(devices) > 1 else None


def fits(stored: Stored) -> bool:
    """Whether a layer's cache can be cut into blocks; if not, XLA reads it."""
    return stored.keys.shape[2] % _BLOCKS[-1] == 0


def attend(
    query: Float[Array, "B K G H"],
    stored: Stored,
    first: Int[Array, "B"],
    end: Int[Array, ""],
    *,
    splits: int | None = None,
    interpret: bool = False,
) -> list[Partial]:
    """Queries to what a cache holds from column `first` on, for each part of it.

    Args:
        query: scaled; one column of each row.
        stored: column c stands at place `c mod C`.
        first: first column that each row sees.
        end: columns written so far.
        splits: parts of whole blocks that the cache is cut into; None: so many that all of a GPU
            has work.
        interpret: run on any device, slowly, for tests.
    """
    batch, heads, groups, width = query.shape
    places = stored.keys.shape[2]
    block = next(size for size in _BLOCKS if places % size == 0)
    splits = splits or num_splits(batch * heads, places // block)
    assert places // block % splits == 0, (places, block, splits)
    size = places // splits
    rows = max(pl.next_power_of_2(groups), _LEAST_ROWS)
    kernel = functools.partial(_kernel, groups=groups, block=block, places=places)
    part = pl.BlockSpec((None, None, size, width), lambda b, k, s: (b, k, s, 0))
    shape = (batch, heads, splits, groups)

    def out(*more: int) -> pl.BlockSpec:
        zeros = (0,) * (1 + len(more))
        return pl.BlockSpec((None, None, None, rows, *more), lambda b, k, s: (b, k, s, *zeros))

    mixed, top, total = pl.pallas_call(
        kernel,
        grid=(batch, heads, splits),
        in_specs=[
            pl.BlockSpec((None,), lambda b, k, s: (b,)),
            pl.BlockSpec((), lambda b, k, s: ()),
            pl.BlockSpec((None, None, rows, width), lambda b, k, s: (b, k, 0, 0)),
            part,
            part,
        ],
        out_specs=[out(width), out(), out()],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, width), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )(first, end, query, stored.keys, stored.values)
    return [Partial(mixed[:, :, i], top[:, :, i], total[:, :, i]) for i in range(splits)]


def num_splits(num_programs: int, num_blocks: int) -> int:
    """Parts of a cache: a divisor of its blocks, so that there is enough to do at the same time."""
    wanted = min(-(-_PROGRAMS // num_programs), num_blocks)
    return next(n for n in range(wanted, num_blocks + 1) if num_blocks % n == 0)


def _kernel(
    first_ref: Any,
    end_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    mixed_ref: Any,
    top_ref: Any,
    total_ref: Any,
    *,
    groups: int,
    block: int,
    places: int,
) -> None:
    """One row, one kv head, one part of the cache."""
    rows, width = q_ref.shape
    size = k_ref.shape[0]
    real = jnp.arange(rows) < groups
    query = plgpu.load(q_ref, mask=real[:, None], other=0.0)
    first, end = first_ref[()], end_ref[()]
    base = pl.program_id(2) * size

    def read(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, top, total = carry
        at = pl.ds(i * block, block)
        scores = plgpu.dot(query, k_ref[at, :].T)
        place = base + i * block + jnp.arange(block)
        column = end - 1 - jax.lax.rem(end - 1 - place + places, places)
        seen = (column >= first)[None, :]
        scores = jnp.where(seen, scores, HIDDEN)
        new = jnp.maximum(top, scores.max(axis=1))
        scale = jnp.exp(top - new)
        weights = jnp.where(seen, jnp.exp(scores - new[:, None]), 0.0)
        values = v_ref[at, :]
        mixed = mixed * scale[:, None] + plgpu.dot(weights.astype(values.dtype), values)
        return mixed, new, total * scale + weights.sum(axis=1)

    start = (
        jnp.zeros((rows, width), jnp.float32),
        jnp.full((rows,), HIDDEN, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    # In a ring that has not come round, what is seen stands at the places first .. end - 1.
    in_order = (first >= 0) & (end <= places)
    low = jnp.where(in_order, jnp.maximum(first - base, 0), 0) // block
    high = jnp.where(in_order, jnp.minimum(end - base, size), size)
    high = jnp.maximum(high + block - 1, 0) // block
    mixed, top, total = jax.lax.fori_loop(low, high, read, start)
    plgpu.store(mixed_ref, mixed, mask=real[:, None])
    plgpu.store(top_ref, top, mask=real)
    plgpu.store(total_ref, total, mask=real)
