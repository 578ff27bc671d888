"""GPT-NeoX with a scalar head against transformers on torch, and what its directories may hold."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle_models
import pytest
import torch
from jax.tree_util import keystr, tree_leaves_with_path
from oracle_models import NEOX, RewardModel, neox_raw, neox_tensors, reward_model, scratch

from refine_af.config import Mesh
from refine_af.mesh import make_mesh, shardings_of
from refine_af.models import gpt_neox
from refine_af.models.gpt_neox import PRESETS, GPTNeoXConfig
from refine_af.models.transformer import Params
from refine_af.models.weights import shapes_of

LENGTHS = (1, 2, 7, 33, 96)
LARGE = PRESETS["oasst-rm-2.1-pythia-1.4b"]


@functools.cache
def saved(parallel: bool) -> Path:
    tensors = neox_tensors(reward_model(parallel=parallel))
    return oracle_models.save(scratch() / f"parallel-{parallel}", tensors, neox_raw())


@functools.cache
def loaded(parallel: bool) -> tuple[GPTNeoXConfig, Params, RewardModel]:
    config = gpt_neox.from_hf_config(neox_raw(use_parallel_residual=parallel))
    params = gpt_neox.open_weights(saved(parallel), config).load("float32")
    return config, params, reward_model(parallel=parallel)


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[np.ndarray, np.ndarray]:
    """Rows of random ids with junk at their padding, and their lengths."""
    rng = np.random.default_rng(0)
    shape = (len(lengths), max(lengths))
    tokens = rng.integers(0, NEOX["vocab_size"], shape).astype(np.int32)
    return tokens, np.asarray(lengths, np.int32)


def expected(model: RewardModel, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    mask = np.arange(tokens.shape[1])[None] < lengths[:, None]
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), torch.tensor(mask).long()).numpy()


@functools.partial(jax.jit, static_argnums=0)
def hidden(config: GPTNeoXConfig, params: Params, tokens: Any) -> jax.Array:
    return gpt_neox.bind(config, params)(tokens)


@pytest.mark.parametrize("parallel", [True, False])
def test_hidden_states_and_scores_agree(parallel: bool) -> None:
    config, params, model = loaded(parallel)
    tokens, lengths = batch()
    with torch.no_grad():
        theirs = model.gpt_neox(torch.tensor(tokens).long()).last_hidden_state.numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(hidden(config, params, tokens), theirs, atol=1e-4, rtol=0)
    scores = expected(model, tokens, lengths)
    assert np.ptp(scores) > 1, "scores this near would agree within any tolerance"
    ours = gpt_neox.rewards(config, params, tokens, lengths)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, scores, atol=1e-5, rtol=0)


def test_the_two_residuals_differ() -> None:
    """Or the test above would not tell them apart."""
    tokens, lengths = batch()
    config, params, _ = loaded(True)
    serial = dataclasses.replace(config, parallel_residual=False)
    both = [gpt_neox.rewards(c, params, tokens, lengths) for c in (config, serial)]
    assert jnp.abs(both[0] - both[1])[1:].min() > 1e-2


def test_padding_and_order_change_nothing() -> None:
    config, params, _ = loaded(True)
    tokens, lengths = batch()
    together = gpt_neox.rewards(config, params, tokens, lengths)
    turned = gpt_neox.rewards(config, params, tokens[::-1].copy(), lengths[::-1].copy())
    np.testing.assert_allclose(turned[::-1], together, atol=1e-5, rtol=0)
    for row, length, score in zip(tokens, lengths, together, strict=True):
        alone = gpt_neox.rewards(config, params, row[None, :length], lengths[:1] * 0 + length)
        np.testing.assert_allclose(alone[0], score, atol=1e-5, rtol=0)


def test_eight_devices_are_one() -> None:
    config, params, _ = loaded(True)
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    axes = gpt_neox.logical_axes(config)
    shardings = shardings_of(axes, mesh, head_dim=config.head_dim)
    placed = gpt_neox.open_weights(saved(True), config).load("float32", shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    assert placed["layers"]["qkv"]["kernel"].addressable_shards[0].data.size * 4 == 2 * 64 * 192
    tokens, lengths = batch((3, 9, 17, 30))
    np.testing.assert_allclose(
        gpt_neox.rewards(config, placed, tokens, lengths),
        gpt_neox.rewards(config, params, tokens, lengths),
        atol=1e-5,
        rtol=0,
    )


def test_bfloat16_stays_near() -> None:
    config, params, _ = loaded(True)
    half = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    scores = [gpt_neox.rewards(c, p, *batch()) for c, p in ((config, params), (half, rounded))]
    assert scores[1].dtype == jnp.float32
    np.testing.assert_allclose(*scores, atol=0.1, rtol=0)


# The full size


def test_the_preset_is_what_its_config_says() -> None:
    raw = {
        "model_type": "gpt_neox_reward_model",
        "vocab_size": 50288,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "layer_norm_eps": 1e-05,
        "hidden_act": "gelu",
        "pooling": "last",
        "use_parallel_residual": True,
    }
    assert gpt_neox.from_hf_config(raw) == LARGE


def test_parameters_of_the_preset() -> None:
    d, f, v = 2048, 8192, 50288
    attention = d * 3 * d + 3 * d + d * d + d
    feed_forward = d * f + f + f * d + d
    layer = attention + feed_forward + 2 * (d + d)
    by_hand = v * d + 24 * layer + (d + d) + (d + 1)
    shapes = shapes_of(gpt_neox.logical_axes(LARGE))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == by_hand == 1_311_594_497
    with torch.device("meta"):
        model = RewardModel(
            oracle_models.GPTNeoXConfig(
                vocab_size=v,
                hidden_size=d,
                intermediate_size=f,
                num_hidden_layers=24,
                num_attention_heads=16,
            )
        )
    assert sum(p.numel() for p in model.parameters()) == by_hand


def test_every_array_of_the_preset_has_a_sharding() -> None:
    mesh = make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    axes = gpt_neox.logical_axes(LARGE)
    shardings = shardings_of(axes, mesh, head_dim=LARGE.head_dim)
    whole = {
        keystr(path, simple=True, separator="/")
        for path, sharding in tree_leaves_with_path(shardings)
        if sharding.is_fully_replicated
    }
    assert all("norm" in name or name.endswith("bias") for name in whole), whole


# config.json


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt_neox"}, {}),
        ({"rotary_pct": None, "rotary_emb_base": None}, {"rotary_dim": 4, "rope_theta": 1e4}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7, "rotary_pct": 1}},
            {"rotary_dim": 16, "rope_theta": 7.0},
        ),
        (
            {
                "rotary_pct": None,
                "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0},
            },
            {"rotary_dim": 16},
        ),
        ({"rope_scaling": None}, {}),
        ({"layer_norm_eps": None}, {"norm_eps": 1e-5}),
        ({"use_parallel_residual": False}, {"parallel_residual": False}),
    ],
)
def test_spellings(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    config = gpt_neox.from_hf_config(neox_raw())
    assert gpt_neox.from_hf_config(neox_raw(**changes)) == dataclasses.replace(config, **expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llama"},
            "model_type='llama': expected one of ('gpt_neox', 'gpt_neox_reward_model')",
        ),
        (
            {"hidden_act": "gelu_new", "pooling": "mean"},
            "not supported: hidden_act='gelu_new', pooling='mean'",
        ),
        ({"attention_bias": False}, "not supported: attention_bias=False"),
        ({"quantization_config": {"bits": 4}}, "not supported: quantization_config={'bits': 4}"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters: not supported: type='linear'",
        ),
        ({"rope_parameters": [1]}, "rope_parameters=[1]: expected an object"),
        ({"hidden_size": None}, "lacks hidden_size"),
        (
            {"num_hidden_layers": 2.0},
            "num_hidden_layers=2.0: expected a whole number from 1 to 10000",
        ),
        ({"layer_norm_eps": "a"}, "layer_norm_eps='a': expected a number above 0"),
        ({"use_parallel_residual": 1}, "use_parallel_residual=1: expected true or false"),
        (
            {"num_attention_heads": 5},
            "GPTNeoXConfig: embed_dim=64 must be a multiple of num_heads=5",
        ),
        (
            {"rotary_pct": 0.2},
            "GPTNeoXConfig.rotary_dim=3: expected an even number from 2 to the head's 16",
        ),
    ],
)
def test_what_would_change_the_numbers_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        gpt_neox.from_hf_config(neox_raw(**changes), "here/config.json")
    assert str(error.value) == f"here/config.json: {message}"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"num_layers": 0}, "GPTNeoXConfig.num_layers=0: expected at least 1"),
        ({"dtype": "int8"}, "GPTNeoXConfig.dtype='int8': expected"),
    ],
)
def test_impossible_numbers_are_refused(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LARGE, **field)


# A test that cannot fail is a defect


def test_parity_catches_swapped_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = "layers/attention_norm/scale", "layers/feed_forward_norm/scale"
    swapped = {first: gpt_neox.KEYS[second], second: gpt_neox.KEYS[first]}
    monkeypatch.setattr(gpt_neox, "KEYS", gpt_neox.KEYS | swapped)
    config, _, model = loaded(True)
    params = gpt_neox.open_weights(saved(True), config).load("float32")
    scores = gpt_neox.rewards(config, params, *batch())
    assert np.abs(scores - expected(model, *batch())).max() > 1e-2
