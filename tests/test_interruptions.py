"""Signals that come while Python runs in a library's callback."""

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from programs import Program, refused

from refine_af import interruptions, report
from refine_af.launch import flags
from refine_af.models.writing import WriteError

pytestmark = pytest.mark.usefixtures("own_handlers")


@contextmanager
def collection_callback(act: Callable[[], None]) -> Iterator[None]:
    """`act` is done in the next garbage collection, as JAX does something in each."""

    def callback(phase: str, _: dict[str, int]) -> None:
        gc.callbacks.remove(callback)
        act()

    gc.callbacks.append(callback)
    yield
    assert callback not in gc.callbacks


def heard_of(leftover: BaseException | None, signum: int | None = None) -> list[type[object]]:
    """Kinds of exceptions that are reported when a callback raises one, or a signal does."""
    heard: list[type[object]] = []

    def act() -> None:
        if signum is not None:
            signal.raise_signal(signum)
        if leftover is not None:
            raise leftover

    def hook(args: Any) -> None:
        flags._report_leftover(args, lambda args: heard.append(args.exc_type))

    with pytest.MonkeyPatch.context() as patch, collection_callback(act):
        patch.setattr(sys, "unraisablehook", hook)
        interruptions.install()
        gc.collect()
    return heard


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_lost_signal_makes_no_noise_and_takes_effect_soon(signum: signal.Signals) -> None:
    assert not heard_of(None, signum)
    assert interruptions.received() == signum
    with pytest.raises(KeyboardInterrupt):
        interruptions.check()


@pytest.mark.parametrize("leftover", [KeyError("lost"), KeyboardInterrupt()])
def test_other_lost_exceptions_are_reported(leftover: BaseException) -> None:
    assert heard_of(leftover) == [type(leftover)]


def test_what_orbax_leaves_behind_is_not_reported() -> None:
    assert not heard_of(RuntimeError("Event loop is closed"))


@pytest.mark.usefixtures("only_its_own_flags")
def test_a_file_that_is_not_written_is_told_of_though_a_signal_came(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SIGTERM would have saved is not saved: that is no success."""

    def fail(_: Path) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise WriteError("x: cannot be written (no room)")

    monkeypatch.setattr(report, "write_report", fail)
    found = program("report", f"--workdir={tmp_path}")
    assert found == refused("x: cannot be written (no room)")


@pytest.mark.usefixtures("only_its_own_flags")
def test_programs_report_so(program: Program) -> None:
    program("report")
    assert sys.unraisablehook == flags._report_leftover
