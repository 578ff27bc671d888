"""Key-value caches: a ring of places whose columns all rows of a batch write together.

Axis letters as in `layers`; C counts the places of a layer, P those of a shared prefix.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from refine_af.models.config import ModelConfig
from refine_af.models.rotary import Rotary

_INT8_MAX = 127.0


class Stored(NamedTuple):
    """Rotated keys, and values, of one layer: in the model's dtype, or int8 with a scale each.

    Kv heads are stored, never expanded; the layout [B, K, C, H] makes decoding's product
    contiguous.
    """

    keys: Float[Array, "B K C H"]
    values: Float[Array, "B K C H"]
    key_scales: Float[Array, "B K C"] | None = None  # float32; only with int8 entries
    value_scales: Float[Array, "B K C"] | None = None


class KVCache(NamedTuple):
    """Keys and values of every layer, written at a column that all rows share.

    The columns are a clock: a row's text may begin at any of them, and what is written next is one
    number for all rows, so the write is a slice update instead of a scatter. A layer has C
    places; column c stands at place `c mod C`, over the column `c - C`, which no row needs any
    more: a layer with a sliding window never has more places than that window.
    """

    layers: tuple[Stored, ...]
    end: Int[Array, ""]  # columns written so far, the same for all rows


class Tail(NamedTuple):
    """A cache that is only read, and the columns since, for a loop that writes a few one by one.

    Each step then writes to a small array: XLA's CPU back end converts the whole of a bfloat16
    array to float32 and back to write to it. Rotations are computed once for all steps.
    """

    past: KVCache
    recent: KVCache  # with room for all columns of the loop
    rotaries: tuple[Rotary, Rotary]  # of those columns, as `Transformer.tail` makes them

    @property
    def end(self) -> Int[Array, ""]:
        """Columns written so far."""
        return self.recent.end

    def next_rotaries(self) -> tuple[Rotary, Rotary]:
        """Those of the next column."""

        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, self.end - self.past.end, 1, axis=2)

        first, second = jax.tree.map(cut, self.rotaries)
        return first, second


class Prefix(NamedTuple):
    """Keys and values of a beginning that texts share: positions 0 .. P-1, the last ones last."""

    layers: tuple[Stored, ...]  # of one row; a layer with a window has its last places only


def num_places(config: ModelConfig, layer: int, length: int) -> int:
    """Places that a layer needs for texts of up to `length` tokens."""
    window = config.window(layer)
    return length if window is None else min(length, window)


def empty(config: ModelConfig, batch: int, length: int) -> KVCache:
    """Cache for texts of up to `length` tokens, with nothing written."""
    stored = jnp.dtype("int8" if config.int8_cache else config.dtype)

    def layer(index: int) -> Stored:
        scales = (batch, config.num_kv_heads, num_places(config, index, length))
        made = [jnp.zeros((*scales, config.head_dim), stored) for _ in range(2)]
        made += [jnp.zeros(scales, jnp.float32) for _ in range(2)] if config.int8_cache else []
        return Stored(*made)

    return KVCache(tuple(map(layer, range(config.num_layers))), jnp.zeros((), jnp.int32))


def joined(tail: Tail) -> KVCache:
    """One cache again, with the recent columns over the oldest ones."""
    past, recent, _ = tail

    def layer(old: Stored, new: Stored) -> Stored:
        column = columns(old.keys.shape[2], recent.end)

        def merge(old: Array, new: Array) -> Array:
            is_new = (column >= past.end).reshape(1, 1, -1, *[1] * (old.ndim - 3))
            return jnp.where(is_new, jnp.take(new, column % new.shape[2], axis=2), old)

        return jax.tree.map(merge, old, new)

    return KVCache(tuple(map(layer, past.layers, recent.layers)), recent.end)


def num_bytes(config: ModelConfig, batch: int, length: int) -> int:
    """Size of `empty(config, batch, length)`, without making it."""
    shapes = jax.eval_shape(lambda: empty(config, batch, length))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def columns(num_places: int, end: Int[Array, ""]) -> Int[Array, "C"]:
    """Column at each place after `end` columns were written; negative where there is none."""
    last = end - 1
    return last - jnp.mod(last - jnp.arange(num_places, dtype=jnp.int32), num_places)


def store(keys: Float[Array, "B K T H"], values: Float[Array, "B K T H"], like: Stored) -> Stored:
    """New keys and values as `like` holds them."""
    if like.key_scales is None:
        return Stored(keys.astype(like.keys.dtype), values.astype(like.values.dtype))
    return quantized(Stored(keys, values))


def quantized(plain: Stored) -> Stored:
    """Entries as int8: each vector of a head is divided by its largest entry over 127."""

    def quantize(x: Array) -> tuple[Array, Array]:
        x = x.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / _INT8_MAX, 1e-30)
        return jnp.round(x / scale[..., None]).astype(jnp.int8), scale

    (keys, key_scales), (values, value_scales) = quantize(plain.keys), quantize(plain.values)
    return Stored(keys, values, key_scales, value_scales)


def append(stored: Stored, new: Stored, end: Int[Array, ""], window: int | None) -> Stored:
    """Write T new columns from column `end` on; in a layer with a window, over the oldest ones.

    Without a window several columns must not reach over the end of the ring.
    """
    places, count = stored.keys.shape[2], new.keys.shape[2]

    def write(old: Array, x: Array) -> Array:
        if window is None or count == 1:
            return jax.lax.dynamic_update_slice_in_dim(old, x, end % places, axis=2)
        kept = min(count, places)
        at = (end + jnp.arange(count - kept, count, dtype=jnp.int32)) % places
        return old.at[:, :, at].set(x[:, :, count - kept :], unique_indices=True)

    return jax.tree.map(write, stored, store(new.keys, new.values, stored))


def resize(config: ModelConfig, old: KVCache, length: int) -> KVCache:
    """The newest columns of `old` in a cache for texts of up to `length` tokens.

    `old` may be what a pass over whole rows returned: T columns at places 0 .. T-1.
    """

    def layer(index: int, stored: Stored) -> Stored:
        places = num_places(config, index, length)
        at = columns(places, old.end) % stored.keys.shape[2]
        moved = jax.tree.map(lambda x: jnp.take(x, at, axis=2), stored)
        return quantized(moved) if config.int8_cache and stored.key_scales is None else moved

    return KVCache(tuple(layer(i, s) for i, s in enumerate(old.layers)), old.end)


def insert(
    cache: KVCache,
    slot: Int[Array, ""],
    source: KVCache,
    row: Int[Array, ""],
    last: Int[Array, ""],
) -> KVCache:
    """Put a text, the columns up to `last` of a row of `source`, into a row of `cache`.

    Its last column becomes the newest one of `cache`, `end - 1`.
    """

    def layer(stored: Stored, origin: Stored) -> Stored:
        shift = last - (cache.end - 1)
        at = (columns(stored.keys.shape[2], cache.end) + shift) % origin.keys.shape[2]
        taken = jax.tree.map(lambda x: jnp.take(x[row], at, axis=1), origin)
        if stored.key_scales is not None and origin.key_scales is None:
            taken = quantized(taken)
        return jax.tree.map(
            lambda old, x: jax.lax.dynamic_update_index_in_dim(old, x.astype(old.dtype), slot, 0),
            stored,
            taken,
        )

    return KVCache(tuple(map(layer, cache.layers, source.layers)), cache.end)


def prefix_of(config: ModelConfig, source: KVCache, length: int) -> Prefix:
    """The newest `length` columns of a cache of one row, as a prefix."""

    def layer(index: int, stored: Stored) -> Stored:
        places = num_places(config, index, length)
        at = (source.end - places + jnp.arange(places, dtype=jnp.int32)) % stored.keys.shape[2]
        return jax.tree.map(lambda x: jnp.take(x, at, axis=2), stored)

    return Prefix(tuple(layer(i, s) for i, s in enumerate(source.layers)))
