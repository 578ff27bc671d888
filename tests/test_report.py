"""The report of a run, on a small workdir made here."""

import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from report_files import (
    DATA_SET_FIGURES,
    FIGURES,
    HOSTILE,
    scores,
    write_json,
    write_statistics,
    write_workdir,
)

from refine_af import plots
from refine_af.records import Row, read_json, read_rows, to_line
from refine_af.report import write_report


class Page(HTMLParser):
    """Tags with their attributes, and the text of a page with its white space collapsed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.chunks: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.chunks).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.chunks.append(data)


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    return write_workdir(tmp_path)


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are there but empty: drawing takes most of the time."""
    monkeypatch.setattr(plots, "_svg_text", lambda *_: "<svg></svg>")


def read(workdir: Path) -> Page:
    return Page(write_report(workdir).read_text(encoding="utf-8"))


def test_all_figures_are_drawn(workdir: Path) -> None:
    html = write_report(workdir).read_text(encoding="utf-8")
    titles = re.findall(r"<figure>\s*<h3>(.*?)</h3>\s*<div class=\"scroll\"><svg", html)
    assert titles == FIGURES


@pytest.mark.usefixtures("sketched")
def test_model_text_is_shown_and_not_run(workdir: Path) -> None:
    page = read(workdir)
    assert "script" not in {tag for tag, _ in page.tags}
    # Once as an instruction, three times as an instance, in an alarm and in a sample.
    assert page.text.count(HOSTILE) == 6


def test_nothing_is_loaded(workdir: Path) -> None:
    html = write_report(workdir).read_text(encoding="utf-8")
    links = [
        value
        for _, attributes in Page(html).tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action")
    ]
    assert links
    assert all(str(link).startswith("#") for link in links)
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    assert set(re.findall(r'(\S*)="https?:', html)) <= {"xmlns", "xmlns:xlink"}


def test_ids_are_unique_and_references_resolve(workdir: Path) -> None:
    html = write_report(workdir).read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', html)) <= set(ids)


@pytest.mark.usefixtures("sketched")
def test_summary_states_the_numbers(workdir: Path) -> None:
    text = read(workdir).text
    assert "tiny wrote 4 new instructions that passed every filter, out of 8 proposed." in text
    assert "practised writing answers for 4 PPO steps" in text
    assert "went from \N{MINUS SIGN}0.5 to 0.75" in text
    assert "wrote 3 input and output pairs for 2 of the instructions" in text
    assert "over 3 unseen tasks moved from 15.0 to 20.0" in text
    assert "higher on 1 of them, lower on 1, equal on 1." in text
    assert "The stages took 3 min 20 s in all." in text


@pytest.mark.usefixtures("sketched")
def test_drop_reasons_are_counted_most_frequent_first(workdir: Path) -> None:
    text = read(workdir).text
    similar = text.index("similar too close to an instruction that the pool already has")
    short = text.index("too short fewer words than an instruction needs 1 12% dropped 1")
    assert similar < short
    assert "3 38% dropped 0" in text[similar:short]


@pytest.mark.usefixtures("sketched")
def test_samples_of_every_stage(workdir: Path) -> None:
    text = read(workdir).text
    assert "Name a city. open Write a tale. 0.53" in text
    assert "Answers sampled at step 0" in text
    assert "not usable completion of step 0 \N{MINUS SIGN}1.00" in text
    assert "the end 0.25 1.50 0.50 0.25 0.12 by itself" in text
    assert "the middle" not in text
    assert "Step 2: length drift: Explain" in text
    assert (
        "Write a story. 2 not usable completion of step 1 \N{MINUS SIGN}1.00 4 much later" in text
    )
    assert "a a-0 question 0 answer 0 or <this> base says 0 refine_af says 0" in text
    assert "says 1" not in text
    assert 'ppo.lora.rank = 16 ppo.sampling.stop = ["\\n"]' in text


def test_a_fine_tuning_without_a_finite_loss_is_shown(workdir: Path) -> None:
    path = workdir / "sft" / "metrics.jsonl"
    rows = [{**row, "loss": None} for row in read_rows(path)]
    path.write_text("".join(map(to_line, rows)))
    assert "No training loss was finite" in read(workdir).text


def test_scores_over_all_stand_below_those_of_tasks(workdir: Path) -> None:
    scores = read_json(workdir / "evaluation.json")["arms"]["base"]["all"]
    row = f"All instances {scores['instances']} {scores['rougeL']:.1f} {scores['exact_match']:.1f}"
    assert read(workdir).text.count(row) == 2


def test_data_sets_of_two_arms_stand_side_by_side(workdir: Path) -> None:
    alone = read(workdir)
    assert "The data set What the filters have left" in alone.text
    assert "REFINE-AF rows 2 instructions 2 rows with an input 2" in alone.text
    write_statistics(workdir / "self_instruct", -1.0)
    html = write_report(workdir).read_text(encoding="utf-8")
    text = Page(html).text
    assert "REFINE-AF Self-Instruct rows 2 2 instructions 2 2" in text
    assert "mean reward 0.25 \N{MINUS SIGN}1" in text
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    assert [f"{title}, REFINE-AF" in titles for title in DATA_SET_FIGURES] == [True] * 4
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_equal_workdirs_give_equal_bytes(workdir: Path) -> None:
    first = write_report(workdir).read_bytes()
    assert write_report(workdir).read_bytes() == first
    assert not [path.name for path in workdir.iterdir() if "report.html" in path.name][1:]


def test_empty_workdir_names_every_stage_as_not_run(tmp_path: Path) -> None:
    read(tmp_path)
    page = read(tmp_path)  # once more
    for file in ("instructions.jsonl", "ppo/metrics.jsonl", "instances.jsonl", "sft/metrics.jsonl"):
        assert f"has not run: the workdir holds no {file} ." in page.text
    for file in ("evaluation.json", "timings.json", "config.json"):
        assert f"he workdir holds no {file} ." in page.text
    assert "svg" not in {tag for tag, _ in page.tags}


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"no run: expected its config\.json or files of"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize(
    ("file", "lost"),
    [
        ("instructions.jsonl", 3),
        ("rejected_instructions.jsonl", 0),
        ("ppo/metrics.jsonl", 7),
        ("ppo/rollouts.jsonl", 0),
        ("instances.jsonl", 0),
        ("rejected_instances.jsonl", 0),
        ("dataset/statistics.json", 4),
        ("sft/metrics.jsonl", 1),
        ("evaluation.json", 2),
        ("predictions.jsonl", 0),
        ("timings.json", 1),
        ("config.json", 0),
    ],
)
def test_any_file_may_be_missing(workdir: Path, file: str, lost: int) -> None:
    (workdir / file).unlink()
    tags = [tag for tag, _ in read(workdir).tags]
    assert tags.count("svg") == len(FIGURES) - lost


@pytest.mark.usefixtures("sketched")
def test_evaluation_of_one_arm(workdir: Path) -> None:
    write_json(workdir / "evaluation.json", {"arms": {"base": scores({"a": 12.5})}})
    text = read(workdir).text
    assert "ROUGE-L 12.5 base model" in text
    assert "moved from" not in text


@pytest.mark.usefixtures("sketched")
def test_evaluation_of_three_arms_compares_the_last_with_each(workdir: Path) -> None:
    arms = {name: scores({"a": r}) for name, r in [("refine_af", 3), ("self_instruct", 4)]}
    write_json(workdir / "evaluation.json", {"arms": arms | {"base": scores({"a": 2})}})
    text = read(workdir).text
    assert "REFINE-AF against base model: ROUGE-L is higher on 1 of 1 tasks, lower on 0" in text
    assert "REFINE-AF against Self-Instruct: ROUGE-L is higher on 0 of 1 tasks, lower on 1" in text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(59.94, "59.9 s"), (61.2, "1 min 1 s"), (7500.0, "2 h 05 min")],
)
def test_durations(tmp_path: Path, seconds: float, shown: str) -> None:
    write_json(tmp_path / "timings.json", {"stage": seconds})
    assert f"The stages took {shown} in all." in read(tmp_path).text


def test_no_workdir(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no workdir at .*nowhere: expected the directory"):
        write_report(tmp_path / "nowhere")


@pytest.mark.usefixtures("sketched")
def test_broken_json_names_the_file_and_keeps_the_old_report(workdir: Path) -> None:
    old = write_report(workdir).read_bytes()
    (workdir / "evaluation.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"evaluation\.json: not valid JSON"):
        write_report(workdir)
    assert (workdir / "report.html").read_bytes() == old


@pytest.mark.usefixtures("sketched")
def test_both_arms_are_told_of(workdir: Path) -> None:
    """And the paper's headline: on how many tasks the method is better than Self-Instruct."""
    shutil.copytree(workdir / "sft", workdir / "self_instruct/sft")
    shutil.copy(workdir / "instances.jsonl", workdir / "self_instruct")
    rouge = {"refine_af": (30, 20, 10), "self_instruct": (10, 10, 20), "base": (1, 1, 1)}
    arms = {arm: scores(dict(zip("abc", of, strict=True))) for arm, of in rouge.items()}
    write_json(workdir / "evaluation.json", {"arms": arms})
    text = read(workdir).text
    assert "REFINE-AF: of 4 answers, 3 were accepted" in text
    assert "Self-Instruct: of 3 answers, 3 were accepted" in text
    assert "REFINE-AF: 3 steps" in text and "Self-Instruct: 3 steps" in text
    assert "Against Self-Instruct, which is the same without PPO, it is better on 66.7% of" in text


@pytest.mark.usefixtures("sketched")
def test_the_baseline_alone_has_run(workdir: Path) -> None:
    (workdir / "self_instruct").mkdir()
    for name in ("instances.jsonl", "rejected_instances.jsonl", "sft", "dataset"):
        (workdir / name).rename(workdir / "self_instruct" / name)
    text = read(workdir).text
    assert "has not run" not in text
    assert "The base model wrote 3 input and output pairs" in text


# The figures by themselves


def words_of(svg: str) -> list[str]:
    return [text for node in ET.fromstring(svg).iter() if (text := (node.text or "").strip())]


def test_figure_takes_the_colours_of_the_page() -> None:
    svg = plots.overlap([0.1, 0.65, 0.66])
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert plots.BLUE in svg
    assert "#000000" not in svg
    assert "#ffffff" not in svg


def test_figures_leave_the_settings_of_matplotlib_alone() -> None:
    before = dict(matplotlib.rcParams)
    plots.timings({"stage": 1.0})
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_draw_is_no_figure() -> None:
    rows: list[Row] = [{"step": 0, "reward/mean": float("nan"), "loss": None}]
    for draw in (plots.reward, plots.policy, plots.finetuning_loss):
        assert draw(rows) == ""
    assert plots.reward_components(rows, ["rew"]) == plots.held_out({}) == ""
    assert plots.verbs({}) == plots.evaluation({}) == plots.timings({}) == plots.overlap([]) == ""


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_values_that_are_not_finite_are_left_out(value: float | None) -> None:
    rows: list[Row] = [{"step": s, "reward/mean": s / 4, "reward/std": 0.1} for s in range(4)]
    without = plots.reward([*rows[:2], rows[3]])
    rows[2]["reward/mean"] = value
    assert plots.reward(rows) == without


def test_verbs_are_ranked_and_their_objects_named() -> None:
    words = words_of(plots.verbs({("name", "city"): 1, ("write", "ode"): 5, ("write", "tale"): 9}))
    assert [word for word in words if word in ("name", "write")] == ["write", "name"]
    assert [word for word in words if word in ("ode", "tale", "city")] == ["tale", "ode", "city"]


def test_tasks_are_ordered_by_gain_and_their_names_are_text() -> None:
    before = {"worse": 50.0, "$x^ <b>": 10.0, "same": 5.0}
    after = {"worse": 20.0, "$x^ <b>": 60.0, "same": 5.0}
    words = words_of(plots.evaluation({"before": before, "after": after}))
    assert [word for word in words if word in before] == ["$x^ <b>", "same", "worse"]
    assert words.index("before") < words.index("after")


@pytest.mark.usefixtures("sketched")
def test_held_out_instructions_have_their_own_comparison(workdir: Path) -> None:
    text = read(workdir).text
    assert (
        "3 answers to each of 2 held-out instructions: PPO moved their mean reward by +0.750"
        in text
    )
    assert "interval \N{MINUS SIGN}0.125 to +1.500); it rose on 50% of them" in text
    assert "KL from the starting model (nats per answer) 0 1.5" in text
    (workdir / "ppo/evaluation.json").unlink()
    assert "held-out instructions" not in read(workdir).text


@pytest.mark.usefixtures("sketched")
def test_components_are_those_that_the_oracle_gave(workdir: Path) -> None:
    metrics = workdir / "ppo/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("reward/nat", "reward/brevity"))
    text = read(workdir).text
    assert "Reward Rew Und Coh Brevity End" in text
