"""T5's encoder and first decoder position against transformers on torch."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle_models
import pytest
import torch
from jax.tree_util import keystr, tree_leaves_with_path
from oracle_models import T5, scratch, t5_model, t5_raw, t5_tensors
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from refine_af.config import Mesh
from refine_af.mesh import make_mesh, shardings_of
from refine_af.models import t5
from refine_af.models.t5 import PRESETS, T5Config
from refine_af.models.transformer import Params
from refine_af.models.weights import shapes_of

LENGTHS = (1, 2, 7, 33, 64)  # the longest past every distance that has a bucket of its own
YES, NO = 71, 72
LARGE = PRESETS["t5-v1.1-large"]


@functools.cache
def saved(tied: bool) -> Path:
    raw = t5_raw(tie_word_embeddings=tied)
    return oracle_models.save(scratch() / f"tied-{tied}", t5_tensors(t5_model(tied=tied)), raw)


@functools.cache
def loaded(tied: bool) -> tuple[T5Config, Params, T5ForConditionalGeneration]:
    config = t5.from_hf_config(t5_raw(tie_word_embeddings=tied))
    params = t5.open_weights(saved(tied), config).load("float32")
    return config, params, t5_model(tied=tied)


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[np.ndarray, np.ndarray]:
    """Rows of random ids with junk at their padding, and their lengths."""
    rng = np.random.default_rng(0)
    shape = (len(lengths), max(lengths))
    return rng.integers(0, T5["vocab_size"], shape).astype(np.int32), np.asarray(lengths, np.int32)


def theirs(
    model: T5ForConditionalGeneration, tokens: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(encoder states, logits of the first decoder position)."""
    mask = torch.tensor(np.arange(tokens.shape[1])[None] < lengths[:, None]).long()
    start = torch.zeros(len(tokens), 1, dtype=torch.long)
    with torch.no_grad():
        out = model(torch.tensor(tokens).long(), attention_mask=mask, decoder_input_ids=start)
    return out.encoder_last_hidden_state.numpy(), out.logits[:, 0].numpy()


@functools.partial(jax.jit, static_argnums=0)
def ours(config: T5Config, params: Params, tokens: Any, lengths: Any) -> Any:
    module = t5.bind(config, params)
    return module.encode(tokens, lengths), module.first_logits(tokens, lengths)


def assert_agree(
    config: T5Config, params: Params, model: T5ForConditionalGeneration, atol: float
) -> None:
    tokens, lengths = batch()
    states, logits = theirs(model, tokens, lengths)
    assert min(np.abs(states).max(), np.abs(logits).max()) > 0.3, "too small for any tolerance"
    found, found_logits = ours(config, params, tokens, lengths)
    assert found_logits.dtype == jnp.float32
    for row, expected, length in zip(found, states, lengths, strict=True):
        np.testing.assert_allclose(row[:length], expected[:length], atol=atol, rtol=0)
    np.testing.assert_allclose(found_logits, logits, atol=atol, rtol=0)
    two = torch.softmax(torch.tensor(logits), dim=-1)[:, [YES, NO]].numpy()
    assert np.ptp(two[:, 0] / two.sum(1)) > 0.05, "all texts have the same answer"
    probability = t5.yes_probability(config, params, tokens, lengths, YES, NO)
    np.testing.assert_allclose(probability, two[:, 0] / two.sum(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_states_logits_and_answers_agree(tied: bool) -> None:
    config, params, model = loaded(tied)
    assert config.tie_embeddings == tied and ("head" in params) != tied
    assert_agree(config, params, model, 1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_5_saves_is_read(tied: bool, tmp_path: Path) -> None:
    """It says `tie_word_embeddings: true` of every T5, and what was meant elsewhere."""
    model = t5_model(tied=tied)
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["tie_word_embeddings"] and raw["scale_decoder_outputs"] == tied
    config = t5.from_hf_config(raw)
    assert config == loaded(tied)[0]
    params = t5.open_weights(tmp_path, config).load("float32")
    jax.tree.map(np.testing.assert_array_equal, params, loaded(tied)[1])


def test_a_tied_head_is_the_embedding_even_where_the_file_has_another() -> None:
    """The rule of transformers 4, with which UniEval was published."""
    config = dataclasses.replace(loaded(False)[0], tie_embeddings=True)
    params = t5.open_weights(saved(False), config).load("float32")
    model = t5_model(tied=False)
    model.lm_head.weight = model.shared.weight
    model.config.scale_decoder_outputs = True
    assert_agree(config, params, model, 1e-4)


def test_padding_and_order_change_nothing() -> None:
    config, params, _ = loaded(False)
    tokens, lengths = batch()
    together = t5.yes_probability(config, params, tokens, lengths, YES, NO)
    back = (tokens[::-1].copy(), lengths[::-1].copy())
    turned = t5.yes_probability(config, params, *back, YES, NO)
    np.testing.assert_allclose(turned[::-1], together, atol=1e-6, rtol=0)
    for row, length, score in zip(tokens, lengths, together, strict=True):
        one = (row[None, :length], np.asarray([length], np.int32))
        alone = t5.yes_probability(config, params, *one, YES, NO)
        np.testing.assert_allclose(alone[0], score, atol=1e-5, rtol=0)


def test_the_two_answers_add_up_to_one() -> None:
    config, params, _ = loaded(False)
    yes, no = (
        t5.yes_probability(config, params, *batch(), *pair) for pair in ((YES, NO), (NO, YES))
    )
    np.testing.assert_allclose(yes + no, 1.0, atol=1e-6)


def test_eight_devices_are_one() -> None:
    config, params, _ = loaded(False)
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    shardings = shardings_of(t5.logical_axes(config), mesh, head_dim=config.head_dim)
    placed = t5.open_weights(saved(False), config).load("float32", shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    assert placed["encoder"]["q"]["kernel"].addressable_shards[0].data.shape == (2, 16, 24)
    tokens, lengths = batch((3, 9, 17, 30))
    np.testing.assert_allclose(
        t5.yes_probability(config, placed, tokens, lengths, YES, NO),
        t5.yes_probability(config, params, tokens, lengths, YES, NO),
        atol=1e-5,
        rtol=0,
    )


def test_bfloat16_stays_near() -> None:
    config, params, _ = loaded(False)
    half = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    scores = [
        t5.yes_probability(c, p, *batch(), YES, NO) for c, p in ((config, params), (half, rounded))
    ]
    assert scores[1].dtype == jnp.float32
    np.testing.assert_allclose(*scores, atol=0.05, rtol=0)


# Relative positions


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (64, 1000), (4, 2)])
def test_buckets_are_those_of_transformers(num_buckets: int, max_distance: int) -> None:
    distances = np.arange(-3000, 3001)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(distances), True, num_buckets, max_distance
    )
    found = t5.buckets(distances, num_buckets, max_distance)
    np.testing.assert_array_equal(found, expected.numpy())
    assert set(found) == set(range(num_buckets)) - {num_buckets // 2}  # a distance 0 of keys after


def test_buckets_by_hand() -> None:
    """8 buckets, 4 a direction: distances 0 and 1, then 2 .. 3, then from 4 (of 8) on."""
    np.testing.assert_array_equal(
        t5.buckets(np.asarray([-9, -4, -3, -2, -1, 0, 1, 2, 3, 4, 9]), 8, 8),
        [3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7],
    )


# The full size


def test_the_preset_is_what_its_config_says() -> None:
    raw = {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 2816,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 16,
        "relative_attention_num_buckets": 32,
        "layer_norm_epsilon": 1e-06,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }
    assert t5.from_hf_config(raw) == LARGE


def test_parameters_of_the_preset() -> None:
    """All of transformers' but those of the decoder's self-attention that cannot matter."""
    d, f, v, heads, buckets = 1024, 2816, 32128, 16, 32
    feed_forward = 3 * d * f + d
    encoder = 24 * (4 * d * d + d + feed_forward) + buckets * heads + d
    decoder = 24 * (2 * d * d + d + 4 * d * d + d + feed_forward) + d
    by_hand = 2 * v * d + encoder + decoder
    shapes = shapes_of(t5.logical_axes(LARGE))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == by_hand
    without = 24 * 2 * d * d + buckets * heads
    assert by_hand + without == 783_150_080
    with torch.device("meta"):
        model = T5ForConditionalGeneration(
            oracle_models.T5Config(
                vocab_size=v,
                d_model=d,
                d_ff=f,
                num_layers=24,
                num_heads=heads,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
    head = model.lm_head.weight.numel()  # tied at first in transformers 5: counted once
    assert sum(p.numel() for p in model.parameters()) + head == by_hand + without


def test_every_array_of_the_preset_has_a_sharding() -> None:
    mesh = make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    shardings = shardings_of(t5.logical_axes(LARGE), mesh, head_dim=LARGE.head_dim)
    whole = {
        keystr(path, simple=True, separator="/")
        for path, sharding in tree_leaves_with_path(shardings)
        if sharding.is_fully_replicated
    }
    assert all("norm" in name or name == "encoder_bias" for name in whole), whole


# config.json


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_decoder_layers": None}, {"num_decoder_layers": 2}),
        ({"decoder_start_token_id": None, "pad_token_id": 5}, {"start_id": 5}),
        ({"relative_attention_max_distance": None}, {"max_distance": 128}),
        ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, {}),
    ],
)
def test_spellings(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    config = t5.from_hf_config(t5_raw())
    assert t5.from_hf_config(t5_raw(**changes)) == dataclasses.replace(config, **expected)


def test_a_head_is_tied_unless_the_config_says_otherwise() -> None:
    raw = t5_raw()
    del raw["tie_word_embeddings"]
    assert t5.from_hf_config(raw).tie_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mt5"}, "model_type='mt5': expected 't5'"),
        (
            {"feed_forward_proj": "relu"},
            "feed_forward_proj='relu': expected 'gated-gelu', T5 v1.1's",
        ),
        ({"is_encoder_decoder": False}, "not supported: is_encoder_decoder=False"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no': expected true or false"),
        (
            {"decoder_start_token_id": "<pad>"},
            "decoder_start_token_id='<pad>': expected a token's id",
        ),
        ({"d_model": None}, "lacks d_model"),
        ({"d_ff": 0}, "d_ff=0: expected a whole number from 1 to 2147483647"),
        (
            {"decoder_start_token_id": 999},
            "T5Config.start_id=999: expected an id of the vocabulary",
        ),
        (
            {"relative_attention_num_buckets": 6},
            "T5Config.num_buckets=6: expected a multiple of 4",
        ),
        (
            {"relative_attention_max_distance": 2},
            "T5Config.max_distance=2: expected more than a quarter of num_buckets=8",
        ),
    ],
)
def test_what_would_change_the_numbers_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        t5.from_hf_config(t5_raw(**changes), "here/config.json")
    assert str(error.value) == f"here/config.json: {message}"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"head_dim": 0}, "T5Config.head_dim=0: expected at least 1"),
        ({"param_dtype": "int8"}, "T5Config.param_dtype='int8': expected"),
    ],
)
def test_impossible_numbers_are_refused(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LARGE, **field)


# A test that cannot fail is a defect


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("encoder/q/kernel", "encoder/k/kernel"),
        ("encoder/feed_forward/gate/kernel", "encoder/feed_forward/up/kernel"),
        ("decoder/self_v/kernel", "decoder/v/kernel"),
        ("decoder/self_norm/scale", "decoder/cross_norm/scale"),
    ],
)
def test_parity_catches_a_swapped_pair(
    first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(t5, "KEYS", t5.KEYS | {first: t5.KEYS[second], second: t5.KEYS[first]})
    config, _, model = loaded(False)
    params = t5.open_weights(saved(False), config).load("float32")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_agree(config, params, model, 1e-3)
