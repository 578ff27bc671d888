"""Other sets of the user: every form that is read, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from refine_af import other_sets
from refine_af.config import DataSet

ALPACA = [{"instruction": "Sing.", "input": "", "output": "la"}, {"instruction": "Add 1 and 2."}]
CHAT = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Sing."},
            {"role": "assistant", "content": "la"},
            {"role": "user", "content": "More."},
        ]
    },
    {"messages": [{"role": "user", "content": "Add 1 and 2."}]},
]


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("rows", [ALPACA, CHAT], ids=["alpaca", "chat"])
def test_what_the_rows_ask_for(rows: list[Any], suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"set{suffix}", rows)
    assert other_sets.requests(path) == ["Sing.", "Add 1 and 2."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.csv", b"", r"set\.csv: expected a file \.jsonl, \.json, \.parquet"),
        ("set.jsonl", None, r"set\.jsonl: no such file; dataset\.others expects"),
        ("set.jsonl", b"\n", r"set\.jsonl: no rows"),
        ("set.jsonl", b"{\n", r"set\.jsonl:1: not valid JSON"),
        ("set.jsonl", b"\xff", r"set\.jsonl: not UTF-8"),
        ("set.json", b"{}", r"set\.json: expected a list of objects"),
        ("set.json", b"[", r"set\.json: not valid JSON"),
        ("set.json", b"[1]", r"set\.json: row 1: expected a string 'instruction', or 'messages'"),
        ("set.jsonl", b'{"text": "a"}\n', r"row 1: expected .*; it has \['text'\]"),
        ("set.jsonl", b'{"messages": [{"role": "system", "content": "a"}]}\n', r"row 1: expected"),
        ("set.jsonl", b'{"messages": "a", "instruction": 1}\n', r"row 1: expected"),
        ("set.parquet", b"PAR1", r"set\.parquet: not a parquet file that can be read"),
    ],
)
def test_a_set_that_cannot_be_read_is_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        other_sets.check(DataSet(others=(str(tmp_path / name),)))


def test_exactly_as_similar_as_allowed_is_no_repetition(tmp_path: Path) -> None:
    """Two words of three in common: ROUGE-L F is 2/3."""
    path = write(tmp_path / "set.jsonl", [{"instruction": "Name two colours."}])
    row = {"instruction": "Name three colours.", "input": "", "output": ""}
    at, below = (DataSet(others=(str(path),), max_similarity=x) for x in (2 / 3, 0.66))
    assert other_sets.repeats([row], at) == [None]
    assert other_sets.repeats([row], below) == [("Name two colours.", round(2 / 3, 4))]
    assert other_sets.repeats([row], DataSet()) == [None]
