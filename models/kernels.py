"""Fused attention of whole sequences: cuDNN on GPUs, splash attention on TPUs.

Both compute what `attention.attend` does under the mask `attention.visible`, without ever holding
the scores. Axis letters as in `layers`.
"""

import functools
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from refine_af.models.config import ModelConfig

_LANES = 128  # entries of a TPU vector register's last axis


class Kernel(Protocol):
    """Attention of T columns among themselves."""

    def __call__(
        self,
        query: Float[Array, "B N T H"],
        keys: Float[Array, "B K T H"],
        values: Float[Array, "B K T H"],
        start: Int[Array, "B 1|T"],
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Float[Array, "B N T H"]:
        """Causal; columns before a query's `start` are hidden, and those `window` or more back."""


def obstacle(
    name: str, config: ModelConfig, num_rows: int, length: int, layout: NamedSharding | None
) -> str | None:
    """What keeps a kernel from computing this model's attention; None when nothing does.

    Args:
        num_rows, length: of the batch.
        layout: of [B, N, T, H] over the devices; None: as the compiler likes.
    """
    if name == "cudnn":
        if config.dtype not in ("bfloat16", "float16"):
            return f"cuDNN needs bfloat16 or float16, not {config.dtype}"
        if config.attention_softcap is not None:
            return "cuDNN has no soft cap of scores"
        if config.head_dim > 128 or config.head_dim % 8:
            return f"cuDNN needs a head_dim of at most 128, a multiple of 8, not {config.head_dim}"
        if length % 2:
            return f"cuDNN needs an even length, not {length}"
        return None
    if length % _LANES:
        return f"splash attention needs a length that is a multiple of {_LANES}, not {length}"
    if layout is None:
        return "splash attention needs a layout over devices" if jax.device_count() > 1 else None
    for what, size, axes in zip(
        ("rows", "kv heads"), (num_rows, config.num_kv_heads), layout.spec, strict=True
    ):
        if size % _num_parts(layout, axes):
            return f"{size} {what} do not divide among {_num_parts(layout, axes)} devices"
    return None


def _num_parts(layout: NamedSharding, axes: str | tuple[str, ...]) -> int:
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(layout.mesh.shape[name] for name in names)


def over_devices(
    kernel: Kernel,
    layout: NamedSharding,
    query: Float[Array, "B N T H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    start: Int[Array, "B 1|T"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B N T H"]:
    """A kernel that the compiler cannot split, on each device's rows and heads."""
    split, rows = layout.spec, PartitionSpec(layout.spec[0])
    mixed: Array = jax.shard_map(
        functools.partial(kernel, window=window, scale=scale, softcap=softcap),
        mesh=layout.mesh,
        in_specs=(split, split, split, rows),
        out_specs=split,
        check_vma=False,  # a kernel's outputs do not say over what they vary
    )(query, keys, values, start)
    return mixed


def cudnn(
    query: Float[Array, "B N T H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    start: Int[Array, "B 1|T"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B N T H"]:
    """FlashAttention (arXiv 2307.08691) of cuDNN, through `jax.nn.dot_product_attention`."""
    assert softcap is None
    length = query.shape[2]
    # A padding query would see nothing, and softmax of nothing is NaN: it sees itself instead.
    own = jnp.arange(length, dtype=jnp.int32)[None, None] >= start[..., None]
    mask = jnp.broadcast_to(
        own | jnp.eye(length, dtype=bool)[None], (*start.shape[:1], length, length)
    )
    mixed = jax.nn.dot_product_attention(
        query.swapaxes(1, 2),
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        mask=mask[:, None],
        scale=scale,
        is_causal=True,  # without it a window would also open to the future
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return mixed.swapaxes(1, 2)


def splash(
    query: Float[Array, "B N T H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    start: Int[Array, "B 1|T"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """Splash attention, JAX's sparse flash kernel for TPUs, one row at a time.

    Each text of a row is a segment, and so is padding: padding queries see padding.

    Args:
        interpret: run on any device, slowly, for tests.
    """
    num_heads, length = query.shape[1:3]
    if window is None:
        mask: masks.Mask = masks.CausalMask((length, length))
    else:
        mask = masks.LocalMask((length, length), (window - 1, 0), 0)
    block = next(size for size in (512, 256, _LANES) if length % size == 0)
    kernel = splash_lib.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=_block_sizes(block),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    text = jnp.where(jnp.arange(length, dtype=jnp.int32)[None] >= start, start, -1)
    return jax.vmap(kernel)(query * scale, keys, values, splash_lib.SegmentIds(text, text))


@functools.cache
def _block_sizes(block: int) -> splash_lib.BlockSizes:
    return splash_lib.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )


KERNELS: dict[str, Kernel] = {"cudnn": cudnn, "splash": splash}
