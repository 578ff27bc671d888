"""What the columns of a layer attend to: each other, a cache, a shared prefix.

All of it is made once for a call of the decoder; a layer brings what it holds itself
(`LayerState`), and whether it has a window. Axis letters as in `layers`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int

from refine_af.models import attention
from refine_af.models import cache as cache_lib
from refine_af.models.attention import Seen
from refine_af.models.block import Attend
from refine_af.models.cache import KVCache, Prefix, Stored, Tail
from refine_af.models.config import ModelConfig


class LayerState(NamedTuple):
    """What one layer has of the columns before."""

    cache: Stored | None  # the one that new columns are written to
    past: Stored | None  # of a `Tail`
    prefix: Stored | None


def layer_states(
    num_layers: int, cache: KVCache | Tail | None, prefix: Prefix | None
) -> list[LayerState]:
    """What each layer holds of the cache and of the prefix; None of what is not there."""
    past, own = (cache.past, cache.recent) if isinstance(cache, Tail) else (None, cache)
    nothing = [None] * num_layers
    return [
        LayerState(*of_layer)
        for of_layer in zip(
            *(nothing if given is None else given.layers for given in (own, past, prefix)),
            strict=True,
        )
    ]


@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """What columns see of a shared prefix."""

    positions: Int[Array, "B T"]  # of the columns in their texts
    offset: Int[Array, "B 1|T"]  # see `Transformer.__call__`

    def seen(self, window: int | None, stored: Stored | None) -> list[Seen]:
        """What layers with this window see of it."""
        if stored is None:
            return []
        # Position of a key, counted back from the prefix's end.
        back = jnp.arange(stored.keys.shape[2], dtype=jnp.int32) - stored.keys.shape[2]
        key_positions = self.offset[..., None] + back[None, None]
        mask = jnp.broadcast_to(
            self.offset[..., None] > 0, (*self.positions.shape, stored.keys.shape[2])
        )
        if window is not None:
            mask &= self.positions[..., None] - key_positions < window
        return [Seen(stored, mask)]


@dataclasses.dataclass(frozen=True)
class CachedAttention:
    """Attention of new columns to a cache and themselves."""

    config: ModelConfig
    start: Int[Array, "B 1|T"]
    columns: Int[Array, "1|B T"]
    cache: KVCache | Tail

    def attend(self, window: int | None, held: LayerState, before: Sequence[Seen]) -> Attend:
        """Attention of a layer with this window."""
        if isinstance(self.cache, Tail):
            return functools.partial(self._attend_tail, self.cache, window, held, before)

        def attend(query: Array, new: Stored) -> tuple[Array, Stored]:
            assert held.cache is not None
            return attention.attend_cached(
                query, new, held.cache, self.start, self.cache.end, window, before, self.config
            )

        return attend

    def _attend_tail(
        self,
        tail: Tail,
        window: int | None,
        held: LayerState,
        before: Sequence[Seen],
        query: Array,
        new: Stored,
    ) -> tuple[Array, Stored]:
        """To what stands before, to the cache that is only read, and to the columns since."""
        assert held.cache is not None
        # Tied to the query: else int8 entries of all layers are widened ahead of the loop.
        tied = jax.lax.optimization_barrier((held.past, query))[0]
        past = _past(tied, tail.past.end, self.start, self.columns, window)
        written = cache_lib.append(held.cache, new, tail.place, None)
        keys = tail.key_columns(self.columns)
        own = attention.visible(self.start, self.columns, keys, window)
        seen = [*before, past, Seen(written, own)]
        return attention.attend(query, seen, self.config), written


class SelfAttention:
    """Attention of whole sequences among their own columns, for both kinds of layers."""

    def __init__(
        self,
        config: ModelConfig,
        layout: NamedSharding | None,
        start: Int[Array, "B 1|T"],
        length: int,
    ) -> None:
        """For rows of `length` columns; `layout` as of `transformer.Definition`."""
        self.config = config
        self.start = start
        self.kernel = attention.kernel_for(config, len(start), length, layout)
        columns = jnp.arange(length, dtype=jnp.int32)
        self.masks = [
            attention.visible(start, columns, columns, window)
            for window in (None, self.config.sliding_window)
        ]

    def attend(self, window: int | None, held: LayerState, before: Sequence[Seen]) -> Attend:
        """Attention of a layer with this window: none, or the model's."""
        return self.of_kind(window is None, before)

    def of_kind(self, is_global: bool | Bool[Array, ""], before: Sequence[Seen] = ()) -> Attend:
        """Attention of one layer; which kind it is may be known at run time only."""
        return lambda query, new: (self._mix(is_global, query, new, before), new)

    def _mix(
        self, is_global: bool | Array, query: Array, new: Stored, before: Sequence[Seen]
    ) -> Array:
        if self.kernel is None or before:
            own = Seen(new, pick(is_global, *self.masks))
            return attention.attend(query, [*before, own], self.config)
        operands = query, new.keys, new.values, self.start
        of_global, of_local = self._fused(None), self._fused(self.config.sliding_window)
        if isinstance(is_global, bool):
            return (of_global if is_global else of_local)(*operands)
        return jax.lax.cond(is_global, of_global, of_local, *operands)

    def _fused(self, window: int | None) -> Callable[..., Array]:
        assert self.kernel is not None
        scale, softcap = attention.scale(self.config), self.config.attention_softcap
        return functools.partial(self.kernel, window=window, scale=scale, softcap=softcap)


def _past(
    stored: Stored,
    end: Int[Array, ""],
    start: Int[Array, "B 1|T"],
    columns: Int[Array, "1|B T"],
    window: int | None,
) -> Seen:
    """What queries at `columns` see of a cache that ends before them."""
    places = cache_lib.columns(stored.keys.shape[2], end)
    return Seen(stored, attention.visible(start, columns, places, window))


def pick(is_global: bool | Bool[Array, ""], of_global: Any, of_local: Any) -> Any:
    """One of two trees: at trace time for a bool, at run time for an array."""
    if isinstance(is_global, bool):
        return of_global if is_global else of_local
    return jax.tree.map(lambda a, b: jnp.where(is_global, a, b), of_global, of_local)
