"""The device mesh and the one table that maps the models' logical axes to mesh axes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from refine_af import config as config_lib
from refine_af.models import kernels, processes, transformer
from refine_af.models.config import LoraConfig, ModelConfig

Axes = tuple[str, ...]
Rule = str | tuple[str, ...] | None  # mesh axes, more than one in order

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")
# Logical axis -> mesh axis. Every axis that a model names stands here exactly once.
RULES: dict[str, Rule] = {
    "embed": ("fsdp", "sequence"),
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "hidden": "tensor",
    "layers": None,
    "norm": None,
    "rank": None,
    "score": None,  # the one output of a reward model
    "buckets": None,  # of relative positions, and
    "bucket_heads": None,  # the few numbers that each of them has
}
# For decoding: weights are cut over all but `data` as over `tensor`, so that partial products are
# added up twice a layer, where the training layout would do so after every linear.
SAMPLING_RULES: dict[str, Rule] = {
    **RULES,
    "embed": None,
    **{axis: AXES[1:] for axis in ("vocab", "heads", "kv_heads", "hidden")},
}


def make_mesh(config: config_lib.Mesh, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """Mesh with the axes `AXES` over all devices.

    Raises:
        ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = devices if devices is not None else jax.devices()
    sizes = [config.data, config.fsdp, config.sequence, config.tensor]
    named = " ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    remedy = "give one axis as -1 to take the rest"
    if sizes.count(-1) == 1 and all(size > 0 or size == -1 for size in sizes):
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = len(devices) // known
        remedy = f"the others multiply to {known}, which does not divide it: change one of them"
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh {named}: the product must be the number of devices, {len(devices)}; {remedy}"
        )
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, auto, devices=devices)


def check(model: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """Refuse a mesh that would leave most of the model whole on every device.

    Raises:
        ValueError: an axis does not divide what it is there to divide.
    """
    for axis, name in (
        ("tensor", "num_heads"),
        ("tensor", "hidden_dim"),
        ("fsdp", "embed_dim"),
        ("sequence", "embed_dim"),
    ):
        size, parts = getattr(model, name), mesh.shape[axis]
        if size % parts:
            fitting = [n for n in range(1, parts) if mesh.size % n == 0 and size % n == 0]
            raise ValueError(
                f"mesh {axis}={parts} does not divide the model's {name}={size}; take "
                f"{axis}={fitting[-1]}, and give the other devices to another axis"
            )


def whole_heads(model: ModelConfig, mesh: jax.sharding.Mesh) -> str | None:
    """One line where sampling leaves attention and cache whole on devices that could share them."""
    claimed = spec(("kv_heads",), (model.num_kv_heads,), mesh, rules=SAMPLING_RULES)[0]
    parts, together = kernels.num_parts(mesh, claimed), mesh.size // mesh.shape["data"]
    sizes = [n for n in range(1, mesh.size + 1) if mesh.size % n == model.num_kv_heads % n == 0]
    if parts == together or parts >= sizes[-1]:
        return None
    return (
        f"while sampling, {together // parts} devices hold the same cache: mesh fsdp*sequence*"
        f"tensor={together} does not divide the model's {model.num_kv_heads} kv heads; take "
        f"fsdp={sizes[-1]}, sequence=1, tensor=1, data=-1, which cuts the weights into "
        f"{sizes[-1]}, too"
    )


def spec(
    axes: Axes,
    shape: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    head_dim: int = 1,
    rules: Mapping[str, Rule] = RULES,
) -> PartitionSpec:
    """Partition of an array with logical `axes`.

    An axis that its mesh axes do not divide is cut over the last of them, or stays whole (3 kv
    heads on 2 devices, say). Mesh axes of one device are not named. Heads of `head_dim` entries
    are never cut.

    Raises:
        ValueError: an axis has no rule, or two axes claim one mesh axis.
    """
    unknown = [axis for axis in axes if axis not in rules]
    if unknown:
        raise ValueError(f"logical axes {unknown} of {axes} have no sharding rule")
    claims = [_names(rules[axis]) for axis in axes]
    claimed = [name for names in claims for name in names]
    if len(set(claimed)) != len(claimed):
        raise ValueError(f"logical axes {axes} map to the same mesh axis twice: {claimed}")
    parts = []
    for axis, size, names in zip(axes, shape, claims, strict=True):
        pieces = size // head_dim if axis in ("heads", "kv_heads") else size
        names = tuple(name for name in names if mesh.shape[name] > 1)
        while names and pieces % int(np.prod([mesh.shape[name] for name in names])):
            names = names[1:]
        parts.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*parts)


def _names(rule: Rule) -> tuple[str, ...]:
    return (rule,) if isinstance(rule, str) else rule or ()


def param_shardings(
    model: ModelConfig,
    lora: LoraConfig | None,
    mesh: jax.sharding.Mesh,
    *,
    stacked: bool = True,
    rules: Mapping[str, Rule] = RULES,
) -> tuple[Any, Any]:
    """(base, adapter) trees of shardings."""
    base, adapter = transformer.logical_axes(model, lora, stacked=stacked)
    head_dim = model.head_dim
    return (
        shardings_of(base, mesh, head_dim=head_dim, rules=rules),
        shardings_of(adapter, mesh, head_dim=head_dim, rules=rules),
    )


def shardings_of(
    axes: Any, mesh: jax.sharding.Mesh, *, head_dim: int, rules: Mapping[str, Rule] = RULES
) -> Any:
    """Tree of shardings for a tree of shapes and logical axes, any model's."""

    def sharding(leaf: tuple[jax.ShapeDtypeStruct, Axes]) -> NamedSharding:
        shape, names = leaf
        return NamedSharding(mesh, spec(names, shape.shape, mesh, head_dim, rules))

    return jax.tree.map(sharding, axes, is_leaf=lambda x: isinstance(x, tuple))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def rows_split(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of a training batch: first axis over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def attention_layout(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of queries [B, N, T, H] in training: rows over the batch axes, heads, columns."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, RULES["heads"], "sequence"))


def keep_rows_split(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Inside traced code: first axes stay split over the batch axes, where these divide them."""
    parts = batch_parts(mesh)
    sharding = rows_split(mesh)

    def keep(x: jax.Array) -> jax.Array:
        divides = x.ndim > 0 and x.shape[0] % parts == 0
        return jax.lax.with_sharding_constraint(x, sharding) if divides else x

    return jax.tree.map(keep, tree)


def shard_batch(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Put host arrays on the mesh, split along their first axis where that divides."""
    parts = batch_parts(mesh)

    def put(x: Any) -> jax.Array:
        divides = np.ndim(x) > 0 and np.shape(x)[0] % parts == 0
        return processes.to_devices(x, rows_split(mesh) if divides else replicated(mesh))

    return jax.tree.map(put, tree)


def batch_parts(mesh: jax.sharding.Mesh) -> int:
    """Parts that a training batch is divided into."""
    return kernels.num_parts(mesh, BATCH_AXES)


def slot_sharding(mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of the sampler's arrays [B, ...], and of caches [B, K, ...], where those divide."""
    rows = "data" if shape and shape[0] % mesh.shape["data"] == 0 else None
    heads = (
        spec(("kv_heads",), shape[1:2], mesh, rules=SAMPLING_RULES)[0] if len(shape) > 2 else None
    )
    return NamedSharding(mesh, PartitionSpec(*(rows, heads)[: len(shape)]))


def shard_slots(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Put the sampler's arrays on the mesh."""

    def put(x: Any) -> jax.Array:
        return processes.to_devices(x, slot_sharding(mesh, np.shape(x)))

    return jax.tree.map(put, tree)
