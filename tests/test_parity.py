"""Every family against transformers on torch: logits, gradients, greedy text, padding, caches."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from families import WINDOW
from safetensors.numpy import load_file

from refine_af import tokens
from refine_af.config import Mesh, Sampling
from refine_af.engine import Engine, Request
from refine_af.mesh import make_mesh
from refine_af.models import hf, registry, sources, transformer
from refine_af.models.cache import resize
from refine_af.models.config import ModelConfig
from refine_af.models.sources import Source
from refine_af.models.transformer import Definition, Params, define
from refine_af.models.weights import TreeWeights

SEQUENCE = 3 * WINDOW


class Model(NamedTuple):
    """One model, here and there."""

    source: Source
    params: Params
    reference: transformers.PreTrainedModel

    @property
    def config(self) -> ModelConfig:
        return self.source.config


@functools.cache
def load(name: str) -> Model:
    source = sources.open_model(str(families.saved(name)))
    return Model(source, source.load(), families.build(name))


@pytest.fixture(params=families.PARAMS)
def model(request: pytest.FixtureRequest) -> Model:
    return load(request.param)


def random_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(4, families.VOCAB_SIZE, (batch, length), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(
    definition: Definition, params: Params, ids: Any, start: Any = None, cache: Any = None
) -> tuple[jax.Array, Any]:
    """Logits [B, T, V], and the cache with these columns."""
    module = transformer.bind(definition, params)
    start = jnp.zeros(ids.shape[:1], jnp.int32) if start is None else start
    hidden, cache = module(ids, start, cache=cache)
    return module.logits(hidden), cache


def expected_logits(model: Model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.reference(torch.tensor(ids)).logits.numpy()


def assert_logits_agree(model: Model) -> None:
    ids = random_tokens(2, SEQUENCE)
    expected = expected_logits(model, ids)
    assert np.abs(expected).max() > 1, "logits this small would agree within any tolerance"
    actual, _ = logits_of(define(model.config), model.params, ids)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


def test_logits_agree(model: Model) -> None:
    assert_logits_agree(model)


@functools.partial(jax.jit, static_argnums=1)
@jax.grad
def gradient(params: Params, config: ModelConfig, ids: jax.Array) -> jax.Array:
    """Of the mean cross-entropy with respect to all parameters."""
    module = transformer.bind(define(config), params)
    hidden, _ = module(ids, jnp.zeros(ids.shape[:1], jnp.int32), remat="full")
    logprobs = jax.nn.log_softmax(module.logits(hidden)[:, :-1])
    return -jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1).mean()


def test_gradients_agree(model: Model, tmp_path: Path) -> None:
    """Gradients go through the key table like weights, transposes included."""
    ids = random_tokens(2, SEQUENCE)
    model.reference.zero_grad()
    model.reference(torch.tensor(ids), labels=torch.tensor(ids).long()).loss.backward()
    expected = {name: p.grad.numpy() for name, p in model.reference.named_parameters()}
    hf.write(TreeWeights(gradient(model.params, model.config, ids)), model.config, tmp_path)
    actual = load_file(tmp_path / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, ours in actual.items():
        atol = 1e-3 * np.abs(expected[name]).max()
        np.testing.assert_allclose(ours, expected[name], atol=atol, rtol=0, err_msg=name)


def test_greedy_text_agrees(model: Model) -> None:
    """64 tokens, past every window, in one left-padded batch here and row by row there."""
    prompts = [random_tokens(1, length)[0] for length in (3, WINDOW - 1, SEQUENCE)]
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    engine = Engine(model.config, None, mesh, eos_ids=(), num_slots=4)
    greedy = Sampling(temperature=0.0, max_new_tokens=64)
    requests = [Request(tuple(prompt.tolist()), greedy) for prompt in prompts]
    completions = engine.generate(transformer.unstack_layers(model.params), requests)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor(prompt[None]).long()
        expected = model.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
        )
        assert list(completion.token_ids) == expected[0, len(prompt) :].tolist()


def test_padded_batches_agree(model: Model) -> None:
    """Rows with junk on the left, on the right and on both sides, in one batch."""
    ids, junk = random_tokens(1, SEQUENCE), random_tokens(3, 13)
    start = np.asarray([0, 5, 13], np.int32)
    rows = [np.concatenate([j[:n], ids[0], j[n:]]) for j, n in zip(junk, start, strict=True)]
    actual, _ = logits_of(define(model.config), model.params, np.stack(rows), start)
    expected = expected_logits(model, ids)[0]
    for row, first in zip(actual, start, strict=True):
        np.testing.assert_allclose(row[first : first + SEQUENCE], expected, atol=1e-4, rtol=0)


# Prompt lengths on both sides of the edges: of the window and of the first bucket in every family,
# of all buckets up to the one that begins after 768 in one with and in one without a window.
EDGES = (5, WINDOW - 1, WINDOW, WINDOW + 1, 63, 64, 65)
FAR_EDGES = sorted({n + beyond for n in map(tokens.bucket, range(64, 769)) for beyond in (0, 1)})


def pad_left(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, length] padded with 0 on the left, start [B] first real column)."""
    start = np.asarray([length - len(row) for row in rows], np.int32)
    padded = [np.pad(row, (before, 0)) for row, before in zip(rows, start, strict=True)]
    return np.stack(padded), start


def assert_cached_decode_agrees(model: Model, lengths: Iterable[int]) -> None:
    """A batch for each bucket, then one and three tokens at a time; parity with the whole text."""
    definition = define(model.config, stacked=False)
    params = transformer.unstack_layers(model.params)
    ids = random_tokens(1, max(lengths) + 13)[0]
    full, places = expected_logits(model, ids[None])[0], tokens.bucket(len(ids))
    groups = {b: list(group) for b, group in itertools.groupby(sorted(lengths), tokens.bucket)}
    for length, group in groups.items():
        # Batches of one size, which are compiled once: a length may come twice.
        ends = np.resize(group, max(map(len, groups.values())))
        padded, start = pad_left([ids[:end] for end in ends], length)
        logits, columns = logits_of(definition, params, padded, start)
        logits, cache = logits[:, -1:], resize(model.config, columns, places)
        for piece in (1, 3, 1, 1, 3, 3, 1):
            expected = np.stack([full[end - logits.shape[1] : end] for end in ends])
            np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0, err_msg=f"{ends=}")
            text = np.stack([ids[end : end + piece] for end in ends])
            logits, cache = logits_of(definition, params, text, start, cache)
            ends += piece


def test_cached_decode_is_the_full_forward(model: Model) -> None:
    assert_cached_decode_agrees(model, EDGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3.1", "gemma3"])
def test_cached_decode_is_the_full_forward_at_the_edges_of_long_prompts(name: str) -> None:
    assert FAR_EDGES[:4] == [64, 65, 128, 129] and FAR_EDGES[-4:] == [512, 513, 768, 769]
    assert_cached_decode_agrees(load(name), FAR_EDGES)


def test_bfloat16_stays_near_float32(model: Model) -> None:
    """KL(float32 || bfloat16) of a token, weights rounded too."""
    half = dataclasses.replace(model.config, dtype="bfloat16", param_dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    ids = random_tokens(4, SEQUENCE)
    p = jax.nn.log_softmax(logits_of(define(model.config), model.params, ids)[0])
    q = jax.nn.log_softmax(logits_of(define(half), rounded, ids)[0])
    assert float(jnp.sum(jnp.exp(p) * (p - q), axis=-1).max()) < 3e-3


# A test that cannot fail is a defect


SQUARE = "layers/attention/o/kernel"
PAIR = ("layers/feed_forward/gate/kernel", "layers/feed_forward/up/kernel")


@pytest.mark.parametrize("fault", ["transposed", "swapped"])
def test_parity_of_logits_catches_a_wrong_key_table(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One square matrix not transposed, or one pair of like shape swapped: all keys still fit."""
    family = registry.FAMILIES["llama"]
    keys = dict(family.keys)
    if fault == "transposed":
        keys[SQUARE] = (keys[SQUARE][0], False)
    else:
        keys[PAIR[0]], keys[PAIR[1]] = keys[PAIR[1]], keys[PAIR[0]]
    monkeypatch.setitem(registry.FAMILIES, "llama", dataclasses.replace(family, keys=keys))
    source = sources.open_model(str(families.saved("llama2")))
    wrong = Model(source, source.load(), families.build("llama2"))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_logits_agree(wrong)
