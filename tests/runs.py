"""Runs of the tiny config in processes of their own, for tests: starting, stopping, comparing."""

import contextlib
import itertools
import os
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pyarrow.parquet
import pytest
from tensorboardX.proto import event_pb2
from xla_flags import SOME_OPTIMIZATION

from refine_af import checkpoints, records

# Outputs of a run, by stage.
PREDICTIONS = "predictions.jsonl"  # greedy, so that a small change of the weights may not show
WHOLE = (
    "config.json",
    "instructions.jsonl",
    "rejected_instructions.jsonl",
    "ppo/alarms.jsonl",
    "ppo/rollouts.jsonl",
    "ppo/samples.jsonl",
    "ppo/evaluation.json",
    "ppo/evaluation.jsonl",
    "instances.jsonl",
    "rejected_instances.jsonl",
    "dataset/README.md",
    "dataset/train.jsonl",
    "dataset/alpaca.jsonl",
    "dataset/chat.jsonl",
    "dataset/statistics.json",
    "dataset/plots/verbs.png",
    "dataset/plots/seed_overlap.png",
    "dataset/plots/lengths.png",
    "dataset/plots/quality.png",
    "sft/adapter/adapter_config.json",
    "sft/adapter/adapter_model.safetensors",
    "sft/hf/config.json",
    "sft/hf/generation_config.json",
    "sft/hf/model.safetensors",
    "sft/hf/tokenizer.json",
    "sft/hf/tokenizer_config.json",
    PREDICTIONS,
    "evaluation.json",
)
METRICS = ("ppo/metrics.jsonl", "sft/metrics.jsonl")  # rows with times
TIMES = ("time/", "memory/")
DATASET = "dataset/train.parquet"
TABLES = (DATASET, "dataset/alpaca.parquet", "dataset/chat.parquet")
SCORES = "ppo/scores.sqlite"
EVENTS = "ppo/events.out.tfevents"
REPORT = ("report.html", "timings.json")  # with times


class Ended(NamedTuple):
    """How a program ended."""

    code: int
    out: str
    err: str
    seconds: float


class Programs:
    """Starts programs on one device."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.environment = os.environ | {
            "XLA_FLAGS": SOME_OPTIMIZATION,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.numbers = itertools.count(1)

    def command(self, name: str, workdir: Path, *args: str) -> list[str]:
        """Command line of a program."""
        config = [] if name == "report" else ["--config=tiny"]
        program = [sys.executable, "-m", f"refine_af.launch.{name}"]
        return [*program, f"--workdir={workdir}", *args, *config]

    def start(self, name: str, workdir: Path, *args: str, **variables: str) -> "Running":
        """Start a program in the background."""
        log = self.scratch / f"{next(self.numbers)}-{name}"
        with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
            command = self.command(name, workdir, *args)
            process = subprocess.Popen(
                command, stdout=out, stderr=err, env=self.environment | variables
            )
        return Running(process, log, time.monotonic())

    def run(self, name: str, workdir: Path, *args: str, **variables: str) -> Ended:
        """Run a program to its end."""
        return self.start(name, workdir, *args, **variables).wait()


class Running(NamedTuple):
    """A program at work."""

    process: subprocess.Popen[bytes]
    log: Path
    began: float

    def wait(self) -> Ended:
        """Let it come to its end."""
        try:
            code = self.process.wait(timeout=400)
        finally:
            self.process.kill()
        texts = [self.log.with_suffix(suffix).read_text() for suffix in (".out", ".err")]
        return Ended(code, *texts, time.monotonic() - self.began)

    def stop_when(self, ready: Callable[[], bool], how: signal.Signals) -> Ended:
        """Send a signal at the moment when `ready` holds."""
        while not ready() and self.process.poll() is None:
            time.sleep(0.01)
        self.process.send_signal(how)
        return self.wait()


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("programs"))


class Done(NamedTuple):
    """A finished run."""

    workdir: Path
    ended: Ended


@pytest.fixture(scope="session")
def undisturbed(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The run that all others are held against."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = programs.run("pipeline", workdir)
    assert ended.code == 0, ended.err
    return Done(workdir, ended)


def rows_without_times(path: Path) -> list[records.Row]:
    return [
        {key: value for key, value in row.items() if not key.startswith(TIMES)}
        for row in records.read_rows(path)
    ]


def arrays(checkpoint: Path) -> dict[str, bytes]:
    """Content of an Orbax directory, by path."""
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(checkpoint).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = reader.restore(checkpoint, restore_args=how)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def newest_state(workdir: Path, stage: str) -> dict[str, bytes]:
    """Arrays of the newest checkpoint of `ppo` or `sft`."""
    folder = workdir / stage / "checkpoints"
    return arrays(folder / str(checkpoints.latest_step(folder)) / "default")


def scores(path: Path) -> dict[str, str]:
    """What the oracle has said, by content."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        return dict(database.execute("SELECT key, components FROM scores"))


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> value as TensorBoard shows it: of the newest file that has it."""
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            data = data[12 + length + 4 :]
    return {key: x for key, x in found.items() if not key[0].startswith(TIMES)}


def rows_of_table(path: Path) -> list[records.Row]:
    return pyarrow.parquet.read_table(path).to_pylist()


def arm_outputs(folder: Path) -> dict[str, Any]:
    """As `outputs`, of the folder of an arm that has one for itself."""
    mine = ("dataset/", "sft/", "instances.jsonl", "rejected_instances.jsonl")
    names = [name for name in WHOLE if name.startswith(mine)]
    found: dict[str, Any] = {name: (folder / name).read_bytes() for name in names}
    found |= {"sft/metrics.jsonl": rows_without_times(folder / "sft/metrics.jsonl")}
    found |= {"sft/checkpoints": newest_state(folder, "sft")}
    return found | {name: rows_of_table(folder / name) for name in TABLES}


def outputs(workdir: Path) -> dict[str, Any]:
    """All that a run leaves behind and that its config and seed alone decide, by file."""
    found: dict[str, Any] = {name: (workdir / name).read_bytes() for name in WHOLE}
    found |= {name: rows_without_times(workdir / name) for name in METRICS}
    found |= {f"{name}/checkpoints": newest_state(workdir, name) for name in ("ppo", "sft")}
    found |= {SCORES: scores(workdir / SCORES), EVENTS: scalars(workdir / "ppo")}
    return found | {name: rows_of_table(workdir / name) for name in TABLES}


def names(workdir: Path) -> set[str]:
    """Files and directories of a run, but for checkpoints; TensorBoard's bear a time."""
    found = {str(path.relative_to(workdir)) for path in workdir.rglob("*")}
    found = {name for name in found if not re.search(r"checkpoints/\d+(/|$)", name)}
    return {re.sub(r"(tfevents)\..*", r"\1", name) for name in found}


def differences(left: Path, right: Path) -> list[str]:
    """Names of the outputs in which two runs differ."""
    ours, theirs = outputs(left), outputs(right)
    return [name for name in ours if ours[name] != theirs[name]]
