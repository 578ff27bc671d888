"""Programs of a run, compiled: what each takes and does on a device, and what looks wrong."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from refine_af import flops, hlo, logprobs, memory
from refine_af import mesh as mesh_lib
from refine_af.abstract_run import SAMPLING, Program, Run, Tree, bytes_on_device
from refine_af.base_model import BaseModel
from refine_af.config import Experiment
from refine_af.hlo import Collective
from refine_af.models import weights
from refine_af.models.one_line import one_line

GIB = 2**30
SHARE = 0.9  # of a device's memory that a program may take
_LARGE = 64 * 2**20  # bytes of a tensor that no device should hold whole


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one program takes and does on each device; sizes in bytes.

    Attributes:
        arguments, outputs, temporaries, aliased: as the compiler says; aliased are outputs in the
            place of donated arguments.
        resident: what else the run keeps on the device meanwhile.
        memory: what the device has.
        operations: of all products, a device's share.
        model_operations: those that the model itself needs (6ND, 4ND of frozen weights, 2ND).
        moved: memory traffic, with every loop's body counted once; None where the compiler does not
            say.
        warnings: what looks wrong.
        least_seconds: of all products at the maker's rate, or of reading the arguments once,
            whichever is longer; None for a device that is not known.
    """

    program: str
    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    resident: int
    memory: int
    operations: float
    model_operations: float
    moved: float | None
    collectives: list[Collective]
    warnings: list[str]
    least_seconds: float | None
    seconds: float  # that compiling took

    @property
    def total(self) -> int:
        """Bytes on a device while the program runs."""
        taken = self.arguments + self.outputs + self.temporaries - self.aliased
        return taken + self.resident

    @property
    def fits(self) -> bool:
        """Whether a tenth of the memory stays free."""
        return self.total <= SHARE * self.memory


def memory_of(device: Any, num_devices: int) -> int:
    """Bytes of memory of a device: what a program may have of one at hand, else all of it."""
    try:
        return memory.device_bytes(device, num_devices)
    except jax.errors.JaxRuntimeError:  # it is not there
        return flops.CHIPS[device.device_kind].memory * GIB


class TooLargeError(Exception):
    """The compiler finds no way to hold a program in a device's memory; with its reason."""


def compiled(program: Program, base: BaseModel) -> Figures:
    """Compile one program for the devices of its arguments.

    Raises:
        TooLargeError: its compiler, which knows the memory of its devices, refuses it.
    """
    began = time.monotonic()
    traced = program.function.trace(*program.arguments)
    try:
        executable = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if memory.ran_out(error):
            raise TooLargeError(one_line(error)) from None
        raise
    sizes, costs = executable.memory_analysis(), executable.cost_analysis() or {}
    text, mesh = executable.as_text(), base.mesh
    found = hlo.collectives(text)
    donated = bytes_on_device(program.donated)
    operations, device = hlo.operations(traced.jaxpr) / mesh.size, mesh.devices.flat[0]
    read = sizes.argument_size_in_bytes
    return Figures(
        program=program.name,
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        aliased=sizes.alias_size_in_bytes,
        resident=program.resident,
        memory=memory_of(device, mesh.size),
        operations=operations,
        model_operations=program.model_operations / mesh.size,
        moved=costs.get("bytes accessed"),
        collectives=found,
        warnings=[
            *_whole_parameters(found, program, base),
            *_replicated(program.arguments, mesh),
            *_not_split(hlo.shapes_made(traced.jaxpr, _LARGE) & hlo.shapes_in(text), base),
            *_not_donated(donated, sizes.alias_size_in_bytes),
            *_whole_heads(program, base),
        ],
        least_seconds=flops.least_seconds(device.device_kind, operations, read),
        seconds=time.monotonic() - began,
    )


def _whole_parameters(found: Sequence[Collective], program: Program, base: BaseModel) -> list[str]:
    """Gathers of weights that could stay where they are, whatever they are gathered as.

    Training gathers a layer's weights at a time, as it should, and the head's in blocks; sampling
    should move none.
    """
    if program.name in SAMPLING:
        params, least = program.arguments[1], _LARGE // 16
    else:
        params, least = base.params, _LARGE
    large = (x for x in jax.tree.leaves(params) if x.size * x.dtype.itemsize > least)
    sizes = {tuple(sorted(n for n in x.shape if n > 1)) for x in large}
    return [
        f"{one.kind} of a whole parameter, {one.shape}"
        for one in found
        if base.mesh.size > 1 and "gather" in one.kind and one.sizes & sizes
    ]


def _replicated(arguments: Tree, mesh: jax.sharding.Mesh) -> list[str]:
    return [
        f"every device holds all of {jax.tree_util.keystr(path)}, {x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(arguments)
        if mesh.size > 1 and bytes_on_device(x) > _LARGE and x.sharding.is_fully_replicated
    ]


def _not_split(shapes: Iterable[hlo.Shape], base: BaseModel) -> list[str]:
    """Results that every device has whole.

    Weights are gathered, as they should be: a layer's at a time, and the head's in blocks. A
    device's own part of all layers' may look like the whole of something else.
    """
    model = base.config
    others = {name: x for name, x in base.params.items() if name != "layers"}
    weights_ = {tuple(sorted(x.shape)) for x in jax.tree.leaves(others)}
    weights_ |= {tuple(sorted(x.shape[1:])) for x in jax.tree.leaves(base.params["layers"])}
    block = model.vocab_size // logprobs.num_blocks(model.vocab_size)
    weights_.add(tuple(sorted((model.embed_dim, block))))
    parts = (x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(base.params))
    weights_ |= {tuple(sorted(shape)) for shape in parts}
    return [
        f"every device computes all of {list(shape)}"
        for shape in sorted(shapes)
        if base.mesh.size > 1 and tuple(sorted(shape)) not in weights_
    ]


def _not_donated(donated: int, aliased: int) -> list[str]:
    missing = donated - aliased
    return [f"{missing / GIB:.2f} GiB of the donated state are not reused"] * (missing > _LARGE)


def _whole_heads(program: Program, base: BaseModel) -> list[str]:
    found = mesh_lib.whole_heads(base.config, base.mesh)
    return [found] if found and program.name in SAMPLING else []


def shortage(figures: Figures, config: Experiment) -> str:
    """By how much a program does not fit, and what to change of the larger part of it.

    Temporaries include gradients, which are as large as what is trained.
    """
    over = (figures.total - SHARE * figures.memory) / GIB
    held = figures.temporaries < figures.arguments + figures.resident + figures.aliased
    sampling = figures.program in SAMPLING
    what = remedy(figures.program, config)
    if held and not sampling:
        more = "use more devices, or more of them for mesh.fsdp and mesh.tensor"
        what = ", ".join([*memory.levers(_section(figures.program), config, ["trained"]), more])
    return f"{over:.1f} GiB too much for {SHARE:.0%} of the memory; {what}"


def remedy(program: str, config: Experiment) -> str:
    """What makes a program smaller on a device, with what it is now."""
    fields = ["batch_size", "num_microbatches", "remat", "trained"]
    if program in SAMPLING:
        fields = ["batch_size", "int8_cache"]
    elif program == "read":
        fields = ["num_microbatches"]
    elif program == "score":
        fields = ["batch_size"]
    return ", ".join([*memory.levers(_section(program), config, fields), "or use more devices"])


def _section(program: str) -> str:
    """Of the config that a program's sizes are in."""
    return "sft" if program == "sft" else "ppo"


def sharding_table(run: Run) -> list[str]:
    """A line for each parameter, of the base model and what PPO trains, and one for all of them."""
    trained = {"ppo": run.ppo_state().params}
    leaves = [*weights.flat(run.base.params), *weights.flat(trained)]
    lines = [(path, list(x.shape), x.sharding.spec, bytes_on_device(x)) for path, x in leaves]
    total = sum(size for *_, size in lines)
    rows = [("parameter", "shape", "layout", "MiB a device")]
    rows += [
        (path, str(shape), str(spec), f"{size / 2**20:.2f}")
        for path, shape, spec, size in [*lines, ("all", "", "", total)]
    ]
    first, second, third, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [f"{a:{first}} {b:{second}} {c:{third}} {d:>12}" for a, b, c, d in rows]
