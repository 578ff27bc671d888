"""Drawing one token: distributions worked by hand, and what can never be drawn."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from refine_af import sampling
from refine_af.sampling import Chosen, Limits, Needs

HALVES = [0.5, 0.25, 0.15, 0.1]
NUM_DRAWS = 20_000

ALL = Needs(drawn=True, top_k=True, top_p=True, min_p=True, penalised=True)
PLAIN = Needs(drawn=True, top_k=False, top_p=False, min_p=False, penalised=False)

jit_choose = jax.jit(sampling.choose, static_argnames="needs")
jit_inverse_cdf = jax.jit(jax.vmap(sampling._inverse_cdf, (None, 0)))


def limits(batch: int, **changes: Any) -> Limits:
    """Plain sampling at temperature 1, row i with seed i."""
    dtypes = {
        "temperature": np.float32(1),
        "top_k": np.int32(0),
        "top_p": np.float32(1),
        "min_p": np.float32(0),
        "presence_penalty": np.float32(0),
        "repetition_penalty": np.float32(1),
        "max_new_tokens": np.int32(1),
    }
    values = {**dtypes, "seed": np.arange(batch)} | changes
    kinds = {name: value.dtype for name, value in dtypes.items()} | {"seed": np.uint32}
    rows = {name: np.broadcast_to(v, batch).astype(kinds[name]) for name, v in values.items()}
    return Limits(**rows, stop_ids=np.full((batch, 1), -1, np.int32))


def choose(
    logits: Any,
    batch: int,
    *,
    needs: Needs = ALL,
    seen: tuple[int, ...] = (),
    prompt: tuple[int, ...] = (),
    drawn: int = 0,
    **changes: Any,
) -> Chosen:
    """Tokens of `batch` rows; logits of one row are the same for all.

    Args:
        seen: tokens drawn before. prompt: tokens of the prompt.
    """
    logits = np.broadcast_to(np.asarray(logits, np.float32), (batch, np.shape(logits)[-1]))
    vocab = np.arange(logits.shape[1])
    marks = sampling.IN_PROMPT * np.isin(vocab, prompt) + sampling._DRAWN * np.isin(vocab, seen)
    chosen = jit_choose(
        logits,
        np.broadcast_to(marks.astype(np.uint8), logits.shape),
        np.full(batch, drawn, np.int32),
        limits(batch, **changes),
        needs=needs,
    )
    return Chosen(*map(np.asarray, chosen))


def random_logits(batch: int, vocab: int) -> np.ndarray:
    return 3 * np.random.default_rng(0).standard_normal((batch, vocab)).astype(np.float32)


@pytest.mark.parametrize(
    "greedy",
    [
        {"temperature": 0.0, "needs": PLAIN},
        {"temperature": 0.0},
        {"temperature": 0.0, "top_k": 5, "top_p": 0.3},
        {"top_k": 1},
        {"top_k": 1, "temperature": 100.0},
        {"top_p": 1e-6},
    ],
    ids=str,
)
def test_greedy_in_all_its_forms_is_argmax(greedy: dict[str, Any]) -> None:
    logits = random_logits(32, 300)
    chosen = choose(logits, 32, **greedy)
    np.testing.assert_array_equal(chosen.token, logits.argmax(axis=1))


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"top_p": 0.4}, {0}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 0.76}, {0, 1, 2}),
        ({"top_p": 0.95}, {0, 1, 2, 3}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.7}, {0, 1}),
        ({"top_k": 1, "top_p": 0.95}, {0}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # .75 of the .9 that top-k leaves is .83
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"min_p": 0.31}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_p": 0.7, "temperature": 3.0}, {0, 1, 2}),  # .345 .274 .231 .202 for 1/3 powers
        ({}, {0, 1, 2, 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)], ids=str)
def test_only_the_nucleus_is_drawn_and_all_of_it(
    changes: dict[str, Any], kept: set[int], order: tuple[int, ...]
) -> None:
    """Likeliest first or not, the smallest set with mass p, cut to k."""
    token = choose(np.log(HALVES)[list(order)], NUM_DRAWS, **changes).token
    assert {order[i] for i in token} == kept


def test_the_threshold_is_that_of_a_sort() -> None:
    """On 300 entries: everything from the first sorted entry whose running mass reaches p."""
    weights = np.asarray(jax.nn.softmax(random_logits(16, 300)))
    top_p = np.linspace(0.05, 0.99, 16, dtype=np.float32)
    threshold = sampling.narrow(weights, limits(16, top_p=top_p), ALL)
    ordered = -np.sort(-weights.astype(np.float64), axis=1)
    size = (np.cumsum(ordered, axis=1) < top_p[:, None]).sum(axis=1) + 1
    np.testing.assert_array_equal((weights >= threshold).sum(axis=1), size)


def test_top_k_is_exact_far_below_the_likeliest_token() -> None:
    """299 tokens within a factor of 2 of each other, all 10^13 times less likely than the first."""
    logits = -np.linspace(0, 0.7, 300, dtype=np.float32)
    logits[0] = 30
    weights = np.asarray(jax.nn.softmax(logits))[None]
    for k in (1, 2, 20, 299):
        assert (weights >= sampling.narrow(weights, limits(1, top_k=k), ALL)).sum() == k


def test_presence_penalty_is_taken_once_from_seen_tokens() -> None:
    """2 - 1 < 1.9: the second wins, unless nothing was seen or nothing is taken."""
    logits = [2, 1.9, 0, 0]
    assert choose(logits, 1, temperature=0, presence_penalty=1, seen=(0,)).token == [1]
    assert choose(logits, 1, temperature=0, presence_penalty=1, prompt=(0,)).token == [0]
    assert choose(logits, 1, temperature=0, presence_penalty=1).token == [0]
    assert choose(logits, 1, temperature=0, seen=(0,)).token == [0]


@pytest.mark.parametrize("where", ["seen", "prompt"])
def test_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_not(
    where: str,
) -> None:
    """2 / 1.5 < 1.9, and -1 * 1.5 < -1.2: each time the next one wins."""
    penalty = {"temperature": 0, "repetition_penalty": 1.5}
    assert choose([2, 1.9, 0, 0], 1, **penalty, **{where: (0,)}).token == [1]
    assert choose([-1, -1.2, -9, -9], 1, **penalty, **{where: (0,)}).token == [1]
    assert choose([2, 1.9, 0, 0], 1, **penalty).token == [0]


@pytest.mark.parametrize("seed", range(5))
def test_penalties_and_cuts_are_those_of_transformers(seed: int) -> None:
    """What may be drawn, and with which probability, as its logits processors have it."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((1, 200)).astype(np.float32)
    met = rng.integers(0, 200, 30)
    temperature, top_k, top_p, min_p, penalty = 0.7, 40, 0.8, 0.02, 1.3
    theirs = torch.tensor(logits)
    for processor in (
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p),
        MinPLogitsWarper(min_p),
    ):
        theirs = processor(torch.tensor(met[None]), theirs)
    expected = torch.log_softmax(theirs, -1).numpy()[0]
    chosen = choose(
        logits,
        4000,
        prompt=tuple(met),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    np.testing.assert_allclose(chosen.logprob, expected[chosen.token], atol=1e-5, rtol=0)
    likely = np.flatnonzero(np.exp(expected) > 0.01)
    assert set(likely) <= set(chosen.token.tolist())


def frequencies(token: np.ndarray, vocab: int) -> np.ndarray:
    return np.bincount(token, minlength=vocab) / len(token)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"needs": PLAIN}, HALVES),
        ({}, HALVES),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.0225, 0.01]),
        ({"top_k": 3}, [0.5, 0.25, 0.15, 0]),
        ({"top_p": 0.7}, [0.5, 0.25, 0, 0]),
        ({"min_p": 0.25}, [0.5, 0.25, 0.15, 0]),
        # Negative logits are multiplied: .5 and .1 are squared.
        ({"repetition_penalty": 2, "prompt": (0, 3)}, [0.25, 0.25, 0.15, 0.01]),
        ({"presence_penalty": np.log(2), "seen": (0, 3)}, [0.25, 0.25, 0.15, 0.05]),
        # 1 / T multiplies what the penalty leaves.
        (
            {"presence_penalty": np.log(2), "seen": (0,), "temperature": 0.5},
            [0.0625, 0.0625, 0.0225, 0.01],
        ),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_distribution(
    changes: dict[str, Any], expected: list[float]
) -> None:
    """Chi-square of 20,000 seeds, three degrees of freedom: over 16.3 in one of 1,000 cases."""
    token = choose(np.log(HALVES), NUM_DRAWS, **changes).token
    share = np.asarray(expected) / np.sum(expected)
    observed = frequencies(token, 4)
    assert observed[share == 0].sum() == 0
    possible = share > 0
    chi_square = NUM_DRAWS * ((observed - share)[possible] ** 2 / share[possible]).sum()
    assert chi_square < 16.3


def test_frequencies_over_a_vocabulary_of_several_blocks() -> None:
    """Both levels of the inverse CDF: 600 tokens in blocks of 256, compared singly and by block."""
    logits = random_logits(1, 600)[0]
    token = choose(logits, NUM_DRAWS, needs=PLAIN).token
    share = np.asarray(jax.nn.softmax(logits), np.float64)
    bound = 5 * np.sqrt(share / NUM_DRAWS) + 5 / NUM_DRAWS
    assert (np.abs(frequencies(token, 600) - share) < bound).all()
    blocks = np.add.reduceat(share, [0, 256, 512])
    observed = frequencies(token // 256, 3)
    assert (np.abs(observed - blocks) < 4 * np.sqrt(blocks / NUM_DRAWS)).all()


def test_the_n_th_token_of_a_seed_has_its_own_random_number() -> None:
    """Same seed and count: the same token. Another count or another seed: independent ones."""

    def tokens(**changes: Any) -> np.ndarray:
        return choose(np.zeros(600), NUM_DRAWS, needs=PLAIN, **changes).token

    first = tokens(drawn=7)
    np.testing.assert_array_equal(tokens(drawn=7), first)
    for other in (tokens(drawn=8), tokens(drawn=7, seed=np.arange(NUM_DRAWS) + 1)):
        assert (first == other).mean() < 0.004  # one in 600 by chance


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "changes",
    [
        {"needs": PLAIN},
        {"top_k": 2},
        {"top_p": 0.3},
        {"min_p": 0.1},
        {"presence_penalty": 2, "seen": (0, 1)},
        {"repetition_penalty": 1.5, "seen": (0, 1)},
    ],
    ids=str,
)
def test_full_logprob_is_that_of_the_policy(temperature: float, changes: dict[str, Any]) -> None:
    """log softmax(logits / T), whatever top-k, top-p, min-p and penalties leave to be drawn."""
    logits = random_logits(32, 300)
    chosen = choose(logits, 32, temperature=temperature, **changes)
    expected = jax.nn.log_softmax(logits / temperature)[np.arange(32), chosen.token]
    np.testing.assert_allclose(chosen.full_logprob, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, HALVES),
        ({"needs": PLAIN}, HALVES),
        ({"top_k": 2}, [2 / 3, 1 / 3]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3]),
        ({"min_p": 0.25}, [5 / 9, 2.5 / 9, 1.5 / 9]),
        ({"temperature": 0.5, "top_k": 2}, [0.8, 0.2]),
        ({"presence_penalty": np.log(2), "seen": (0,)}, [1 / 3, 1 / 3, 0.2, 2 / 15]),
    ],
    ids=str,
)
def test_logprob_is_that_of_the_distribution_drawn_from(
    changes: dict[str, Any], share: list[float]
) -> None:
    chosen = choose(np.log(HALVES), 100, **changes)
    np.testing.assert_allclose(chosen.logprob, np.log(share)[chosen.token], atol=1e-5, rtol=0)


def test_logprobs_of_a_greedy_token_are_those_of_temperature_one() -> None:
    for changes in ({"needs": PLAIN}, {"top_k": 1}, {"top_p": 0.1}):
        chosen = choose(np.log(HALVES), 1, temperature=0.0, **changes)
        assert chosen.token == [0]
        np.testing.assert_allclose(chosen.logprob, [np.log(0.5)], atol=1e-6)
        np.testing.assert_allclose(chosen.full_logprob, [np.log(0.5)], atol=1e-6)


@pytest.mark.parametrize("needs", [ALL, PLAIN._replace(top_p=True), PLAIN._replace(penalised=True)])
def test_what_others_ask_for_changes_no_token(needs: Needs) -> None:
    """A row without limits draws the same token in a batch where some have them."""
    logits = random_logits(64, 3000)
    plain, among = (choose(logits, 64, needs=n) for n in (PLAIN, needs))
    np.testing.assert_array_equal(plain.token, among.token)
    np.testing.assert_allclose(plain.logprob, among.logprob, atol=1e-6)


def sparse_weights(vocab: int, share: float, seed: int) -> np.ndarray:
    """Weights that are zero but for some; the last entries always are, the first sometimes."""
    rng = np.random.default_rng(seed)
    weights = rng.random(vocab).astype(np.float32) ** 8
    weights[rng.random(vocab) > share] = 0
    weights[-vocab // 3 :] = 0
    weights[vocab // 3] = 1
    return weights


@pytest.mark.parametrize("vocab", [4, 255, 256, 257, 1000, 32_000])
def test_the_ends_of_the_unit_interval_draw_an_entry_with_weight(vocab: int) -> None:
    uniform = np.asarray([0, 0.5, 1 - 2**-23, 1 - 2**-24, 1], np.float32)
    for seed in range(8):
        weights = sparse_weights(vocab, 0.1, seed)
        index = np.asarray(jit_inverse_cdf(weights, uniform))
        assert (index < vocab).all()
        assert (weights[index] > 0).all()


@pytest.mark.parametrize("vocab", [600, 131_000])
def test_rounding_of_running_sums_never_draws_an_entry_without_weight(vocab: int) -> None:
    """All uniforms of float32 around the edges of blocks.

    Of 500 block sums and more, XLA's own running sum on a CPU is not monotone.
    """
    for seed in range(3):
        weights = sparse_weights(vocab, 256 / vocab, seed)
        ends = np.cumsum(weights, dtype=np.float64)[255::256] / weights.sum(dtype=np.float64)
        steps = np.round(ends[:, None] * 2**23) + np.arange(-16, 17)
        uniform = np.unique(steps.clip(0, 2**23 - 1)) / 2**23
        assert (weights[jit_inverse_cdf(weights, uniform.astype(np.float32))] > 0).all()


def test_inverse_cdf_is_that_of_a_float64_sum() -> None:
    """Away from the edges, index i has cdf(i - 1) <= u < cdf(i)."""
    weights = sparse_weights(1000, 0.5, 0)
    cdf = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    uniform = np.random.default_rng(0).random(5000)
    uniform = uniform[np.abs(cdf[:, None] - uniform).min(axis=0) > 1e-6]
    expected = np.searchsorted(cdf, uniform, side="right")
    np.testing.assert_array_equal(jit_inverse_cdf(weights, uniform.astype(np.float32)), expected)


def test_large_seeds_are_not_folded_onto_small_ones() -> None:
    """Every one of the 32 bits counts."""
    seeds = np.asarray([0, 1, 2**31, 2**32 - 1], np.uint32)
    uniform = jax.vmap(sampling._uniform)(seeds, jnp.zeros(4, jnp.int32))
    assert len(set(uniform.tolist())) == 4
