"""Rewards: the formula by hand, and what bad oracles and answers get."""

from collections.abc import Sequence

import numpy as np
import pytest

from refine_af import rewards
from refine_af.config import PAPER_COMPONENTS, Reward
from refine_af.rewards import Example

# The formula


def test_combine_is_the_formula_of_the_paper() -> None:
    """.0078 * 2.5 - .4421 * .9 + .3212 * .8 + .1520 * .5 - .0274 = -.07283."""
    components = {"rew": 2.5, "und": 0.9, "nat": 0.8, "coh": 0.5}
    assert rewards.combine(components, Reward()) == pytest.approx(-0.07283, rel=1e-14)


@pytest.mark.parametrize("name", ["rew", "und", "nat", "coh"])
def test_combine_uses_each_configured_coefficient(name: str) -> None:
    """Powers of two, so that the sum is exact."""
    options = Reward(rew=2.0, und=-4.0, nat=8.0, coh=16.0, bias=0.5)
    nothing = dict.fromkeys(PAPER_COMPONENTS, 0.0)
    assert rewards.combine(nothing | {name: 0.25}, options) == 0.5 + getattr(options, name) * 0.25


# Judging answers


def constant(**components: float) -> rewards.Oracle:
    """An oracle that says the same of every example."""

    def oracle(examples: Sequence[Example]) -> dict[str, np.ndarray]:
        return {name: np.full(len(examples), value) for name, value in components.items()}

    return oracle


def word_count(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """An oracle whose `rew` tells its examples apart."""
    lengths = np.asarray([len(e.output.split()) for e in examples], np.float64)
    return {name: np.zeros(len(examples)) for name in PAPER_COMPONENTS} | {"rew": lengths}


PAYS = Reward(rew=1.0, bias=0.0, unparsable=-3.0, missing_end_penalty=0.25)


def test_floor_penalty_and_components_go_to_their_answers() -> None:
    """An unreadable answer in the middle does not shift the scores of those after it."""
    answers = [Example("do", "", "one"), None, Example("do", "", "one two three"), None]
    judged = rewards.judge(word_count, answers, [True, True, False, False], PAYS)
    assert [j.reward for j in judged] == [1.0, -3.0, 2.75, -3.25]
    assert [j.components and j.components["rew"] for j in judged] == [1.0, None, 3.0, None]


def test_an_oracle_is_not_asked_about_nothing() -> None:
    def oracle(examples: Sequence[Example]) -> dict[str, np.ndarray]:
        raise AssertionError(examples)

    assert [j.reward for j in rewards.judge(oracle, [None, None], [True, True], PAYS)] == [-3, -3]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_names_the_instruction(bad: float) -> None:
    oracle = constant(rew=0.0, und=0.5, nat=bad, coh=0.5)
    message = (
        rf"reward oracle gave {{'nat': {bad}}} \(not finite\) for the instruction 'Sing\.' "
        "with the output 'la'"
    )
    with pytest.raises(ValueError, match=message):
        rewards.judge(oracle, [Example("Sing.", "", "la")], [True], PAYS)


def test_a_missing_component_is_named() -> None:
    with pytest.raises(ValueError, match=r"gave \['nat', 'rew'\], but \['und', 'coh'\] \(missing"):
        rewards.judge(constant(rew=0.0, nat=0.5), [Example("Sing.", "", "la")], [True], PAYS)


@pytest.mark.parametrize("surplus", [-1, 1])
def test_an_oracle_must_give_one_value_an_example(surplus: int) -> None:
    def oracle(examples: Sequence[Example]) -> dict[str, np.ndarray]:
        return {name: np.zeros(len(examples) + surplus) for name in PAPER_COMPONENTS}

    message = rf"reward oracle gave 'rew' of shape \({2 + surplus},\) for 2 examples"
    with pytest.raises(ValueError, match=message):
        rewards.judge(oracle, [Example("Sing.", "", "la")] * 2, [True, True], PAYS)


def test_every_answer_needs_to_know_whether_it_ended() -> None:
    with pytest.raises(ValueError, match="shorter"):
        rewards.judge(word_count, [Example("Sing.", "", "la"), None], [True], PAYS)


def test_an_example_reads_as_instruction_then_input() -> None:
    assert Example("Add.", "1 2", "3").context == "Add.\n1 2"
    assert Example("Sing.", "", "la").context == "Sing."


@pytest.mark.parametrize("name", ["rew", "und", "nat", "coh"])
def test_a_component_that_counts_for_nothing_may_be_missing(name: str) -> None:
    table = {other: np.ones(1) for other in PAPER_COMPONENTS if other != name}
    options = Reward(rew=1.0, und=1.0, nat=1.0, coh=1.0, bias=0.0)
    with pytest.raises(ValueError, match="missing"):
        rewards.combine(table, options)
    without = {**{other: 1.0 for other in PAPER_COMPONENTS}, name: 0.0}
    assert rewards.combine(table, Reward(**without, bias=0.0)) == [3.0]


# Shaping


TABLE = {"good": np.asarray([1.0, 2.0, 3.0, 6.0]), "long": np.asarray([0.0, 0.0, 4.0, 4.0])}


def test_other_components_have_coefficients_by_name() -> None:
    """2 * good - .5 * long + 1."""
    options = Reward(others=("good=2", "long=-.5"), bias=1.0)
    np.testing.assert_array_equal(rewards.combine(TABLE, options), [3, 5, 5, 11])


def test_a_component_named_reward_is_the_reward() -> None:
    table = {**TABLE, "reward": np.asarray([0.25, -1.0, 0.0, 9.0])}
    np.testing.assert_array_equal(rewards.combine(table, Reward()), table["reward"])


def test_others_beside_a_whole_reward_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reward\.others would count for nothing"):
        rewards.combine({"reward": np.ones(1), "a": np.ones(1)}, Reward(others=("a=1",)))


def test_one_of_the_others_that_is_missing_is_to_be_taken_out() -> None:
    with pytest.raises(ValueError, match=r"take \['long'\] out of reward\.others$"):
        rewards.combine({"good": np.ones(1)}, Reward(others=("good=1", "long=1")))


def test_components_are_normalised_over_the_batch_then_clipped_then_summed() -> None:
    """good: mean 3, deviation sqrt(3.5); long: mean 2, deviation 2, so -1 -1 1 1."""
    options = Reward(others=("good=1", "long=1"), bias=0.0, normalise="batch")
    good = np.asarray([-2, -1, 0, 3]) / np.sqrt(3.5)
    np.testing.assert_allclose(
        rewards.combine(TABLE, options), good + np.asarray([-1, -1, 1, 1]), rtol=1e-12
    )
    clipped = Reward(**{**vars(options), "clip_components": 0.6})
    good = np.asarray([-0.6, -1 / np.sqrt(3.5), 0, 0.6])
    wanted = good + np.asarray([-0.6, -0.6, 0.6, 0.6])
    np.testing.assert_allclose(rewards.combine(TABLE, clipped), wanted, rtol=1e-12)


def test_equal_components_normalise_to_nothing() -> None:
    table = {"good": np.full(3, 7.0)}
    options = Reward(others=("good=1",), bias=0.5, normalise="batch")
    np.testing.assert_array_equal(rewards.combine(table, options), [0.5] * 3)


def test_the_reward_is_clipped_last_and_penalties_come_on_top() -> None:
    options = Reward(rew=1.0, bias=0.0, clip_reward=1.5, missing_end_penalty=2.0)
    answers = [Example("do", "", words) for words in ("a", "a b c", "a b c")]
    judged = rewards.judge(word_count, answers, [True, True, False], options)
    assert [j.reward for j in judged] == [1.0, 1.5, -0.5]
    assert judged[1].components and judged[1].components["rew"] == 3.0  # as it was given


@pytest.mark.parametrize("item", ["good", "good=", "good=x", "2=1", "rew=1", "good=nan", "=1"])
def test_coefficients_that_say_nothing_are_refused(item: str) -> None:
    with pytest.raises(ValueError, match=r"reward\.others: .*: expected name=coefficient"):
        Reward(others=(item,))


def test_a_reward_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no component has a coefficient; .* \['good', 'long'\]"):
        rewards.combine(TABLE, Reward(others=("good=0",)))
    with pytest.raises(ValueError, match="reward oracle gave no component"):
        rewards.judge(constant(), [Example("Sing.", "", "la")], [True], PAYS)
    with pytest.raises(ValueError, match=r"\['a'\] stand there more than once"):
        Reward(others=("a=1", "a=2"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["rew", "bias", "unparsable", "clip_reward", "timeout"])
def test_numbers_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"reward\.{name}={bad}: expected a finite number"):
        Reward(**{name: float(bad)})


def test_a_fault_of_no_single_example_is_one_of_the_batch() -> None:
    def oracle(examples: Sequence[Example]) -> dict[str, np.ndarray]:
        if len(examples) > 1:
            raise MemoryError("too many")
        return {"reward": np.zeros(1)}

    answers = [Example("Sing.", "", "la"), Example("Stop.", "", "no")]
    message = r"failed on a batch of 2 from the instruction 'Sing\.' .* on: MemoryError: too many"
    with pytest.raises(ValueError, match=message):
        rewards.components(oracle, answers)


def test_a_failing_oracle_names_the_example() -> None:
    def oracle(examples: Sequence[Example]) -> dict[str, np.ndarray]:
        return {"reward": np.asarray([1 / len(e.output) for e in examples])}

    answers = [Example("Sing.", "", "la"), Example("Stop.", "", "")]
    message = (
        "reward oracle failed on the instruction 'Stop.' with the output '': ZeroDivisionError: "
    )
    with pytest.raises(ValueError, match=message):
        rewards.judge(oracle, answers, [True, True], Reward())
