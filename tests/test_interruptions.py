"""Signals that come while Python runs in a library's callback."""

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from refine_af import interruptions
from refine_af.launch import flags

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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_lost_signal_makes_no_noise_and_takes_effect_soon(
    signum: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda leftover: flags._hear(leftover, heard.append))
    interruptions.install()
    with collection_callback(lambda: signal.raise_signal(signum)):
        gc.collect()  # Python drops the exception
    assert not heard
    assert interruptions.received() == signum
    with pytest.raises(KeyboardInterrupt):
        interruptions.check()


def test_other_lost_exceptions_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[type[BaseException]] = []

    def fail() -> None:
        raise KeyError("lost")

    def note(leftover: Any) -> None:
        heard.append(leftover.exc_type)

    monkeypatch.setattr(sys, "unraisablehook", lambda leftover: flags._hear(leftover, note))
    interruptions.install()
    with collection_callback(fail):
        gc.collect()
    assert heard == [KeyError]
