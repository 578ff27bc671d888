"""The whole pipeline on the tiny config, in processes of its own: files, seeds, interruptions."""

import contextlib
import itertools
import json
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pytest
import torch
import transformers
from runs import (
    METRICS,
    REPORT,
    TABLES,
    WHOLE,
    Done,
    Programs,
    differences,
)
from safetensors.numpy import load_file

from refine_af import records
from refine_af.models import sources

pytestmark = pytest.mark.slow

STAGES = (
    "generate_instructions",
    "train_ppo",
    "generate_instances",
    "finetune",
    "evaluate",
    "report",
)

# One run


def test_a_run_leaves_every_file(undisturbed: Done) -> None:
    workdir, ended = undisturbed
    *scores, last = ended.out.splitlines()
    assert [line.split("  ")[0] for line in scores] == ["base model", "REFINE-AF"]
    assert last == f"report: {workdir / 'report.html'}"
    assert "Traceback" not in ended.err
    names = {str(p.relative_to(workdir)) for p in workdir.rglob("*") if p.is_file()}
    assert {*WHOLE, *METRICS, *TABLES, *REPORT} <= names
    others = names - {*WHOLE, *METRICS, *TABLES, *REPORT}
    folders = {"/".join(name.split("/")[:2]) for name in others}
    events = {name for name in folders if name.startswith("ppo/events.out.tfevents.")}
    folders -= {*events, "ppo/scores.sqlite"}
    assert folders == {"ppo/checkpoints", "sft/checkpoints"}
    assert len(events) == 1
    assert not [name for name in names if "partial" in name or "tmp" in name]


def test_every_stage_did_something(undisturbed: Done) -> None:
    """Else equality of runs would mean little."""
    workdir = undisturbed.workdir
    lengths = {
        name: len(records.read_rows(workdir / name))
        for name in [*WHOLE, *METRICS]
        if name.endswith(".jsonl")
    }
    assert lengths["instructions.jsonl"] == 12
    assert lengths["ppo/metrics.jsonl"] == 3
    assert lengths["ppo/rollouts.jsonl"] == 24
    assert lengths["predictions.jsonl"] == 48
    assert all(lengths.values())
    batches = {row["batch"] for row in records.read_rows(workdir / "instances.jsonl")}
    assert batches == {0, 1, 2}
    assert list(json.loads((workdir / "timings.json").read_text())) == list(STAGES[:-1])
    scores = json.loads((workdir / "evaluation.json").read_text())
    assert list(scores["arms"]) == ["base", "refine_af"]
    metrics = records.read_rows(workdir / "sft/metrics.jsonl")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert [row["epoch"] for row in metrics if "eval_loss" in row] == [1.0, 2.0]


def test_the_data_set_loads(undisturbed: Done, tmp_path: Path) -> None:
    """By its parquet file, and by its folder, whose card names the file."""
    folder = undisturbed.workdir / "dataset"
    kept = records.read_rows(undisturbed.workdir / "instances.jsonl")
    written = {
        row["id"]: row for row in records.read_rows(undisturbed.workdir / "instructions.jsonl")
    }
    for where in (
        {"path": "parquet", "data_files": str(folder / "train.parquet")},
        {"path": "json", "data_files": str(folder / "train.jsonl")},
        {"path": str(folder)},
    ):
        table = datasets.load_dataset(**where, cache_dir=str(tmp_path))["train"]
        assert len(table) == len(kept)
        for row, instance in zip(table.to_list(), kept, strict=True):
            for name in ("id", "instruction", "input", "output", "prompt", "demo_ids", "reward"):
                assert row[name] == instance[name]
            assert instance["components"] == {
                name: row[f"reward_{name}"] for name in ("rew", "nat", "und", "coh")
            }
            made = written[row["id"]]
            assert row["seed_ids"] + row["generated_ids"]
            assert {*row["seed_ids"], *row["generated_ids"]} == {*made["prompt_ids"]}
            assert row["max_similarity"] == made["most_similar"][row["most_similar"]]
            assert (row["model"], row["arm"]) == ("random:tiny", "refine_af")


def test_the_tuned_model_loads_in_transformers(undisturbed: Done) -> None:
    """And is another one than the base model."""
    folder = undisturbed.workdir / "sft/hf"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("Say hello.").input_ids])
    with torch.no_grad():
        assert model(ids).logits.shape == (1, 10, len(tokenizer))
    tuned, base = (
        sources.open_model(name).load()["layers"]["attention"]["q"]["kernel"]
        for name in (str(folder), "random:tiny")
    )
    assert not np.array_equal(tuned, base)
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == np.float32


def test_a_damaged_policy_is_made_again(
    undisturbed: Done, programs: Programs, tmp_path: Path
) -> None:
    """PPO had finished; its last step is taken once more, and everything behind it."""
    workdir = tmp_path / "run"
    for name in ("config.json", "instructions.jsonl", "rejected_instructions.jsonl"):
        copied(undisturbed.workdir / name, workdir / name)
    shutil.copytree(undisturbed.workdir / "ppo", workdir / "ppo")
    newest = max(int(path.name) for path in (workdir / "ppo/checkpoints").iterdir())
    cut = workdir / f"ppo/checkpoints/{newest}/default/manifest.ocdbt"
    cut.write_bytes(cut.read_bytes()[:-3])
    ended = programs.run("pipeline", workdir)
    assert ended.code == 0, ended.err
    assert "damaged" in ended.err
    assert differences(undisturbed.workdir, workdir) == []


def copied(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copy(source, target)


def test_a_second_start_changes_nothing_and_is_quick(undisturbed: Done, programs: Programs) -> None:
    workdir, first = undisturbed
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    ended = programs.run("pipeline", workdir)
    done = ("generate_instructions", "train_ppo", "generate_instances", "finetune")
    told = "".join(f"{name}: nothing to do in {workdir}\n" for name in done)
    assert ended[:2] == (0, told + first.out)
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert [path for path in before | after if before.get(path) != after.get(path)] == []
    assert ended.seconds < first.seconds / 2


def test_another_seed_writes_other_instructions(
    undisturbed: Done, programs: Programs, tmp_path: Path
) -> None:
    """The same one gives the same bytes: see below, and test_crash.py."""
    ended = programs.run("generate_instructions", tmp_path, "--config.seed=1")
    assert ended.code == 0, ended.err
    written, others = (
        {row["instruction"] for row in records.read_rows(d / "instructions.jsonl")}
        for d in (undisturbed.workdir, tmp_path)
    )
    assert not written & others


# Interruptions


class Moment(NamedTuple):
    """When a program is stopped, in terms of what it has written."""

    stage: str
    wanted: str  # pattern of a file
    rows: int  # that it has at least

    def reached(self, workdir: Path, since: float) -> bool:
        """Whether it has come, by something that was written after the time `since`."""
        for path in workdir.glob(self.wanted):
            with contextlib.suppress(FileNotFoundError):  # renamed since it was listed
                if path.stat().st_mtime > since:
                    return not self.rows or len(records.read_rows(path)) >= self.rows
        return False


MOMENTS = (
    Moment("generate_instructions", "config.json", 0),  # before the first batch
    Moment("generate_instructions", "instructions.jsonl", 4),
    Moment("train_ppo", "ppo/checkpoints/*tmp*", 0),  # a checkpoint is being written
    Moment("train_ppo", "ppo/metrics.jsonl", 2),
    Moment("generate_instances", "*instances.jsonl", 1),
    Moment("finetune", "sft/metrics.jsonl", 7),
    Moment("evaluate", "predictions.jsonl", 1),
)


def is_stopped(
    programs: Programs, name: str, workdir: Path, moment: Moment, how: signal.Signals
) -> bool:
    """Whether a program stops in its work when it is told to, and says so as it should."""
    began = time.time()
    running = programs.start(name, workdir)
    ended = running.stop_when(lambda: moment.reached(workdir, began), how)
    print(ended.err)
    *_, last = ended.err.splitlines()
    polite = last == "stopped; the same command goes on from here"
    code = 130 if how == signal.SIGINT else 0
    return ended.code == code and polite and "Traceback" not in ended.err


@pytest.mark.timeout(1800)  # a dozen starts
def test_stages_stopped_again_and_again_make_the_same_run(
    undisturbed: Done, programs: Programs, tmp_path: Path
) -> None:
    """By their own programs, with Ctrl-C and SIGTERM in turn; `pipeline`: test_crash.py."""
    signals = itertools.cycle([signal.SIGTERM, signal.SIGINT])
    for stage in STAGES:
        for moment in [m for m in MOMENTS if m.stage == stage]:
            assert is_stopped(programs, stage, tmp_path, moment, next(signals)), moment
        ended = programs.run(stage, tmp_path)
        assert ended.code == 0, ended.err
    assert differences(undisturbed.workdir, tmp_path) == []


def test_a_pipeline_stops_politely(programs: Programs, tmp_path: Path) -> None:
    assert is_stopped(programs, "pipeline", tmp_path, MOMENTS[1], signal.SIGINT)
