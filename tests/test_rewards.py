"""Rewards: the formula by hand, what bad oracles and answers get, and the base model as judge."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_af import config as config_lib
from refine_af import mesh, rewards
from refine_af.config import Reward
from refine_af.models import transformer
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.registry import PRESETS
from refine_af.rewards import BaseModelJudge, Example

TINY = PRESETS["tiny"]
TOKENIZER = byte_tokenizer()


# The formula


def test_combine_is_the_formula_of_the_paper() -> None:
    """.0078 * 2.5 - .4421 * .9 + .3212 * .8 + .1520 * .5 - .0274 = -.07283."""
    components = {"rew": 2.5, "und": 0.9, "nat": 0.8, "coh": 0.5}
    assert rewards.combine(components, Reward()) == pytest.approx(-0.07283, rel=1e-14)


@pytest.mark.parametrize("name", ["rew", "und", "nat", "coh"])
def test_combine_uses_each_configured_coefficient(name: str) -> None:
    """Powers of two, so that the sum is exact."""
    options = Reward(rew=2.0, und=-4.0, nat=8.0, coh=16.0, bias=0.5)
    nothing = dict.fromkeys(rewards.COMPONENTS, 0.0)
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
    return {name: np.zeros(len(examples)) for name in rewards.COMPONENTS} | {"rew": lengths}


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
    message = rf"reward oracle gave {{'nat': {bad}}} \(not finite\) for the instruction 'Sing\.'"
    with pytest.raises(ValueError, match=message):
        rewards.judge(oracle, [Example("Sing.", "", "la")], [True], PAYS)


def test_a_missing_component_is_named() -> None:
    with pytest.raises(ValueError, match=r"gave \['und', 'coh'\] \(missing\) for the instruction"):
        rewards.judge(constant(rew=0.0, nat=0.5), [Example("Sing.", "", "la")], [True], PAYS)


@pytest.mark.parametrize("surplus", [-1, 1])
def test_an_oracle_must_give_one_value_an_example(surplus: int) -> None:
    def oracle(examples: Sequence[Example]) -> dict[str, np.ndarray]:
        return {name: np.zeros(len(examples) + surplus) for name in rewards.COMPONENTS}

    message = rf"reward oracle gave {2 + surplus} values of 'rew' for 2 examples"
    with pytest.raises(ValueError, match=message):
        rewards.judge(oracle, [Example("Sing.", "", "la")] * 2, [True, True], PAYS)


def test_every_answer_needs_to_know_whether_it_ended() -> None:
    with pytest.raises(ValueError, match="shorter"):
        rewards.judge(word_count, [Example("Sing.", "", "la"), None], [True], PAYS)


def test_an_example_reads_as_instruction_then_input() -> None:
    assert Example("Add.", "1 2", "3").context == "Add.\n1 2"
    assert Example("Sing.", "", "la").context == "Sing."


# The base model as judge


EXAMPLES = [
    Example("Add the numbers.", "1 2", "3"),
    Example("Sing.", "", "la la la"),
    Example("Name a colour of the sky at noon and at night.", "", "Blue; black."),
    Example("Repeat.", "abc " * 20, "abc " * 20),
    Example("Say nothing.", "", "."),
]


@functools.cache
def base_judge() -> BaseModelJudge:
    """Random weights with logits of order 1, two devices' worth of data."""
    params, _ = transformer.init(TINY, key=jax.random.key(0))
    devices = mesh.make_mesh(config_lib.Mesh(), jax.devices()[:2])
    definition = transformer.define(TINY)
    larger = jax.tree.map(lambda x: 5 * x, params)
    return BaseModelJudge(definition, larger, TOKENIZER, devices)


@functools.cache
def scores() -> dict[str, np.ndarray]:
    return base_judge()(EXAMPLES)


@jax.jit
def full_logprobs(ids: jax.Array) -> jax.Array:
    model = transformer.bind(base_judge().definition, base_judge().params)
    logits = model.logits(model(ids, jnp.zeros(1, jnp.int32))[0])
    return jax.nn.log_softmax(logits[0])


def logprobs(text: str) -> np.ndarray:
    """Whole table [T, V] of what follows each token of a text that stands alone."""
    ids = TOKENIZER(text).input_ids
    return np.asarray(full_logprobs(np.asarray([ids + [0] * (512 - len(ids))])))[: len(ids)]


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    assert set(actual) == set(expected) == set(rewards.COMPONENTS)
    for name, column in actual.items():
        np.testing.assert_allclose(column, expected[name], atol=1e-5, rtol=0, err_msg=name)


def test_scores_are_probabilities_and_log_probabilities_that_differ() -> None:
    for name in ("nat", "und", "coh"):
        assert ((scores()[name] > 0) & (scores()[name] < 1)).all()
    assert (scores()["rew"] < 0).all()
    assert all(len(set(column.round(4))) == len(EXAMPLES) for column in scores().values())


def test_neighbours_order_and_padding_change_no_score() -> None:
    judge = base_judge()
    for name in rewards.COMPONENTS:
        alone = np.concatenate([judge([example])[name] for example in EXAMPLES])
        np.testing.assert_allclose(alone, scores()[name], atol=1e-5, rtol=0, err_msg=name)
    turned = judge(EXAMPLES[::-1])
    assert_same({name: column[::-1] for name, column in turned.items()}, scores())


def test_the_likelihood_is_the_mean_over_the_output() -> None:
    """Bytes are tokens, so the span of the output is known; each is predicted one row before."""
    for example, actual in zip(EXAMPLES, scores()["rew"], strict=True):
        prompt, output = f"Task: {example.context}\nResponse:", f" {example.output}"
        table, first = logprobs(prompt + output), len(prompt)
        ids = TOKENIZER(output).input_ids
        assert len(table) == first + len(ids)
        expected = np.mean([table[first - 1 + i, token] for i, token in enumerate(ids)])
        assert actual == pytest.approx(expected, abs=1e-5)


def test_a_question_is_answered_by_yes_against_no() -> None:
    """Of the byte tokenizer's candidates the last byte counts: `s` and `o`."""
    example = EXAMPLES[0]
    question = "Is this a natural response to the task? Answer Yes or No.\nAnswer:"
    text = f"Task: {example.context}\nResponse: {example.output}\n\n{question}"
    yes, no = (logprobs(text)[-1, TOKENIZER(c).input_ids[0]] for c in "so")
    assert scores()["nat"][0] == pytest.approx(1 / (1 + np.exp(no - yes)), abs=1e-5)


def test_a_long_text_loses_its_beginning() -> None:
    """512 tokens are read: what lies before them changes nothing, what they hold does."""
    tail = "x" * 600
    texts = [Example("A", start + tail, "y") for start in ("", "zz", "z" * 300)]
    other = Example("A", "w" * 600, "y")
    columns = base_judge()([*texts, other])
    for name, column in columns.items():
        np.testing.assert_array_equal(column[1:3], column[0], err_msg=name)
        assert abs(column[3] - column[0]) > 1e-4, name


def test_an_output_longer_than_the_limit_is_scored_by_its_end() -> None:
    example = Example("A", "", "y" * 700)
    table = logprobs("y" * 512)
    expected = table[np.arange(511), TOKENIZER("y" * 511).input_ids].mean()
    assert base_judge()([example])["rew"][0] == pytest.approx(expected, abs=1e-5)
