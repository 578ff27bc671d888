"""JSONL files that survive kill -9: whole lines, appended and flushed; torn ends are cut.

Stages work in batches, and a batch is a pure function of what came before it. So a row carries
the number of its batch, and resuming drops the rows of the newest batch on disk (it may be
incomplete) and makes that batch again, with the same result.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path, strings: Sequence[str] = ()) -> list[Row]:
    """All rows; [] when there is no file. A last line without its newline is ignored.

    Args:
        strings: fields that every row must have as a string.

    Raises:
        ValueError: `file:line` of a complete line that is not a JSON object, lacks a field, or is
            not UTF-8.
    """
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    try:
        return parse_lines([line.decode() for line in lines], path, strings)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} in {error.object[:40]!r})") from None


def parse_lines(lines: Iterable[str], path: Path, strings: Sequence[str] = ()) -> list[Row]:
    """Rows of the lines of a file, which is named in errors; blank lines are skipped.

    Args:
        strings: fields that every row must have as a string.

    Raises:
        ValueError: `file:line` is not a JSON object, or lacks a field.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
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


def read_json(path: Path) -> Row:
    """Content of a JSON file; {} when there is none.

    Raises:
        ValueError: the file is not a JSON object.
    """
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


def to_line(row: Row) -> str:
    """One line of JSON with its newline; a top-level number that is not finite becomes null."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows in one write and force them to disk."""
    data = "".join(map(to_line, rows)).encode()
    if not data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def keep_rows(path: Path, rows: Sequence[Row]) -> None:
    """Make `path` hold exactly `rows` (a prefix of what it holds), cutting a torn end too."""
    text = "".join(map(to_line, rows))
    if path.exists() and path.read_bytes() != text.encode():
        write_text(path, text)


def resume(paths: Sequence[Path], key: str = "batch") -> tuple[int, list[list[Row]]]:
    """First batch that has to be made (again), and the rows of the ones before, by file.

    Raises:
        ValueError: as `read_rows`, or a row has no number.
    """
    first = max((row[key] for path in paths for row in _numbered(path, key)), default=0)
    return first, cut(paths, first, key)


def cut(paths: Sequence[Path], first: int, key: str) -> list[list[Row]]:
    """Drop from each file the rows from batch (or step) `first` on; returns what is kept.

    Raises:
        ValueError: as `read_rows`, or a row has no number.
    """
    kept = [[row for row in _numbered(path, key) if row[key] < first] for path in paths]
    for path, rows in zip(paths, kept, strict=True):
        keep_rows(path, rows)
    return kept


def _numbered(path: Path, key: str) -> list[Row]:
    rows = read_rows(path)
    odd = next((row for row in rows if type(row.get(key)) is not int or row[key] < 0), None)
    if odd is not None:
        raise ValueError(f"{path}: {key}={odd.get(key)!r}: expected each row's number of its {key}")
    return rows
