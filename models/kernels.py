"""Fused attention of whole sequences: cuDNN on GPUs, splash attention on TPUs.

Both compute what `attention.attend` does under the mask `attention.visible`, without ever holding
the scores. Axis letters as in `layers`.
"""

import functools
import math
from typing import Protocol, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
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
        layout: NamedSharding | None = None,
    ) -> Float[Array, "B N T H"]:
        """Causal; columns before a query's `start` are hidden, and those `window` or more back.

        Args:
            layout: of the queries over the devices; None: one device, or as the compiler likes.
        """


def obstacle(
    name: str, config: ModelConfig, num_rows: int, length: int, layout: NamedSharding | None
) -> str | None:
    """What keeps a kernel from computing this model's attention; None when nothing does.

    Args:
        num_rows, length: of the batch.
        layout: of queries [B, N, T, H] over the devices; None: as the compiler likes.
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
    sizes = {"rows": num_rows, "kv heads": config.num_kv_heads, "blocks": length // _LANES}
    for (what, size), axes in zip(sizes.items(), layout.spec, strict=True):
        if size % num_parts(layout.mesh, axes):
            return f"{size} {what} do not divide among {num_parts(layout.mesh, axes)} devices"
    return None


def num_parts(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """Parts that these axes of a mesh cut an array's axis into."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def cudnn(
    query: Float[Array, "B N T H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    start: Int[Array, "B 1|T"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    layout: NamedSharding | None = None,
) -> Float[Array, "B N T H"]:
    """FlashAttention (arXiv 2307.08691) of cuDNN, through `jax.nn.dot_product_attention`."""
    del layout  # the compiler splits it
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
    layout: NamedSharding | None = None,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """Splash attention, JAX's sparse flash kernel for TPUs, one row at a time.

    Each text of a row is a segment, and so is padding: padding queries see padding.

    Args:
        layout: of the queries over the devices, each of which works on its rows, heads and
            columns; keys and values of all columns come to it.
        interpret: run on any device, slowly, for tests.
    """
    num_heads, length = query.shape[1:3]
    rows, heads, columns = layout.spec if layout else (None, None, None)
    q_shards = num_parts(layout.mesh, columns) if layout else 1
    if window is None:
        mask: masks.Mask = masks.CausalMask((length, length), shard_count=q_shards)
    else:
        mask = masks.LocalMask((length, length), (window - 1, 0), 0, shard_count=q_shards)
    part = length // q_shards
    kernel = splash_lib.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=_block_sizes(next(n for n in (512, 256, _LANES) if part % n == 0)),
        head_shards=num_parts(layout.mesh, heads) if layout else 1,
        q_seq_shards=q_shards,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    text = jnp.where(jnp.arange(length, dtype=jnp.int32)[None] >= start, start, -1)
    operands = kernel, query * scale, keys, values, text, text
    if layout is None:
        return _by_rows(*operands)
    of_keys, of_queries = P(rows, heads), P(rows, heads, columns)
    masks_split = kernel.manual_sharding_spec(NamedSharding(layout.mesh, P(heads, columns)))
    mixed: Array = jax.shard_map(
        _by_rows,
        mesh=layout.mesh,
        in_specs=(masks_split, of_queries, of_keys, of_keys, P(rows, columns), P(rows)),
        out_specs=of_queries,
        check_vma=False,  # a kernel's outputs do not say over what they vary
    )(*operands)
    return mixed


def _by_rows(
    kernel: splash_lib.SplashAttentionKernel,
    query: Float[Array, "B N Q H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    of_query: Int[Array, "B Q"],
    of_key: Int[Array, "B T"],
) -> Float[Array, "B N Q H"]:
    mixed = jax.vmap(kernel)(query, keys, values, splash_lib.SegmentIds(of_query, of_key))
    return cast(Array, mixed)  # residuals come with it only where they are asked for


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
