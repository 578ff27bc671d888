"""A tiny policy that answered some prompts, and one PPO update of it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoders import source_of
from jax.tree_util import keystr, tree_leaves_with_path

from refine_af import config as config_lib
from refine_af import mesh as mesh_lib
from refine_af import policy_update, rollout
from refine_af.base_model import BaseModel
from refine_af.config import Ppo, Sampling
from refine_af.configs import tiny
from refine_af.mesh import shard_batch
from refine_af.models import transformer
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.registry import PRESETS
from refine_af.policy import Policy
from refine_af.requests import Completion, Request
from refine_af.rollout import Layout, Reading, Rollout
from refine_af.training import TrainState

CONFIG = tiny.get_config()
TINY = PRESETS["tiny"]
ROWS, ANSWER = 8, 16
PACKED, ALONE = Layout(72, ANSWER, 4), Layout(72, ANSWER, 8)  # some texts a row, or one
SPLIT = Layout(72, ANSWER, 16)  # rows that 8 devices share in each of 2 minibatches; half are empty
COLD = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=ANSWER)
HOT = Sampling(temperature=1.7, top_k=12, max_new_tokens=ANSWER)
# 2 epochs of 2 minibatches: steps that follow other steps; ratios soon leave 1 +- eps.
OPTIONS = dataclasses.replace(CONFIG.ppo, num_microbatches=1, clip_eps=0.02, sampling=COLD)
ONE_STEP = dataclasses.replace(OPTIONS, num_epochs=1, num_minibatches=1, sampling=HOT)
# With an optimizer that changes nothing and keeps the gradient as its state.
GRADIENT = dataclasses.replace(
    ONE_STEP, num_microbatches=2, gamma=0.98, entropy_coef=0.01, kl_coef=0.2, sampling=COLD
)
FULL = dataclasses.replace(GRADIENT, trained="full")
SEPARATE = dataclasses.replace(GRADIENT, critic="separate")
KEEPING = (GRADIENT, FULL, SEPARATE)
BOTH_CUTS = dataclasses.replace(HOT, top_p=0.8)
GROUPS = dataclasses.replace(ONE_STEP, group_size=4, estimator="rloo", sampling=COLD)
EOS = tuple(range(4, 34))  # so many that random text ends now and then

Sizes = tuple[int, int, int, int]  # of a mesh
ONE_DEVICE: Sizes = (1, 1, 1, 1)


@functools.cache
def base(sizes: Sizes = ONE_DEVICE) -> BaseModel:
    """Random weights with logits of order 1."""
    axes = config_lib.Mesh(**dict(zip(mesh_lib.AXES, sizes, strict=True)))
    mesh = mesh_lib.make_mesh(axes, jax.devices()[: int(np.prod(sizes))])
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.12 * rng.standard_normal(shape.shape)).astype(np.float32)

    shapes = jax.eval_shape(lambda: transformer.init(TINY, key=jax.random.key(0)))[0]
    params = jax.device_put(
        jax.tree_util.tree_map_with_path(draw, shapes),
        mesh_lib.param_shardings(TINY, None, mesh)[0],
    )
    source = source_of(TINY, params, EOS, byte_tokenizer())
    definition = transformer.define(TINY, layout=mesh_lib.attention_layout(mesh))
    return BaseModel(source, definition, params, mesh)


@functools.cache
def fresh_state(sizes: Sizes, options: Ppo = OPTIONS) -> TrainState:
    return policy_update.new_state(dataclasses.replace(CONFIG, ppo=options), base(sizes))


def new_state(
    noise: int | None = None, sizes: Sizes = ONE_DEVICE, options: Ppo = OPTIONS
) -> TrainState:
    """State before the first step; `noise` seeds weights as if after some training."""
    rng = np.random.default_rng(noise)

    def copy(x: jax.Array) -> jax.Array:
        return jax.device_put(np.array(x), x.sharding)  # updates eat the state they are given

    def draw(x: jax.Array) -> jax.Array:
        noise = rng.standard_normal(x.shape, np.float32)
        moved = np.array(x) + 0.02 * noise if options.trained == "full" else 0.1 * noise
        return jax.device_put(moved, x.sharding)

    state = jax.tree.map(copy, fresh_state(sizes, like(options)))
    return state if noise is None else state._replace(params=jax.tree.map(draw, state.params))


@functools.cache
def answers(
    noise: int | None = 1, sampling: Sampling = COLD
) -> tuple[Rollout, tuple[Completion, ...]]:
    """Host arrays of prompts of different lengths, and what the policy wrote to them."""
    params = Policy(base(), OPTIONS).for_sampling(new_state(noise).params)
    completions = base().engine(ROWS).generate(params, asked(sampling))
    return pack(completions, sampling), tuple(completions)


def asked(sampling: Sampling = COLD) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(tuple(rng.integers(4, 260, 5 + 2 * row).tolist()), sampling, seed=row)
        for row in range(ROWS)
    ]


def pack(
    completions: Sequence[Completion], sampling: Sampling = COLD, layout: Layout = PACKED
) -> Rollout:
    scores = np.random.default_rng(0).normal(size=ROWS).tolist()
    return rollout.build(asked(sampling), completions, scores, layout)


def like(options: Ppo) -> Ppo:
    """Options whose state has the same arrays."""
    return dataclasses.replace(
        OPTIONS,
        trained=options.trained,
        critic=options.critic,
        critic_warmup=min(options.critic_warmup, 1),
        optimizer=options.optimizer,
        lora=options.lora,
    )


def read(
    state: TrainState,
    rows: Rollout,
    temperature: float = COLD.temperature,
    sizes: Sizes = ONE_DEVICE,
    options: Ppo = OPTIONS,
) -> Reading:
    home = base(sizes)
    policy = Policy(home, options).definition
    return rollout.jit_read(
        policy, home.definition, home.params, state.params, rows, temperature, 2
    )


@functools.cache
def make_update(options: Ppo, sizes: Sizes = ONE_DEVICE) -> Any:
    keep = optax.GradientTransformation(
        lambda params: optax.tree.zeros_like(params),
        lambda grads, _, params: (optax.tree.zeros_like(params), grads),
    )
    with pytest.MonkeyPatch.context() as patch:
        if options in KEEPING:
            patch.setattr(policy_update, "optimizer", lambda _: keep)
        home, state = base(sizes), new_state(1, sizes, options)
        if options in KEEPING:
            state = state._replace(opt_state=optax.tree.zeros_like(state.params))
        return policy_update.make_update(
            Policy(home, options).definition, options, home.mesh, state
        )


def update(
    options: Ppo = OPTIONS,
    noise: int | None = 1,
    *,
    sizes: Sizes = ONE_DEVICE,
    key: int = 0,
    reading: Reading | None = None,
    **rows: Any,
) -> tuple[TrainState, dict[str, float]]:
    """One update of a state on answers that its policy drew; `rows` replaces arrays of these."""
    batch = answers(noise, options.sampling)[0]._replace(**rows)
    batch = shard_batch(base(sizes).mesh, batch)
    state = new_state(noise, sizes, options)._replace(kl_coef=jnp.asarray(options.kl_coef))
    reading = reading or read(state, batch, options.sampling.temperature, sizes, options)
    if options in KEEPING:
        state = state._replace(opt_state=optax.tree.zeros_like(state.params))
    run = make_update(options, sizes)
    state, metrics = run(base(sizes).params, state, batch, reading, jax.random.key(key))
    return state, {name: float(value) for name, value in metrics.items()}


def slow(value: Any) -> Any:
    """A parameter whose test is a slow one."""
    return pytest.param(value, marks=pytest.mark.slow)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    left, right = tree_leaves_with_path(actual), tree_leaves_with_path(expected)
    for (path, a), (_, b) in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=keystr(path))


def assert_equal(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, 0)


def distance(first: TrainState, second: TrainState) -> float:
    return float(optax.tree.norm(optax.tree.sub(first.params, second.params)))
