"""Key-value cache of a batch that decodes in step: a ring where a layer has a sliding window."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from refine_af.models.config import ModelConfig

Stored = tuple[Float[Array, "B K C H"], Float[Array, "B K C H"]]  # keys and values of a layer


class KVCache(NamedTuple):
    """Keys and values of every layer, written at a column that all rows share.

    Rows are padded on the left, so the column that is written next is one number, and the write
    is a slice update in place instead of a scatter. A layer has C places; column c stands at place
    `c mod C`, over the column `c - C` that no query sees any more: a layer with a sliding window
    never has more places than that window. Kv heads are stored, never expanded; the layout
    [B, K, C, H] makes the decode product contiguous.
    """

    keys: tuple[Float[Array, "B K C H"], ...]  # one a layer, compute dtype, rotated
    values: tuple[Float[Array, "B K C H"], ...]
    end: Int[Array, ""]  # columns written so far, the same for all rows


def num_places(config: ModelConfig, layer: int, length: int) -> int:
    """Places that a layer needs for sequences of up to `length` columns."""
    window = config.window(layer)
    return length if window is None else min(length, window)


def empty(config: ModelConfig, batch: int, length: int) -> KVCache:
    """Cache for `length` columns with none written."""

    def zeros() -> tuple[Array, ...]:
        shapes = [
            (batch, config.num_kv_heads, num_places(config, i, length), config.head_dim)
            for i in range(config.num_layers)
        ]
        return tuple(jnp.zeros(shape, config.dtype) for shape in shapes)

    return KVCache(zeros(), zeros(), jnp.zeros((), jnp.int32))


def lay_out(config: ModelConfig, whole: KVCache, length: int) -> KVCache:
    """Cache for `length` columns that holds the T columns of `whole`, all of them at place c."""

    def place(x: Float[Array, "B K T H"], layer: int) -> Float[Array, "B K C H"]:
        places, columns = num_places(config, layer, length), x.shape[2]
        if columns <= places:
            return jnp.pad(x, ((0, 0), (0, 0), (0, places - columns), (0, 0)))
        return jnp.roll(x[:, :, columns - places :], columns % places, axis=2)

    def all_layers(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(place(x, i) for i, x in enumerate(arrays))

    return KVCache(all_layers(whole.keys), all_layers(whole.values), whole.end)


def columns(num_places: int, end: Int[Array, ""]) -> Int[Array, "C"]:
    """Column at each place after `end` columns were written; negative where there is none."""
    last = end - 1
    return last - jnp.mod(last - jnp.arange(num_places, dtype=jnp.int32), num_places)


def append(stored: Stored, new: Stored, end: Int[Array, ""], window: int | None) -> Stored:
    """Write T new columns from column `end` on; in a layer with a window, over the oldest ones."""
    places, count = stored[0].shape[2], new[0].shape[2]

    def write(old: Array, x: Array) -> Array:
        x = x.astype(old.dtype)
        if window is None or count == 1:
            return jax.lax.dynamic_update_slice_in_dim(old, x, end % places, axis=2)
        kept = min(count, places)
        at = (end + jnp.arange(count - kept, count, dtype=jnp.int32)) % places
        return old.at[:, :, at].set(x[:, :, count - kept :], unique_indices=True)

    return write(stored[0], new[0]), write(stored[1], new[1])
