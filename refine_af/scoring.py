"""Token rows of unequal length through a model: short ones together, equal ones once."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from refine_af import packing, tokens
from refine_af.mesh import batch_parts, shard_batch
from refine_af.models import processes

_TOKENS = 2048  # of a batch, padding included; a longer row makes a batch of its own
_LEAST = 16  # columns

# (tokens [B, T] padded on the right, lengths [B], extras [B, ...]) -> [B, ...]
Score = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def by_length(
    score: Score,
    rows: Sequence[tokens.TokenIds],
    mesh: jax.sharding.Mesh,
    extras: np.ndarray | None = None,
    *,
    tokens_per_batch: int = _TOKENS,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """Result of every row, float64, in their order; a row's result does not depend on the others.

    Rows go longest first, in batches of about `tokens_per_batch` tokens whose shapes are few. Rows
    that are equal, in their extras too, are computed once.

    Args:
        extras: int32, whatever else `score` needs of each row; default: zeros.
        progress: called with the number of rows that are done.
    """
    if extras is None:
        extras = np.zeros(len(rows), np.int32)
    keys: list[Hashable] = [(tuple(r), e.tobytes()) for r, e in zip(rows, extras, strict=True)]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    order = sorted(first.values(), key=lambda i: -len(rows[i]))
    found: dict[int, np.ndarray] = {}
    while order:
        length = packing.bucket(len(rows[order[0]]), _LEAST)
        size = max(packing.power_of_two(tokens_per_batch // length + 1) // 2, batch_parts(mesh))
        chosen, order = order[:size], order[size:]
        size = max(packing.power_of_two(len(chosen)), batch_parts(mesh))
        filled = np.resize(chosen, size)
        padded = tokens.pad_right([rows[i] for i in filled], length)
        lengths = np.asarray([len(rows[i]) for i in filled], np.int32)
        given = shard_batch(mesh, (padded, lengths, extras[filled]))
        result = processes.to_host(score(*given))
        found.update(zip(chosen, result.astype(np.float64), strict=False))
        if progress:
            progress(len(found))
    return np.asarray([found[first[key]] for key in keys])
