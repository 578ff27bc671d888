"""Ctrl-C and SIGTERM: what is under way is dropped, or finished first where it must not be cut.

A signal may come to some of several processes only, or at different moments. In a loop that they
go through together it therefore takes effect where they `agree`.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from refine_af.models import processes

_received: list[signal.Signals] = []  # by this process
_agreed: list[signal.Signals] = []  # the one that all processes stop for, if any
_depth = 0  # of blocks that are held


class AgreedInterrupt(KeyboardInterrupt):
    """A signal that all processes stop for, at the same place."""


def install() -> None:
    """Handle both signals from now on; a shell starts background jobs with SIGINT ignored."""
    _received.clear()
    _agreed.clear()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _receive)


def _receive(signum: int, frame: Any) -> None:
    _received.append(signal.Signals(signum))
    waits = _depth or _agreed  # a first one asks for what is being done already
    if not waits or len(_received) > 1:
        raise KeyboardInterrupt


def received() -> signal.Signals | None:
    """The signal that all stop for, or the first that has come here, if any."""
    return next(iter((*_agreed, *_received)), None)


def check() -> None:
    """Stop also where the exception was lost, in a library's callback say.

    Raises:
        KeyboardInterrupt: a signal has come, and no block is held.
    """
    if _depth:
        return
    if _agreed:
        raise AgreedInterrupt
    if _received:
        raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """A block that is done as a whole: a first signal takes effect at its end, a second at once.

    Raises:
        KeyboardInterrupt: a signal has come.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    check()


@contextmanager
def shared() -> Iterator[None]:
    """A loop of several processes, in which a first signal waits for `agree`."""
    global _depth
    waits = processes.several()
    _depth += waits
    try:
        yield
    finally:
        _depth -= waits


def agree() -> None:
    """Stop all processes where a signal has come to any of them; all must come here.

    From here on a first signal of each process's own changes nothing, and a second one ends it at
    once: a scheduler sends one to every host, and not at the same moment.

    Raises:
        AgreedInterrupt: it has.
    """
    if not processes.several():
        return
    first = next(filter(None, processes.everyone(int(_received[0]) if _received else 0)), 0)
    if first:
        _agreed[:] = [signal.Signals(first)]
        raise AgreedInterrupt
