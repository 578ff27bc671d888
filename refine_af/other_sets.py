"""Instruction sets that a user has already: what of ours asks for the same is left out."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from refine_af import records
from refine_af.config import DataSet
from refine_af.models.one_line import one_line
from refine_af.novelty import NoveltyPool
from refine_af.records import Row
from refine_af.rewards import Example

_FIELDS = ("instruction", "messages")


class Repeat(NamedTuple):
    """What another set asks for, and how similar that is: ROUGE-L F."""

    text: str
    similarity: float


def check(options: DataSet) -> None:
    """See that the other sets can be read.

    Raises:
        ValueError: as `requests`.
    """
    for name in options.others:
        requests(Path(name).expanduser())


def repeats(rows: Sequence[Row], options: DataSet) -> list[Repeat | None]:
    """For each row what it repeats, by its instruction alone or together with its input.

    Raises:
        ValueError: as `requests`.
    """
    if not options.others:
        return [None] * len(rows)
    texts = [text for name in options.others for text in requests(Path(name).expanduser())]
    pool = NoveltyPool(list(dict.fromkeys(texts)))
    pairs = [
        (row["instruction"], Example(row["instruction"], row["input"], row["output"]).context)
        for row in rows
    ]
    ours = list(dict.fromkeys(text for pair in pairs for text in pair))
    found = {
        text: Repeat(*next(iter(near.most_similar.items())))
        for text, near in zip(ours, pool.compare_all(ours), strict=True)
        if not pool.is_novel(text, near, options.max_similarity)
    }
    return [found.get(alone) or found.get(whole) for alone, whole in pairs]


def requests(path: Path) -> list[str]:
    """What each row of a set asks for: its `instruction`, or the user's first turn of `messages`.

    Args:
        path: `.jsonl`, `.json` (a list of objects) or `.parquet`.

    Raises:
        ValueError: there is no such file, or `file:row` has neither.
    """
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: expected a file {', '.join(_READERS)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; dataset.others expects {', '.join(_READERS)}")
    texts = [
        _request(row, f"{path}: row {number}")
        for number, row in enumerate(_READERS[path.suffix](path), start=1)
    ]
    if not texts:
        raise ValueError(f"{path}: no rows; expected rows with one of {_FIELDS}")
    return texts


def _request(row: Any, where: str) -> str:
    fields = row if isinstance(row, dict) else {}
    if isinstance(fields.get("instruction"), str):
        return fields["instruction"]
    turns = fields.get("messages")
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and turn.get("role") == "user":
            content = turn.get("content")
            if isinstance(content, str):
                return content
    raise ValueError(
        f"{where}: expected a string 'instruction', or 'messages' with a turn of the user's; "
        f"it has {list(fields)}"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _lines(path: Path) -> Iterator[Row]:
    yield from records.parse_lines(_text(path).split("\n"), path)


def _list(path: Path) -> Iterator[Any]:
    try:
        rows = json.loads(_text(path))
        json.dumps(rows, ensure_ascii=False).encode()  # refuses halves of characters, "\\ud800"
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of objects")
    yield from rows


def _table(path: Path) -> Iterator[Row]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in _FIELDS if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not a parquet file that can be read ({one_line(error)})"
        ) from None


_READERS = {".jsonl": _lines, ".json": _list, ".parquet": _table}
