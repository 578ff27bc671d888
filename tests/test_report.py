"""The report of a run, on a small workdir made here."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import data_sets
import matplotlib
import pytest

from refine_af import dataset, dataset_statistics, plots
from refine_af.records import Row, append_rows
from refine_af.report import write_report

HOSTILE = "Explain <script>alert('x')</script> & \"quotes\" to a child."
DATA_SET_FIGURES = [
    "Verbs and their objects",
    "Overlap with the seed tasks",
    "Lengths",
    "Reward of the rows",
]
FIGURES = [
    "Overlap with the nearest instruction",
    "Length of the instructions",
    "What the instructions ask for",
    "Reward",
    "What the reward is made of",
    "Distance from the starting model",
    "Form of the answers",
    "Size of the policy updates",
    "Value head",
    "Reward of each held-out instruction",
    *DATA_SET_FIGURES,
    "Loss",
    "ROUGE-L on every task",
    "Gain in ROUGE-L on every task",
    "Wall-clock time of the stages",
]
PPO_KEYS = [
    *(f"reward/{key}" for key in ("std", "rew", "nat", "und", "coh", "parsed_share")),
    *(f"kl/{key}" for key in ("k1", "k3", "coef")),
    *(f"length/{key}" for key in ("mean", "eos_rate")),
    *(
        f"ppo/{key}"
        for key in ("clip_fraction", "entropy", "ratio_max", "value_loss", "explained_variance")
    ),
    *(f"time/{key}" for key in ("sample", "score", "update")),
]


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


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def instruction(number: int, text: str) -> Row:
    return {
        "id": f"instruction_{number:05}",
        "instruction": text,
        "is_classification": number == 1,
        "avg_similarity": 0.1,
        "most_similar": {"Write a tale.": 0.5 + number / 100, "Name a town.": 0.2},
        "prompt_ids": ["seed_task_0"],
        "model": "tiny",
        "seed": 0,
        "batch": 0,
    }


def rollout(step: int, output: str | None) -> Row:
    return {
        "step": step,
        "row": 0,
        "instruction": "Write a story.",
        "completion": f"completion of step {step}",
        "input": None if output is None else "",
        "output": output,
        "reward": -1.0 if output is None else 0.25,
        "components": {} if output is None else {"rew": 1.5, "nat": 0.5, "und": 0.25, "coh": 0.125},
        "finish_reason": "length" if output is None else "stop",
    }


def scores(rouge: dict[str, float]) -> dict[str, Any]:
    tasks = {
        name: {"category": "Word Analogy", "instances": 20, "exact_match": 1.0, "rougeL": value}
        for name, value in rouge.items()
    }
    whole = {"instances": 60, "exact_match": 1.0, "rougeL": sum(rouge.values()) / len(rouge)}
    return {"tasks": tasks, "categories": {"Word Analogy": whole}, "all": whole}


def write_statistics(folder: Path, reward: float) -> None:
    """What the report reads of a data set."""
    tasks = [data_sets.instruction(i, HOSTILE) for i in range(2)]
    rows = [data_sets.instance(task, "a", "one two three", reward) for task in tasks]
    rows = dataset.rows_of(data_sets.made_of(rows, tasks))
    (folder / "dataset").mkdir(parents=True)
    write_json(folder / "dataset/statistics.json", dataset_statistics.of_rows(rows, ["Sing."]))


def write_stage_files(path: Path) -> None:
    texts = [HOSTILE, "Write a story.", "Write a poem.", "Name a city."]
    append_rows(path / "instructions.jsonl", [instruction(i, text) for i, text in enumerate(texts)])
    reasons = ["similar", "too_short", "similar", "similar"]
    append_rows(
        path / "rejected_instructions.jsonl",
        [{"instruction": f"dropped {i}", "reason": r, "batch": 0} for i, r in enumerate(reasons)],
    )
    means = [-0.5, -0.25, 0.0, 0.75]
    append_rows(
        path / "ppo/metrics.jsonl",
        [
            {"step": step, "reward/mean": mean} | {key: 0.5 + step / 10 for key in PPO_KEYS}
            for step, mean in enumerate(means)
        ],
    )
    append_rows(
        path / "ppo/rollouts.jsonl",
        [rollout(0, None), rollout(1, "the middle"), rollout(3, "the end")],
    )
    looks = [rollout(1, None), rollout(3, f"much later {HOSTILE}")]
    looks[1]["completion"] = looks[1]["output"]
    append_rows(path / "ppo/samples.jsonl", looks)
    append_rows(path / "ppo/alarms.jsonl", [{"step": 2, "alarm": f"length drift: {HOSTILE}"}])
    before, after = (
        {
            "reward": late - 0.5,
            "kl": 1.5 * late,
            "tokens": 9.0,
            "ended": 1.0,
            "parsed": 0.5,
            "components": {"rew": 1.0 + late},
        }
        for late in (0, 1)
    )
    write_json(
        path / "ppo/evaluation.json",
        {
            "num_instructions": 2,
            "num_samples": 3,
            "before": before,
            "after": after,
            "difference": {"mean": 0.75, "low": -0.125, "high": 1.5, "share_better": 0.5},
            "rewards": {"before": [-1.0, 0.0], "after": [1.0, -0.5]},
            "instructions": ["Write <b>an ode.", "Name a town."],
        },
    )
    pair = {"is_classification": False, "input": "", "output": "one two three", "batch": 0}
    append_rows(
        path / "instances.jsonl",
        [{"id": f"instruction_0000{i}", "instruction": HOSTILE} | pair for i in (0, 0, 1)],
    )
    append_rows(
        path / "rejected_instances.jsonl",
        [{"id": "i", "instruction": "a", "completion": "b", "reason": "unparsable", "batch": 0}],
    )
    write_statistics(path, 0.25)
    losses = [{"step": s, "epoch": s / 2, "loss": 3.0 - s / 2} for s in (1, 2, 3)]
    append_rows(path / "sft/metrics.jsonl", [*losses[:2], losses[2] | {"eval_loss": 1.75}])


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    write_stage_files(tmp_path)
    arms = {
        "refine_af": scores({"a": 30.0, "b": 20.0, "c": 10.0}),
        "base": scores({"a": 10.0, "b": 25.0, "c": 10.0}),
    }
    write_json(tmp_path / "evaluation.json", {"arms": arms})
    append_rows(
        tmp_path / "predictions.jsonl",
        [
            {"arm": arm, "task": "a", "id": f"a-{i}", "prediction": f"{arm} says {i}"}
            for arm in arms
            for i in range(2)
        ],
    )
    write_json(tmp_path / "timings.json", {"train_ppo": 100.0, "evaluate": 100.0})
    config = {"seed": 0, "ppo": {"lora": {"rank": 16}, "sampling": {"stop": ["\n"]}}}
    write_json(tmp_path / "config.json", {"config": config, "hash": "0123abcd"})
    return tmp_path


def read(workdir: Path) -> Page:
    return Page(write_report(workdir).read_text(encoding="utf-8"))


def test_all_figures_are_drawn(workdir: Path) -> None:
    html = write_report(workdir).read_text(encoding="utf-8")
    titles = re.findall(r"<figure>\s*<h3>(.*?)</h3>\s*<div class=\"scroll\"><svg", html)
    assert titles == FIGURES


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


def test_summary_states_the_numbers(workdir: Path) -> None:
    text = read(workdir).text
    assert "tiny wrote 4 new instructions that passed every filter, out of 8 proposed." in text
    assert "practised writing answers for 4 PPO steps" in text
    assert "went from \N{MINUS SIGN}0.5 to 0.75" in text
    assert "wrote 3 input and output pairs for 2 of the instructions" in text
    assert "over 3 unseen tasks moved from 15.0 to 20.0" in text
    assert "higher on 1 of them, lower on 1, equal on 1." in text
    assert "The stages took 3 min 20 s in all." in text


def test_drop_reasons_are_counted_most_frequent_first(workdir: Path) -> None:
    text = read(workdir).text
    similar = text.index("similar too close to an instruction that the pool already has")
    short = text.index("too short fewer words than an instruction needs 1 12% dropped 1")
    assert similar < short
    assert "3 38% dropped 0" in text[similar:short]


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
    assert "a a-0 base says 0 refine_af says 0" in text
    assert "says 1" not in text
    assert 'ppo.lora.rank = 16 ppo.sampling.stop = ["\\n"]' in text


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
    page = read(tmp_path)
    for file in ("instructions.jsonl", "ppo/metrics.jsonl", "instances.jsonl", "sft/metrics.jsonl"):
        assert f"has not run: the workdir holds no {file} ." in page.text
    for file in ("evaluation.json", "timings.json", "config.json"):
        assert f"he workdir holds no {file} ." in page.text
    assert "svg" not in {tag for tag, _ in page.tags}


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


def test_evaluation_of_one_arm(workdir: Path) -> None:
    write_json(workdir / "evaluation.json", {"arms": {"base": scores({"a": 12.5})}})
    text = read(workdir).text
    assert "ROUGE-L 12.5 base model" in text
    assert "moved from" not in text


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


def test_broken_json_names_the_file_and_keeps_the_old_report(workdir: Path) -> None:
    old = write_report(workdir).read_bytes()
    (workdir / "evaluation.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"evaluation\.json: not valid JSON"):
        write_report(workdir)
    assert (workdir / "report.html").read_bytes() == old


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


def test_components_are_those_that_the_oracle_gave(workdir: Path) -> None:
    metrics = workdir / "ppo/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("reward/nat", "reward/brevity"))
    text = read(workdir).text
    assert "Reward Rew Und Coh Brevity End" in text
