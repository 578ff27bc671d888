"""`evaluate` without a run: predictions that are given, and answers of any model."""

import json
from pathlib import Path

import pytest
from programs import Program, jsonl, refused

from refine_af import records

TABLE = [("task", "task1_echo"), ("category", "Echo"), ("all", "")]

pytestmark = pytest.mark.usefixtures("only_its_own_flags")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A directory with one task of two test cases."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    cases = [{"id": f"echo-{i}", "input": text, "output": [text]} for i, text in enumerate("ab")]
    task = {
        "Definition": ["Repeat the input."],
        "Categories": ["Echo"],
        "Positive Examples": [{"input": "x", "output": "x"}],
        "Instances": cases,
    }
    (folder / "task1_echo.json").write_text(json.dumps(task))
    return folder


def test_evaluate_scores_predictions(
    program: Program, tasks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"id": "echo-0", "prediction": text} for text in ("b", "A.")]
    rows.append({"id": "other", "prediction": "b"})
    files = (f"--predictions={jsonl(tmp_path / 'rows', *rows)}", f"--output={tmp_path / 'out'}")
    code, out, _ = program("evaluate", f"--tasks={tasks}", *files)
    scores = {"instances": 2, "exact_match": 50.0, "rougeL": 50.0}
    rows = [f"{kind:8} {name:10}         2     50.0000  50.0000" for kind, name in TABLE]
    head = " " * 20 + "instances exact_match   rougeL"
    assert (code, out.splitlines()) == (0, [f"predictions: {json.dumps(scores)}", head, *rows])
    missing = "1 of 2 instances have no prediction and count as empty, the first is echo-1"
    texts = "1 ids come again; the last counts", missing
    assert caplog.messages == [f"{tmp_path / 'rows'}: {text}" for text in texts]
    assert records.read_json(tmp_path / "out/evaluation.json")["arms"] == {
        "predictions": {
            "tasks": {"task1_echo": {"category": "Echo", **scores}},
            "categories": {"Echo": scores},
            "all": scores,
        }
    }
    instances = records.read_json(tmp_path / "out/evaluation.json")["instances"]
    assert instances == {"predictions": {"task1_echo": {"echo-0": 100.0, "echo-1": 0.0}}}


def test_evaluate_refuses_predictions_of_other_tasks_and_with_a_model(
    program: Program, tasks: Path, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "rows", {"id": "a", "prediction": "b"})
    files = (f"--predictions={path}", f"--output={tmp_path / 'out'}")
    message = f"{path}: no id is one of the tasks', such as echo-0"
    assert program("evaluate", f"--tasks={tasks}", *files) == refused(message)
    message = "give --config and --workdir, or --model, or --predictions"
    assert program("evaluate", "--model=random:tiny", *files) == refused(message)
    message = "--predictions and --config exclude each other: a run has its own"
    assert program("evaluate", "--config=tiny", *files) == refused(message)
    message = "--batch_size and --predictions exclude each other: no model runs"
    assert program("evaluate", "--batch_size=4", *files) == refused(message)
    message = "--split and --config exclude each other: a run has its own"
    assert program("evaluate", "--config=tiny", "--split=x") == refused(message)
    message = "--mesh=rows:2: expected AXIS:SIZE of ['data', 'fsdp', 'sequence', 'tensor'], as in "
    alone = (f"--tasks={tasks}", f"--output={tmp_path / 'out'}", "--model=random:tiny")
    found = program("evaluate", *alone, "--mesh=rows:2")
    assert found == refused(message + "data:2,fsdp:-1")


@pytest.mark.slow
def test_evaluate_asks_a_model_once(program: Program, tasks: Path, tmp_path: Path) -> None:
    """A second start finds its answers; one with other options would mix them up."""
    output = tmp_path / "configs"  # looks like a flag, and is none
    arguments = ("--model=random:tiny", f"--tasks={tasks}", "--output", str(output))
    first = program("evaluate", *arguments)
    assert first.code == 0
    assert first.out.startswith('random:tiny: {"instances": 2, ')
    rows = records.read_rows(output / "predictions.jsonl")
    assert [(row["arm"], row["task"], row["id"]) for row in rows] == [
        ("random:tiny", "task1_echo", "echo-0"),
        ("random:tiny", "task1_echo", "echo-1"),
    ]
    before = {path: path.read_bytes() for path in output.iterdir()}
    assert program("evaluate", *arguments).out == first.out
    assert {path: path.read_bytes() for path in output.iterdir()} == before
    where = f"{output / 'options.json'}: made with another model or options"
    message = f"{where} (num_examples=2 there, 0 here); take another --output"
    assert program("evaluate", *arguments, "--num_examples=0") == refused(message)
    given = f"--predictions={output / 'predictions.jsonl'}"
    message = f"--output={output}: has the evaluation of a model; take another directory"
    assert program("evaluate", given, f"--output={output}") == refused(message)
    assert {path: path.read_bytes() for path in output.iterdir()} == before
