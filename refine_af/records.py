"""JSONL files that survive kill -9: whole lines, appended and flushed; torn ends are cut.

Stages work in batches, and a batch is a pure function of what came before it. So a row carries
the number of its batch, and resuming drops the rows of the newest batch on disk (it may be
incomplete) and makes that batch again, with the same result.

Of several processes the writer alone reads and writes, and tells the others what it has read.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from refine_af.models import processes
from refine_af.models.writing import writing

Row = dict[str, Any]


def read_rows(path: Path, strings: Sequence[str] = ()) -> list[Row]:
    """All rows; [] when there is no file. A last line without its newline is ignored.

    Args:
        strings: fields that every row must have as a string.

    Raises:
        ValueError: `file:line` of a complete line that is not a JSON object, lacks a field, or is
            not UTF-8.
    """
    return processes.once(lambda: list(stream_rows(path, strings)))


def stream_rows(path: Path, strings: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of `read_rows`, one in memory at a time; as this process sees the file."""
    if path.exists():
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield from _rows_of(line, path, number, strings)


def _rows_of(line: bytes, path: Path, number: int, strings: Sequence[str] = ()) -> list[Row]:
    try:
        return parse_lines([line.decode()], path, strings, first=number)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} in {error.object[:40]!r})") from None


def parse_lines(
    lines: Iterable[str], path: Path, strings: Sequence[str] = (), first: int = 1
) -> list[Row]:
    """Rows of the lines of a file, which is named in errors; blank lines are skipped.

    Args:
        strings: fields that every row must have as a string.
        first: number of the first line.

    Raises:
        ValueError: `file:line` is not a JSON object, or lacks a field.
    """
    rows = []
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        row = _parse(line, f"{path}:{number}", allow_nan=False)
        for name in strings:
            if not isinstance(row.get(name), str):
                fault = (
                    "must be a string" if name in row else f"is missing; the row has {list(row)}"
                )
                raise ValueError(f"{path}:{number}: {name!r} {fault}")
        rows.append(row)
    return rows


def check_bools(rows: Iterable[Row], name: str, path: Path) -> None:
    """See to it that all rows of a file have a field that is true or false.

    Raises:
        ValueError: one has not.
    """
    for number, row in enumerate(rows):
        if not isinstance(row.get(name), bool):
            raise ValueError(
                f"{path}: row {number}: {name}={row.get(name)!r}: expected true or false"
            )


def read_json(path: Path) -> Row:
    """Content of a JSON file; {} when there is none.

    Raises:
        ValueError: the file is not a JSON object.
    """
    return processes.once(lambda: _read_json(path))


def _read_json(path: Path) -> Row:
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    return _parse(text, str(path), allow_nan=True)


def _parse(text: str, where: str, *, allow_nan: bool) -> Row:
    """A JSON object that can be written again as it is, without halves of characters say."""
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False, allow_nan=allow_nan).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object")
    return row


def exists(path: Path) -> bool:
    """Whether there is such a file or directory."""
    return processes.once(path.exists)


def to_line(row: Row) -> str:
    """One line of JSON with its newline; a top-level number that is not finite becomes null."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows in one write and force them to disk.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    data = "".join(map(to_line, rows)).encode()
    if data:
        processes.by_writer(lambda: _write(path, "ab", data))


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: readers see the old content or the new, never a part.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_text`."""
    processes.by_writer(lambda: _replace(path, data))


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    _write(partial, "wb", data)
    partial.replace(path)


def _write(path: Path, mode: str, data: bytes) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def resume(
    paths: Sequence[Path], key: str = "batch", strings: Sequence[str] = ()
) -> tuple[int, list[list[Row]]]:
    """First batch that has to be made (again), and the rows of the ones before, by file.

    Args:
        strings: as of `read_rows`.

    Raises:
        ValueError: as `read_rows`, or a row has no number.
    """

    def newest() -> int:
        return max(
            (_number(row, key, path) for path in paths for row in stream_rows(path)), default=0
        )

    first = processes.once(newest)
    for path in paths:
        cut(path, first, key)
    return first, [read_rows(path, strings) for path in paths]


def cut(path: Path, first: float = math.inf, key: str = "batch") -> None:
    """End a file where batch (or step) `first` begins, and before a torn last line.

    Raises:
        ValueError: as `read_rows`, or a row has no number.
    """
    processes.once(lambda: _cut(path, first, key))


def _cut(path: Path, first: float, key: str) -> None:
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            rows = _rows_of(line, path, number) if first < math.inf else []
            if any(_number(row, key, path) >= first for row in rows):
                break
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)


def _number(row: Row, key: str, path: Path) -> int:
    """A row's batch or step."""
    number = row.get(key)
    if type(number) is not int or number < 0:
        raise ValueError(f"{path}: {key}={number!r}: expected each row's number of its {key}")
    return number
