"""Rows, tasks, configs, scores and reports with anything in them: a value, or a line that says why.

`docs/robustness.md` has the commands for long runs.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import sqlite3
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from absl import flags as absl_flags
from damage import ODD_VALUES, changed, edited, fuzz, json_files, jsonl_files, read, written_into
from hypothesis import given
from hypothesis import strategies as st
from programs import forget_flags
from report_files import write_stage_files
from test_report import Page

from refine_af import (
    base_model,
    comparison,
    comparison_report,
    diversity,
    instructions,
    other_sets,
    plots,
    prompts,
    records,
    report,
    seeds,
    superni,
    trained_oracle,
)
from refine_af.base_model import BaseModel
from refine_af.config import Experiment, Mesh, Model, config_hash
from refine_af.config_reading import from_dict
from refine_af.http_oracle import HttpOracle
from refine_af.launch import _files, flags
from refine_af.requests import Completion
from refine_af.rewards import Example
from refine_af.score_cache import CachedOracle

_HELD = tempfile.TemporaryDirectory()
FOLDER = Path(_HELD.name)  # no fixture: the coverage-guided fuzzer has none
written = functools.partial(written_into, FOLDER)

SEED = {
    "id": "seed_task_0",
    "instruction": "Name a colour.",
    "instances": [{"input": "", "output": "Blue."}],
    "is_classification": False,
}
TASK = {
    "Definition": ["Add."],
    "Categories": ["Maths"],
    "Positive Examples": [{"input": "1 1", "output": "2"}],
    "Instances": [{"id": "a-1", "input": "1 2", "output": ["3", "three"]}],
}
EXPERIMENT = dataclasses.asdict(flags.load_config("tiny"))


# Rows and tasks


@fuzz()
@given(jsonl_files(SEED, SEED | {"id": "b"}))
def test_seed_files(content: bytes) -> None:
    path = written("seeds.jsonl", content)
    for task in read(lambda: seeds.load(path), path) or ():
        records.to_line(dataclasses.asdict(task)).encode()


@fuzz()
@given(jsonl_files({"instruction": "a", "input": "", "output": "b", "mine": [1.5]}, {"output": 0}))
def test_rows(content: bytes) -> None:
    path = written("rows.jsonl", content)
    for row in read(lambda: records.read_rows(path), path) or ():
        records.to_line(row).encode()
    for row in read(lambda: _files.read_input(path, ("output",)), path) or ():
        assert isinstance(row["output"], str)
        records.to_line(row).encode()
    read(lambda: records.read_json(path), path)
    read(lambda: records.resume([path]), path)


CHAT = {
    "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Sing."}]
}


@functools.cache
def _whole_table() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CHAT, {"instruction": "Add."}]), buffer)
    return buffer.getvalue()


@fuzz()
@given(
    st.tuples(st.just("set.jsonl"), jsonl_files(CHAT, {"instruction": "Add."}))
    | st.tuples(st.just("set.json"), json_files({"rows": [CHAT]}).map(lambda x: x[8:-1]))
    | st.tuples(st.just("set.parquet"), edited(_whole_table()))
)
def test_other_sets(file: tuple[str, bytes]) -> None:
    path = written(*file)
    for text in read(lambda: other_sets.requests(path), path) or ():
        records.to_line({"text": text}).encode()


@fuzz(0.5)
@given(json_files(TASK), edited(b"task1\ntask2\n"))
def test_tasks_and_splits(content: bytes, split: bytes) -> None:
    folder = written("tasks/task1.json", content).parent
    written(
        "tasks/task2.json",
        json.dumps(TASK | {"Instances": [{"id": "b-1", "input": "", "output": "x"}]}).encode(),
    )
    path = written("split.txt", split)
    for tasks in (
        read(lambda: superni.load_tasks(folder), folder),
        read(lambda: superni.load_tasks(folder, path), FOLDER),
    ):
        if tasks:
            json.dumps(superni.score(tasks, {"a-1": "3"}), ensure_ascii=False).encode()


def _evaluation(score: float) -> dict[str, Any]:
    row = {"instances": 2, "exact_match": 0.0, "rougeL": score}
    task = {"category": "Maths", **row}
    scores = {"tasks": {"a": task, "b": task}, "categories": {"Maths": row}, "all": row}
    singles = {task: {f"{task}-{i}": score for i in range(2)} for task in "ab"}
    return {"arms": {"base": scores}, "instances": {"base": singles}}


@fuzz(0.5)
@given(json_files(_evaluation(5.0)))
def test_evaluations_to_compare(content: bytes) -> None:
    path = written("damaged/evaluation.json", content)
    written("sound/evaluation.json", json.dumps(_evaluation(7.0)).encode())
    sound, damaged = f"b={FOLDER}/sound", f"a={FOLDER}/damaged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "NUM_RESAMPLES", 9)
        found = read(
            lambda: comparison.compare([comparison.open_run(text) for text in (damaged, sound)]),
            path,
        )
    if found:
        comparison.to_json(found).encode()
        comparison_report.to_markdown(found).encode()


PROMPT = {"prompt": "ab", "temperature": 0.5, "stop": ["x"], "stop_token_ids": [5], "seed": 1}
PROMPT |= {"max_new_tokens": 3, "top_k": 2, "num_samples": 2, "mine": {"a": [1]}}


@functools.cache
def _generate() -> tuple[Any, BaseModel]:
    """The program as a module, its flags at their defaults, and the model that it asks."""
    known = set(absl_flags.FLAGS)
    module = importlib.import_module("refine_af.launch.generate")
    sys.modules.pop(module.__name__)  # `programs` runs it anew
    for name, flag in list(vars(module).items()):
        if isinstance(flag, absl_flags.FlagHolder):
            setattr(module, name, SimpleNamespace(value=flag.default))
    forget_flags(known)
    model = Model(source="random:tiny", dtype="float32", param_dtype="float32")
    return module, base_model.load(model, Mesh())


@fuzz()
@given(jsonl_files(PROMPT, {"prompt_token_ids": [68, 69]}))
def test_rows_of_prompts(content: bytes) -> None:
    """No row keeps the others from being answered."""
    module, base = _generate()
    path = written("prompts.jsonl", content)
    engine = base.engine(2)
    for asked in read(lambda: list(module.asked_of(module.read_rows(path), base)), path) or ():
        fault = asked.fault or engine.fault(asked.request)
        answer = Completion("", (), (), (), "error" if fault else "stop", fault)
        records.to_line(module.output_row(asked, answer)).encode()


# Configs


SECTIONS_AND_FIELDS = {
    "Experiment=",  # where the whole is none
    *(name for path in flags._paths(EXPERIMENT) for name in path.split(".")),
}


@fuzz(2)
@given(changed(EXPERIMENT))
def test_values_of_a_config(values: Any) -> None:
    config = read(lambda: from_dict(Experiment, values), *SECTIONS_AND_FIELDS)
    if config is not None:
        json.dumps(dataclasses.asdict(config), allow_nan=False, ensure_ascii=False).encode()
        assert from_dict(Experiment, json.loads(json.dumps(values))) == config
        config_hash(config)


FIELDS = [*flags._paths(EXPERIMENT), "ppo", "ppo.sampling", "ppo.x", "", "x", "ppo..x"]


@fuzz(0.5)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(FIELDS), ODD_VALUES.map(str) | st.sampled_from(["(", "[1", "1e3"])
        ),
        max_size=3,
    )
)
def test_overrides_on_the_command_line(overrides: list[tuple[str, str]]) -> None:
    known = set(absl_flags.FLAGS)
    argv = ["program", "--config=tiny", *(f"--config.{name}={value}" for name, value in overrides)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            flags.parse_with_config(argv)
    except (ValueError, absl_flags.Error) as error:
        assert flags._is_for_user(error), repr(error)
    else:
        config_hash(flags.experiment())
    finally:
        forget_flags(known)


# Oracles


DESCRIPTION = json.loads(
    next(trained_oracle.SHIPPED.glob(f"*/{trained_oracle.DESCRIPTION}")).read_text()
)


@fuzz()
@given(json_files(DESCRIPTION))
def test_descriptions_of_oracles(content: bytes) -> None:
    path = written(f"oracle/{trained_oracle.DESCRIPTION}", content)
    found = read(lambda: trained_oracle.describe(path.parent), path)
    if found is not None:
        assert found.lora.rank >= 1 and found.max_length >= 8


EXAMPLES = [Example("a", "", str(i)) for i in range(3)]


def score(examples: Any) -> dict[str, np.ndarray]:
    return {name: np.full(len(examples), 0.5) for name in ("rew", "nat")}


def cache(content: bytes | None = None) -> CachedOracle:
    path = FOLDER / "scores.sqlite"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    return CachedOracle(score, path, "identity")


def _whole_cache() -> bytes:
    made = cache()
    made(EXAMPLES)
    return made.path.read_bytes()


WHOLE_CACHE = _whole_cache()


@fuzz(0.5)
@given(edited(WHOLE_CACHE))
def test_damaged_caches_of_scores(content: bytes) -> None:
    made = cache(content)
    table = read(lambda: made(EXAMPLES), made.path)
    if table is not None:
        assert all(np.isfinite(column).all() for column in table.values())


@fuzz(0.5)
@given(json_files({"rew": 0.5, "nat": 0.5}) | st.none() | st.floats())
def test_rows_of_a_cache_of_scores(content: Any) -> None:
    made = cache(WHOLE_CACHE)
    with contextlib.closing(sqlite3.connect(made.path)) as database, database:
        database.execute("UPDATE scores SET components = ? WHERE rowid = 2", (content,))
    table = read(lambda: made(EXAMPLES), made.path)
    if table is not None:
        assert all(np.isfinite(column).all() for column in table.values())


@fuzz()
@given(changed({"components": {"rew": [1, 2.5], "nat": [0.5, 0.0]}}) | changed({"rewards": [1, 2]}))
def test_answers_of_a_server(answer: Any) -> None:
    oracle = HttpOracle("http://server.test", 1.0)
    table = read(lambda: oracle._read(answer, 2), oracle.url)
    assert table is None or all(column.shape == (2,) for column in table.values())


# What a model writes


@fuzz(2)
@given(
    st.text()
    | st.sampled_from(["Task:", "Input:", "\nOutput:"])
    | edited(b"Input: a\nOutput: b\n\nTask 9: Write a poem.\nTask 10: Name a town.\n").map(
        lambda text: text.decode(errors="replace")
    )
)
def test_texts_of_a_model(text: str) -> None:
    for accept in (True, False):
        prompts.parse_instance(text, accept_unmarked=accept)
    for cut in (True, False):
        instructions.parse(text, cut=cut)
    instructions.unusable(text)
    diversity.verb_object(text)


# Reports


def _stage_files() -> dict[str, bytes]:
    folder = FOLDER / "whole"
    folder.mkdir()
    write_stage_files(folder)
    arm = {"category": "Maths", "instances": 1, "exact_match": 0.0, "rougeL": 5.0}
    scores = {"tasks": {"a": arm}, "categories": {"Maths": arm}, "all": arm}
    more: dict[str, Any] = {
        "evaluation.json": {"arms": {"base": scores, "refine_af": scores}},
        "timings.json": {"train_ppo": 100.0},
        "config.json": {"config": {"seed": 0}, "hash": "0123abcd"},
    }
    records.append_rows(
        folder / "predictions.jsonl",
        [
            {"arm": arm, "task": "a", "id": "a-1", "prediction": "x"}
            for arm in ("base", "refine_af")
        ],
    )
    for name, content in more.items():
        (folder / name).write_text(json.dumps(content))
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


STAGE_FILES = _stage_files()


def make_report(files: dict[str, bytes]) -> str:
    for name, content in files.items():
        written(f"workdir/{name}", content)
    return report.write_report(FOLDER / "workdir").read_text(encoding="utf-8")


@fuzz(0.3)
@given(st.data())
def test_reports_of_damaged_workdirs(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(STAGE_FILES)))
    content = STAGE_FILES[name]
    if name.endswith(".jsonl"):
        damaged = data.draw(jsonl_files(*map(json.loads, content.splitlines())))
    else:
        damaged = data.draw(json_files(json.loads(content)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_svg_text", lambda *_: "")  # drawing takes most of the time
        read(lambda: make_report(STAGE_FILES | {name: damaged}), FOLDER / "workdir")


ATTACKS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "--><img src=x onerror=alert(1)>",
    "]]><svg onload=alert(1)>",
    "</text></svg><iframe src=javascript:alert(1)>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    "</textarea></title></pre><b>",
    "&lt;script&gt; &#60;script&#62; &amp;",
    "{{ 7*7 }} {% raw %} {{ config }}",
    "$\\frac{1$ \\href{javascript:alert(1)}{x}",
    '<metadata>x</metadata> id="url(#a)" href="#x" <svg',
    "\0\x01\x0b\x1b[31m\u202e\u2028",
]
BENIGN = "Explain words to a child."


def texts_replaced(node: Any, text: str) -> Any:
    """Every string of a tree but the reasons, that a program chose, and every name of a component,
    task, category or arm."""
    if isinstance(node, dict):
        kept = ("reason", "hash", "finish_reason", "arm")
        changed = {k: v if k in kept else texts_replaced(v, text) for k, v in node.items()}
        if "category" in node:
            changed["category"] = f"{node['category']} {text}"
        named = ("a", "Maths", "rew", "Write a tale.")
        return {f"{key} {text}" if key in named else key: v for key, v in changed.items()}
    if isinstance(node, list):
        return [texts_replaced(value, text) for value in node]
    return text if isinstance(node, str) else node


def page_with(text: str) -> Page:
    files = {}
    for name, content in STAGE_FILES.items():
        lines = content.splitlines() if name.endswith(".jsonl") else [content]
        rows = [texts_replaced(json.loads(line), text) for line in lines]
        files[name] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return Page(make_report(files))


@pytest.mark.slow
@fuzz(0.05)
@given(st.sampled_from(ATTACKS) | st.lists(st.sampled_from(ATTACKS)).map("".join) | st.text())
def test_what_a_model_wrote_is_shown_and_not_run(text: str) -> None:
    """A page has the elements and attributes that any text gives it, whatever the text."""
    shapes = [
        {(tag, *sorted(attributes)) for tag, attributes in page_with(written).tags}
        for written in (BENIGN, text or "x")
    ]
    assert shapes[1] <= shapes[0]
    assert not {"script", "iframe", "object", "embed", "link", "base"} & {t for t, *_ in shapes[0]}
