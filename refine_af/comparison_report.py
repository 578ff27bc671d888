"""A comparison of runs for readers: Markdown, a self-contained HTML page, a part of a report."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from refine_af import comparison, plots
from refine_af.comparison import Run
from refine_af.pages import environment
from refine_af.records import write_bytes, write_text

JSON, MARKDOWN, PAGE = "comparison.json", "comparison.md", "report.html"
PLOT = "gains.png"


def write_comparison(runs: Sequence[Run], directory: Path, seed: int = 0) -> dict[str, Any]:
    """Compare runs; write `comparison.json` and `.md`, `report.html` and `gains.png`.

    Returns:
        What `comparison.compare` does.

    Raises:
        ValueError: the runs cannot be compared.
    """
    found = comparison.compare(runs, seed)
    write_text(directory / JSON, comparison.to_json(found))
    write_text(directory / MARKDOWN, to_markdown(found))
    page = environment().get_template("comparison.html.j2").render(comparison=section(found))
    write_text(directory / PAGE, page)
    image = plots.png(plots.FULL_WIDTH, 300)(plots.draw_gains)(_panels(found))
    write_bytes(directory / PLOT, image)
    return found


def section(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `comparison_section.html.j2` shows of a comparison."""
    return {
        **found,
        "by_name": {run["name"]: run for run in found["runs"]},
        "method_text": method(found),
        "figure": Markup(plots.gains(_panels(found))),
    }


def _panels(found: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, comparison.Interval]]]:
    """What the figure shows: gains of the last run against each of the others."""
    last = found["runs"][-1]["name"]
    return {
        f"{last} against {pair['first']}": {
            name: (row["gain"], row["gain_interval"]) for name, row in pair["tasks"].items()
        }
        for pair in found["pairs"]
        if pair["second"] == last
    }


def method(found: Mapping[str, Any]) -> str:
    """How the intervals were made."""
    how = found["method"]
    return (
        "A task is won when its ROUGE-L is higher, to four decimals. Gains are paired: the same "
        f"tasks and instances in both runs. Intervals are {how['confidence']:.0%} percentile "
        f"bootstraps of the mean (scipy.stats.bootstrap, {how['num_resamples']:,} resamples, seed "
        f"{how['seed']}): over all, tasks are drawn again; in a category and in a task, instances "
        "are. Over all each task counts once."
    )


def summary(pair: Mapping[str, Any]) -> str:
    """One pair in a line."""
    share = _with_interval(f"{pair['share_improved']:.2f}%", pair["share_improved_interval"])
    gain = _with_interval(f"{pair['gain']:+.2f}", pair["gain_interval"], "+")
    return (
        f"{pair['second']} against {pair['first']}: won {pair['won']}, tied {pair['tied']}, lost "
        f"{pair['lost']} of {pair['num_tasks']} tasks; improved {share}; ROUGE-L {gain}"
    )


def to_markdown(found: Mapping[str, Any]) -> str:
    """The whole comparison as Markdown."""
    runs = [
        (run["name"], run["all"]["instances"], *_fixed(run["all"], "exact_match", "rougeL"))
        for run in found["runs"]
    ]
    pairs = [
        (
            f"{pair['second']} against {pair['first']}",
            *(pair[key] for key in ("won", "tied", "lost")),
            _with_interval(f"{pair['share_improved']:.2f}%", pair["share_improved_interval"]),
            _with_interval(f"{pair['gain']:+.2f}", pair["gain_interval"], "+"),
        )
        for pair in found["pairs"]
    ]
    parts = [
        "# Comparison of runs\n",
        table(("Run", "Instances", "Exact match", "ROUGE-L"), runs),
        table(("Runs", "Won", "Tied", "Lost", "Tasks improved", "Gain in ROUGE-L"), pairs),
        method(found) + "\n",
    ]
    for pair in found["pairs"]:
        parts += [
            f"## {_cell(pair['second'])} against {_cell(pair['first'])}\n",
            _of_categories(found, pair),
            _of_tasks(found, pair),
        ]
    return "\n".join(parts)


def _of_categories(found: Mapping[str, Any], pair: Mapping[str, Any]) -> str:
    first, second = _two(found, pair)
    head = ("Category", "Tasks", "Won", "Tied", "Lost", pair["first"], pair["second"], "Gain")
    rows = [
        (
            name,
            *(row[key] for key in ("num_tasks", "won", "tied", "lost")),
            *_fixed(first["categories"][name], "rougeL"),
            *_fixed(second["categories"][name], "rougeL"),
            _with_interval(f"{row['gain']:+.2f}", row["gain_interval"], "+"),
        )
        for name, row in pair["categories"].items()
    ]
    return table(head, rows)


def _of_tasks(found: Mapping[str, Any], pair: Mapping[str, Any]) -> str:
    first, second = _two(found, pair)
    rows = [
        (
            name,
            row["outcome"],
            *_fixed(first["tasks"][name], "rougeL"),
            *_fixed(second["tasks"][name], "rougeL"),
            _with_interval(f"{row['gain']:+.2f}", row["gain_interval"], "+"),
        )
        for name, row in pair["tasks"].items()
    ]
    return table(("Task", "Outcome", pair["first"], pair["second"], "Gain"), rows)


def _two(found: Mapping[str, Any], pair: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Both runs of a pair."""
    by_name = {run["name"]: run for run in found["runs"]}
    return [by_name[pair["first"]], by_name[pair["second"]]]


def _fixed(row: Mapping[str, float], *keys: str) -> list[str]:
    return [f"{row[key]:.2f}" for key in keys]


def _with_interval(value: str, ends: comparison.Interval, sign: str = "") -> str:
    return value if ends is None else f"{value} ({ends[0]:{sign}.2f} to {ends[1]:{sign}.2f})"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(value: Any) -> str:
    """Text that cannot end its cell or mean something in Markdown."""
    text = " ".join(str(value).split())
    return text if re.fullmatch(r"-+:?", text) else re.sub(r"([\\`*\[\]<>|&#])", r"\\\1", text)
