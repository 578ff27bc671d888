"""Which answers the oracle is asked about, and which get the floor reward."""

import dataclasses

import numpy as np
import pytest
from updates import CONFIG, base

from refine_af.actor import Actor
from refine_af.base_model import BaseModel
from refine_af.ppo_prompts import Batch
from refine_af.requests import Completion

TEXTS = [
    " 1\nOutput: 2",
    " A red hat.\nOutput: A red hat",  # stage 3 drops a copy
    " 1\nOutput: such as:",
    " 1\nOutput:",
    "1",
]


def test_its_engine_knows_the_longest_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class AskedError(Exception):
        """What the engine was asked to be."""

    def engine(*_: object, **options: object) -> None:
        raise AskedError(options)

    monkeypatch.setattr(BaseModel, "engine", engine)
    actor = Actor(CONFIG, base(), lambda examples: {"reward": np.ones(len(examples))}, 9)
    with pytest.raises(AskedError) as asked:
        actor.sample({}, Batch([], []))
    assert asked.value.args[0]["longest_text"] == 9 + CONFIG.ppo.sampling.max_new_tokens


@pytest.mark.parametrize(("floor", "asked"), [("unreadable", 3), ("dropped", 1)])
def test_answers_that_are_of_no_use_get_the_floor(floor: str, asked: int) -> None:
    """Else a policy learns to copy its input, which oracles of coherence like."""
    reward = dataclasses.replace(CONFIG.reward, floor=floor, unparsable=-3.0)
    prompts = dataclasses.replace(CONFIG.prompts, accept_unmarked_output=False)
    config = dataclasses.replace(CONFIG, reward=reward, prompts=prompts)
    actor = Actor(config, base(), lambda examples: {"reward": np.ones(len(examples))}, 9)
    completions = [Completion(text, (5, 6), (0.0, 0.0), (0.0, 0.0), "stop") for text in TEXTS]
    answers = actor.judge(Batch([], ["Do it."] * 5), completions)
    rewards = [judgement.reward for judgement in answers.judgements]
    assert rewards == [1.0] * asked + [-3.0] * (5 - asked)
    assert [row["output"] for row in answers.rows()][:asked] == ["2", "A red hat", "such as:"][
        :asked
    ]
