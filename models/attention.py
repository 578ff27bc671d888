"""Grouped-query attention: the reference implementation, and the choice of a kernel.

Axis letters as in `layers`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from refine_af.models import cache, decode_kernel, kernels
from refine_af.models.cache import Stored
from refine_af.models.config import ModelConfig
from refine_af.models.contraction import contract


class Ring(NamedTuple):
    """What a row sees of a cache where one column is new."""

    first: Int[Array, "B"]  # column that it sees first
    end: Int[Array, ""]  # columns written


class Seen(NamedTuple):
    """Keys and values, and which of them each query may see; S of them."""

    stored: Stored  # of one row where all rows share it
    mask: Bool[Array, "B T S"]
    ring: Ring | None = None  # the same as the mask, for a kernel


def visible(
    start: Int[Array, "B 1|T"],
    query_columns: Int[Array, "T"] | Int[Array, "1|B T"],
    key_columns: Int[Array, "S"] | Int[Array, "1|B S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Which keys each query may see.

    A query at column q sees a key at column k when `start <= k <= q` (left padding, or another
    text in the same row, lies before `start`; right padding lies after every real query, so
    causality hides it; an empty place of a cache has a negative column) and, with a window w,
    when `q - k < w`.

    Args:
        start: first column of the text that a query belongs to, of each row or of each query.
        query_columns: of all rows alike, or of each; so are `key_columns`.
    """
    query = jnp.atleast_2d(query_columns)[:, :, None]
    key = jnp.atleast_2d(key_columns)[:, None]
    seen = (key <= query) & (key >= start[..., None])
    return seen if window is None else seen & (query - key < window)


def attend(
    query: Float[Array, "B N T H"], seen: Sequence[Seen], config: ModelConfig
) -> Float[Array, "B N T H"]:
    """Softmax attention; each kv head serves G = N/K query heads. The reference for all kernels.

    Scores and softmax are float32. A query that sees nothing (padding) gets a mean of values,
    never NaN. Heads are grouped by reshaping the queries, so kv heads are not copied; keys that
    all rows share meet all their queries in one product. Where the config names a decode kernel,
    that reads the cache for a single column, and a query that sees nothing gets 0.
    """
    b, n, t, h = query.shape
    k = config.num_kv_heads
    grouped = (query * scale(config)).reshape(b, k, n // k * t, h)
    if t == 1 and has_decode_kernel(config):
        whole = decode_kernel.merged([x for part in seen for x in _partials(grouped, part)])
        return whole.reshape(b, n, t, h).astype(query.dtype)
    scores = _joined([_scores(grouped, part.stored) for part in seen])
    if config.attention_softcap is not None:
        scores = jnp.tanh(scores / config.attention_softcap) * config.attention_softcap
    mask = _joined([part.mask for part in seen])
    scores = scores.reshape(b, k, n // k, t, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).reshape(b, k, n // k * t, -1)
    ends = np.cumsum([part.mask.shape[-1] for part in seen])[:-1]
    parts = jnp.split(weights, ends, axis=-1)
    mixed = sum(_mixed(w, part.stored, query.dtype) for w, part in zip(parts, seen, strict=True))
    return jnp.asarray(mixed).reshape(b, n, t, h).astype(query.dtype)


def has_decode_kernel(config: ModelConfig) -> bool:
    """Whether a kernel attends to caches, one column at a time."""
    return config.decode_kernel != "xla"


def check_decode_kernel(config: ModelConfig, devices: Sequence[jax.Device]) -> None:
    """Refuse a kernel that was asked for and cannot compute this model's attention there.

    Raises:
        ValueError: says why.
    """
    obstacle = decode_kernel.obstacle(config, devices) if has_decode_kernel(config) else None
    if obstacle:
        kernel = config.decode_kernel
        raise ValueError(f"decode_kernel={kernel!r}: {obstacle}; take decode_kernel='xla'")


def _partials(grouped: Float[Array, "B K G H"], part: Seen) -> list[decode_kernel.Partial]:
    """Softmax over one part of what a column sees, or over pieces of it."""
    if part.ring is not None and decode_kernel.fits(part.stored):
        return decode_kernel.attend(grouped, part.stored, part.ring.first, part.ring.end)
    scores = jnp.where(part.mask[:, None], _scores(grouped, part.stored), decode_kernel.HIDDEN)
    top = scores.max(axis=-1)
    weights = jnp.where(part.mask[:, None], jnp.exp(scores - top[..., None]), 0.0)
    mixed = _mixed(weights, part.stored, grouped.dtype)
    return [decode_kernel.Partial(mixed, top, weights.sum(axis=-1))]


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _scores(grouped: Float[Array, "B K Q H"], stored: Stored) -> Float[Array, "B K Q S"]:
    scores = _product("qh,sh->qs", grouped, stored.keys.astype(grouped.dtype))
    return scores if stored.key_scales is None else scores * stored.key_scales[:, :, None]


def _mixed(
    weights: Float[Array, "B K Q S"], stored: Stored, dtype: jnp.dtype
) -> Float[Array, "B K Q H"]:
    if stored.value_scales is not None:
        weights = weights * stored.value_scales[:, :, None]
    return _product("qs,sh->qh", weights.astype(dtype), stored.values.astype(dtype))


def _product(spec: str, a: Float[Array, "B K Q X"], b: Float[Array, "1|B K S H"]) -> Array:
    """A product for each row and kv head; where all rows share `b`, one for each kv head."""
    operands, out = spec.split("->")
    left, right = operands.split(",")
    rows, heads, queries, _ = a.shape
    if rows == b.shape[0]:
        return contract(f"bk{left},bk{right}->bk{out}", a, b)
    flat = a.swapaxes(0, 1).reshape(heads, rows * queries, -1)
    product = contract(f"k{left},k{right}->k{out}", flat, b[0])
    return product.reshape(heads, rows, queries, -1).swapaxes(0, 1)


def attend_whole(
    query: Float[Array, "B N T H"],
    keys: Float[Array, "B N S H"],
    values: Float[Array, "B N S H"],
    mask: Bool[Array, "#B #T S"],
    *,
    scale: float,
    bias: Float[Array, "N T S"] | None = None,
) -> Float[Array, "B N T H"]:
    """Softmax attention with a key for each query head; scores and softmax are float32.

    Args:
        mask: which keys each query may see.
        scale: factor of the scores.
        bias: float32, added to the scaled scores of every row.
    """
    scores = contract("bnth,bnsh->bnts", query, keys) * scale
    if bias is not None:
        scores = scores + bias[None]
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return contract("bnts,bnsh->bnth", weights, values).astype(query.dtype)


def attend_cached(
    query: Float[Array, "B N T H"],
    new: Stored,
    stored: Stored,
    start: Int[Array, "B 1|T"],
    end: Int[Array, ""],
    window: int | None,
    before: Sequence[Seen],
    config: ModelConfig,
) -> tuple[Float[Array, "B N T H"], Stored]:
    """Attention of columns end .. end+T to the cache and to themselves; and the cache with them.

    In a ring, several new columns may take the places of old ones that the first of them still
    see: then the new ones are written after they have looked.

    Args:
        before: what stands before all of these columns, a shared prefix say.
    """
    length, places = query.shape[2], stored.keys.shape[2]
    query_columns = end + jnp.arange(length, dtype=jnp.int32)
    written = cache.append(stored, new, end, window)
    if window is None or length == 1:
        own = [(written, cache.columns(places, end + length))]
    else:
        own = [(stored, cache.columns(places, end)), (new, query_columns)]
    seen = [Seen(s, visible(start, query_columns, keys, window)) for s, keys in own]
    if length == 1:
        first = start[:, 0] if window is None else jnp.maximum(start[:, 0], end + 1 - window)
        seen = [seen[0]._replace(ring=Ring(first, end + 1))]
    return attend(query, [*before, *seen], config), written


def scale(config: ModelConfig) -> float:
    """Factor of the scores."""
    return (config.query_pre_attn_scalar or config.head_dim) ** -0.5


def kernel_for(
    config: ModelConfig, num_rows: int, length: int, layout: NamedSharding | None = None
) -> kernels.Kernel | None:
    """Fused kernel for `num_rows` whole sequences of `length` columns; None: `attend`.

    Args:
        layout: of queries [B, N, T, H] over the devices; None: one, or as the compiler likes.

    Raises:
        ValueError: a kernel was asked for by name and cannot compute this.
    """
    name = config.attention_kernel
    if name == "auto":
        devices = jax.devices() if layout is None else layout.mesh.devices.flat
        name = {"gpu": "cudnn", "tpu": "splash"}.get(devices[0].platform, "xla")
    if name == "xla":
        return None
    obstacle = kernels.obstacle(name, config, num_rows, length, layout)
    if obstacle is None:
        kernel = kernels.KERNELS[name]
        return kernel if layout is None else functools.partial(kernel, layout=layout)
    if config.attention_kernel == "auto":
        return None
    raise ValueError(f"attention_kernel={name!r}: {obstacle}")
