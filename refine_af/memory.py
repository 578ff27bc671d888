"""Memory of caches and train states, computed before anything is made, and advice when it ends."""

import dataclasses
import functools
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import psutil

from refine_af.config import Experiment
from refine_af.mesh import slot_sharding
from refine_af.models import cache, processes
from refine_af.models.config import ModelConfig

_SHARE = 0.9  # of the free memory that caches may take


@functools.cache  # a cache is traced for it
def cache_bytes(
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    num_slots: int,
    length: int,
    *,
    windows: bool = True,
) -> int:
    """Bytes on each device of `cache.empty(config, num_slots, length, windows=windows)`."""

    def on_device(x: jax.ShapeDtypeStruct) -> int:
        part = slot_sharding(mesh, x.shape).shard_shape(x.shape)
        return int(np.prod(part)) * x.dtype.itemsize

    shapes = jax.eval_shape(lambda: cache.empty(config, num_slots, length, windows=windows))
    return sum(map(on_device, jax.tree.leaves(shapes.layers)))


def free_bytes(mesh: jax.sharding.Mesh) -> int:
    """Bytes that caches may take on each device of the mesh, the fullest host's counting."""
    local = mesh.local_devices
    stats = [device.memory_stats() for device in local]
    if all(stats):
        least = min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    else:  # the host's memory, which its devices share
        least = psutil.virtual_memory().available // len(local)
    return min(processes.everyone(int(_SHARE * least)))


def device_bytes(device: jax.Device, num_devices: int) -> int:
    """Memory of a device; the host's, in equal parts, where it does not say."""
    stats = device.memory_stats()
    return int(stats["bytes_limit"] if stats else psutil.virtual_memory().total // num_devices)


def affordable_slots(
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    *,
    wanted: int,
    length: int,
    tail_length: int,
    prefix_length: int,
    scratch_length: int,
    free: int | None,
) -> int:
    """Slots whose caches fit into memory: `wanted`, or fewer with a notice on standard error.

    Args:
        wanted: a multiple of the number of parts of a batch.
        length: tokens of the longest text; caches grow up to it, so that an old one and a new
            one are there at the same time.
        tail_length: columns that are written apart before they join a cache; 0: none.
        prefix_length: tokens of a shared beginning.
        scratch_length: tokens of the cache that a long prompt is read into.
        free: bytes on each device; None: what is free now.

    Raises:
        ValueError: not even one slot a part fits.
    """
    free = free_bytes(mesh) if free is None else free
    parts = mesh.shape["data"]
    single = sum(cache_bytes(config, mesh, 1, n) for n in (prefix_length, scratch_length) if n)

    def needed(num_slots: int) -> int:
        kept = sum(cache_bytes(config, mesh, num_slots, n) for n in (length, length * 3 // 4))
        if not tail_length:
            return single + kept
        return single + kept + cache_bytes(config, mesh, num_slots, tail_length, windows=False)

    num_slots = wanted
    while needed(num_slots) > free and num_slots > parts:
        num_slots = max(num_slots // 2 // parts, 1) * parts
    figures = (
        f"the caches of {num_slots} slots of {length} tokens take {needed(num_slots) / 2**20:.1f} "
        f"MiB on each device, and {free / 2**20:.1f} MiB are free"
    )
    if needed(num_slots) > free:
        raise ValueError(f"{figures}; shorten prompts or max_new_tokens, or use more devices")
    if num_slots < wanted:
        notice = f"notice: {num_slots} slots instead of {wanted}: {figures}"
        processes.by_writer(lambda: print(notice, file=sys.stderr))
    return num_slots


_SMALLER = {
    "train_ppo": "train an adapter (lora), take ppo.optimizer=adafactor",
    "finetune": "train an adapter (lora) of low sft.lora.rank",
}


def check_state(state: Any, params: Any, mesh: jax.sharding.Mesh, stage: str) -> None:
    """See to it that a train state and its gradient fit: the least that an update takes.

    Args:
        state: shapes, as `jax.eval_shape` gives them; large arrays lie over all axes but data.
        params: the part of it that is trained.

    Raises:
        ValueError: they do not.
    """
    parts = mesh.size // mesh.shape["data"]
    needed, free = (_num_bytes(state) + _num_bytes(params)) // parts, free_bytes(mesh)
    if needed > free:
        raise ValueError(
            f"{stage}: the train state and its gradient take {needed / 2**30:.1f} GiB on each "
            f"device, and {free / 2**30:.1f} GiB are free; {_SMALLER[stage]}, or raise mesh.fsdp"
        )


def _num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# Fields of a stage's section that decide how much memory it takes, and what to do with them.
_LEVERS = {
    "batch_size": "lower {}",
    "num_microbatches": "raise {}",
    "remat": "set {}=full",
    "trained": "set {}=lora",
    "int8_cache": "set {}=True",
    "max_length": "lower {}",
}
_SPENT = {"remat": "full", "trained": "lora", "int8_cache": True}  # nothing is left to change
_SECTIONS = {
    "generate_instructions": "instructions",
    "train_ppo": "ppo",
    "generate_instances": "instances",
    "finetune": "sft",
    "evaluate": "evaluation",
}


def ran_out(error: Exception) -> bool:
    """Whether it says that a device or the host has no memory left."""
    of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    text = str(error).lower()
    said = "resource_exhausted" in text or "out of memory" in text
    return isinstance(error, MemoryError) or (of_jax and said)


def levers(section: str, config: Experiment, fields: Iterable[str] = tuple(_LEVERS)) -> list[str]:
    """What to change in a section for less memory, of these fields, each with what it is now."""
    values = dataclasses.asdict(getattr(config, section))
    return [
        f"{_LEVERS[field].format(f'{section}.{field}')} (now {values[field]})"
        for field in fields
        if field in values and values[field] != _SPENT.get(field)
    ]


def advice(stage: str, config: Experiment, error: Exception) -> str:
    """One line for a stage that ran out of memory: how much was asked for, what to change."""
    section = _SECTIONS[stage]
    found = levers(section, config)
    sampling = getattr(getattr(config, section), "sampling", None)
    if sampling:
        name = f"{section}.sampling.max_new_tokens"
        found.append(f"lower {name} (now {sampling.max_new_tokens})")
    found.append(f"raise mesh.fsdp (now {config.mesh.fsdp})")
    reason = str(error).strip().partition("\n")[0][:200]
    return f"{stage}: out of memory ({reason}): {', '.join(found)}"
