"""Files and directories that flags name: checked before any work."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl.flags import FlagHolder

from refine_af import records
from refine_af.launch import flags
from refine_af.models import processes
from refine_af.models.writing import writing


def read_input(path: Path, strings: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a user's JSONL file, each with the named fields as strings.

    Raises:
        ValueError: the file is missing or empty, or `file:line` lacks a field.
    """
    return processes.once(lambda: _read_input(path, strings))


def check_input(path: Path) -> None:
    """Raise ValueError unless there is such a file."""
    if not path.is_file():
        found = "a directory" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {found}; expected JSONL")


def output_file(holder: "FlagHolder[str | None]") -> Path:
    """File to write, in a directory that is there from now on.

    Raises:
        ValueError: it is not given, or a directory.
        OSError: its directory cannot be made.
    """
    path = Path(flags.require(holder)).expanduser()
    if path.is_dir():
        raise ValueError(f"--{holder.name}={path}: is a directory; expected a file to write")
    with writing(path):
        processes.by_writer(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    return path


def output_directory(holder: "FlagHolder[str | None]", what: str) -> Path:
    """Directory to write `what` in; not that of a run, which has its own.

    Raises:
        ValueError: it is not given, a file, or the workdir of a run.
    """
    path = directory(holder)
    if (path / "config.json").exists():
        raise ValueError(
            f"--{holder.name}={path}: the workdir of a run, whose own {what} these would replace; "
            "take another directory"
        )
    return path


def directory(holder: "FlagHolder[str | None]") -> Path:
    """Path of a directory, which need not be there yet.

    Raises:
        ValueError: it is not given, or a file.
    """
    path = Path(flags.require(holder)).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError(f"--{holder.name}={path}: is a file; expected a directory")
    return path


def _read_input(path: Path, strings: Sequence[str]) -> list[dict[str, Any]]:
    check_input(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    rows = records.parse_lines(text.split("\n"), path, strings)
    if not rows:
        raise ValueError(f"{path}: no rows; expected JSONL")
    return rows
