"""Every row of every table in docs/experiment.md is printed by one of the commands there."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest

from refine_af import comparison, comparison_report

FOLDER = Path(__file__).resolve().parents[1] / "docs"
SEEDS = "012"
NOT_KEPT = "### The first runs"


def compared(text: str) -> list[str]:
    """What `report --compare` writes, for each comparison that the document asks for."""
    found = []
    for asked in re.findall(r"--compare=(\S+)", text):
        asked = asked.replace("$E", str(FOLDER / "experiment"))
        for runs in {asked.replace("$seed", seed) for seed in SEEDS}:
            opened = [comparison.open_run(run) for run in runs.split(",")]
            found += comparison_report.to_markdown(comparison.compare(opened)).splitlines()
    return found


def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `docs/experiment/tables.py` prints."""
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(FOLDER / "experiment/tables.py"), run_name="__main__")
    return out.getvalue().splitlines()


def test_the_tables_are_those_that_the_commands_print(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those of the first runs, whose files were not kept."""
    text = (FOLDER / "experiment.md").read_text(encoding="utf-8")
    parts = re.split("^(?=##)", text, flags=re.MULTILINE)
    lines = [x for part in parts if not part.startswith(NOT_KEPT) for x in part.splitlines()]
    rows = [line for line in lines if line.startswith("|")]
    tables = printed(monkeypatch)
    known = {*compared(text), *tables}
    assert len(rows) > 40
    assert [row for row in rows if row not in known] == []
    assert [row for row in tables if row and row not in rows] == []
