"""Ctrl-C and SIGTERM: what is under way is dropped, or finished first where it must not be cut."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_received: list[signal.Signals] = []
_depth = 0  # of blocks that are held


def install() -> None:
    """Handle both signals from now on; a shell starts background jobs with SIGINT ignored."""
    _received.clear()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _receive)


def _receive(signum: int, frame: Any) -> None:
    _received.append(signal.Signals(signum))
    if not _depth or len(_received) > 1:
        raise KeyboardInterrupt


def received() -> signal.Signals | None:
    """The first signal, if one has come."""
    return _received[0] if _received else None


def check() -> None:
    """Stop also where the exception was lost, in a library's callback say.

    Raises:
        KeyboardInterrupt: a signal has come, and no block is held.
    """
    if _received and not _depth:
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
