"""Prompts that a model's context has no room for, and a run's own scores."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from absl import logging
from programs import Program, only_its_own_flags, program, refused

from refine_af import evaluation
from refine_af.configs import tiny
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.superni import Example, Instance, Task

__all__ = ["only_its_own_flags", "program"]

OPTIONS = dataclasses.replace(
    tiny.get_config().evaluation, num_examples=0, format="raw", max_new_tokens=10
)
LONG, SHORT = Instance("long", "abcde " * 60, ("x",)), Instance("short", "abc", ("x",))


def task(definition: str = "Say it.") -> Task:
    return Task("task1", "Title Generation", definition, (), (LONG, SHORT), "default")


def text_of(found: list[evaluation.Question], id: str) -> str:
    (question,) = [q for q in found if q.instance.id == id]
    return str(byte_tokenizer().decode(question.prompt_ids, skip_special_tokens=True))


def test_an_input_without_room_loses_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    whole = evaluation.questions([task()], byte_tokenizer(), OPTIONS, 1000)
    assert not said
    assert LONG.input.strip() in text_of(whole, "long")
    cut = evaluation.questions([task()], byte_tokenizer(), OPTIONS, 150)
    assert text_of(cut, "short") == text_of(whole, "short")
    text = text_of(cut, "long")
    assert text.endswith("\nOutput:") and "Input: abcde abcde" in text
    assert 139 <= max(len(q.prompt_ids) for q in cut) <= 140  # a blank at the end does not count
    assert said == [
        "evaluation: the ends of 1 inputs were cut off, which left no room for 10 tokens in the "
        "model's context of 150"
    ]


def test_examples_go_before_an_input_is_cut() -> None:
    shown = dataclasses.replace(task(), examples=(Example("abc " * 30, "x"),))
    options = dataclasses.replace(OPTIONS, num_examples=1)
    found = evaluation.questions([shown], byte_tokenizer(), options, 150)
    alone = evaluation.questions([task()], byte_tokenizer(), OPTIONS, 150)
    assert found == alone


def test_a_definition_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="task1: its definition and examples leave no room in the"):
        evaluation.questions([task("Say it. " * 40)], byte_tokenizer(), OPTIONS, 150)


def test_a_line_for_each_arm_says_what_came_out(tmp_path: Path) -> None:
    tasks = [task(), dataclasses.replace(task(), name="task2")]
    arms = {"base": {}, "refine_af": {"long": "x", "short": "x"}}
    evaluation.write_scores_of(arms, tasks, tmp_path / "evaluation.json")
    assert evaluation.outline(tmp_path / "evaluation.json").splitlines() == [
        "base model  ROUGE-L  0.0000, exact match  0.0000",
        "REFINE-AF   ROUGE-L 100.0000, exact match 100.0000; against the base model 2 tasks won, "
        "0 tied, 0 lost",
    ]
    evaluation.write_scores_of({"other": {}}, tasks, tmp_path / "evaluation.json")
    assert evaluation.outline(tmp_path / "evaluation.json") == (
        "other  ROUGE-L  0.0000, exact match  0.0000"
    )


def test_arms_of_different_tasks_are_not_set_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    found = evaluation.write_scores_of({"base": {}, "refine_af": {}}, [task()], path)
    del found["arms"]["refine_af"]["tasks"]["task1"]
    found["arms"]["refine_af"]["tasks"]["task2"] = found["arms"]["base"]["tasks"]["task1"]
    del found["instances"]
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        evaluation.outline(path)


@pytest.mark.parametrize("what", ["--predictions=rows.jsonl", "--model=random:tiny"])
def test_evaluate_does_not_replace_the_scores_of_a_run(
    program: Program, what: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert program("evaluate", what, f"--output={tmp_path}") == refused(
        f"--output={tmp_path}: the workdir of a run, whose own scores these would replace; take "
        "another directory"
    )
