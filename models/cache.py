"""Key-value caches: a ring of places whose columns all rows of a batch write together.

Axis letters as in `layers`; C counts the places of a layer, P those of a shared prefix.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from refine_af.models.config import ModelConfig
from refine_af.models.rotary import Rotary

_INT8_MAX = 127.0
NO_COLUMN = 1 << 30  # after every query, so that none sees it


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
    """A cache that is only read, and the columns since, for a loop that writes several at a time.

    Of the columns of a step a row keeps the first ones (`keep`): rows come to have their own places
    for their own columns. Rotations are computed once for all steps.
    """

    past: KVCache
    recent: KVCache  # P places in each layer, filled from the first one on
    rotaries: tuple[Rotary, Rotary]  # of P columns, as `Transformer.tail` makes them
    own: Int[Array, "B P"]  # column of each row at each place, NO_COLUMN where none is kept

    @property
    def end(self) -> Int[Array, ""]:
        """Columns written so far, kept or not."""
        return self.recent.end

    @property
    def place(self) -> Int[Array, ""]:
        """Where the next column is written."""
        return self.end - self.past.end

    def ahead(self) -> Int[Array, "B"]:
        """Columns since `past` that a row has."""
        return jnp.sum(self.own < NO_COLUMN, axis=1)

    def next_columns(self, count: int) -> Int[Array, "B T"]:
        """The next `count` columns of the rows."""
        first = self.past.end + self.ahead()
        return first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]

    def next_rotaries(self, count: int) -> tuple[Rotary, Rotary]:
        """Those of the next columns."""
        at = (self.next_columns(count) - self.past.end)[:, None, :, None]
        first, second = jax.tree.map(lambda x: jnp.take_along_axis(x, at, axis=2), self.rotaries)
        return first, second

    def key_columns(self, new: Int[Array, "B T"]) -> Int[Array, "B P"]:
        """Column at each place when `new` ones are written; later ones where nothing is."""
        return jax.lax.dynamic_update_slice(self.own, new, (0, self.place))

    def keep(self, count: int, kept: Int[Array, "B"]) -> "Tail":
        """Of the `count` columns written last, a row keeps the first `kept` ones."""
        void = jnp.arange(count, dtype=jnp.int32)[None] >= kept[:, None]
        new = jnp.where(void, NO_COLUMN, self.next_columns(count))
        own = jax.lax.dynamic_update_slice(self.own, new, (0, self.place - count))
        return self._replace(own=own)


class Prefix(NamedTuple):
    """Keys and values of a beginning that texts share: positions 0 .. P-1, the last ones last."""

    layers: tuple[Stored, ...]  # of one row; a layer with a window has its last places only


def num_places(config: ModelConfig, layer: int, length: int) -> int:
    """Places that a layer needs for texts of up to `length` tokens."""
    window = config.window(layer)
    return length if window is None else min(length, window)


def empty(config: ModelConfig, batch: int, length: int, *, windows: bool = True) -> KVCache:
    """Cache for texts of up to `length` tokens, with nothing written.

    Args:
        windows: layers with a window have no more places than that.
    """
    stored = jnp.dtype("int8" if config.int8_cache else config.dtype)

    def layer(index: int) -> Stored:
        places = num_places(config, index, length) if windows else length
        scales = (batch, config.num_kv_heads, places)
        made = [jnp.zeros((*scales, config.head_dim), stored) for _ in range(2)]
        made += [jnp.zeros(scales, jnp.float32) for _ in range(2)] if config.int8_cache else []
        return Stored(*made)

    return KVCache(tuple(map(layer, range(config.num_layers))), jnp.zeros((), jnp.int32))


def aligned(tail: Tail) -> tuple[KVCache, Int[Array, "B"]]:
    """One cache again, and by how many columns each row moved.

    The row with the most of them sets the clock, and the texts of others move up to it.
    """
    past, recent, ahead = tail.past, tail.recent, tail.ahead()
    end = past.end + jnp.max(ahead)
    moved = jnp.max(ahead) - ahead
    order = jnp.argsort(tail.own, axis=1)  # places of a row's columns, one after the other

    def layer(old: Stored, new: Stored) -> Stored:
        places = old.keys.shape[2]
        column = columns(places, end)[None] - moved[:, None]
        recently = jnp.clip(column - past.end, 0, order.shape[1] - 1)
        at = jnp.where(
            column >= past.end,
            places + jnp.take_along_axis(order, recently, axis=1),
            jnp.mod(column, places),
        )

        def merge(old: Array, new: Array) -> Array:
            both = jnp.concatenate([old, new], axis=2)
            return jnp.take_along_axis(both, at.reshape(len(at), 1, -1, *[1] * (old.ndim - 3)), 2)

        return jax.tree.map(functools.partial(_by_bits, merge), old, new)

    return KVCache(tuple(map(layer, past.layers, recent.layers)), end), moved


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

    return jax.tree.map(
        functools.partial(_by_bits, write), stored, store(new.keys, new.values, stored)
    )


def resize(config: ModelConfig, old: KVCache, length: int) -> KVCache:
    """The newest columns of `old` in a cache for texts of up to `length` tokens.

    `old` may be what a pass over whole rows returned: T columns at places 0 .. T-1.
    """

    def layer(index: int, stored: Stored) -> Stored:
        places = num_places(config, index, length)
        at = columns(places, old.end) % stored.keys.shape[2]
        moved = _taken(stored, at)
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
        taken = _taken(jax.tree.map(lambda x: x[row][None], origin), at)
        if stored.key_scales is not None and origin.key_scales is None:
            taken = quantized(taken)
        return jax.tree.map(functools.partial(_by_bits, put), stored, taken)

    def put(old: Array, x: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), slot, axis=0)

    return KVCache(tuple(map(layer, cache.layers, source.layers)), cache.end)


def prefix_of(config: ModelConfig, source: KVCache, length: int) -> Prefix:
    """The newest `length` columns of a cache of one row, as a prefix."""

    def layer(index: int, stored: Stored) -> Stored:
        places = num_places(config, index, length)
        at = (source.end - places + jnp.arange(places, dtype=jnp.int32)) % stored.keys.shape[2]
        return _taken(stored, at)

    return Prefix(tuple(layer(i, s) for i, s in enumerate(source.layers)))


def _taken(stored: Stored, places: Int[Array, "C"]) -> Stored:
    """What stands at these places."""
    return jax.tree.map(functools.partial(_by_bits, lambda x: jnp.take(x, places, axis=2)), stored)


def _by_bits(move: Callable[..., Array], *arrays: Array) -> Array:
    """`move(*arrays)`, of arrays of one dtype whose entries it only moves.

    Several rows of 16 bits are moved as integers on a CPU: XLA's back end would convert whole
    arrays to float32 and back (a row of caches for 64 x 384 columns of SmolLM2-135M: 20 ms, as
    integers 2; jax 0.10.2). A single row, as integers, it would copy instead.
    """
    dtype = arrays[0].dtype

    def as_integers(*arrays: Array) -> Array:
        moved = move(*(jax.lax.bitcast_convert_type(x, jnp.uint16) for x in arrays))
        return jax.lax.bitcast_convert_type(moved, dtype)

    if dtype.itemsize != 2 or arrays[0].shape[0] == 1:
        return move(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=as_integers, default=move)
