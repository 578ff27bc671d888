"""The paper's presets on their own meshes, scaled down to 8 devices, say what one device says."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from decoders import noise, source_of
from updates import assert_close

from refine_af import config as config_lib
from refine_af import mesh as mesh_lib
from refine_af import policy_update
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
def step(name: str, sizes: Mesh) -> tuple[list[Completion], Any, dict[str, float]]:
    """Answers, and policy and figures after an update on them."""
    model, options = scaled_down(name), experiment()
    devices = jax.devices()[:1] if sizes == ONE else jax.devices()
    mesh = mesh_lib.make_mesh(sizes, devices)
    mesh_lib.check(model, mesh)
    shapes = jax.eval_shape(lambda: transformer.init(model, key=jax.random.key(0)))[0]
    params = jax.device_put(noise(shapes, seed=1), mesh_lib.param_shardings(model, None, mesh)[0])
    base = BaseModel(
        source_of(model, params, (1,), byte_tokenizer()),
        transformer.define(model, layout=mesh_lib.attention_layout(mesh)),
        params,
        mesh,
    )
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
