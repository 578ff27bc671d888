"""A disk that does not take a file: told beforehand where that can be, and always in one line."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RUST = re.compile(r"\(os error (\d+)\)$")  # as safetensors and tokenizers say it


class WriteError(OSError):
    """A file was not written; says which, and why."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes `path`; errors of a write itself name no file.

    Raises:
        WriteError: the disk is full, or `path` cannot be written.
    """
    try:
        yield
    except Exception as error:
        rust = _RUST.search(str(error))
        if not isinstance(error, OSError) and not rust:
            raise
        number = int(rust[1]) if rust else getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or error
        remedy = "; make room, then start the same command again" if number in _FULL else ""
        raise WriteError(f"{path}: cannot be written ({reason}){remedy}") from None


def check_space(target: Path, needed: int) -> None:
    """See to it that the disk of `target` takes `needed` bytes more.

    Raises:
        OSError: it does not.
    """
    parent = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(
            f"{parent}: {_size(free)} are free, {_size(needed)} are needed; make room or use "
            "another disk"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"
