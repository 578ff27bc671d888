"""A run as shapes: its programs and what they are given, for devices that need not be there.

Nothing is allocated: parameters and batches are shapes with shardings.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from refine_af import (
    base_model,
    drafting,
    finetuning,
    flops,
    logprobs,
    packing,
    policy_update,
    rollout,
    sampling,
    tokens,
    topologies,
    training,
    trunk,
)
from refine_af import mesh as mesh_lib
from refine_af.base_model import BaseModel, lora_config
from refine_af.config import Experiment
from refine_af.models import heads, transformer
from refine_af.models.transformer import Params
from refine_af.packing import Answered
from refine_af.policy import Policy
from refine_af.rollout import Reading, Rollout
from refine_af.training import TrainState

SAMPLING = ("sample prefill", "sample decode")

Tree = Any


class Program(NamedTuple):
    """A program and the shapes that it is compiled for."""

    name: str
    function: Any  # jitted
    arguments: tuple[Tree, ...]
    donated: Tree  # the argument that is
    model_operations: float  # over all devices
    resident: int  # bytes on a device that the run holds besides


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

    def ppo_state(self) -> TrainState:
        """Of PPO: what is trained, with its optimizer."""
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
        state = self.ppo_state()
        policy = Policy(self.base, options)
        function = policy_update.make_update(policy.definition, options, self.base.mesh, state)
        reading = Reading(answers, answers, answers)
        arguments = self.base.params, state, rows, reading, self._key()
        wanted = flops.of_step(self.base.config, options, n * t, n * r)
        wanted -= 2 * flops.forward(self.base.config, n * t, n * r)  # reading
        if options.critic == "separate":
            wanted -= flops.forward(self.base.config, n * t, 0)
        return [Program("update", function, arguments, state, wanted, 0)]

    def read(self) -> list[Program]:
        """What policy, critic and reference say of the same rollout, before its update."""
        options, base = self.config.ppo, self.base
        (update,) = self.update()
        _, state, rows, *_ = update.arguments
        pieces = options.num_minibatches * options.num_microbatches
        arguments = (
            Policy(base, options).definition,
            base.definition,
            base.params,
            state.params,
            rows,
            options.sampling.temperature,
            pieces,
        )
        n, t = options.batch_size, self._row_length
        wanted = 2 * flops.forward(base.config, n * t, n * options.sampling.max_new_tokens)
        if options.critic == "separate":
            wanted += flops.forward(base.config, n * t, 0)
        held = bytes_on_device((state.opt_state, state.scores))
        return [Program("read", rollout.jit_read, arguments, (), wanted, held)]

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
        """Reading a piece of a prompt, and one more pass for every slot with a full cache."""
        base, mesh, options = self.base, self.base.mesh, self.config.ppo
        config = dataclasses.replace(
            base.config, int8_weights=options.int8_weights, int8_cache=options.int8_cache
        )
        definition = transformer.define(config, stacked=False)

        def laid_out(params: Params) -> Params:
            whole = transformer.int8_kernels(params) if options.int8_weights else params
            return transformer.unstack_layers(whole)

        shapes = jax.eval_shape(laid_out, base.params)
        layout = mesh_lib.param_shardings(
            config, None, mesh, stacked=False, rules=mesh_lib.SAMPLING_RULES
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
        decode: Any = sampling.jit_decode
        writing: tuple[Any, ...] = definition, params, slots, None, needs
        tokens_written = options.batch_size * (base.draft_tokens + 1)
        if base.draft_tokens:
            decode = drafting.jit_decode
            texts = _slots(mesh, lambda: jnp.zeros((options.batch_size, length), jnp.int32))
            writing = definition, params, slots, texts, None, needs, base.draft_tokens
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
                decode,
                (*writing, count, count),
                slots,
                flops.forward(base.config, tokens_written, tokens_written),
                self._held(),
            ),
        ]

    def _held(self) -> int:
        """Base parameters and train state stay where they are while answers are sampled."""
        return bytes_on_device((self.base.params, self.ppo_state()))

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
    "read": Run.read,
    "update": Run.update,
    "sample": Run.sample,
    "score": Run.score,
    "sft": Run.sft,
}


def abstract_run(config: Experiment, topology: str, prompt_length: int) -> Run:
    """A run on a topology, whose mesh is the config's.

    Raises:
        ValueError: the topology is not known, the mesh does not have its number of devices or does
            not divide the model, or a decode kernel cannot compute its attention there.
    """
    mesh = mesh_lib.make_mesh(config.mesh, list(topologies.devices(topology)))
    source = base_model.open_source(config.model, mesh)
    mesh_lib.check(source.config, mesh)
    shapes = jax.eval_shape(lambda: transformer.init(source.config, key=jax.random.key(0))[0])
    params = _placed(shapes, mesh_lib.param_shardings(source.config, None, mesh)[0])
    definition = transformer.define(source.config, layout=mesh_lib.attention_layout(mesh))
    base = BaseModel(source, definition, params, mesh, config.model.draft_tokens)
    return Run(config, base, prompt_length)


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
