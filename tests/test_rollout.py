"""Packing of answers into rows, and which prompts a step has."""

import dataclasses

import numpy as np
import pytest
from updates import CONFIG, base

from refine_af import packing, rollout, seeds
from refine_af.config import Sampling
from refine_af.ppo_prompts import Prompter
from refine_af.requests import Completion, Request
from refine_af.rollout import Layout, Reading

SAMPLING = Sampling(temperature=1.0, max_new_tokens=8)


def test_items_are_spread_over_rows_largest_first_into_the_emptiest() -> None:
    assert packing.spread([2, 5, 4, 3], 7, 2) == [[1, 0], [2, 3]]
    assert packing.spread([2, 5, 4, 3], 14, 1) == [[1, 2, 3, 0]]
    assert packing.spread([1], 4, 3) == [[0], [], []]


def test_what_does_not_fit_gets_another_row() -> None:
    assert packing.spread([4, 4, 4], 5, 2) == [[0], [1], [2]]


def pair(prompt: int, answer: int) -> tuple[Request, Completion]:
    ids = tuple(range(prompt)), tuple(range(100, 100 + answer))
    return Request(ids[0], SAMPLING), Completion("", ids[1], (), (), "stop")


def test_texts_lie_behind_each_other_in_their_rows() -> None:
    asked, given = zip(pair(3, 2), pair(1, 4), pair(2, 1), strict=True)
    rows = rollout.build(asked, given, [0.5, -1.0, 2.0], Layout(10, 8, 2))
    np.testing.assert_array_equal(
        rows.tokens, [[0, 1, 2, 100, 101, 0, 1, 100, 0, 0], [0, 100, 101, 102, 103, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(rows.start, [[0] * 5 + [5] * 5, [0] * 10])
    np.testing.assert_array_equal(rows.columns[:, :4], [[2, 3, 6, 0], [0, 1, 2, 3]])
    np.testing.assert_array_equal(rows.predicts.sum(1), [3, 4])
    np.testing.assert_array_equal(rows.mask.sum(1), [2, 4, 1])
    np.testing.assert_array_equal(rows.score, np.float32([0.5, -1.0, 2.0]))
    assert rollout.padding_share(asked, given, rows) == pytest.approx(1 - 13 / 20)


@pytest.mark.parametrize("multiple", [1, 4, 6])
def test_rows_are_a_multiple_and_not_many_more_than_needed(multiple: int) -> None:
    asked, given = zip(*(pair(20, 1 + i % 8) for i in range(200)), strict=True)
    rows = rollout.build(asked, given, [0.0] * 200, Layout(64, 8, multiple))
    needed = -(-sum(21 + i % 8 for i in range(200)) // 64)
    assert len(rows.tokens) % multiple == 0
    assert needed <= len(rows.tokens) <= 1.25 * needed + multiple + 1


def test_a_group_has_one_prompt_and_different_seeds() -> None:
    """`estimate` takes answers in a row for a group."""
    options = dataclasses.replace(CONFIG.ppo, batch_size=12, num_minibatches=1, group_size=3)
    config = dataclasses.replace(CONFIG, ppo=options)
    texts = [f"Write about {thing}." for thing in ("cats", "rain", "tea", "ships", "snow")]
    prompter = Prompter(config, base().tokenizer, seeds.load(None), texts, [])
    steps = [prompter.of_step(step) for step in range(3)]
    for requests, chosen in steps:
        prompts = [request.prompt_ids for request in requests]
        groups = [prompts[i : i + 3] for i in range(0, 12, 3)]
        assert all(len(set(group)) == 1 for group in groups)
        assert len({request.seed for request in requests}) == 12
        assert chosen[::3] == chosen[1::3] == chosen[2::3]
    seen = [text for _, chosen in steps for text in chosen[::3]]
    assert sorted(seen[:5]) == sorted(seen[5:10]) == sorted(texts), "passes over all of them"


@pytest.mark.parametrize("row", [0, 1])
def test_drift_that_is_no_number_is_seen(row: int) -> None:
    given = [Completion("", (1, 2), (), (-1.0, -2.0), "stop") for _ in range(2)]
    trained = np.float32([[-1.0, -2.5, 0.0], [-1.25, -2.0, 0.0]])
    assert rollout.drift(given, Reading(trained, trained, trained)) == 0.5
    trained[row, 0] = np.nan
    assert np.isnan(rollout.drift(given, Reading(trained, trained, trained)))
