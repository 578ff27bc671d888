"""The programs: flags, help, one-line errors, and the files that they read and write."""

import dataclasses
import json
import logging
import operator
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from programs import Program, Result, jsonl, refused

from refine_af import checkpoints, memory, mesh, pipeline, records, rlaf, tokens
from refine_af import config as config_lib
from refine_af.config import config_hash
from refine_af.launch import _files, flags

TINY = flags.load_config("tiny")
ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = {target.partition(":")[2] for target in PYPROJECT["project"]["scripts"].values()}
NOT_JSON = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
STAGE = ("train_ppo", "--config=tiny")
CONFIGS = flags.available_configs()
NOT_FOUND = f"not found; expected a .py file or one of {CONFIGS}"
UNKNOWN_FLAG = "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"


pytestmark = pytest.mark.usefixtures("only_its_own_flags")


# Command lines


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--config.ppo.num_step=3",
            "--config.ppo.num_step: no such field; "
            "nearest: ppo.num_steps, ppo.num_epochs, ppo.warmup_steps",
        ),
        (
            "--config.ppo.num_steps=abc",
            "--config.ppo.num_steps=abc: expected a whole number",
        ),
        ("--config.ppo.num_steps=0", "ppo.num_steps=0: expected at least 1"),
        ("--profile_steps=many", "--profile_steps=many: expected a whole number"),
        (
            "--config.prompts.max_demo_chars=2",
            "prompts.max_demo_chars=2: only 0 seed tasks are that short, prompts.num_demos=1 are "
            "needed",
        ),
        (
            "--config.mesh=data:3",
            "mesh data=3 fsdp=1 sequence=1 tensor=1: the product must be the number of devices, "
            f"{jax.device_count()}; give one axis as -1 to take the rest",
        ),
        ("--config=tinny", f"--config=tinny: {NOT_FOUND}; did you mean tiny?"),
        ("--config=x/y.py", f"--config=x/y.py: {NOT_FOUND}"),
        ("--wrkdir=x", UNKNOWN_FLAG),
        ("x", "unexpected argument 'x'; flags look like --name=value"),
    ],
)
def test_a_faulty_command_line_is_refused_before_anything_is_written(
    argument: str, message: str, program: Program, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    assert program(*STAGE, f"--workdir={workdir}", argument) == refused(message)
    assert not workdir.exists()


def test_a_config_is_needed_and_its_lack_hides_no_other_fault(program: Program) -> None:
    needed = f"--config is required: one of {CONFIGS} or a .py file"
    assert program("train_ppo") == refused(needed)
    assert program("train_ppo", "--wrkdir=x") == refused(UNKNOWN_FLAG)


@pytest.mark.parametrize("name", ["train_ppo", "pipeline", "evaluate"])
def test_a_stage_needs_a_workdir(name: str, program: Program) -> None:
    assert program(name, "--config=tiny") == refused("--workdir is required; see --help")


# Help


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_help_shows_the_docstring_and_every_flag(name: str, program: Program) -> None:
    source = (ROOT / f"launch/{name}.py").read_text()
    wanted = {line.split('"')[1] for line in source.split("DEFINE_")[1:] if '"' in line}
    wanted |= {"config"} if "with_config" in source else set()
    wanted |= {"workdir", "force_config"} if "workdir_flags" in source else set()
    for arguments in (["--help"], ["--seed=1", "-h"]):
        code, out, err = program(name, *arguments)
        assert (code, err) == (0, "")
        assert out.startswith(source.split('"""')[1].strip().splitlines()[0])
        shown = out.replace("--[no]", "--")
        assert not [flag for flag in wanted if f"  --{flag}: " not in shown]
    assert wanted


# Workdirs


def test_a_workdir_belongs_to_one_config(program: Program, tmp_path: Path) -> None:
    """`--force_config` goes on with the new one: here to the next complaint."""
    pipeline.claim(dataclasses.replace(TINY, seed=2), tmp_path, force=False)
    pipeline.claim(TINY, tmp_path, force=False)  # no results: the start before has failed
    (tmp_path / "rejected_instructions.jsonl").touch()
    path, other = tmp_path / "config.json", (*STAGE, f"--workdir={tmp_path}", "--config.seed=1")
    before = path.read_bytes()
    mine, theirs = config_hash(dataclasses.replace(TINY, seed=1)), config_hash(TINY)
    assert program(*other) == refused(
        f"{path}: this workdir was made with config {theirs}, not {mine} (seed=0 there, 1 here); "
        "take another --workdir, or --force_config to go on with the new one"
    )
    assert path.read_bytes() == before
    lacking = (
        f"{tmp_path / 'instructions.jsonl'}: 0 of 12 instructions; run generate_instructions first"
    )
    assert program(*other, "--force_config") == refused(lacking)
    assert program(*other) == refused(lacking), "now it is the new config's"


def test_a_workdir_goes_on_with_another_mesh(program: Program, tmp_path: Path) -> None:
    """To the next complaint, and the newest mesh is on record."""
    pipeline.claim(TINY, tmp_path, force=False)
    result = program(*STAGE, f"--workdir={tmp_path}", "--config.mesh=data:2,fsdp:-1")
    assert result.err.endswith("0 of 12 instructions; run generate_instructions first\n")
    assert records.read_json(tmp_path / "config.json")["config"]["mesh"]["data"] == 2


def test_a_stage_without_work_says_so(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "run_stage", lambda *_: False)
    found = program(*STAGE, f"--workdir={tmp_path}")
    assert found == (0, f"train_ppo: nothing to do in {tmp_path}\n", "")


def test_a_second_program_in_a_workdir_is_refused(program: Program, tmp_path: Path) -> None:
    with pipeline.alone_in(tmp_path):
        message = f"{tmp_path}: another program is at work there; wait for its end, or stop it"
        assert program(*STAGE, f"--workdir={tmp_path}") == refused(message)
    assert not list(tmp_path.iterdir())
    with pipeline.alone_in(tmp_path):  # free again
        pass


def test_checkpoints_of_another_config_are_refused_unless_forced(tmp_path: Path) -> None:
    """Once forced, the workdir remembers."""
    folder = tmp_path / rlaf.CHECKPOINTS
    with checkpoints.open_manager(folder, keep=1) as manager:
        checkpoints.save(manager, 1, {"x": jnp.zeros(1)}, config="c0ffee")
    mine = config_hash(TINY)
    message = rf"^{folder}: this workdir was made with config c0ffee, not {mine}; .*--force_config"
    with pytest.raises(ValueError, match=message):
        pipeline.claim(TINY, tmp_path, force=False)
    pipeline.claim(TINY, tmp_path, force=True)
    pipeline.claim(TINY, tmp_path, force=False)
    assert records.read_json(tmp_path / "config.json")["earlier"] == ["c0ffee"]


def test_a_stage_out_of_memory_gives_advice_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(run: pipeline.Run) -> bool:
        jax.jit(lambda: jnp.zeros((1 << 44,)))()
        return True

    monkeypatch.setitem(pipeline.STAGES, "train_ppo", greedy)
    with pytest.raises(ValueError) as caught:
        pipeline.run_stage(pipeline.Run(TINY, tmp_path), "train_ppo")
    assert str(caught.value) == (
        "train_ppo: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 70368744177664 "
        "bytes.): lower ppo.batch_size (now 8), raise ppo.num_microbatches (now 2), set "
        "ppo.int8_cache=True (now False), lower ppo.sampling.max_new_tokens (now 32), raise "
        "mesh.fsdp (now -1)"
    )


def test_a_train_state_that_cannot_fit_is_refused_beforehand() -> None:
    huge = {"x": jax.ShapeDtypeStruct((1 << 42,), jnp.float32)}
    message = r"^train_ppo: the train state and its gradient take 4096\.0 GiB on each device, and "
    with pytest.raises(ValueError, match=message):
        memory.check_state(huge, huge, mesh.make_mesh(TINY.mesh), "train_ppo")


def test_a_broken_config_json_is_named(program: Program, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    message = f"{tmp_path / 'config.json'}: not valid JSON ({NOT_JSON})"
    assert program(*STAGE, f"--workdir={tmp_path}") == refused(message)


# Files that users give


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("score", "--config=tiny --output={0}/out --examples={0}/rows"),
        ("evaluate", "--output={0}/out --predictions={0}/rows"),
    ],
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, ": no such file; expected JSONL"),
        (b"\n \n", ": no rows; expected JSONL"),
        (b'{"a": "\xff"}\n', ": not UTF-8 (invalid start byte at byte 7)"),
        (b"[1]\n", ":1: expected a JSON object"),
        (b"\nnull\n", ":2: expected a JSON object"),
        (b"\n\n{a\n", f":3: not valid JSON ({NOT_JSON})"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(
    name: str, arguments: str, content: bytes | None, message: str, program: Program, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "rows").write_bytes(content)
    result = program(name, *arguments.format(tmp_path).split())
    assert result == refused(f"{tmp_path / 'rows'}{message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "row", "fault"),
    [
        (
            "score --config=tiny --examples",
            {"instruction": "a", "input": "b"},
            "'output' is missing; the row has ['instruction', 'input']",
        ),
        (
            "score --config=tiny --examples",
            {"instruction": 1},
            "'instruction' must be a string",
        ),
        ("evaluate --predictions", {"id": "a"}, "'prediction' is missing; the row has ['id']"),
    ],
)
def test_a_row_that_lacks_a_string_is_named(
    command: str, row: dict[str, Any], fault: str, program: Program, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "rows", row)
    result = program(*command.split(), str(path), f"--output={tmp_path / 'out'}")
    assert result == refused(f"{path}:1: {fault}")


def test_a_typo_in_the_oracle_shows_before_the_first_stage(
    program: Program, tmp_path: Path
) -> None:
    oracle = "--config.reward.oracle=trained:nowhere"
    for name in ("pipeline", "generate_instructions"):
        result = program(name, "--config=tiny", f"--workdir={tmp_path / 'run'}", oracle)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("error: oracle 'nowhere': expected a directory")
    assert not (tmp_path / "run").exists()


def test_scores_are_written_to_a_file(program: Program, tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "rows", {"instruction": "a", "input": "", "output": "b"})
    result = program("score", "--config=tiny", f"--examples={rows}", f"--output={tmp_path}")
    assert result == refused(f"--output={tmp_path}: is a directory; expected a file to write")


def test_rows_may_hold_any_line_break_but_a_newline_and_begin_with_a_mark(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\x85c\x0bd"}, {"text": "e"}]
    path = jsonl(tmp_path / "rows", *rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert _files.read_input(path, ["text"]) == rows


# Faults


def start(
    action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, *, resumes: bool = True
) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    flags.start(action, resumes=resumes)


def in_a_manager() -> None:
    """A fault of ours inside a `with`."""
    with pytest.MonkeyPatch.context():
        config_lib.Sampling(temperature=-1, max_new_tokens=1)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: config_lib.require(False, "two\n lines"), "two lines"),
        (in_a_manager, "temperature=-1: expected 0 or at least 0.0001"),
        (lambda: Path("/no").read_text(), "[Errno 2] No such file or directory: '/no'"),
    ],
)
def test_faults_of_the_user_are_one_line(
    action: Callable[[], Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit:
        start(action, monkeypatch)
    assert Result(exit.value.code, *capsys.readouterr()) == refused(message)


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (lambda: json.loads("{"), json.JSONDecodeError),  # a library's
        (lambda: tokens.pad_right([[1, 2, 3]], 2), ValueError),  # NumPy's, in a line of ours
        (lambda: mesh.spec(("embed",), (2, 2), mesh.make_mesh(TINY.mesh)), ValueError),  # zip's
        (lambda: {}["missing"], KeyError),
        (lambda: operator.truediv(1, 0), ZeroDivisionError),
    ],
)
def test_defects_keep_their_traceback(
    action: Callable[[], Any], kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(kind):
        start(action, monkeypatch)


@pytest.mark.parametrize(
    ("signum", "resumes", "code", "left_over"),
    [
        (signal.SIGINT, True, 130, "the same command goes on from here"),
        (signal.SIGTERM, True, 0, "the same command goes on from here"),
        (signal.SIGINT, False, 130, "nothing was written"),
        (signal.SIGTERM, False, 143, "nothing was written"),
    ],
)
def test_a_signal_is_one_line(
    signum: signal.Signals,
    resumes: bool,
    code: int,
    left_over: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit:
        start(lambda: signal.raise_signal(signum), monkeypatch, resumes=resumes)
    result = Result(exit.value.code, *capsys.readouterr())
    assert result == (code, "", f"\nstopped; {left_over}\n")


# Programs that read and write files of the user


def test_score_adds_the_reward_and_its_components(program: Program, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Say hello.", "input": "", "output": "hello", "mine": [1]},
        {"instruction": "Say it.", "input": "yes\u2028no", "output": "yes"},
    ]
    examples, output = jsonl(tmp_path / "rows", *rows), tmp_path / "out"
    files = (f"--examples={examples}", f"--output={output}")
    result = program("score", "--config=tiny", "--config.reward.bias=2", *files)
    assert result[:2] == (0, f"2 rows: {output}\n")
    assert "2/2" in result.err  # the bar
    for row, scored in zip(rows, records.read_rows(output), strict=True):
        assert list(scored) == [*row, "reward", "rew", "nat", "und", "coh"]
        assert row.items() <= scored.items()
        rest = 0.0078 * scored["rew"] - 0.4421 * scored["und"]
        rest += 0.3212 * scored["nat"] + 0.1520 * scored["coh"]
        assert scored["reward"] == pytest.approx(rest + 2)
        assert scored["rew"] < 0 < scored["nat"] < 1


def test_score_asks_a_function_of_the_user(program: Program, tmp_path: Path) -> None:
    mine = tmp_path / "my_reward.py"
    mine.write_text(
        "def score(examples):\n"
        '    return {"reward": [min(len(e.output.split()), 20) / 20 for e in examples]}\n'
    )
    rows = [{"instruction": "Sing.", "input": "", "output": "la " * n} for n in (2, 5)]
    examples, output = jsonl(tmp_path / "rows", *rows), tmp_path / "out"
    command = ("--config=tiny", f"--config.reward.oracle={mine}:score")
    result = program("score", *command, f"--examples={examples}", f"--output={output}")
    assert result[:2] == (0, f"2 rows: {output}\n")
    assert [row["reward"] for row in records.read_rows(output)] == [0.1, 0.25]
    assert not list(tmp_path.glob("*.scores"))
    named = f"--config.reward.oracle={mine}:name", "--config.reward.others=('input=1',)"
    mine.write_text("def name(examples):\n    return {'input': [1.0] * len(examples)}\n")
    files = f"--examples={examples}", f"--output={output}"
    result = program("score", "--config=tiny", *named, *files)
    assert result.err.splitlines()[-1] == (
        f"error: {examples}: rows have ['input'] already, as the oracle would name its own"
    )
    mine.write_text("def score(examples):\n    return [1 / 0 for e in examples]\n")
    result = program("score", *command, f"--examples={examples}", f"--output={output}")
    assert result.code == 2
    assert result.err.splitlines()[-1] == (
        "error: reward oracle failed on the instruction 'Sing.' with the output 'la la ': "
        f"{mine}:2: ZeroDivisionError: division by zero"
    )


# In processes of their own


def shell(*command: str) -> Result:
    environment = os.environ | {"XLA_FLAGS": "", "COLUMNS": "80"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return Result(run.returncode, run.stdout, run.stderr)


def test_a_module_ends_in_one_line() -> None:
    module = ("-m", "refine_af.launch.train_ppo", "--config=tiny", "--config.ppo.num_steps=0")
    assert shell(sys.executable, *module) == refused("ppo.num_steps=0: expected at least 1")


def test_a_console_script_shows_help() -> None:
    code, out, err = shell(str(Path(sys.executable).parent / "refine-af-report"), "--help")
    assert (code, err) == (0, "")
    assert "  --workdir: " in out


def test_writes_that_fail_together_are_one_error() -> None:
    """The others come from asyncio, with tracebacks, after the line that says it."""

    def record(text: str) -> logging.LogRecord:
        return logging.LogRecord("asyncio", logging.ERROR, "", 0, text, (), None)

    assert not flags._is_no_echo(record("Task exception was never retrieved\nfuture: <Task>"))
    assert flags._is_no_echo(record("Executing <Task> took 2 seconds"))
