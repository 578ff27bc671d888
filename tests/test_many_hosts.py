"""Two processes on loopback, two devices each: the same run as one process of four, and its end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import rows_without_times
from safetensors.numpy import load_file
from xla_flags import SOME_OPTIMIZATION

from refine_af import checkpoints, records, seeds

SEEDS = Path(seeds.__file__).parent
TEXTS = (
    "config.json",
    "instructions.jsonl",
    "rejected_instructions.jsonl",
    "instances.jsonl",
    "rejected_instances.jsonl",
    "dataset/README.md",
    "predictions.jsonl",
    "evaluation.json",
)
PPO = ("ppo/metrics.jsonl", "ppo/rollouts.jsonl", "ppo/samples.jsonl", "ppo/evaluation.jsonl")
NUMBERS = (*PPO, "sft/metrics.jsonl")
CHECKPOINTS = ("ppo/checkpoints", "sft/checkpoints")

ORACLE = """
import os, pathlib

def score(examples):
    with pathlib.Path(os.environ["ASKED"]).open("a") as file:
        file.write(f"{os.getpid()}\\n")
    return {"length": [float(len(e.output)) for e in examples]}
"""
SMALL = (
    "--config=tiny",
    "--config.mesh=data:2,fsdp:2",
    "--config.instructions.num_instructions=3",
    "--config.instructions.batch_size=48",
    "--config.instructions.sampling.max_new_tokens=64",
    "--config.ppo.num_steps=3",
    "--config.ppo.num_epochs=1",
    "--config.ppo.num_eval_samples=1",
    "--config.ppo.sampling.max_new_tokens=8",
    "--config.instances.sampling.max_new_tokens=48",
    "--config.sft.num_epochs=1",
    "--config.sft.eval_share=0.5",
    "--config.evaluation.max_instances=1",
    "--config.evaluation.max_new_tokens=4",
)


class Ended(NamedTuple):
    """How a process ended, and after how many seconds."""

    code: int
    out: str
    err: str
    seconds: float


class Process:
    """A program at work on CPU devices of its own."""

    def __init__(
        self, scratch: Path, devices: int, name: str, *arguments: str, cwd: Path | None = None
    ) -> None:
        self.log = scratch / f"{time.monotonic_ns()}"
        self.began = time.monotonic()
        environment = os.environ | {
            "XLA_FLAGS": SOME_OPTIMIZATION,
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "ASKED": str(self.log.with_suffix(".asked")),
        }
        with (
            self.log.with_suffix(".out").open("w") as out,
            self.log.with_suffix(".err").open("w") as err,
        ):
            program = [name] if name.endswith(".py") else ["-m", f"refine_af.launch.{name}"]
            command = [sys.executable, *program, *arguments]
            self.process = subprocess.Popen(
                command, stdout=out, stderr=err, env=environment, cwd=cwd
            )

    def wait(self, timeout: float = 500) -> Ended:
        try:
            code = self.process.wait(timeout)
        finally:
            self.process.kill()
        texts = [self.log.with_suffix(suffix).read_text() for suffix in (".out", ".err")]
        return Ended(code, *texts, time.monotonic() - self.began)


def start(
    scratch: Path,
    count: int,
    name: str,
    *arguments: str,
    last: tuple[str, ...] = (),
    directories: Sequence[Path | None] = (),
) -> list[Process]:
    """Processes of one run, four devices in all; the last one has the arguments `last`, too.

    Args:
        directories: in which they are started.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = (f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}")
    return [
        Process(
            scratch,
            4 // count,
            name,
            *arguments,
            *(last if number == count - 1 else ()),
            *together,
            f"--process_id={number}",
            cwd=directory,
        )
        for number, directory in zip(range(count), directories or [None] * count, strict=True)
    ]


class Run(NamedTuple):
    """A finished run."""

    workdir: Path
    ended: list[Ended]
    asked: list[list[str]]  # process ids that asked the oracle, by process


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def arguments(scratch: Path) -> tuple[str, ...]:
    """A model on the devices and a function of the user's judge together."""
    (scratch / "mine.py").write_text(ORACLE)
    oracle = f"--config.reward.oracle=judge,{scratch / 'mine.py'}:score"
    return (*SMALL, oracle, "--config.reward.others=('length=0.1',)")


def finish(workdir: Path, processes: list[Process]) -> Run:
    ended = [process.wait() for process in processes]
    assert [e.code for e in ended] == [0] * len(ended), "\n".join(e.err for e in ended)
    files = [process.log.with_suffix(".asked") for process in processes]
    return Run(workdir, ended, [f.read_text().split() if f.exists() else [] for f in files])


@pytest.fixture(scope="module")
def one(scratch: Path, arguments: tuple[str, ...]) -> Run:
    workdir = scratch / "one"
    return finish(workdir, [Process(scratch, 4, "pipeline", f"--workdir={workdir}", *arguments)])


@pytest.fixture(scope="module")
def two(scratch: Path, arguments: tuple[str, ...]) -> Run:
    workdir = scratch / "two"
    return finish(workdir, start(scratch, 2, "pipeline", f"--workdir={workdir}", *arguments))


def checkpoint(directory: Path) -> Any:
    """Arrays of the newest checkpoint, on the host."""
    step = max(int(path.name) for path in directory.iterdir() if path.name.isdigit())
    path = (directory / str(step) / "default").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def assert_close(actual: Any, expected: Any, where: str, tolerance: float = 1e-5) -> None:
    """Texts equal, numbers within `tolerance` of the larger of 1 and their size."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_close(actual[key], expected[key], f"{where}/{key}", tolerance)
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_close(a, b, f"{where}[{i}]", tolerance)
    elif isinstance(expected, float | np.ndarray | np.generic):
        np.testing.assert_allclose(
            np.asarray(actual, np.float64),
            np.asarray(expected, np.float64),
            rtol=tolerance,
            atol=tolerance,
            err_msg=where,
        )
    else:
        assert actual == expected, where


# One run


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(one: Run, two: Run) -> None:
    for name in TEXTS:
        assert (two.workdir / name).read_bytes() == (one.workdir / name).read_bytes(), name
    for name in NUMBERS:
        assert_close(
            rows_without_times(two.workdir / name), rows_without_times(one.workdir / name), name
        )
    for name in CHECKPOINTS:
        found, wanted = (checkpoint(run.workdir / name)["tree"]["params"] for run in (two, one))
        assert_close(found, wanted, name)
    for name in ("sft/hf/model.safetensors", "sft/adapter/adapter_model.safetensors"):
        assert_close(*(load_file(run.workdir / name) for run in (two, one)), name)


@pytest.mark.slow
def test_one_process_writes_and_asks_and_speaks(one: Run, two: Run) -> None:
    names = [
        sorted(str(path.relative_to(run.workdir)) for path in run.workdir.rglob("*"))
        for run in (one, two)
    ]
    inner = ("checkpoints/", "events.")  # as many parts as processes; a time
    outer = [[n for n in found if not any(i in n for i in inner)] for found in names]
    assert outer[0] == outer[1]
    assert len([n for n in names[1] if "events." in n]) == 1
    first, second = two.ended
    assert first.out.splitlines()[-1] == f"report: {two.workdir / 'report.html'}"
    assert "report" not in second.out
    assert "fine-tuning" in first.err
    assert "fine-tuning" not in second.err
    assert set(two.asked[0]) and not two.asked[1]
    assert len(two.asked[0]) == len(one.asked[0])


# Ends


def before_ppo(run: Run, workdir: Path) -> Path:
    """A workdir as `run` left it before its PPO, but for the config on record."""
    workdir.mkdir()
    for name in TEXTS[1:3]:
        (workdir / name).write_bytes((run.workdir / name).read_bytes())
    return workdir


def assert_close_ppo(workdir: Path, other: Path) -> None:
    for name in PPO:
        assert_close(*(rows_without_times(where / name) for where in (workdir, other)), name)
    found, wanted = (checkpoint(where / CHECKPOINTS[0])["tree"] for where in (workdir, other))
    assert_close(found["params"], wanted["params"], CHECKPOINTS[0])


def assert_same_ppo(workdir: Path, other: Path) -> None:
    for name in PPO:
        assert rows_without_times(workdir / name) == rows_without_times(other / name)
    found, wanted = (checkpoint(where / CHECKPOINTS[0]) for where in (workdir, other))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def wait_for(condition: Callable[[], bool], processes: list[Process]) -> None:
    while not condition():
        assert all(process.process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_kill_ends_all_and_both_go_on_to_the_same_bits(
    two: Run, scratch: Path, arguments: tuple[str, ...]
) -> None:
    workdir = before_ppo(two, scratch / "killed")
    command = ("train_ppo", f"--workdir={workdir}", *arguments)
    processes = start(scratch, 2, *command)
    wait_for(lambda: bool(records.read_rows(workdir / PPO[0])), processes)
    processes[1].process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    ended = processes[0].wait(60)
    assert time.monotonic() - killed < 60
    assert ended.code not in (0, 2)
    assert "The following tasks are unhealthy (stopped sending heartbeats):\n1\n" in ended.err
    assert len(records.read_rows(workdir / PPO[0])) < 3, "nothing was left to do"
    finish(workdir, start(scratch, 2, *command))
    assert_same_ppo(workdir, two.workdir)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_a_step_that_one_process_goes_on_from_too(
    two: Run, scratch: Path, arguments: tuple[str, ...]
) -> None:
    """The signal's save is the only one there: none is due before the last step."""
    workdir = before_ppo(two, scratch / "stopped")
    arguments += ("--config.ppo.checkpoint_every=9",)
    command = ("train_ppo", f"--workdir={workdir}", *arguments)
    processes = start(scratch, 2, *command)
    wait_for(lambda: bool(records.read_rows(workdir / PPO[0])), processes)
    processes[1].process.send_signal(signal.SIGTERM)
    for ended in [process.wait(60) for process in processes]:
        assert ended.code == 0
        assert ended.err.endswith("\nstopped; the same command goes on from here\n")
        assert "has failed" not in ended.err
    step = checkpoints.latest_step(workdir / CHECKPOINTS[0])
    assert 0 < step < 3
    assert len(records.read_rows(workdir / PPO[0])) == step
    moved = shutil.copytree(workdir, scratch / "moved")
    finish(workdir, start(scratch, 2, *command))
    assert_same_ppo(workdir, two.workdir)
    finish(moved, start(scratch, 1, "train_ppo", f"--workdir={moved}", *arguments))
    assert_close_ppo(moved, two.workdir)


def part_of_the_other(directory: Path) -> Path:
    """The arrays of a checkpoint that process 1 alone has written, and reads."""
    files = (directory / "default/ocdbt.process_1/d").iterdir()
    return max(files, key=lambda file: file.stat().st_size)


@pytest.mark.slow
def test_damage_that_one_process_finds_is_found_by_all(tmp_path: Path, scratch: Path) -> None:
    program = str(Path(__file__).with_name("save_and_restore.py"))
    directory = tmp_path / "checkpoints"
    command = (program, f"--directory={directory}")
    finish(tmp_path, start(scratch, 2, *command))
    part = part_of_the_other(directory / "2")
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    first, second = [process.wait() for process in start(scratch, 2, *command)]
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.out.endswith("restored 1\n")
    assert f"{directory}/2: the checkpoint is damaged (" in first.err
    assert sorted(path.name for path in directory.iterdir()) == ["1", "damaged-2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--config.seed_tasks=tasks.jsonl", "tasks.jsonl: cannot read seed tasks: "),
        ("--config=mine.py", "--config=mine.py: not found; "),  # before any work
    ],
)
def test_an_error_of_one_is_the_end_and_the_reason_of_all(
    flag: str, reason: str, tmp_path: Path, scratch: Path
) -> None:
    """Process 1 does not find a file that the command names: there is none on its host."""
    here, there = tmp_path / "here", tmp_path / "there"
    for directory in (here, there):
        directory.mkdir()
    (here / "tasks.jsonl").write_bytes((SEEDS / "seed_tasks.jsonl").read_bytes())
    (here / "mine.py").write_text("from refine_af.configs.tiny import get_config\n")
    command = ("generate_instructions", f"--workdir={tmp_path / 'lost'}", *SMALL)
    started = start(scratch, 2, *command, flag, directories=(here, there))
    first, second = (process.wait() for process in started)
    assert (first.code, second.code) == (2, 2)
    assert f"error: {reason}" in second.err
    assert f"error: another process has failed: process 1: {reason}" in first.err
    assert "Traceback" not in first.err + second.err
    assert abs((started[0].began + first.seconds) - (started[1].began + second.seconds)) < 10


@pytest.mark.slow
def test_processes_with_other_arguments_are_refused(scratch: Path) -> None:
    workdir = scratch / "unlike"
    command = ("finetune", f"--workdir={workdir}", *SMALL)
    for ended in [p.wait() for p in start(scratch, 2, *command, last=("--config.seed=1",))]:
        assert ended.code == 2
        assert "error: process 1 was started with '--workdir=" in ended.err
        assert ended.err.endswith("; all of a run take the same arguments\n")
    assert not workdir.exists()


@pytest.mark.slow
def test_generate_answers_each_row_once(scratch: Path) -> None:
    prompts = scratch / "prompts.jsonl"
    rows = [{"prompt": text, "max_new_tokens": 4} for text in ("a", "bc", "def")] + [{"prompt": 1}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("generate", "--model=random:tiny", f"--prompts={prompts}")
    outputs = [scratch / "together.jsonl", scratch / "alone.jsonl"]
    together = start(scratch, 2, *command, f"--output={outputs[0]}")
    alone = Process(scratch, 4, *command, f"--output={outputs[1]}")
    assert [process.wait().code for process in (*together, alone)] == [2, 2, 2]
    found, wanted = map(records.read_rows, outputs)
    assert len(found) == 4
    assert_close(found, wanted, "rows")
