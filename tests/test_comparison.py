"""Runs side by side: outcomes, gains and intervals by hand; as JSON, Markdown and HTML."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from programs import Program, refused
from test_report import Page

from refine_af import comparison, comparison_report, plots
from refine_af.comparison import Run

HOSTILE = "<script>alert(1)</script>|`*x*"
# ROUGE-L of single instances, by task; `sums` and `products` are of one category.
BEFORE = {"sums": [10.0, 20.0, 30.0], "products": [50.0, 50.0], "rhymes": [40.0, 60.0]}
AFTER = {"sums": [20.0, 30.0, 40.0], "products": [50.0, 50.0], "rhymes": [0.0, 60.0]}
CATEGORIES = {"sums": "Maths", "products": "Maths", "rhymes": "Verse"}


def mean(values: list[float]) -> dict[str, Any]:
    total = round(sum(values) / len(values), 4)
    return {"instances": len(values), "exact_match": 0.0, "rougeL": total}


def arm_of(values: dict[str, list[float]], categories: dict[str, str]) -> dict[str, Any]:
    members: dict[str, list[float]] = {}
    for name, found in values.items():
        members.setdefault(categories[name], []).extend(found)
    return {
        "tasks": {n: {"category": categories[n], **mean(found)} for n, found in values.items()},
        "categories": {name: mean(found) for name, found in members.items()},
        "all": mean([x for found in values.values() for x in found]),
    }


def singles(values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {n: {f"{n}-{i}": x for i, x in enumerate(found)} for n, found in values.items()}


def run(name: str, values: dict[str, list[float]]) -> Run:
    return Run(name, f"{name}.json", arm_of(values, CATEGORIES), singles(values))


def write_run(folder: Path, **arms: dict[str, list[float]]) -> Path:
    folder.mkdir()
    content = {
        "arms": {arm: arm_of(values, CATEGORIES) for arm, values in arms.items()},
        "instances": {arm: singles(values) for arm, values in arms.items()},
    }
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def pair_of(*runs: Run) -> dict[str, Any]:
    (pair,) = comparison.compare(runs)["pairs"]
    return pair


# The numbers


def test_outcomes_by_hand() -> None:
    """Two of three won would be 66.6667."""
    first = {"a": 1.0, "b": 2.0, "c": 3.0}
    found = comparison.outcomes(first, {"a": 1.0001, "b": 2.0, "c": 0.0})
    assert found == {"won": 1, "tied": 1, "lost": 1, "share_improved": 33.3333}


def test_interval_of_few_values_by_hand() -> None:
    """A mean of two draws of 0 and 100 is 0 or 100 a quarter of the time each: both ends."""
    assert comparison.interval([0.0, 100.0], seed=0) == (0.0, 100.0)
    assert comparison.interval([2.5] * 7, seed=0) == (2.5, 2.5)
    assert comparison.interval([2.5], seed=0) is None
    assert comparison.interval([], seed=0) is None


def test_interval_of_a_coin_by_hand() -> None:
    """Half of 16 are 100: draws have a binomial of 16, whose 2.5 and 97.5% quantiles are 4, 12."""
    for seed in range(3):
        assert comparison.interval([0.0, 100.0] * 8, seed) == (25.0, 75.0)


def test_interval_is_decided_by_its_seed_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by how many of its draws are in memory at a time."""
    values = [float(i * i % 17) for i in range(40)]
    first = comparison.interval(values, seed=1)
    assert comparison.interval(values, seed=1) == first
    assert comparison.interval(values, seed=2) != first
    monkeypatch.setattr(comparison, "_MOST_DRAWN", 1000)
    assert comparison.interval(values, seed=1) == first


def test_pair_by_hand() -> None:
    """Gains are 10, 0 and -20: their mean is -10/3; of Maths 10, 10, 10, 0, 0."""
    pair = pair_of(run("old", BEFORE), run("new", AFTER))
    assert {key: pair[key] for key in ("first", "second", "num_tasks", "won", "tied", "lost")} == {
        "first": "old", "second": "new", "num_tasks": 3, "won": 1, "tied": 1, "lost": 1
    }  # fmt: skip
    assert (pair["share_improved"], pair["gain"]) == (33.3333, -3.3333)
    # Of 27 equal draws of three tasks one has all won, one all lost: 3.7%, beyond either end.
    assert pair["share_improved_interval"] == (0.0, 100.0)
    assert pair["gain_interval"] == (-20.0, 10.0)
    assert pair["tasks"] == {
        "products": {"outcome": "tied", "gain": 0.0, "gain_interval": (0.0, 0.0)},
        "rhymes": {"outcome": "lost", "gain": -20.0, "gain_interval": (-40.0, 0.0)},
        "sums": {"outcome": "won", "gain": 10.0, "gain_interval": (10.0, 10.0)},
    }
    maths, verse = pair["categories"]["Maths"], pair["categories"]["Verse"]
    assert (maths["num_tasks"], maths["won"], maths["tied"], maths["lost"]) == (2, 1, 1, 0)
    assert (maths["share_improved"], maths["gain"]) == (50.0, 6.0)
    low, high = maths["gain_interval"]
    assert (low, high) == (2.0, 10.0)  # binomial of 5 with 3/5: quantiles 1 and 5
    assert (verse["lost"], verse["gain"], verse["gain_interval"]) == (1, -20.0, (-40.0, 0.0))


def test_every_interval_has_the_seed_and_its_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "interval", lambda values, seed: (seed, list(values)))
    (pair,) = comparison.compare([run("old", BEFORE), run("new", AFTER)], seed=3)["pairs"]
    assert pair["share_improved_interval"] == (3, [0.0, 0.0, 100.0])  # products, rhymes, sums
    assert pair["gain_interval"] == (3, [0.0, -20.0, 10.0])
    assert pair["categories"]["Maths"]["gain_interval"] == (3, [0.0, 0.0, 10.0, 10.0, 10.0])
    assert pair["tasks"]["rhymes"]["gain_interval"] == (3, [-40.0, 0.0])


def test_gains_are_paired() -> None:
    """Instances differ by 80 and more from each other, and by 1 between the runs."""
    first, second = [0.0, 90.0, 5.0], [1.0, 91.0, 6.0]
    pair = pair_of(run("a", {"sums": first}), run("b", {"sums": second}))
    assert pair["tasks"]["sums"]["gain_interval"] == (1.0, 1.0)
    turned = run("b", {"sums": second})
    backwards = dict(reversed(turned.instances["sums"].items()))
    turned = Run("b", turned.where, turned.scores, {"sums": backwards})
    assert pair_of(run("a", {"sums": first}), turned) == pair, "by id, not by place"


def test_every_run_is_held_against_those_before_it() -> None:
    runs = [run(name, BEFORE) for name in ("a", "b", "c")]
    found = comparison.compare(runs, seed=3)
    assert [(p["first"], p["second"]) for p in found["pairs"]] == [
        ("a", "b"), ("a", "c"), ("b", "c")
    ]  # fmt: skip
    assert [r["name"] for r in found["runs"]] == ["a", "b", "c"]
    assert found["runs"][0]["all"] == arm_of(BEFORE, CATEGORIES)["all"]
    assert found["method"]["seed"] == 3
    assert json.loads(comparison.to_json(found))["pairs"][2]["tied"] == 3


def test_without_scores_of_instances_the_tasks_still_count() -> None:
    """As of a file by an earlier version; a part of a category would mislead."""
    bare = Run("new", "new.json", arm_of(AFTER, CATEGORIES), {"sums": singles(AFTER)["sums"]})
    pair = pair_of(run("old", BEFORE), bare)
    assert pair["gain_interval"] == (-20.0, 10.0)
    assert pair["tasks"]["rhymes"]["gain_interval"] is None
    assert pair["tasks"]["sums"]["gain_interval"] == (10.0, 10.0)
    assert pair["categories"]["Maths"]["gain_interval"] is None


# What cannot be compared


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"sums": [1.0]}, r"only one has scores of the task 'products'"),
        ({**BEFORE, "sums": [1.0]}, r"sums has 3 of 'Maths' and 1 of 'Maths' instances, expected"),
    ],
)
def test_runs_of_different_tasks(other: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comparison.compare([run("old", BEFORE), run("new", other)])


def test_runs_of_different_instances() -> None:
    new = run("new", BEFORE)
    moved = {**new.instances, "sums": {"x": 1.0, "sums-1": 1.0, "sums-2": 1.0}}
    with pytest.raises(ValueError, match=r"only one has scores of the instance 'sums-0'"):
        comparison.compare([run("old", BEFORE), Run("new", "new.json", new.scores, moved)])


def test_one_run_and_runs_of_one_name() -> None:
    with pytest.raises(ValueError, match=r"^1 run to compare, expected at least two$"):
        comparison.compare([run("a", BEFORE)])
    with pytest.raises(ValueError, match=r"\['a', 'a'\], expected a different NAME= for each"):
        comparison.compare([run("a", BEFORE), run("a", AFTER)])


# Runs of directories


def test_a_run_is_named_by_directory_arm_and_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a:b", base=BEFORE, refine_af=AFTER)
    assert comparison.open_run(str(folder)).scores["all"] == arm_of(AFTER, CATEGORIES)["all"]
    base = comparison.open_run(f"{folder}:base")
    assert (base.name, base.scores["all"]["rougeL"]) == (f"{folder}:base", 37.1429)
    odd = write_run(tmp_path / "a=b", base=BEFORE)
    assert comparison.open_run(str(odd)).name == str(odd)
    plain = write_run(tmp_path / "plain", anything=BEFORE)
    assert comparison.open_run(f"mine={plain}").name == "mine"
    assert comparison.open_run(f"mine={plain}:anything").instances == singles(BEFORE)


def test_several_seeds_stand_for_one_run_by_their_means(tmp_path: Path) -> None:
    plus = write_run(tmp_path / "a+b", base=BEFORE)
    assert comparison.open_run(f"{plus}:base").scores["all"] == arm_of(BEFORE, CATEGORIES)["all"]
    one = write_run(tmp_path / "one", base=BEFORE)
    two = write_run(tmp_path / "two", base=AFTER, refine_af=BEFORE)
    found = comparison.open_run(f"seeds={one}:base+{two}:base")
    middle = {"sums": [15.0, 25.0, 35.0], "products": [50.0, 50.0], "rhymes": [20.0, 60.0]}
    assert (found.name, found.instances) == ("seeds", singles(middle))
    assert found.scores == arm_of(middle, CATEGORIES)
    assert found.where == f"{one / 'evaluation.json'}, {two / 'evaluation.json'}"
    assert comparison.open_run(f"{one}+{two}:base").name == f"{one}+{two}:base"
    assert comparison.open_run(f"{two}:base+{one}").instances == singles(middle)
    other = write_run(tmp_path / "other", base={"sums": BEFORE["sums"]})
    with pytest.raises(ValueError, match=r"only one has scores of the task 'products'"):
        comparison.open_run(f"{one}+{other}")
    with pytest.raises(ValueError, match=r"evaluation.json: 'base model' and 'REFINE-AF', expect"):
        comparison.open_run(f"{one}+{two}")
    with pytest.raises(ValueError, match=r"evaluation.json: twice in a mean, expected different"):
        comparison.open_run(f"{one}+{one}")
    with pytest.raises(ValueError, match=r"^evaluation.json: no such file; expected"):
        comparison.open_run(f"{one}+")


def test_what_is_no_run(tmp_path: Path) -> None:
    missing = f"{tmp_path / 'evaluation.json'}: no such file; expected [NAME=]DIR[:ARM][+DIR"
    with pytest.raises(ValueError, match=re.escape(missing)):
        comparison.open_run(str(tmp_path))
    folder = write_run(tmp_path / "a", x=BEFORE, y=AFTER)
    message = f"{folder / 'evaluation.json'}: has the arms ['x', 'y']; expected DIR:ARM with one"
    for text in (str(folder), f"{folder}:z"):
        with pytest.raises(ValueError, match=re.escape(message)):
            comparison.open_run(text)


@pytest.mark.parametrize(
    "damage",
    [
        {"arms": 3},
        {"arms": {"a": {}}},
        {"arms": {"a": arm_of(BEFORE, CATEGORIES) | {"categories": {}}}},
        {"arms": {"a": arm_of(BEFORE, CATEGORIES) | {"tasks": {}}}},
        {"arms": {"a": arm_of(BEFORE, CATEGORIES) | {"all": mean([float("nan")])}}},
        {"arms": {"a": arm_of({**BEFORE, "sums": [1e308]}, CATEGORIES)}},
        {"arms": {"a": arm_of(BEFORE, CATEGORIES)}, "instances": {"a": {"sums": {"x": "1"}}}},
        {"arms": {"a": arm_of(BEFORE, CATEGORIES)}, "instances": {"a": {"other": {}}}},
        {"arms": {"a": arm_of(BEFORE, CATEGORIES)}, "instances": [1]},
    ],
)
def test_a_damaged_file_is_named(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(damage))
    with pytest.raises(ValueError, match=re.escape(f"{path}: not as the stage writes it (")):
        comparison.open_run(str(tmp_path))


# For readers


def test_markdown_is_exact() -> None:
    found = comparison.compare([run("old", BEFORE), run("new|er", AFTER)])
    text = comparison_report.to_markdown(found)
    for line in [
        "| new\\|er | 7 | 0.00 | 35.71 |",
        "| new\\|er against old | 1 | 1 | 1 | 33.33% (0.00 to 100.00) | -3.33 (-20.00 to +10.00) |",
        "## new\\|er against old",
        "| Maths | 2 | 1 | 1 | 0 | 32.00 | 38.00 | +6.00 (+2.00 to +10.00) |",
        "| rhymes | lost | 50.00 | 30.00 | -20.00 (-40.00 to +0.00) |",
    ]:
        assert line in text.splitlines()
    assert "9,999 resamples, seed 0" in text


def test_a_page_of_its_own(tmp_path: Path) -> None:
    runs = [run("old", BEFORE), run(HOSTILE, AFTER), run("last", AFTER)]
    comparison_report.write_comparison(runs, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("svg") == 1
    assert HOSTILE in page.text
    assert "last against old 1 1 1 33.3% 0.0 to 100.0 \N{MINUS SIGN}3.33" in page.text
    assert "Maths 2 0 2 0 38.0 38.0 +0.00 +0.00 to +0.00" in page.text
    assert "rhymes lost 50.0 30.0 \N{MINUS SIGN}20.00" in page.text
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', html)) <= set(ids)
    assert not re.findall(r'(?:src|href|srcset)="(?!#)', html)
    assert set(re.findall(r'(\S*)="https?:', html)) <= {"xmlns", "xmlns:xlink"}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    comparison_report.write_comparison(runs, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(before) == 4
    assert before[tmp_path / "gains.png"].startswith(b"\x89PNG")


def test_tasks_of_the_figure_are_ordered_by_the_first_gain() -> None:
    found = {"worst": (-1.0, (-2.0, 0.0)), "best": (3.0, None), "same": (0.0, (0.0, 0.0))}
    svg = plots.gains({"b against a": found, "b against c": found})
    places = [svg.index(f">{name}<") for name in ("best", "same", "worst")]
    assert places == sorted(places)
    assert "b against c" in svg
    assert plots.gains({}) == plots.gains({"a": {}}) == ""


# The program


def test_report_compares_runs(program: Program, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", base=BEFORE, refine_af=AFTER)
    output = tmp_path / "out"
    arguments = (f"--compare=old={folder}:base,new={folder}", f"--output={output}")
    code, out, err = program("report", *arguments, "--seed=5")
    line = (
        "new against old: won 1, tied 1, lost 1 of 3 tasks; improved 33.33% (0.00 to 100.00); "
        "ROUGE-L -3.33 (-20.00 to +10.00)"
    )
    assert (code, out.splitlines(), err) == (0, [line, str(output / "report.html")], "")
    found = json.loads((output / "comparison.json").read_text())
    assert found["method"]["seed"] == 5
    assert "seed 5" in (output / "comparison.md").read_text()


def test_report_refuses_what_it_cannot_compare(program: Program, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", base=BEFORE, refine_af=AFTER)
    output, workdir = f"--output={tmp_path / 'out'}", tmp_path / "workdir"
    workdir.mkdir()
    (workdir / "config.json").touch()
    for arguments, message in [
        ((), "give --workdir, or --compare and --output; see --help"),
        ((f"--workdir={folder}", f"--compare={folder}"), "give --workdir, or --compare and --ou"),
        ((f"--compare={folder},{folder}:base",), "--output is required; see --help"),
        ((f"--compare={folder}", output), "1 run to compare, expected at least two"),
        ((f"--compare={folder},{folder}", output), "runs to compare: "),
        ((f"--compare={folder},{tmp_path}/no", output), f"{tmp_path}/no/evaluation.json: no such "),
        (
            (f"--compare={folder},{folder}:base", f"--output={workdir}"),
            f"--output={workdir}: the workdir of a run, whose own report these would replace; ",
        ),
    ]:
        result = program("report", *arguments)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert result.err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()
    assert program("report") == refused("give --workdir, or --compare and --output; see --help")
