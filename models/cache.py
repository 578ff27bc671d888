"""Key-value cache of a batch that decodes in step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from refine_af.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of every layer, written at a column that all rows share.

    Rows are padded on the left, so the column that is written next is one number, and the write
    is a slice update in place instead of a scatter. Kv heads are stored, never expanded; the
    layout [B, K, S, H] makes the decode product contiguous.
    """

    keys: tuple[Float[Array, "B K S H"], ...]  # one a layer, compute dtype, rotated
    values: tuple[Float[Array, "B K S H"], ...]
    end: Int[Array, ""]  # columns filled so far, the same for all rows


def empty_cache(config: ModelConfig, batch: int, length: int) -> KVCache:
    """Zeroed cache of `length` columns."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)

    def zeros() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))

    return KVCache(zeros(), zeros(), jnp.zeros((), jnp.int32))


def write(
    stored: Float[Array, "B K S H"], new: Float[Array, "B K T H"], end: Int[Array, ""]
) -> Float[Array, "B K S H"]:
    """Put `new` at columns end .. end+T; the caller sees to it that they exist."""
    return jax.lax.dynamic_update_slice_in_dim(stored, new.astype(stored.dtype), end, axis=2)
