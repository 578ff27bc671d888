"""Held-out instructions: what is kept from training, and the difference by hand."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from refine_af import ppo_evaluation, records
from refine_af.actor import Answers
from refine_af.configs import tiny
from refine_af.ppo_prompts import Batch
from refine_af.requests import Completion
from refine_af.rewards import Judgement

TEXTS = [f"Task {i}." for i in range(20)]


def test_the_split_is_whole_fixed_and_depends_on_the_seed() -> None:
    train, held_out = ppo_evaluation.split(TEXTS, 5, seed=0)
    assert len(held_out) == 5 and sorted(train + held_out) == sorted(TEXTS)
    assert ppo_evaluation.split(TEXTS, 5, seed=0) == (train, held_out)
    assert ppo_evaluation.split(TEXTS, 5, seed=1)[1] != held_out
    assert ppo_evaluation.split(TEXTS, 0, seed=0) == (TEXTS, [])


def test_a_constant_gain_has_no_width() -> None:
    found = ppo_evaluation.difference(np.asarray([0.0, 1.0, 2.0]), np.asarray([0.5, 1.5, 2.5]), 0)
    assert found == {"mean": 0.5, "low": 0.5, "high": 0.5, "share_better": 1.0}


def test_the_interval_is_that_of_the_mean() -> None:
    """Of 400 gains with deviation 1: 1.96 / sqrt(400) to each side."""
    gains = np.random.default_rng(0).normal(0.3, 1.0, 400)
    gains = (gains - gains.mean()) / gains.std() + 0.3
    found = ppo_evaluation.difference(np.zeros(400), gains, 0)
    assert found["mean"] == pytest.approx(0.3)
    assert found["low"] == pytest.approx(0.3 - 0.098, abs=0.01)
    assert found["high"] == pytest.approx(0.3 + 0.098, abs=0.01)


def completion(text: str, reason: str) -> Completion:
    return Completion(text, (1,) * len(text), (0.0,), (0.0,), reason)


def test_both_arms_are_written_with_their_figures(tmp_path: Path) -> None:
    """Two instructions with two answers each; the third answer before cannot be read."""

    config = tiny.get_config()
    config = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, num_eval_samples=2))
    assert not ppo_evaluation.measured(config, tmp_path)

    def answer(arm: str) -> ppo_evaluation.Arm:
        late = arm == "after"
        completions = [completion("abc", "stop")] * 2 + [completion("abcde", "length")] * 2
        judged = [Judgement(r + late, {"reward": 2.0 * r}) for r in (0.0, 1.0, 2.0, 3.0)]
        if not late:
            judged[2] = Judgement(-1.0, None)
        batch = Batch([], [text for text in TEXTS[:2] for _ in range(2)])
        answers = Answers(batch, completions, [None] * 4, judged)
        return answers, np.asarray([0.0, 1.0, 2.0, 3.0]) * late

    ppo_evaluation.compare(tmp_path, TEXTS[:2], answer, config)
    assert ppo_evaluation.measured(config, tmp_path)
    assert not ppo_evaluation.measured(dataclasses.replace(config, seed=1), tmp_path)
    summary = json.loads((tmp_path / ppo_evaluation.SUMMARY).read_text())
    assert summary["rewards"] == {"before": [0.5, 1.0], "after": [1.5, 3.5]}
    assert summary["difference"]["mean"] == 1.75
    before, after = summary["before"], summary["after"]
    assert before["reward"] == 0.75 and before["components"]["reward"] == pytest.approx(8 / 3)
    assert before["usable"] == 0.75 and before["kl"] == 0.0
    assert after == {
        "reward": 2.5,
        "components": {"reward": 3.0},
        "kl": 1.5,
        "tokens": 4.0,
        "ended": 0.5,
        "usable": 1.0,
    }
    rows = records.read_rows(tmp_path / ppo_evaluation.ANSWERS)
    assert [row["arm"] for row in rows] == ["before"] * 4 + ["after"] * 4
    assert [row["instruction"] for row in rows[:4]] == [TEXTS[0]] * 2 + [TEXTS[1]] * 2
    assert rows[2]["components"] is None and rows[7]["reward"] == 4.0
