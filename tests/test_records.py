"""JSONL files after a crash: torn ends, resuming, atomic replacement."""

from pathlib import Path
from typing import Any

import pytest

from refine_af import records


def test_rows_read_back_as_they_were_appended(tmp_path: Path) -> None:
    """Line breaks of every kind, emoji and fractions survive; folders are made."""
    rows = [{"batch": 0, "text": "a\nb\r\u2028\x85\U0001f600"}, {"batch": 1, "score": 0.7}]
    path = tmp_path / "new" / "rows.jsonl"
    for row in rows:
        records.append_rows(path, [row])
    assert records.read_rows(path) == rows
    assert path.read_bytes().count(b"\n") == 2


def test_a_missing_file_has_no_rows_and_appending_nothing_makes_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    records.append_rows(path, [])
    assert records.read_rows(path) == []
    assert not path.exists()


@pytest.mark.parametrize(
    "torn", [b'{"batch": 1', b'{"batch": 1}', b'{"text": "\xe2\x82', b"\xff"], ids=repr
)
def test_a_last_line_without_its_newline_is_ignored_and_cut(torn: bytes, tmp_path: Path) -> None:
    """Even one that looks whole: its row may have been meant to go on."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"batch": 0}\n' + torn)
    assert records.read_rows(path) == [{"batch": 0}]
    records.cut(path)
    assert path.read_bytes() == b'{"batch": 0}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"batch": ', r"rows\.jsonl:2: not valid JSON \("),
        ("[1]", r"rows\.jsonl:2: expected a JSON object$"),
        ("null", r"rows\.jsonl:2: expected a JSON object$"),
    ],
)
def test_a_bad_line_in_the_middle_is_an_error_with_its_number(
    line: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"batch": 0}\n' + line + '\n{"batch": 1}\n')
    with pytest.raises(ValueError, match=message):
        records.read_rows(path)


def test_a_blank_line_is_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"batch": 0}\n\n{"batch": 1}\n')
    assert records.read_rows(path) == [{"batch": 0}, {"batch": 1}]
    path.write_text('{"batch": 0}\n \nx\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: "):
        records.read_rows(path)


@pytest.mark.parametrize(
    ("row", "fault"),
    [('{"text": 1}', "must be a string"), ('{"a": 1}', r"is missing; the row has \['a'\]")],
)
def test_a_row_without_a_string_that_it_must_have_is_refused(row: str, fault: str) -> None:
    lines = ['{"text": "good"}', row]
    with pytest.raises(ValueError, match=rf"^rows\.jsonl:2: 'text' {fault}$"):
        records.parse_lines(lines, Path("rows.jsonl"), strings=["text"])
    assert records.parse_lines(lines[:1], Path("rows.jsonl"), strings=["text"])


NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_measurement_that_is_not_finite_becomes_null(value: float) -> None:
    """JSON has no NaN; a metric of a diverged step must not end the run that reports it."""
    assert records.to_line({"kl": value, "step": 3, "ok": True}) == (
        '{"kl": null, "step": 3, "ok": true}\n'
    )


@pytest.mark.parametrize("value", NOT_FINITE)
def test_one_deeper_down_is_refused_before_anything_is_written(
    value: float, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="Out of range float"):
        records.append_rows(path, [{"batch": 0}, {"batch": 1, "scores": [value]}])
    assert not path.exists()


# Resuming


def batches(*numbers: int) -> list[dict[str, Any]]:
    return [{"batch": number, "row": row} for row, number in enumerate(numbers)]


def write_all(folder: Path, *tables: list[dict[str, Any]]) -> list[Path]:
    paths = [folder / f"{i}.jsonl" for i in range(len(tables))]
    for path, rows in zip(paths, tables, strict=True):
        records.append_rows(path, rows)
    return paths


def test_resume_drops_the_newest_batch_from_every_file(tmp_path: Path) -> None:
    """The newest batch counts over all files; the second file is torn, the third was never made."""
    paths = write_all(tmp_path, batches(0, 0, 1, 2, 2), batches(0, 1), [])
    with paths[1].open("a") as file:
        file.write('{"batch": 2, "ro')
    first, kept = records.resume(paths)
    assert first == 2
    assert kept == [batches(0, 0, 1), batches(0, 1), []]
    assert [records.read_rows(path) for path in paths] == kept
    assert paths[1].read_bytes().endswith(b"}\n")
    assert not paths[2].exists()


@pytest.mark.parametrize("rows", [[], batches(0, 0)])
def test_resume_starts_with_batch_zero_when_nothing_is_complete(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert records.resume(write_all(tmp_path, rows)) == (0, [[]])


def test_making_the_dropped_batch_again_gives_the_same_file(tmp_path: Path) -> None:
    """Killed anywhere inside a batch, at any byte, and resumed: byte-equal to never killed."""
    (whole,) = write_all(tmp_path, batches(0, 0, 1, 1, 2))
    expected, path = whole.read_bytes(), tmp_path / "killed.jsonl"
    for size in range(len(expected)):
        path.write_bytes(expected[:size])
        first, _ = records.resume([path])
        records.append_rows(path, [row for row in batches(0, 0, 1, 1, 2) if row["batch"] >= first])
        assert path.read_bytes() == expected


def test_cut_uses_the_key_that_it_is_given(tmp_path: Path) -> None:
    rows = [{"step": 10}, {"step": 20}, {"step": 30}]
    (path,) = write_all(tmp_path, rows)
    records.cut(path, 20, "step")
    assert records.read_rows(path) == [{"step": 10}]


# Replacing


def test_write_text_leaves_the_old_file_when_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash before the new content is safely on disk: readers never see a part of it."""
    path = tmp_path / "report.txt"
    records.write_text(path, "old")

    def crash(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        records.write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    records.write_text(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.txt", "new")]


def test_cut_does_not_touch_a_file_that_is_right(tmp_path: Path) -> None:
    (path,) = write_all(tmp_path, batches(0, 1))
    before = path.stat()
    records.cut(path)
    records.cut(path, 2)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
