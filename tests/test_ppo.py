"""The equations of PPO: numbers worked by hand, identities, precision."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_af import ppo


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return f32(scale * np.random.default_rng(seed).standard_normal(shape))


def f32(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


# Estimators of the KL divergence


def test_k1_is_the_difference_and_k3_its_convex_companion() -> None:
    """k3 at d = log ref - log pi = log 2: 2 - 1 - log 2; at d = -log 2: 1/2 - 1 + log 2."""
    logprobs, ref = f32([-1.0, -1.0]), f32([-1.0 + np.log(2), -1.0 - np.log(2)])
    close(ppo.kl_k1(logprobs, ref), [-np.log(2), np.log(2)])
    close(ppo.kl_k3(logprobs, ref), [1 - np.log(2), np.log(2) - 0.5])


@pytest.mark.parametrize("d", [1e-4, -1e-4, 1e-3, -0.03, 0.5])
def test_k3_keeps_its_digits_in_float32(d: float) -> None:
    """Against float64; the plain formula, exp(d) - d - 1, gives nothing but zeros at 1e-4."""
    single = f32(d)
    exact = np.expm1(np.float64(single)) - np.float64(single)
    assert float(ppo.kl_k3(f32(0.0), single)) == pytest.approx(exact, rel=2e-3)
    if abs(d) < 0.01:
        assert float(jnp.exp(single) - single - 1) != pytest.approx(exact, rel=0.04)


def test_k3_is_never_negative_and_finite_however_far_apart() -> None:
    for scale in (1e-6, 1e-3, 1.0, 100.0):
        k3 = ppo.kl_k3(jnp.zeros(500), normal(0, 500, scale=scale))
        assert jnp.all((k3 >= 0) & jnp.isfinite(k3)), scale


# Rewards


def test_the_score_stands_on_the_last_real_token_alone() -> None:
    rewards = ppo.shaped_rewards(f32(0.7), jnp.zeros(4), jnp.zeros(4), f32([1, 1, 1, 0]), 0.1)
    assert rewards.dtype == jnp.float32
    assert rewards.tolist() == [0, 0, float(np.float32(0.7)), 0]


def test_the_kl_penalty_is_charged_at_every_token() -> None:
    """-.5 * (log pi - log ref), plus the score 2 on the third."""
    logprobs, ref = f32([-1.0, -2.0, -3.0, -9.0]), f32([-1.5, -1.0, -3.0, -1.0])
    rewards = ppo.shaped_rewards(f32(2.0), logprobs, ref, f32([1, 1, 1, 0]), 0.5)
    assert rewards.tolist() == [-0.25, 0.5, 2.0, 0.0]


def test_an_empty_answer_is_paid_nothing() -> None:
    rewards = ppo.shaped_rewards(f32(1.0), jnp.ones(3), jnp.zeros(3), jnp.zeros(3), 0.1)
    assert rewards.tolist() == [0, 0, 0]


# Generalised advantage estimation


def test_gae_of_three_steps_by_hand() -> None:
    """gamma = lambda = 1/2, r = 1 2 4, V = 8 4 2.

    delta_2 = 4 - 2 = 2; delta_1 = 2 + 1 - 4 = -1; delta_0 = 1 + 2 - 8 = -5.
    A_2 = 2; A_1 = -1 + 2/4 = -1/2; A_0 = -5 - 1/8. The fourth column is padding.
    """
    rewards, values = f32([1, 2, 4, 99]), f32([8, 4, 2, 77])
    advantages, returns = ppo.gae(rewards, values, f32([1, 1, 1, 0]), 0.5, 0.5)
    assert advantages.tolist() == [-5.125, -0.5, 2.0, 0.0]
    assert returns.tolist() == [2.875, 3.5, 4.0, 0.0]


def trajectory() -> tuple[jax.Array, jax.Array]:
    """Rewards and values of 12 steps."""
    return normal(1, 12), normal(2, 12)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_at_lambda_1_advantages_are_discounted_returns_less_values(gamma: float) -> None:
    rewards, values = trajectory()
    advantages, returns = ppo.gae(rewards, values, jnp.ones(12), gamma, 1.0)
    expected = [sum(gamma**k * r for k, r in enumerate(rewards.tolist()[t:])) for t in range(12)]
    np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(advantages, f32(expected) - values, rtol=1e-5, atol=1e-6)


def test_at_lambda_0_advantages_are_one_step_errors() -> None:
    rewards, values = trajectory()
    advantages, _ = ppo.gae(rewards, values, jnp.ones(12), 0.9, 0.0)
    close(advantages, rewards + 0.9 * jnp.append(values[1:], 0.0) - values)


def test_padding_changes_no_advantage() -> None:
    rewards, values = trajectory()
    alone = ppo.gae(rewards, values, jnp.ones(12), 0.9, 0.8)
    long, mask = jnp.full(5, 1e3), jnp.append(jnp.ones(12), jnp.zeros(5))
    padded = ppo.gae(jnp.append(rewards, long), jnp.append(values, long), mask, 0.9, 0.8)
    for short, extended in zip(alone, padded, strict=True):
        assert extended.tolist() == [*short.tolist(), *[0.0] * 5]


# Whitening


@functools.cache
def batch() -> tuple[jax.Array, jax.Array]:
    """[6, 20] values of mean 3 and deviation 5 with rows of different lengths."""
    lengths = np.asarray([20, 1, 7, 13, 0, 16])[:, None]
    return 3 + normal(3, 6, 20, scale=5.0), f32(np.arange(20)[None] < lengths)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_values_have_unit_variance_over_the_mask(shift_mean: bool) -> None:
    values, mask = batch()
    white = ppo.whiten(values, mask, shift_mean=shift_mean)
    inside = np.asarray(white, np.float64)[mask > 0]
    mean = 0.0 if shift_mean else np.asarray(values, np.float64)[mask > 0].mean()
    assert inside.mean() == pytest.approx(mean, abs=1e-6)
    assert inside.std() == pytest.approx(1, abs=1e-6)
    assert not white[mask == 0].any()


def test_whitening_by_hand() -> None:
    """Of 1 and 3: mean 2, variance 1."""
    values, mask = f32([[1.0, 3.0, 100.0]]), f32([[1, 1, 0]])
    close(ppo.whiten(values, mask), [[-1, 1, 0]])
    close(ppo.whiten(values, mask, shift_mean=False), [[1, 3, 0]])


@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_whitening_equal_or_no_values_gives_zeros(mask: float) -> None:
    assert not ppo.whiten(jnp.full((2, 3), 0.5), jnp.full((2, 3), mask)).any()


# Losses


def surrogate(ratio: Any, advantages: Any, mask: Any = 1.0) -> ppo.PolicyLoss:
    """Policy loss at eps = .2 of tokens with these ratios."""
    ratio, advantages, mask = jnp.broadcast_arrays(f32(ratio), f32(advantages), f32(mask))
    return ppo.policy_loss(jnp.log(ratio) - 1.0, jnp.full(ratio.shape, -1.0), advantages, mask, 0.2)


def test_at_ratio_1_nothing_is_clipped() -> None:
    advantages = normal(4, 30)
    loss = surrogate(1.0, advantages)
    close(loss.loss, -jnp.sum(advantages))
    assert (float(loss.clipped), float(loss.approx_kl), float(loss.ratio_max)) == (0, 0, 1)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 2.0, -2.4, 1),  # gain held at 1.2 * 2
        (1.5, -2.0, 3.0, 0),  # a worse token made likelier: no mercy
        (0.5, 2.0, -1.0, 0),  # a better token made less likely: no mercy
        (0.5, -2.0, 1.6, 1),  # gain held at .8 * 2
        (1.1, 2.0, -2.2, 0),
        (0.9, -2.0, 1.8, 0),
    ],
)
def test_clipping_holds_gains_and_never_losses(
    ratio: float, advantage: float, loss: float, clipped: int
) -> None:
    result = surrogate([ratio], [advantage])
    assert float(result.loss) == pytest.approx(loss, rel=1e-6)
    assert result.clipped == clipped
    assert float(result.approx_kl) == pytest.approx(0.5 * np.log(ratio) ** 2, rel=1e-5)


def test_losses_are_sums_over_the_mask() -> None:
    """Ratios 1.5 and .5 count, the padding with its ratio of 9 does not."""
    result = surrogate([1.5, 0.5, 9.0], [2.0, 2.0, -5.0], [1, 1, 0])
    close(result.loss, -2.4 - 1.0)
    assert (int(result.clipped), float(result.ratio_max)) == (1, pytest.approx(1.5))


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(1.5, 2.0, 0.0), (1.5, -2.0, 3.0), (0.5, -2.0, 0.0), (1.0, 2.0, -2.0)],
)
def test_a_clipped_token_has_no_gradient(ratio: float, advantage: float, gradient: float) -> None:
    """d loss / d log pi = -ratio * A where the plain objective is the active one."""

    def loss(logprobs: jax.Array) -> jax.Array:
        return ppo.policy_loss(logprobs, jnp.zeros(1), f32([advantage]), jnp.ones(1), 0.2).loss

    close(jax.grad(loss)(jnp.log(f32([ratio]))), [gradient])


def test_a_log_ratio_that_would_overflow_is_clamped() -> None:
    result = ppo.policy_loss(f32([200.0]), f32([0.0]), f32([-1.0]), jnp.ones(1), 0.2)
    close(result.ratio_max, np.exp(20.0))
    assert jnp.isfinite(result.loss)


@pytest.mark.parametrize(
    ("value", "returns", "loss", "clipped"),
    [
        (1.1, 2.0, 0.405, 0),  # within .2 of the old value 1: .5 * .9^2
        (2.0, 2.0, 0.32, 1),  # jumped to the return: as if it had stopped at 1.2, .5 * .8^2
        (3.0, 1.0, 2.0, 0),  # overshot: the plain error, .5 * 2^2, is the larger
        (0.5, 2.0, 1.125, 0),  # away from the return: .5 * 1.5^2, not .5 * 1.2^2
    ],
)
def test_value_loss_is_the_worse_of_plain_and_clipped(
    value: float, returns: float, loss: float, clipped: int
) -> None:
    """The second column is padding."""
    columns = [f32([x, 50.0]) for x in (value, 1.0, returns)]
    actual = ppo.value_loss(*columns, f32([1, 0]), 0.2)
    assert float(actual.loss) == pytest.approx(loss, rel=1e-6)
    assert int(actual.clipped) == clipped


# Controller and critic


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 256 / 10_000),
        (60.0, 1 + 0.2 * 256 / 10_000),
        (5.4, 1 - 0.1 * 256 / 10_000),
        (-3.0, 1 - 0.2 * 256 / 10_000),
        (np.nan, 1.0),
    ],
)
def test_the_controller_moves_in_proportion_and_at_most_a_fifth(kl: float, factor: float) -> None:
    coef = ppo.adapt_kl_coef(f32(0.1), f32(kl), target=6.0, horizon=10_000, batch_size=256)
    assert float(coef) == pytest.approx(0.1 * factor, rel=1e-6)


def test_leave_one_out_by_hand() -> None:
    rewards = jnp.asarray([1.0, 2.0, 6.0])
    np.testing.assert_allclose(ppo.rloo(rewards), [1 - 4, 2 - 3.5, 6 - 1.5], rtol=1e-6)
    np.testing.assert_allclose(ppo.rloo(jnp.asarray([3.0, 5.0])), [-2, 2])


def test_group_relative_rewards_by_hand() -> None:
    rewards = jnp.asarray([1.0, 2.0, 6.0])  # mean 3, squared distances 4, 1, 9
    expected = np.asarray([-2, -1, 3]) / (7**0.5 + 1e-4)
    np.testing.assert_allclose(ppo.grpo(rewards), expected, rtol=1e-6)
    np.testing.assert_array_equal(ppo.grpo(jnp.full((4,), 2.5)), np.zeros(4))


def test_moments_are_those_of_all_numbers() -> None:
    numbers = np.random.default_rng(0).normal(3, 2, size=(4, 5)).astype(np.float32)
    moments = ppo.Moments(*jnp.zeros(3))
    for some in numbers:
        moments = moments.add(jnp.asarray(some))
    assert float(moments.total) == 20
    assert float(moments.mean) == pytest.approx(numbers.mean(), rel=1e-6)
    scaled = moments.scale(jnp.asarray(numbers[0]))
    np.testing.assert_allclose(scaled, (numbers[0] - numbers.mean()) / numbers.std(), rtol=1e-5)


def test_moments_ignore_numbers_that_are_not_finite() -> None:
    moments = ppo.Moments(*jnp.zeros(3)).add(jnp.asarray([1.0, 3.0]))
    for x, y in zip(moments.add(jnp.asarray([2.0, jnp.inf])), moments, strict=True):
        assert float(x) == float(y)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (10.0, -1.0, 3.0, 1),  # bounded
        (2.0, -1.0, 2.0, 0),  # below the bound
        (0.5, -1.0, 0.8, 1),  # clipped as ever
        (10.0, 1.0, -1.2, 1),  # no bound on good tokens
    ],
)
def test_the_dual_clip_bounds_what_a_bad_token_costs(
    ratio: float, advantage: float, loss: float, clipped: int
) -> None:
    one = jnp.ones(1)
    found = ppo.policy_loss(
        jnp.log(one * ratio), one * 0, one * advantage, one, clip_eps=0.2, dual_clip=3.0
    )
    assert float(found.loss) == pytest.approx(loss, rel=1e-6)
    assert int(found.clipped) == clipped


def test_explained_variance_of_perfect_useless_and_wrong_critics() -> None:
    """A constant explains nothing; a critic of the opposite sign leaves four times the variance."""
    returns, mask = batch()
    for values, expected in [(returns, 1), (returns + 5, 1), (0 * returns, 0), (-returns, -3)]:
        noisy = jnp.where(mask > 0, values, 1e3)
        close(ppo.explained_variance(noisy, returns, mask), expected)


# Many answers


def test_vmapped_answers_are_those_one_by_one() -> None:
    values, mask = batch()
    logprobs, old, rewards = (normal(seed, 6, 20, scale=0.3) - 2 for seed in range(5, 8))
    score = normal(8, 6)
    calls = {
        "rewards": (ppo.shaped_rewards, (score, logprobs, old, mask), (0.1,)),
        "gae": (ppo.gae, (rewards, values, mask), (0.99, 0.95)),
        "policy": (ppo.policy_loss, (logprobs, old, values, mask), (0.2,)),
        "value": (ppo.value_loss, (values, old, rewards, mask), (0.2,)),
    }
    for name, (function, rows, constants) in calls.items():
        axes = (0,) * len(rows) + (None,) * len(constants)
        together = jax.jit(jax.vmap(function, axes))(*rows, *constants)
        single = [function(*(x[i] for x in rows), *constants) for i in range(6)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
        for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(stacked), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)
