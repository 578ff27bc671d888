"""What PPO trains: adapter or all weights, a critic that shares the trunk or has its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from updates import (
    ONE_STEP,
    ROWS,
    answers,
    asked,
    assert_close,
    assert_equal,
    base,
    distance,
    make_update,
    new_state,
    pack,
    read,
    slow,
    update,
)

from refine_af import mesh, policy_update, rollout, training
from refine_af.config import Ppo
from refine_af.policy import Policy

SEPARATE = dataclasses.replace(ONE_STEP, critic="separate", value_coef=1.0)
ALL = dataclasses.replace(ONE_STEP, trained="full")
BOTH = dataclasses.replace(ALL, critic="separate")


def moved(first: Any, second: Any) -> float:
    return float(optax.tree.norm(optax.tree.sub(first, second)))


@pytest.mark.parametrize("options", [SEPARATE, ALL, slow(BOTH)], ids=["critic", "full", "both"])
def test_before_the_first_step_the_policy_is_the_reference(options: Ppo) -> None:
    reading = read(new_state(options=options), answers()[0], options=options)
    assert_equal(reading.logprobs, reading.ref_logprobs)
    assert not np.asarray(reading.values).any()


def test_all_weights_are_trained_and_the_reference_stays() -> None:
    before = jax.tree.map(np.array, base().params)
    start = new_state(options=ALL).params["policy"]
    state, metrics = update(ALL, None)
    assert_equal(base().params, before)
    assert all(
        moved(a, b) > 0
        for a, b in zip(*map(jax.tree.leaves, (state.params["policy"], start)), strict=True)
    )
    assert metrics["kl/k1"] == 0
    reading = read(state, answers(None)[0], options=ALL)
    assert np.abs(np.asarray(reading.logprobs - reading.ref_logprobs)).max() > 1e-3


@pytest.mark.parametrize("options", [SEPARATE, ALL], ids=["lora", "full"])
def test_the_engine_samples_what_is_trained(options: Ppo) -> None:
    state = new_state(1, options=options)
    params = Policy(base(), options).for_sampling(state.params)
    completions = base().engine(ROWS).generate(params, asked())
    reading = read(state, pack(completions), options=options)
    assert rollout.drift(completions, reading) < 1e-4


def test_the_sampling_layout_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host traces the whole model for it."""
    policy, state = Policy(base(), ONE_STEP), new_state(options=ONE_STEP)
    first = policy.for_sampling(state.params)
    monkeypatch.delattr(mesh, "param_shardings")
    assert_equal(policy.for_sampling(state.params), first)


@pytest.mark.slow
def test_all_weights_on_a_mesh_are_those_on_one_device() -> None:
    state, metrics = update(ALL, sizes=(1, 8, 1, 1))
    expected_state, expected_metrics = update(ALL)
    assert_close(metrics, expected_metrics, 1e-5)
    assert_close(state, expected_state, 1e-5)


@pytest.mark.slow
def test_a_critic_of_its_own_leaves_the_policy_alone() -> None:
    """A shared trunk is moved by the value loss, too."""
    for options, alone in ((SEPARATE, True), (ONE_STEP, False)):
        states = [
            update(dataclasses.replace(options, value_coef=coef, max_grad_norm=1e6))[0].params
            for coef in (0.5, 2.0)
        ]
        assert (moved(states[0]["policy"], states[1]["policy"]) < 1e-6) == alone
    critic = new_state(1, options=SEPARATE).params["critic"]
    assert moved(update(SEPARATE)[0].params["critic"], critic) > 1e-3


@pytest.mark.parametrize("options", [slow(ONE_STEP), SEPARATE], ids=["shared", "separate"])
def test_the_warm_up_trains_the_critic_alone(options: Ppo) -> None:
    start = new_state(1, options=options).params
    first = update(dataclasses.replace(options, critic_warmup=1))[0].params
    assert_equal(first["policy"], start["policy"])
    assert moved(first["value_head"], start["value_head"]) > 1e-4


@pytest.mark.slow
def test_the_first_step_of_the_policy_is_the_same_however_long_the_warm_up() -> None:
    """Its moments, and its own warm-up of the learning rate, begin with it."""
    options = dataclasses.replace(
        SEPARATE,
        num_steps=8,
        schedule="constant",
        warmup_steps=2,
        max_grad_norm=1e6,
        kl_controller="fixed",
    )
    expected = update(options)[0].params["policy"]
    late = dataclasses.replace(options, critic_warmup=2)
    state, batch = new_state(1, options=late), answers(1, late.sampling)[0]
    reading = read(state, batch, late.sampling.temperature, options=late)
    run = make_update(late)
    for step in range(3):
        state, _ = run(base().params, state, batch, reading, jax.random.key(step))
    assert_close(state.params["policy"], expected, 1e-6)


def test_learning_rates_by_hand() -> None:
    options = dataclasses.replace(
        ONE_STEP, num_epochs=1, num_minibatches=1, learning_rate=8.0, warmup_steps=3
    )
    counts = np.asarray([0, 2, 3, 7, 11])
    for name, late in (
        ("linear", [8.0, 4.0, 0.0]),  # 8 steps behind the warm-up
        ("cosine", [8.0, 4.0, 0.0]),
        ("constant", [8.0, 8.0, 8.0]),
    ):
        rate = policy_update.schedule(dataclasses.replace(options, schedule=name), 11)
        np.testing.assert_allclose(rate(counts), [2.0, 6.0, *late], atol=1e-6, err_msg=name)
    cosine = policy_update.schedule(dataclasses.replace(options, schedule="cosine"), 11)
    assert float(cosine(5)) == pytest.approx(8 * (1 + np.cos(np.pi / 4)) / 2)


@pytest.mark.slow
def test_factored_moments_take_steps() -> None:
    options = dataclasses.replace(ALL, optimizer="adafactor")
    state, metrics = update(options)
    assert np.isfinite(metrics["ppo/loss"])
    assert distance(state, new_state(1, options=options)) > 1e-4


def test_moments_of_large_matrices_are_rows_and_columns() -> None:
    options = dataclasses.replace(ALL, optimizer="adafactor")
    weights = {"policy": {"w": jax.ShapeDtypeStruct((4096, 512), np.float32)}}
    state = jax.eval_shape(policy_update.optimizer(options).init, weights)
    shapes = {x.shape for x in jax.tree.leaves(state)}
    assert {(4096,), (512,)} <= shapes and (4096, 512) not in shapes


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_the_learning_rate_that_is_shown_is_the_policy_s(optimizer: str, warmup: int) -> None:
    """It rises by a quarter with each of its steps; none is taken in a critic's warm-up."""
    options = dataclasses.replace(
        ONE_STEP,
        num_steps=8,
        optimizer=optimizer,
        learning_rate=8.0,
        warmup_steps=3,
        critic_warmup=warmup,
    )
    params = {"policy": {"a": jnp.ones(2)}, "value_head": {"b": jnp.ones(2)}}
    tx = policy_update.optimizer(options)
    state, found = training.new_state(params, tx, 0.0), []
    for step in range(warmup + 3):
        found.append(float(policy_update.learning_rate(state, options)))
        learns = {"policy_learns": jnp.asarray(step >= warmup)} if warmup else {}
        state = training.guarded_step(tx, state, params, **learns)[0]
        state = state._replace(step=state.step + 1)
    assert found == [2.0] * warmup + [2.0, 4.0, 6.0]
