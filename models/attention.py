"""Grouped-query attention: the reference implementation, and the choice of a kernel.

Axis letters as in `layers`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from refine_af.models import cache, kernels
from refine_af.models.cache import Stored
from refine_af.models.config import ModelConfig
from refine_af.models.contraction import contract


def visible(
    start: Int[Array, "B"],
    query_columns: Int[Array, "T"],
    key_columns: Int[Array, "S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Which keys each query may see.

    A query at column q sees a key at column k when `start <= k <= q` (left padding lies before
    `start`; right padding lies after every real query, so causality hides it; an empty place of a
    cache has a negative column) and, with a window w, when `q - k < w`.
    """
    query, key = query_columns[None, :, None], key_columns[None, None, :]
    seen = (key <= query) & (key >= start[:, None, None])
    return seen if window is None else seen & (query - key < window)


def attend(
    query: Float[Array, "B N T H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    config: ModelConfig,
) -> Float[Array, "B N T H"]:
    """Softmax attention; each kv head serves G = N/K query heads. The reference for all kernels.

    Scores and softmax are float32. A query that sees nothing (padding) gets a mean of values,
    never NaN. Heads are grouped by reshaping the queries, so kv heads are not copied.
    """
    b, n, t, h = query.shape
    k = keys.shape[1]
    grouped = (query * scale(config)).reshape(b, k, n // k * t, h)
    scores = contract("bkqh,bksh->bkqs", grouped, keys)
    if config.attention_softcap is not None:
        scores = jnp.tanh(scores / config.attention_softcap) * config.attention_softcap
    scores = scores.reshape(b, k, n // k, t, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = contract("bkqs,bksh->bkqh", weights.reshape(b, k, n // k * t, -1), values)
    return mixed.reshape(b, n, t, h).astype(query.dtype)


def attend_cached(
    query: Float[Array, "B N T H"],
    new: Stored,
    stored: Stored,
    start: Int[Array, "B"],
    end: Int[Array, ""],
    window: int | None,
    config: ModelConfig,
) -> tuple[Float[Array, "B N T H"], Stored]:
    """Attention of columns end .. end+T to the cache and to themselves; and the cache with them.

    In a ring, several new columns may take the places of old ones that the first of them still
    see: then the new ones are written after they have looked.
    """
    length, places = query.shape[2], stored[0].shape[2]
    query_columns = end + jnp.arange(length, dtype=jnp.int32)
    written = cache.append(stored, new, end, window)
    if window is None or length == 1:
        keys, values = written
        key_columns = cache.columns(places, end + length)
    else:
        keys, values = (jnp.concatenate(pair, axis=2) for pair in zip(stored, new, strict=True))
        key_columns = jnp.concatenate([cache.columns(places, end), query_columns])
    mask = visible(start, query_columns, key_columns, window)
    return attend(query, keys, values, mask, config), written


def scale(config: ModelConfig) -> float:
    """Factor of the scores."""
    return (config.query_pre_attn_scalar or config.head_dim) ** -0.5


def kernel_for(config: ModelConfig, length: int) -> kernels.Kernel | None:
    """Fused kernel for whole sequences of `length` columns on this device; None: `attend`.

    Raises:
        ValueError: a kernel was asked for by name and cannot compute this.
    """
    name = config.attention_kernel
    if name == "auto":
        name = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "xla")
    if name == "xla":
        return None
    obstacle = kernels.obstacle(name, config, length)
    if obstacle is None:
        return kernels.KERNELS[name]
    if config.attention_kernel == "auto":
        return None
    raise ValueError(f"attention_kernel={name!r}: {obstacle}")
