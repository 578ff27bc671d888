"""The paper's presets on their own meshes, scaled down to 8 devices, say what one device says."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from decoders import noise, source_of
from test_sft_steps import RECORD
from updates import assert_close

from refine_af import config as config_lib
from refine_af import finetuning, logprobs, policy_update, sft_examples, training, trunk
from refine_af import mesh as mesh_lib
from refine_af.base_model import BaseModel
from refine_af.config import Experiment, Mesh, Sampling
from refine_af.configs import llama2_7b, llama2_13b, mistral_7b, tiny
from refine_af.learner import Learner
from refine_af.models import transformer
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.config import ModelConfig
from refine_af.models.registry import PRESETS
from refine_af.policy import Policy
from refine_af.requests import Completion, Request
from refine_af.sft_examples import Layout, Pair

MODELS = {"llama2_7b": "llama2-7b", "llama2_13b": "llama2-13b", "mistral_7b": "mistral-7b-v0.1"}
CONFIGS = {"llama2_7b": llama2_7b, "llama2_13b": llama2_13b, "mistral_7b": mistral_7b}
ROWS, ANSWER = 8, 12
ONE = Mesh(fsdp=1)


def scaled_down(name: str) -> ModelConfig:
    """As many heads, which a mesh has to divide, all else smaller; a window that texts outgrow."""
    full = PRESETS[MODELS[name]]
    return dataclasses.replace(
        full,
        head_dim=4,
        embed_dim=4 * full.num_heads,
        hidden_dim=full.hidden_dim // 32,
        num_layers=2,
        vocab_size=len(byte_tokenizer()),
        max_positions=256,
        sliding_window=full.sliding_window and 16,
    )


def experiment() -> Experiment:
    """One optimizer step, so that it does not matter which rows of a batch are a minibatch."""
    config = tiny.get_config()
    return dataclasses.replace(
        config,
        ppo=dataclasses.replace(
            config.ppo,
            batch_size=ROWS,
            num_epochs=1,
            num_minibatches=1,
            num_microbatches=1,
            sampling=Sampling(temperature=1.0, max_new_tokens=ANSWER),
        ),
    )


@functools.cache
def base_of(name: str, sizes: Mesh) -> BaseModel:
    """Random weights on a mesh of these sizes."""
    model = scaled_down(name)
    devices = jax.devices()[:1] if sizes == ONE else jax.devices()
    mesh = mesh_lib.make_mesh(sizes, devices)
    mesh_lib.check(model, mesh)
    shapes = jax.eval_shape(lambda: transformer.init(model, key=jax.random.key(0)))[0]
    params = jax.device_put(noise(shapes, seed=1), mesh_lib.param_shardings(model, None, mesh)[0])
    definition = transformer.define(model, layout=mesh_lib.attention_layout(mesh))
    return BaseModel(source_of(model, params, (1,), byte_tokenizer()), definition, params, mesh)


@functools.cache
def step(name: str, sizes: Mesh) -> tuple[list[Completion], Any, dict[str, float]]:
    """Answers, and policy and figures after an update on them."""
    base, options = base_of(name, sizes), experiment()
    rng = np.random.default_rng(0)
    requests = [
        Request(tuple(rng.integers(4, 260, 5 + 3 * row).tolist()), options.ppo.sampling, seed=row)
        for row in range(ROWS)
    ]
    state = policy_update.new_state(options, base)
    weights = Policy(base, options.ppo).for_sampling(state.params)
    completions = base.engine(ROWS).generate(weights, requests)
    learner = Learner(options, base, longest_prompt=5 + 3 * ROWS)
    rows, reading = learner.read(state, requests, completions)
    scores = rng.normal(size=ROWS).tolist()
    state, metrics = learner.begin_update(0, state, rows, reading, scores)
    return completions, state.params, {key: float(value) for key, value in metrics.items()}


def scored(base: BaseModel) -> np.ndarray:
    """What a judge says of eight texts."""
    ids = np.random.default_rng(1).integers(4, 260, (ROWS, 40))
    first, length = np.full(ROWS, 8, np.int32), np.arange(20, 20 + ROWS, dtype=np.int32)
    rows = mesh_lib.shard_batch(base.mesh, (ids, first, length))
    return np.asarray(logprobs.mean_of_span(base.definition, base.params, *rows))


def tuned(base: BaseModel) -> tuple[Any, dict[str, float]]:
    """Gradients of all weights in a step of fine-tuning, and its figures."""
    options = dataclasses.replace(experiment().sft, trained="full", batch_size=ROWS)
    fresh = trunk.new(base, options, jax.random.key(0))
    state = base.place_state(training.new_state(fresh, RECORD, 0.0))
    make = finetuning.make_step(trunk.definition(base, options), options, RECORD, 1)
    rng = np.random.default_rng(2)
    pairs: list[Pair] = [
        tuple(rng.integers(4, 260, n).tolist() for n in (9 + i, 12)) for i in range(ROWS)
    ]
    batch = mesh_lib.shard_batch(base.mesh, sft_examples.pack(pairs, Layout(ROWS, 40, 16, 1)))
    state, figures = training.in_place(make, state)(base.params, state, batch)
    return state.opt_state, {key: float(value) for key, value in figures.items()}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama2_7b", None),
        pytest.param("llama2_13b", None, marks=pytest.mark.slow),
        ("llama2_13b", Mesh(data=2, fsdp=4)),  # as on 16
        pytest.param("mistral_7b", None, marks=pytest.mark.slow),
        pytest.param(
            "llama2_7b", Mesh(data=2, fsdp=4), marks=pytest.mark.slow
        ),  # two hosts of GPUs
    ],
)
def test_a_preset_on_its_mesh_says_what_one_device_says(
    name: str, sizes: config_lib.Mesh | None
) -> None:
    sizes = sizes or CONFIGS[name].get_config().mesh
    (ours, params, metrics), (theirs, expected, figures) = step(name, sizes), step(name, ONE)
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert_close(metrics, figures, 1e-4)
    assert_close(params, expected, 1e-5)
    mesh, one = base_of(name, sizes), base_of(name, ONE)
    np.testing.assert_allclose(scored(mesh), scored(one), atol=1e-5)
    (gradients, said), (same, expected_said) = tuned(mesh), tuned(one)
    assert_close(said, expected_said, 1e-5)
    assert_close(gradients, same, 1e-5)
