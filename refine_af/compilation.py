"""Programs of a run, compiled for devices that need not be there: what they would take and do.

Nothing is allocated: parameters and batches are shapes with shardings. The compiler of TPUs comes
with `pip install -e ".[tpu]"` and needs no TPU.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

from refine_af import (
    base_model,
    finetuning,
    flops,
    hlo,
    logprobs,
    memory,
    packing,
    policy_update,
    sampling,
    tokens,
    training,
    trunk,
)
from refine_af import mesh as mesh_lib
from refine_af.base_model import BaseModel, lora_config
from refine_af.config import Experiment
from refine_af.hlo import Collective
from refine_af.models import heads, transformer, weights
from refine_af.models.one_line import one_line
from refine_af.models.transformer import Params
from refine_af.packing import Answered
from refine_af.policy import Policy
from refine_af.rollout import Reading, Rollout
from refine_af.training import TrainState

GIB = 2**30
SHARE = 0.9  # of a device's memory that a program may take
# Memory of a chip in GiB, from Google Cloud's documentation.
_MEMORY = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
# What the library would ask the machines of a slice for.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations at a time
}
SAMPLING = ("sample prefill", "sample decode")
_LARGE = 64 * 2**20  # bytes of a tensor that no device should hold whole

Tree = Any


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
        moved: memory traffic, with every loop's body counted once.
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
    moved: float
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


def devices(topology: str) -> Sequence[Any]:
    """Devices of a TPU slice such as `v5e:4x4`, or those at hand for `local`.

    Raises:
        ValueError: no such topology, or its compiler is not installed.
    """
    if topology == "local":
        return jax.devices()
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:120]
        raise ValueError(
            f"--topology={topology}: {reason}; expected local or a slice such as v5e:4x4, "
            "v5p:2x2x2, v6e:2x4; the compiler comes with pip install -e '.[tpu]'"
        ) from None
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read their programs back
    return list(found.devices)


def memory_of(device: Any, num_devices: int) -> int:
    """Bytes of memory of a device."""
    if device.device_kind in _MEMORY:
        return _MEMORY[device.device_kind] * GIB
    return memory.device_bytes(device, num_devices)


class TooLargeError(Exception):
    """The compiler finds no way to hold a program in a device's memory; with its reason."""


class Program(NamedTuple):
    """A program and the shapes that it is compiled for."""

    name: str
    function: Any  # jitted
    arguments: tuple[Tree, ...]
    donated: Tree  # the argument that is
    model_operations: float  # over all devices
    resident: int  # bytes on a device that the run holds besides


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
        moved=costs.get("bytes accessed", 0.0),
        collectives=found,
        warnings=[
            *_whole_parameters(found, base),
            *_replicated(program.arguments, mesh),
            *_not_split(hlo.shapes_made(traced.jaxpr, _LARGE) & hlo.shapes_in(text), base),
            *_not_donated(donated, sizes.alias_size_in_bytes),
            *_whole_heads(program, base),
        ],
        least_seconds=flops.least_seconds(device.device_kind, operations, read),
        seconds=time.monotonic() - began,
    )


def _whole_parameters(found: Sequence[Collective], base: BaseModel) -> list[str]:
    """Gathers of all layers' weights at a time; one layer's are as they should be."""
    layers = base.params["layers"]
    sizes = {leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers)}
    return [
        f"{one.kind} of a whole stack of layers, {one.shape}"
        for one in found
        if base.mesh.size > 1 and one.size in sizes and one.size > _LARGE
    ]


def _replicated(arguments: Tree, mesh: jax.sharding.Mesh) -> list[str]:
    return [
        f"every device holds all of {jax.tree_util.keystr(path)}, {x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(arguments)
        if mesh.size > 1 and bytes_on_device(x) > _LARGE and x.sharding.is_fully_replicated
    ]


def _not_split(shapes: Iterable[hlo.Shape], base: BaseModel) -> list[str]:
    """Results that every device has whole.

    Weights are gathered, as they should be: a layer's at a time, and the head's in blocks.
    """
    params, model = jax.tree.leaves(base.params), base.config
    weights_ = {tuple(sorted(x.shape[i:])) for x in params for i in (0, 1)}

    block = model.vocab_size // logprobs.num_blocks(model.vocab_size)
    weights_.add(tuple(sorted((model.embed_dim, block))))
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


def bytes_on_device(tree: Tree) -> int:
    """Bytes that a device has of shapes with shardings; what is no shape is left out."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if isinstance(x, jax.ShapeDtypeStruct)
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as shapes.

    Attributes:
        base: its parameters are shapes.
        prompt_length: tokens of the longest prompt.
    """

    config: Experiment
    base: BaseModel
    prompt_length: int

    @property
    def _row_length(self) -> int:
        options = self.config.ppo
        return tokens.bucket(
            max(self.prompt_length + options.sampling.max_new_tokens, options.row_length)
        )

    def programs(self, kind: str) -> list[Program]:
        """Programs of a kind, one of `KINDS`."""
        return KINDS[kind](self)

    # PPO and fine-tuning

    def state(self, params: Tree, shardings: Tree, tx: optax.GradientTransformation) -> TrainState:
        """Train state of these trained parameters; the optimizer's arrays lie as theirs."""
        params = _placed(params, shardings)
        state = jax.eval_shape(lambda p: training.new_state(p, tx, 0.0), params)
        whole = mesh_lib.replicated(self.base.mesh)

        owners = dict(jax.tree_util.tree_leaves_with_path(params))

        def place(path: tuple[Any, ...], x: Any) -> Any:
            """Moments have the path of their parameter behind their own."""
            owner = next((owners[path[i:]] for i in range(len(path)) if path[i:] in owners), x)
            sharding = owner.sharding if owner is not x and owner.shape == x.shape else whole
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        placed: TrainState = jax.tree_util.tree_map_with_path(place, state)
        return placed

    def _trunk(self, options: trunk.Options) -> tuple[Params, Params]:
        """(shapes, shardings) of what is trained of a trunk."""
        config = lora_config(options.lora) if options.trained == "lora" else None
        shapes = jax.eval_shape(
            lambda: transformer.init(self.base.config, config, key=jax.random.key(0))
        )
        shardings = mesh_lib.param_shardings(self.base.config, config, self.base.mesh)
        if config:
            return {"adapter": shapes[1]}, {"adapter": shardings[1]}
        masters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shapes[0])
        return {"model": masters}, {"model": shardings[0]}

    def _ppo_state(self) -> TrainState:
        options = self.config.ppo
        shapes, shardings = self._trunk(options)
        head = jax.eval_shape(lambda: heads.init_value_head(self.base.config.embed_dim))
        whole = mesh_lib.replicated(self.base.mesh)
        params = {"policy": shapes, "value_head": head}
        layout = {"policy": shardings, "value_head": jax.tree.map(lambda _: whole, head)}
        if options.critic == "separate":
            params["critic"], layout["critic"] = shapes, shardings
        return self.state(params, layout, policy_update.optimizer(options))

    def update(self) -> list[Program]:
        """The PPO update of a rollout whose answers are all as long as they may be, one a row."""
        options, n = self.config.ppo, self.config.ppo.batch_size
        t, r = self._row_length, options.sampling.max_new_tokens
        ids, answers = self._rows(n, t, dtype=jnp.int32), self._rows(n, r)
        places = self._rows(n, r, dtype=jnp.int32)
        rows = Rollout(ids, ids, places, answers, places, places, answers, self._rows(n))
        state = self._ppo_state()
        policy = Policy(self.base, options)
        function = policy_update.make_update(policy.definition, options, self.base.mesh)
        reading = Reading(answers, answers, answers)
        arguments = self.base.params, state, rows, reading, self._key()
        wanted = flops.of_step(self.base.config, options, n * t, n * r)
        wanted -= 2 * flops.forward(self.base.config, n * t, n * r)  # reading
        if options.critic == "separate":
            wanted -= flops.forward(self.base.config, n * t, 0)
        return [Program("update", function, arguments, state, wanted, 0)]

    def sft(self) -> list[Program]:
        """A step of fine-tuning on examples of the greatest length, one a row."""
        options, base = self.config.sft, self.base
        tx = finetuning.optimizer(options, 100)
        state = self.state(*self._trunk(options), tx)
        definition = trunk.definition(base, options)
        step = finetuning.make_step(definition, options, tx, options.num_microbatches)
        function = training.in_place(step, state)
        b, t = options.batch_size, options.max_length
        ids, places = (self._rows(b, n, dtype=jnp.int32) for n in (t, t - 1))
        examples = Answered(ids, ids, places, self._rows(b, t - 1))
        passes = 2 if options.trained == "lora" else 3
        wanted = passes * flops.forward(base.config, b * t, b * (t - 1))
        return [Program("sft", function, (base.params, state, examples), state, wanted, 0)]

    def score(self) -> list[Program]:
        """A judge of the base model's size reads whole texts; so does a trained oracle's trunk."""
        n, t = self.config.ppo.batch_size, self._row_length
        ids, ends = self._rows(n, t, dtype=jnp.int32), self._rows(n, dtype=jnp.int32)
        arguments = self.base.definition, self.base.params, ids, ends, ends
        wanted = flops.forward(self.base.config, n * t, n * t)
        return [Program("score", logprobs.mean_of_span, arguments, (), wanted, self._held())]

    # Sampling

    def sample(self) -> list[Program]:
        """Reading a piece of a prompt, and one more token for every slot with a full cache."""
        base, mesh, options = self.base, self.base.mesh, self.config.ppo
        definition = transformer.define(base.config, stacked=False)
        shapes = jax.eval_shape(transformer.unstack_layers, base.params)
        layout = mesh_lib.param_shardings(
            base.config, None, mesh, stacked=False, rules=mesh_lib.SAMPLING_RULES
        )[0]
        params = _placed(shapes, layout)
        needs = sampling.Needs(True, False, False, False, False)
        length = packing.bucket(self.prompt_length + options.sampling.max_new_tokens)
        slots = _slots(
            mesh,
            lambda: sampling.empty_slots(definition, mesh, options.batch_size, length, 1, needs),
        )
        whole = mesh_lib.replicated(mesh)
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        size = min(self.prompt_length, base.engine(1).max_read)
        scratch = _slots(mesh, lambda: sampling.scratch(definition, length))
        piece = jax.ShapeDtypeStruct((1, size), jnp.int32, sharding=whole)
        one = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=whole)
        reading = definition, params, scratch, piece, one, None, one
        writing = definition, params, slots, None, needs, count, count
        tokens_written = options.batch_size
        return [
            Program(
                SAMPLING[0],
                sampling.jit_extend,
                reading,
                scratch,
                flops.forward(base.config, size, 0),
                self._held() + bytes_on_device(slots),
            ),
            Program(
                SAMPLING[1],
                sampling.jit_decode,
                writing,
                slots,
                flops.forward(base.config, tokens_written, tokens_written),
                self._held(),
            ),
        ]

    def _held(self) -> int:
        """Base parameters and train state stay where they are while answers are sampled."""
        return bytes_on_device((self.base.params, self._ppo_state()))

    def _rows(self, *shape: int, dtype: Any = jnp.float32) -> Any:
        parts = mesh_lib.batch_parts(self.base.mesh)
        split = mesh_lib.rows_split(self.base.mesh)
        sharding = mesh_lib.replicated(self.base.mesh) if shape[0] % parts else split
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _key(self) -> Any:
        key = jax.eval_shape(lambda: jax.random.key(0))
        sharding = mesh_lib.replicated(self.base.mesh)
        return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding)


KINDS: dict[str, Callable[[Run], list[Program]]] = {
    "update": Run.update,
    "sample": Run.sample,
    "score": Run.score,
    "sft": Run.sft,
}


def abstract_run(config: Experiment, topology: str, prompt_length: int) -> Run:
    """A run on a topology, whose mesh is the config's.

    Raises:
        ValueError: the topology is not known, or the mesh does not have its number of devices.
    """
    mesh = mesh_lib.make_mesh(config.mesh, list(devices(topology)))
    source = base_model.open_source(config.model)
    shapes = jax.eval_shape(lambda: transformer.init(source.config, key=jax.random.key(0))[0])
    params = _placed(shapes, mesh_lib.param_shardings(source.config, None, mesh)[0])
    definition = transformer.define(source.config, layout=mesh_lib.attention_layout(mesh))
    return Run(config, BaseModel(source, definition, params, mesh), prompt_length)


def _placed(shapes: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _slots(mesh: jax.sharding.Mesh, make: Callable[[], Tree]) -> Tree:
    """Shapes of the sampler's arrays as it lays them out."""
    shapes = jax.eval_shape(make)
    return _placed(shapes, jax.tree.map(lambda x: mesh_lib.slot_sharding(mesh, x.shape), shapes))


def shortage(figures: Figures) -> str:
    """By how much a program does not fit, and what to change of the larger part of it."""
    over = (figures.total - SHARE * figures.memory) / GIB
    held = figures.temporaries < figures.arguments + figures.resident
    more = "use more devices, or more of them for mesh.fsdp and mesh.tensor"
    what = more if held and figures.program not in SAMPLING else remedy(figures.program)
    return f"{over:.1f} GiB too much for {SHARE:.0%} of the memory; {what}"


def remedy(program: str) -> str:
    """What makes a program smaller on a device."""
    if program in SAMPLING:
        return "lower ppo.batch_size, set ppo.int8_cache, or use more devices"
    if program == "score":
        return "lower ppo.batch_size, or use more devices"
    name = "sft" if program == "sft" else "ppo"
    return f"raise {name}.num_microbatches, set {name}.remat=full, or use more devices"


def sharding_table(base: BaseModel) -> list[str]:
    """A line for each parameter: path, shape, layout, MiB on a device."""
    lines = []
    for path, x in weights.flat(base.params):
        size = bytes_on_device(x) / 2**20
        lines.append(f"{path:48} {list(x.shape)!s:24} {x.sharding.spec!s:40} {size:10.2f}")
    return lines
