"""Running the programs in this process, for tests."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from absl import flags as absl_flags

from refine_af import interruptions
from refine_af.launch import (
    _cli,
    flags,  # noqa: F401 - defines what all programs share, once a process
)


class Result(NamedTuple):
    """How a program ended, and what it printed."""

    code: int | str | None
    out: str
    err: str


Program = Callable[..., Result]


@pytest.fixture
def only_its_own_flags() -> Iterator[None]:
    """absl's flags are those of one process: what a test defines goes when it ends."""
    known = set(absl_flags.FLAGS)
    yield
    forget_flags(known)


def forget_flags(known: set[str]) -> None:
    for name in set(absl_flags.FLAGS) - known:
        delattr(absl_flags.FLAGS, name)
    absl_flags.FLAGS.unparse_flags()


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Signals are handled as before when the test ends."""
    kept = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    interruptions.install()  # forgets what came
    for signum, handler in kept.items():
        signal.signal(signum, handler)


@pytest.fixture
def program(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Program:
    """Run a program as its console script does, in this process and on its eight devices."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # is put back
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp()))

    def run(name: str, *args: str) -> Result:
        known = set(absl_flags.FLAGS)
        monkeypatch.setattr(sys, "argv", [f"refine-af-{name}", *args])
        code: int | str | None = 0
        capsys.readouterr()
        try:
            getattr(_cli, name)()
        except SystemExit as error:
            code = error.code
        finally:
            forget_flags(known)
        return Result(code, *capsys.readouterr())

    return run


def refused(message: str) -> Result:
    """Exit 2, one line on standard error, nothing on standard output."""
    return Result(2, "", f"error: {message}\n")


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
