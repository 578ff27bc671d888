"""The bundled seed tasks and evaluation tasks, and the loader's errors."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rapidfuzz import process
from rapidfuzz.distance import Indel
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from refine_af import seeds

RAW = [json.loads(line) for line in seeds.SEED_TASKS.read_text(encoding="utf-8").splitlines()]
EVALUATION = {path.name: json.loads(path.read_text()) for path in seeds.EVALUATION_DIR.iterdir()}


def test_bundled_tasks_load_in_the_order_of_the_file() -> None:
    tasks = seeds.load()
    assert [task.id for task in tasks] == [f"seed_task_{i}" for i in range(175)]
    assert tasks[0].instruction == RAW[0]["instruction"]
    assert tasks[0].instances[0].output == RAW[0]["instances"][0]["output"]


def test_bundled_tasks_are_mixed_like_those_of_self_instruct() -> None:
    """25 classification tasks; about 50 need no input."""
    tasks = seeds.load()
    assert sum(task.is_classification for task in tasks) == 25
    assert 48 <= sum(task.instances[0].input == "" for task in tasks) <= 52


@pytest.mark.parametrize("field", ["id", "name", "instruction"])
def test_bundled_tasks_are_unique(field: str) -> None:
    assert len({task[field] for task in RAW}) == 175


def test_bundled_answers_are_not_empty() -> None:
    for task in seeds.load():
        assert all(instance.output.strip() for instance in task.instances), task.id
        assert task.instruction == task.instruction.strip(), task.id


def test_no_two_bundled_instructions_are_alike() -> None:
    """ROUGE-L F of each pair is at most the 0.7 that stage 1 lets a new instruction have.

    InDel similarity of token lists equals ROUGE-L F; the ten closest pairs are checked with
    `rouge-score` itself.
    """
    instructions = [task.instruction for task in seeds.load()]
    tokenizer, ids = DefaultTokenizer(use_stemmer=False), dict[str, int]()
    rows = [[ids.setdefault(w, len(ids)) for w in tokenizer.tokenize(t)] for t in instructions]
    scores = process.cdist(rows, rows, scorer=Indel.normalized_similarity, dtype=np.float64)
    pairs = sorted(itertools.combinations(range(175), 2), key=lambda p: -scores[p])
    assert scores[pairs[0]] <= 0.7
    scorer = RougeScorer(["rougeL"])
    for i, j in pairs[:10]:
        rouge = scorer.score(instructions[i], instructions[j])["rougeL"].fmeasure
        assert rouge == pytest.approx(scores[i, j], abs=1e-12)


GOOD = {
    "id": "t",
    "instruction": "Add.",
    "instances": [{"input": "1 1", "output": "2"}],
    "is_classification": False,
}


def test_lines_end_with_line_feeds_only(tmp_path: Path) -> None:
    """What Unicode also calls a line break may stand unescaped in JSON; a BOM is no fault."""
    text = "one\u2028two\x85three"
    path = tmp_path / "own.jsonl"
    line = json.dumps(GOOD | {"instruction": text}, ensure_ascii=False)
    path.write_text(line + "\n", encoding="utf-8-sig")
    assert seeds.load(path)[0].instruction == text


def test_a_file_of_ones_own_may_have_blank_lines_and_more_fields(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("\n" + json.dumps(GOOD | {"note": 1}) + "\n\n")
    expected = seeds.SeedTask("t", "Add.", (seeds.Instance("1 1", "2"),), False)
    assert seeds.load(path) == seeds.load(str(path)) == [expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON (Expecting property name"),
        ("[]", "expected a JSON object, got list"),
        ({"instruction": None}, "'instruction' must be a str, found None"),
        ({"instruction": " "}, "'instruction' is empty"),
        ({"id": 3}, "'id' must be a str, found 3"),
        ({"is_classification": "no"}, "'is_classification' must be a bool, found 'no'"),
        ({"instances": {}}, "'instances' must be a list, found {}"),
        ({"instances": []}, "'instances' is empty; expected at least one"),
        ({"instances": ["x"]}, "an instance must be an object with strings 'input' and 'output'"),
        (
            {"instances": [{"input": ""}]},
            "an instance must be an object with strings 'input' and 'output'",
        ),
        ({"id": "first"}, "id 'first' stands in the file twice"),
    ],
    ids=str,
)
def test_a_fault_is_reported_with_file_and_line(
    row: str | dict[str, Any], message: str, tmp_path: Path
) -> None:
    line = row if isinstance(row, str) else json.dumps(GOOD | row)
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(GOOD | {"id": "first"}) + "\n\n" + line + "\n")
    with pytest.raises(ValueError) as error:
        seeds.load(path)
    assert str(error.value).startswith(f"{path}:3: {message}")


@pytest.mark.parametrize("field", ["id", "instruction", "instances", "is_classification"])
def test_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({k: v for k, v in GOOD.items() if k != field}))
    with pytest.raises(ValueError, match=f"own.jsonl:1: '{field}' must be a .*, found nothing"):
        seeds.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read seed tasks: .*No such file"),
        (b"\xff\xfe", "cannot read seed tasks: .*utf-8"),
        (b"\n \n", "no seed tasks; expected one JSON object a line"),
    ],
)
def test_an_unusable_file_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"own.jsonl: {message}"):
        seeds.load(path)


def test_evaluation_tasks_cover_twelve_categories_with_twenty_instances_each() -> None:
    assert len(EVALUATION) == 12
    assert [len(task["Instances"]) for task in EVALUATION.values()] == [20] * 12
    assert len({task["Categories"][0] for task in EVALUATION.values()}) == 12


@pytest.mark.parametrize("name", EVALUATION)
def test_instances_of_an_evaluation_task_are_distinct_and_not_its_examples(name: str) -> None:
    task = EVALUATION[name]
    inputs = [instance["input"] for instance in task["Instances"]]
    assert len(set(inputs)) == len(inputs)
    assert len({instance["id"] for instance in task["Instances"]}) == len(inputs)
    assert not set(inputs) & {example["input"] for example in task["Positive Examples"]}
