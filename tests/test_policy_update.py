"""The PPO update as a whole: before anything is learnt, over meshes and cuts, by its options, and
when numbers go bad.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from updates import (
    ALONE,
    ANSWER,
    BOTH_CUTS,
    COLD,
    CONFIG,
    EOS,
    GRADIENT,
    GROUPS,
    HOT,
    ONE_STEP,
    OPTIONS,
    ROWS,
    SEPARATE,
    SPLIT,
    Sizes,
    answers,
    assert_close,
    assert_equal,
    base,
    distance,
    new_state,
    pack,
    read,
    slow,
    update,
)

from refine_af import config as config_lib
from refine_af import policy_update, rewards, rollout, training
from refine_af.config import Ppo, Sampling
from refine_af.mesh import shard_batch
from refine_af.models.transformer import Definition, Params
from refine_af.rollout import Rollout
from refine_af.training import TrainState

# Before anything is learnt


@pytest.mark.parametrize(
    "options",
    [GRADIENT, ONE_STEP, slow(dataclasses.replace(ONE_STEP, sampling=BOTH_CUTS))],
    ids=["cold, top-p", "hot, top-k", "hot, both"],
)
def test_identical_weights_have_no_kl_and_ratio_1(options: Ppo) -> None:
    """Whatever the temperature, and whatever top-k and top-p kept from being drawn."""
    _, metrics = update(options, noise=None)
    assert (metrics["kl/k1"], metrics["kl/k3"], metrics["ppo/clip_fraction"]) == (0, 0, 0)
    assert metrics["ppo/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert metrics["ppo/approx_kl"] < 1e-10
    assert metrics["ppo/grad_norm"] > 0.01, "there was something to learn"


@pytest.mark.parametrize("noise", [None, 1])
@pytest.mark.parametrize("sampling", [COLD, HOT], ids=["cold, top-p", "hot, top-k"])
def test_sampler_and_trainer_agree_on_log_probabilities(
    noise: int | None, sampling: Sampling
) -> None:
    rows, completions = answers(noise, sampling)
    heat = sampling.temperature
    assert rollout.drift(completions, read(new_state(noise), rows, heat)) < 1e-4
    other = rollout.drift(completions, read(new_state(2), rows, heat))
    assert other > 0.1, "drift would not notice other weights"


def test_the_critic_starts_at_zero() -> None:
    assert not new_state().params["value_head"]["kernel"].any()
    assert not read(new_state(), answers(None)[0]).values.any()


def test_an_answer_cut_by_length_is_not_rewarded_as_ended() -> None:
    _, completions = answers()
    ended = [c.finish_reason == "stop" for c in completions]
    assert ended == [c.token_ids[-1] in EOS for c in completions]
    assert 0 < sum(ended) < ROWS, "both kinds are needed"
    assert all(len(c.token_ids) == ANSWER for c, e in zip(completions, ended, strict=True) if not e)

    def oracle(examples: Any) -> dict[str, np.ndarray]:
        return {name: np.zeros(len(examples)) for name in config_lib.PAPER_COMPONENTS}

    examples = [rewards.Example("do", "", c.text) for c in completions]
    judged = rewards.judge(oracle, examples, ended, CONFIG.reward)
    lost = [CONFIG.reward.bias - judgement.reward for judgement in judged]
    assert lost == pytest.approx([0.0 if e else CONFIG.reward.missing_end_penalty for e in ended])


# How the batch is cut, and where it lies


@pytest.mark.parametrize("pieces", [slow(2), 4])
def test_microbatches_change_nothing(pieces: int) -> None:
    whole = dataclasses.replace(OPTIONS, num_minibatches=1)
    cut = dataclasses.replace(whole, num_microbatches=pieces)
    assert_close(update(cut), update(whole), 1e-6)


def test_packing_changes_nothing() -> None:
    rows, completions = answers()
    alone = pack(completions, layout=ALONE)
    assert max(len(texts) for texts in texts_of(rows)) > 1
    assert max(len(texts) for texts in texts_of(alone)) == 1
    assert_close(read(new_state(1), alone), read(new_state(1), rows), 1e-5)
    state, metrics = update(GRADIENT, **alone._asdict())
    expected_state, expected_metrics = update(GRADIENT)
    assert_close(metrics, expected_metrics, 1e-5)
    assert_close(state, expected_state, 1e-5)


def texts_of(rows: Rollout) -> list[set[int]]:
    """Numbers of the answers in each row."""
    return [
        set((answer[predicts > 0] // ANSWER).tolist())
        for answer, predicts in zip(rows.answer, rows.predicts, strict=True)
    ]


def test_every_answer_token_is_predicted_once() -> None:
    rows, completions = answers()
    assert rows.predicts.sum() == sum(len(c.token_ids) for c in completions)
    number = np.arange(ROWS * ANSWER).reshape(ROWS, ANSWER) + 1
    there = rows.of_predictions(jnp.asarray(number))
    np.testing.assert_array_equal(rows.of_answers(there), number * rows.mask)
    next_tokens = np.take_along_axis(rows.tokens, rows.columns + 1, axis=1)
    back = np.asarray(rows.of_answers(jnp.asarray(next_tokens)))
    for completion, ids in zip(completions, back, strict=True):
        assert ids[: len(completion.token_ids)].tolist() == list(completion.token_ids)


def test_activations_stay_where_their_rows_are() -> None:
    """Weights are gathered layer by layer; nothing as large as a batch's residual stream is moved.

    The compiler's own choice, with nothing said, is to gather the batch.
    """
    home = base((1, 8, 1, 1))
    rows = shard_batch(home.mesh, pack(answers()[1], layout=SPLIT))
    places = rollout.Places(rows.tokens, rows.start, rows.columns)

    def largest(definition: Definition) -> int:
        def loss(adapter: Params) -> jax.Array:
            hidden = rollout.hidden_states(definition, home.params, adapter, places, remat="full")
            return jnp.sum(hidden**2)

        adapter = home.new_adapter(OPTIONS.lora, jax.random.key(0))
        text = jax.jit(jax.grad(loss)).lower(adapter).compile().as_text()
        moved = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all)\(", text)
        shapes = re.findall(r"\[([\d,]+)\]", " ".join(moved))
        return max(int(np.prod(list(map(int, shape.split(","))))) for shape in shapes)

    stream = rows.tokens.size * home.config.embed_dim
    definition = home.adapted(OPTIONS.lora)
    assert largest(definition) < stream <= largest(dataclasses.replace(definition, layout=None))


GRPO = dataclasses.replace(GROUPS, estimator="grpo")


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (OPTIONS, (2, 2, 1, 2)),
        *(
            pytest.param(options, sizes, marks=pytest.mark.slow)
            for options, sizes in [
                *(
                    (OPTIONS, sizes)
                    for sizes in ((8, 1, 1, 1), (1, 8, 1, 1), (2, 1, 4, 1), (2, 1, 1, 4))
                ),
                *((options, (2, 2, 1, 2)) for options in (SEPARATE, GROUPS, GRPO)),
            ]
        ),
    ],
)
def test_a_mesh_changes_nothing(options: Ppo, sizes: Sizes) -> None:
    rows = pack(answers()[1], layout=SPLIT)._asdict()
    state, metrics = update(options, sizes=sizes, **rows)
    expected_state, expected_metrics = update(options, **rows)
    assert_close(metrics, expected_metrics, 1e-5)
    assert_close(state, expected_state, 1e-5)
    start = new_state(1, sizes, options)  # laid out alike: the next step is the same program
    for after, before in zip(*map(jax.tree.leaves, (state.params, start.params)), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim)


# What the options do


def steps_taken(state: TrainState) -> set[int]:
    counts = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
    return {int(count) for _, count in counts}


def test_epochs_and_minibatches_are_steps_of_the_optimizer() -> None:
    once, twice = update(ONE_STEP)[0], update()[0]
    assert (steps_taken(once), steps_taken(twice)) == ({1}, {4})
    assert (int(once.step), int(twice.step)) == (1, 1)
    assert distance(once, twice) > 1e-3


def test_the_ratio_is_to_the_policy_that_drew_the_answers() -> None:
    """Were old log-probabilities computed with the new weights, nothing would ever be clipped."""
    assert update(ONE_STEP)[1]["ppo/clip_fraction"] == 0
    assert update()[1]["ppo/clip_fraction"] > 0.01


def test_the_key_decides_which_rows_form_a_minibatch() -> None:
    first, same, other = (update(key=key)[0] for key in (0, 0, 1))
    assert_equal(first, same)
    assert distance(first, other) > 1e-4


@pytest.mark.parametrize("noise", [None, 1])
def test_the_kl_coefficient_is_used_then_adapted(noise: int | None) -> None:
    options = ONE_STEP
    state, metrics = update(options, noise)
    assert metrics["kl/coef"] == pytest.approx(options.kl_coef)
    error = np.clip(metrics["kl/k1"] / options.kl_target - 1, -0.2, 0.2)
    expected = options.kl_coef * (1 + error * ROWS / options.kl_horizon)
    assert float(state.kl_coef) == pytest.approx(expected, rel=1e-6)
    assert expected != options.kl_coef


def test_a_fixed_coefficient_stays() -> None:
    state, _ = update(dataclasses.replace(ONE_STEP, kl_controller="fixed"))
    assert float(state.kl_coef) == np.float32(ONE_STEP.kl_coef)


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_groups_need_no_critic(estimator: str) -> None:
    options = dataclasses.replace(GROUPS, estimator=estimator)
    rows = answers()[0]
    reading = read(new_state(1), rows)
    state = new_state(1)._replace(kl_coef=jnp.asarray(options.kl_coef))
    advantages, returns = policy_update.estimate(rows, reading, state, options)
    kl = ((reading.logprobs - reading.ref_logprobs) * rows.mask).sum(1)
    totals = (rows.score - options.kl_coef * np.asarray(kl)).reshape(2, 4)
    apart = totals - totals.mean(1, keepdims=True)
    scale = 4 / 3 if estimator == "rloo" else 1 / (totals.std(1, ddof=1, keepdims=True) + 1e-4)
    expected = (apart * scale).reshape(-1, 1) * rows.mask
    np.testing.assert_allclose(advantages, expected, atol=1e-5, rtol=1e-5)
    assert not np.asarray(returns).any()
    after, _ = update(options)
    assert_equal(after.params["value_head"], new_state(1).params["value_head"])
    assert distance(after, new_state(1)) > 1e-3
    metrics = update(options)[1]
    assert not {"ppo/value_loss", "ppo/explained_variance"} & metrics.keys()


def test_scores_are_scaled_by_all_that_were_seen() -> None:
    options = dataclasses.replace(ONE_STEP, scale_scores=True)
    rows = answers(1, HOT)[0]
    state, _ = update(options)
    assert float(state.scores.total) == ROWS
    assert float(state.scores.mean) == pytest.approx(rows.score.mean(), abs=1e-6)
    scaled = (rows.score - rows.score.mean()) / rows.score.std()
    assert_close(update(options)[1], update(ONE_STEP, score=scaled)[1], 1e-4)


def test_whitened_rewards_have_deviation_1_and_keep_their_mean() -> None:
    rows = answers()[0]
    reading, state = read(new_state(1), rows), new_state(1)
    without = {"kl_coef": 0.0, "kl_controller": "fixed"}
    options = dataclasses.replace(OPTIONS, gae_lambda=1.0, gamma=1.0, **without)
    state = state._replace(kl_coef=jnp.zeros(()))
    whitened = dataclasses.replace(options, whiten_rewards=True)
    plain, scaled = (
        policy_update.estimate(rows, reading, state, o)[1] for o in (options, whitened)
    )
    rewards = plain[:, 0], scaled[:, 0]  # an answer's return is its score
    np.testing.assert_allclose(rewards[0], rows.score, atol=1e-5)
    count = rows.mask.sum()
    mean = rows.score.sum() / count
    deviation = np.sqrt((rows.score**2).sum() / count - mean**2)
    lengths = rows.mask.sum(1)
    expected = (rows.score - mean * lengths) / deviation + mean * lengths
    np.testing.assert_allclose(rewards[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_epochs_end_once_the_policy_has_moved_too_far() -> None:
    """The first step is at the policy that sampled; the second one sees what it did."""
    whole, figures = update()
    assert figures["ppo/steps_taken"] == 4
    stopped, figures = update(dataclasses.replace(OPTIONS, max_update_kl=1e-6))
    assert (figures["ppo/steps_taken"], figures["ppo/steps_skipped"]) == (1, 0)
    assert steps_taken(stopped) == {1}
    patient, _ = update(dataclasses.replace(OPTIONS, max_update_kl=1e6))
    assert_close(patient, whole, 1e-6)
    assert all(np.isfinite(value) for value in figures.values())


def test_the_base_never_changes() -> None:
    before = jax.tree.map(np.array, base().params)
    update()
    assert_equal(base().params, before)


# Numbers that are not finite


def test_a_nan_reward_is_skipped_and_counted() -> None:
    """Whitening spreads it over the batch, so that no step can be taken."""
    score = np.array(answers()[0].score)
    score[3] = np.nan
    before = new_state(1)
    state, metrics = update(score=score)
    assert np.isnan(metrics["ppo/grad_norm"])
    assert (int(state.skipped), int(state.step)) == (4, 1)
    assert_equal(state.params, before.params)
    assert_equal(state.opt_state, before.opt_state)
    assert np.isfinite(state.kl_coef)


def test_one_bad_minibatch_is_seen() -> None:
    options = dataclasses.replace(
        OPTIONS, num_epochs=1, num_minibatches=4, whiten_advantages=False, sampling=COLD
    )
    score = np.array(answers()[0].score)
    score[3] = np.nan
    state, metrics = update(options, score=score)
    assert (metrics["ppo/steps_taken"], metrics["ppo/steps_skipped"]) == (3, 1)
    assert np.isnan(metrics["ppo/loss"]) and np.isnan(metrics["ppo/grad_norm"])
    assert metrics["nonfinite/score"] == 1
    assert metrics["nonfinite/loss"] == metrics["nonfinite/gradient of policy"] == 1
    assert steps_taken(state) == {3}


def test_a_reading_that_is_not_finite_leaves_the_controller_alone() -> None:
    reading = read(new_state(1), answers()[0])
    broken = reading._replace(logprobs=reading.logprobs.at[0, 0].set(jnp.nan))
    state, _ = update(reading=broken)
    assert (int(state.skipped), float(state.kl_coef)) == (4, pytest.approx(OPTIONS.kl_coef))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_costs_one_step_and_the_next_is_taken(bad: float) -> None:
    optimizer = optax.adam(0.1)
    start = training.new_state({"a": jnp.ones(2), "b": jnp.ones(())}, optimizer, 0.0)
    good = {"a": jnp.ones(2), "b": jnp.ones(())}
    skipped, norm = training.guarded_step(optimizer, start, good | {"b": jnp.asarray(bad)})
    assert (int(skipped.skipped), bool(jnp.isfinite(norm))) == (1, False)
    assert_equal(skipped._replace(skipped=start.skipped), start)
    after, norm = training.guarded_step(optimizer, skipped, good)
    assert_equal(after, training.guarded_step(optimizer, start, good)[0])
    assert (int(after.skipped), float(norm)) == (0, pytest.approx(3**0.5)), "none in a row"
    assert distance(after, start) > 0.1


def test_too_many_skipped_steps_stop_the_run() -> None:
    state = new_state()._replace(skipped=jnp.asarray(3, jnp.int32))
    training.check_skipped(state, "ppo step 7", limit=3)
    with pytest.raises(
        ValueError, match=r"ppo step 7: 3 steps in a row had a gradient that is not finite"
    ):
        training.check_skipped(state, "ppo step 7", limit=2)
    with pytest.raises(ValueError, match=r"\(limit 2\); not finite: score; lower"):
        figures = {"nonfinite/score": 1.0, "nonfinite/values": 0.0}
        training.check_skipped(state, "", figures, limit=2)
