"""Log-probabilities in pieces against whole logits: values, gradients, memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_af import logprobs
from refine_af.models import transformer
from refine_af.models.config import ModelConfig
from refine_af.models.registry import PRESETS
from refine_af.models.transformer import Params

TINY = dataclasses.replace(PRESETS["tiny"], vocab_size=4608)
BATCH, LENGTH = 3, 7


def arrays(config: ModelConfig) -> tuple[Params, jax.Array, jax.Array]:
    params, _ = transformer.init(config, key=jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x, params)  # a distribution that is far from flat
    keys = jax.random.split(jax.random.key(1))
    hidden = jax.random.normal(keys[0], (BATCH, LENGTH, config.embed_dim))
    return params, hidden, jax.random.randint(keys[1], (BATCH, LENGTH), 0, config.vocab_size)


def plain(model: transformer.Transformer, hidden: Any, targets: Any, heat: float) -> Any:
    found = jax.nn.log_softmax(model.logits(hidden) / heat, axis=-1)
    entropy = -jnp.sum(jnp.exp(found) * found, axis=-1)
    return jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0], entropy


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("positions", "entries"), [(256, 32_768), (6, 2304), (4, 1536)])
def test_pieces_are_the_whole(
    tied: bool,
    softcap: float | None,
    positions: int,
    entries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values, and gradients by hidden states and by the head, of both results."""
    monkeypatch.setattr(logprobs, "_POSITIONS", positions)
    monkeypatch.setattr(logprobs, "_ENTRIES", entries)
    logprobs.num_blocks.cache_clear()
    config = dataclasses.replace(TINY, tie_embeddings=tied, logit_softcap=softcap)
    assert logprobs.num_blocks(config.vocab_size) == -(-config.vocab_size // entries)
    params, hidden, targets = arrays(config)
    definition = transformer.define(config)
    factors = np.random.default_rng(0).normal(size=(2, BATCH, LENGTH)).astype(np.float32)

    def loss(of: Any, params: Params, hidden: jax.Array) -> tuple[jax.Array, Any]:
        found = of(transformer.bind(definition, params), hidden, targets, 0.7)
        return sum(jnp.sum(f * x) for f, x in zip(factors, found, strict=True)), found

    results = [
        jax.value_and_grad(lambda p, h, of=of: loss(of, p, h), argnums=(0, 1), has_aux=True)(
            params, hidden
        )
        for of in (logprobs.of_targets, plain)
    ]
    logprobs.num_blocks.cache_clear()
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


def test_the_gradient_of_a_head_in_bfloat16_is_added_up_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From 128 pieces it is as near as from one: what is left is the rounding of the result."""
    monkeypatch.setattr(logprobs, "_POSITIONS", 4)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 512, TINY.embed_dim)), jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, TINY.vocab_size, (1, 512)))
    params, _ = transformer.init(TINY, key=jax.random.key(0))
    rounded = jax.tree.map(lambda x: (5 * x).astype(jnp.bfloat16), params)

    def gradient(dtype: Any) -> Any:
        def loss(params: Params) -> jax.Array:
            model = transformer.bind(transformer.define(TINY), params)
            return jnp.sum(logprobs.of_targets(model, hidden.astype(dtype), targets)[0])

        found = jax.grad(loss)(jax.tree.map(lambda x: x.astype(dtype), rounded))
        return jnp.concatenate([x.astype(jnp.float32).reshape(-1) for x in jax.tree.leaves(found)])

    exact = gradient(jnp.float32)
    error = jnp.linalg.norm(gradient(jnp.bfloat16) - exact) / jnp.linalg.norm(exact)
    assert error < 0.003


def test_a_certain_token_has_no_entropy() -> None:
    params, hidden, targets = arrays(TINY)
    model = transformer.bind(transformer.define(TINY), params)
    chosen, entropy = logprobs.of_targets(model, hidden * 1e3, targets)
    assert np.isfinite(chosen).all() and (np.asarray(entropy) >= 0).all()
    assert np.min(entropy) < 1e-6


@pytest.mark.parametrize("vocab", [32_000, 49_152, 50_257, 128_256, 151_936, 262_144])
def test_blocks_are_equal_and_small(vocab: int) -> None:
    blocks = logprobs.num_blocks(vocab)
    assert vocab % blocks == 0 and vocab // blocks <= logprobs._ENTRIES


def test_a_vocabulary_without_divisors_stays_whole() -> None:
    assert logprobs.num_blocks(50_021) == 1
