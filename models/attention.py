"""Grouped-query attention and the mask that all uses of the decoder share.

Axis letters as in `layers`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from refine_af.models.contraction import contract


def visible(
    start: Int[Array, "B"],
    query_offset: Int[Array, ""] | int,
    num_queries: int,
    num_keys: int,
    sliding_window: int | None,
) -> Bool[Array, "B T S"]:
    """Which key columns each query column may see.

    Query t stands at column `query_offset + t`. It sees key column s when `start <= s <= t`'s
    column (left padding lies before `start`; right padding lies after every real query, so
    causality hides it) and, with a window w, when fewer than w columns back.
    """
    query = jnp.arange(num_queries, dtype=jnp.int32)[None, :, None] + query_offset
    key = jnp.arange(num_keys, dtype=jnp.int32)[None, None, :]
    seen = (key <= query) & (key >= start[:, None, None])
    if sliding_window is not None:
        seen &= query - key < sliding_window
    return seen


def attend(
    query: Float[Array, "B N T H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B N T H"]:
    """Softmax attention with scale 1/sqrt(H); each kv head serves G = N/K query heads.

    Scores and softmax are float32. A query that sees nothing (padding) gets a mean of values,
    never NaN. Heads are grouped by reshaping the queries, so kv heads are not copied.
    """
    b, n, t, h = query.shape
    k = keys.shape[1]
    grouped = (query * h**-0.5).reshape(b, k, n // k * t, h)
    scores = contract("bkqh,bksh->bkqs", grouped, keys)
    scores = scores.reshape(b, k, n // k, t, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = contract("bkqs,bksh->bkqh", weights.reshape(b, k, n // k * t, -1), values)
    return mixed.reshape(b, n, t, h).astype(query.dtype)
