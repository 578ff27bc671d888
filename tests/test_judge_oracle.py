"""A model as the judge: what it reads, and that neighbours change nothing."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_af import base_model
from refine_af.config import PAPER_COMPONENTS, Mesh, Model
from refine_af.judge_oracle import JudgeOracle
from refine_af.models import transformer
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.rewards import Example

TOKENIZER = byte_tokenizer()

EXAMPLES = [
    Example("Add the numbers.", "1 2", "3"),
    Example("Sing.", "", "la la la"),
    Example("Name a colour of the sky at noon and at night.", "", "Blue; black."),
    Example("Repeat.", "abc " * 20, "abc " * 20),
    Example("Say nothing.", "", "."),
]


@functools.cache
def base_judge() -> JudgeOracle:
    """Random weights with logits of order 1."""
    options = Model(source="random:tiny", dtype="float32", param_dtype="float32")
    base = base_model.load(options, Mesh())
    return JudgeOracle(dataclasses.replace(base, params=jax.tree.map(lambda x: 5 * x, base.params)))


@functools.cache
def scores() -> dict[str, np.ndarray]:
    return base_judge()(EXAMPLES)


@jax.jit
def full_logprobs(ids: jax.Array) -> jax.Array:
    model = transformer.bind(base_judge().model.definition, base_judge().model.params)
    logits = model.logits(model(ids, jnp.zeros(1, jnp.int32))[0])
    return jax.nn.log_softmax(logits[0])


def logprobs(text: str) -> np.ndarray:
    """Whole table [T, V] of what follows each token of a text that stands alone."""
    ids = TOKENIZER(text).input_ids
    return np.asarray(full_logprobs(np.asarray([ids + [0] * (512 - len(ids))])))[: len(ids)]


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    assert set(actual) == set(expected) == set(PAPER_COMPONENTS)
    for name, column in actual.items():
        np.testing.assert_allclose(column, expected[name], atol=1e-5, rtol=0, err_msg=name)


def test_scores_are_probabilities_and_log_probabilities_that_differ() -> None:
    for name in ("nat", "und", "coh"):
        assert ((scores()[name] > 0) & (scores()[name] < 1)).all()
    assert (scores()["rew"] < 0).all()
    assert all(len(set(column.round(4))) == len(EXAMPLES) for column in scores().values())


def test_neighbours_order_and_padding_change_no_score() -> None:
    judge = base_judge()
    for name in PAPER_COMPONENTS:
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


def test_a_model_with_a_chat_format_is_asked_in_it() -> None:
    judge = base_judge()
    chatty = byte_tokenizer()
    chatty.chat_template = "{{ messages[0].content }}|"
    source = dataclasses.replace(judge.model.source, tokenizer=chatty)
    asked = JudgeOracle(dataclasses.replace(judge.model, source=source))(EXAMPLES[:1])
    question = "Is this a natural response to the task? Answer Yes or No.|"
    text = f"Task: {EXAMPLES[0].context}\nResponse: {EXAMPLES[0].output}\n\n{question}"
    yes, no = (logprobs(text)[-1, TOKENIZER(c).input_ids[0]] for c in "so")
    assert asked["nat"][0] == pytest.approx(1 / (1 + np.exp(no - yes)), abs=1e-5)
