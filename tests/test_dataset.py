"""The data set: rows and where they came from, forms, filters, the card, statistics, figures."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
import yaml
from data_sets import SEEDS, instance, instruction, made_of, material

from refine_af import dataset, dataset_plots, dataset_statistics, plots, records
from refine_af.dataset import Material

TASKS = [
    instruction(0, "Write a poem about snow."),
    instruction(1, "Decide whether the text is kind."),
    instruction(2, "Name two rivers."),
]
ROWS = [
    instance(TASKS[0], "", "Snow falls \N{EM DASH} ♪\nslowly.", 0.5),
    instance(TASKS[1], "You are great.", "kind", 1.0),
    instance(TASKS[1], "Go away.", "unkind", -0.25),
    instance(TASKS[2], "", "Nile, Rhine", 0.75),
]
LATE = "The train to the city was late again and nobody told us why, so we went home on foot."


def options(made_of: Material, **fields: Any) -> Material:
    section = dataclasses.replace(made_of.config.dataset, **fields)
    return dataclasses.replace(made_of, config=dataclasses.replace(made_of.config, dataset=section))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    dataset.write_dataset(made_of(ROWS, TASKS), tmp_path)
    return tmp_path / "dataset"


def load(folder: Path, name: str | None = None) -> list[dict[str, Any]]:
    found = datasets.load_dataset(str(folder), name, cache_dir=str(folder.parent / "cache"))
    assert list(found) == ["train"]
    return found["train"].to_list()


def test_every_row_says_where_it_came_from(written: Path) -> None:
    first, second, *_ = load(written)
    assert first == {
        "id": "instruction_00000",
        "instruction": "Write a poem about snow.",
        "input": "",
        "output": "Snow falls \N{EM DASH} ♪\nslowly.",
        "is_classification": False,
        "arm": "refine_af",
        "model": "random:tiny",
        "seed": 0,
        "seed_ids": ["seed_1"],
        "generated_ids": [],
        "instruction_prompt": "Come up with a series of tasks:\n"
        "1. Name the capital of a country.\n2.",
        "demo_ids": ["seed_0"],
        "prompt": "Task: Write a poem about snow.\nInput:",
        "avg_similarity": 0.125,
        "max_similarity": 0.5,
        "most_similar": SEEDS[0].instruction,
        "reward": 0.5,
        "reward_rew": 0.5,
    }
    assert (second["seed_ids"], second["generated_ids"]) == (["seed_1"], ["instruction_00000"])
    assert second["instruction_prompt"].endswith(
        "labels in each:\n1. Name the capital of a country.\n2. Write a poem about snow.\n3."
    )


def test_the_forms_hold_the_same_rows(written: Path) -> None:
    rows = load(written)
    triplets = [{name: row[name] for name in ("instruction", "input", "output")} for row in rows]
    assert load(written, "alpaca") == triplets
    for name in ("train", "alpaca", "chat"):
        table = pyarrow.parquet.read_table(written / f"{name}.parquet").to_pylist()
        assert records.read_rows(written / f"{name}.jsonl") == table
        lines = datasets.load_dataset(
            "json", data_files=str(written / f"{name}.jsonl"), cache_dir=str(written.parent)
        )
        assert lines["train"].to_list() == table
    assert [row["messages"] for row in load(written, "chat")][1:3] == [
        [
            {"role": "user", "content": f"Decide whether the text is kind.\n{text}"},
            {"role": "assistant", "content": answer},
        ]
        for text, answer in (("You are great.", "kind"), ("Go away.", "unkind"))
    ]
    assert load(written, "chat")[0]["messages"][0]["content"] == "Write a poem about snow."


def test_rows_without_a_score_have_an_empty_reward(tmp_path: Path) -> None:
    rows = [instance(TASKS[0], "", "Snow.", None)]
    dataset.write_dataset(made_of(rows, TASKS), tmp_path)
    (row,) = load(tmp_path / "dataset")
    assert row["reward"] is None
    assert not [name for name in row if name.startswith("reward_")]
    assert not (tmp_path / "dataset/plots/quality.png").exists()
    assert "quality" not in (tmp_path / "dataset/README.md").read_text()


# Filters


@pytest.mark.parametrize(
    ("fields", "outputs"),
    [
        ({"filter": "reward", "filter_at": 0.75}, ["kind", "Nile, Rhine"]),
        ({"filter": "share", "filter_at": 0.5}, ["kind", "Nile, Rhine"]),
        ({"filter": "share", "filter_at": 0.51}, [ROWS[0]["output"], "kind", "Nile, Rhine"]),
        ({"filter": "share", "filter_at": 0.01}, ["kind"]),
        ({"filter": "share", "filter_at": 1.0}, [row["output"] for row in ROWS]),
    ],
)
def test_low_rewards_go_when_asked(
    fields: dict[str, Any], outputs: list[str], tmp_path: Path
) -> None:
    dataset.write_dataset(options(made_of(ROWS, TASKS), **fields), tmp_path)
    assert [row["output"] for row in dataset.read(tmp_path)] == outputs
    left_out = records.read_rows(tmp_path / dataset.LEFT_OUT)
    assert len(left_out) == len(ROWS) - len(outputs)
    assert {row["reason"] for row in left_out} <= {"low_reward"}
    card = (tmp_path / "dataset/README.md").read_text()
    assert ("| data set | low_reward |" in card) == bool(left_out)


def test_a_share_is_the_number_that_it_says(tmp_path: Path) -> None:
    """.07 of 100 is 7.000000000000001 in floating point."""
    dataset.write_dataset(options(material(100, 0), filter="share", filter_at=0.07), tmp_path)
    assert len(dataset.read(tmp_path)) == 7


def test_of_equal_rewards_a_share_keeps_the_first(tmp_path: Path) -> None:
    rows = [{**row, "reward": 1.0} for row in ROWS]
    dataset.write_dataset(options(made_of(rows, TASKS), filter="share", filter_at=0.5), tmp_path)
    assert [row["output"] for row in dataset.read(tmp_path)] == [r["output"] for r in ROWS[:2]]


def test_what_another_set_asks_for_goes(tmp_path: Path) -> None:
    """By a near-duplicate of the instruction, or of instruction and input together."""
    other = tmp_path / "mine.jsonl"
    records.append_rows(
        other,
        [
            {"instruction": "write a POEM, about snow!", "output": "x"},
            {"messages": [{"role": "user", "content": f"{TASKS[1]['instruction']} {LATE}"}]},
        ],
    )
    rows = [ROWS[0], ROWS[1], instance(TASKS[1], LATE, "unkind"), ROWS[3]]
    dataset.write_dataset(options(made_of(rows, TASKS), others=(str(other),)), tmp_path)
    assert [row["output"] for row in dataset.read(tmp_path)] == ["kind", "Nile, Rhine"]
    left_out = records.read_rows(tmp_path / dataset.LEFT_OUT)
    assert [(row["output"], row["reason"]) for row in left_out] == [
        (ROWS[0]["output"], "in_another_set"),
        ("unkind", "in_another_set"),
    ]
    assert left_out[0]["most_similar"] == "write a POEM, about snow!"
    assert left_out[0]["max_similarity"] == 1.0
    assert "| data set | in_another_set | 2 |" in (tmp_path / "dataset/README.md").read_text()


def test_filters_that_leave_nothing_are_refused_with_their_counts(tmp_path: Path) -> None:
    strict = options(made_of(ROWS, TASKS), filter="reward", filter_at=2.0)
    message = rf"its filters left no row of 4 \({{'low_reward': 4}}\); see {tmp_path}/rejected_rows"
    with pytest.raises(ValueError, match=message):
        dataset.write_dataset(strict, tmp_path)
    assert not dataset.finished(tmp_path)


def test_a_data_set_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no instance was accepted; see the reasons in rejected_"):
        dataset.write_dataset(made_of([], TASKS), tmp_path)
    with pytest.raises(ValueError, match=r"dataset: not finished; run generate_instances first"):
        dataset.read(tmp_path)


def test_rows_that_are_gone_are_named(written: Path) -> None:
    (written / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"train.jsonl: no rows; remove .*dataset and run"):
        dataset.read(written.parent)


# Card, statistics, figures


def test_the_card_has_recipe_counts_drops_and_licence(written: Path, tmp_path: Path) -> None:
    card = (written / dataset.CARD).read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "other"
    assert [(c["config_name"], c["data_files"]) for c in head["configs"]] == [
        ("default", "train.parquet"),
        ("alpaca", "alpaca.parquet"),
        ("chat", "chat.parquet"),
    ]
    assert "4 triplets (instruction, input, output) for 3 instructions" in card
    assert "by PPO from automated feedback" in card
    assert "| instructions | similar | 1,200 |" in card
    assert card.index("| instances | duplicate | 3 |") < card.index("| instances | truncated | 2 |")
    assert "| data set | | 0 |" in card
    assert "| rows with an input | 2 |" in card
    assert "| reward | 0.50 | 0.62 | -0.25 | 1.00 |" in card
    settings = re.search(r"```json\n(.*?)```", card, re.DOTALL)
    assert settings is not None
    assert json.loads(settings[1])["dataset"]["license"] == "other"
    for image in re.findall(r"\]\((plots/\S+)\)", card):
        assert (written / image).read_bytes().startswith(b"\x89PNG")
    licensed = options(made_of(ROWS, TASKS, "self_instruct"), license="cc-by-4.0")
    dataset.write_dataset(licensed, tmp_path / "arm")
    card = (tmp_path / "arm/dataset/README.md").read_text()
    assert "license: cc-by-4.0\n" in card
    assert "by PPO" not in card
    assert "2. The same model, untuned, wrote" in card


def test_statistics_by_hand(written: Path) -> None:
    found = records.read_json(written / dataset.STATISTICS)
    assert found["arm"] == "refine_af"
    assert (found["rows"], found["instructions"], found["rows_with_input"]) == (4, 3, 2)
    assert found["classification_rows"] == 2
    lengths = found["instruction_words"]
    assert (lengths["mean"], lengths["least"], lengths["largest"]) == (4.6667, 3, 6)
    assert sum(lengths["histogram"]["counts"]) == 3
    assert found["input_words"]["mean"] == 2.5
    words = found["instruction_vocabulary"]
    assert (words["words"], words["different_words"]) == (14, 14)
    assert found["verbs"]["num_pairs"] == 3
    # Five words of each in common: "write a poem about" of 5 and 6, "name" of 3 and 6, "the".
    assert found["seed_overlap"]["largest"] == pytest.approx(2 * 4 / 11, abs=1e-4)
    assert found["rewards"]["reward"]["mean"] == 0.5
    assert found["dropped"]["instances"] == {"duplicate": 3, "truncated": 2}


def test_shares_of_outputs_by_hand() -> None:
    pairs = [("a b c", "B, c."), ("", "yes"), ("a", "yes no"), ("x", "yes")]
    rows: list[records.Row] = [{"input": given, "output": output} for given, output in pairs]
    shares = dataset_statistics.shares(rows)
    assert shares == {"one_word": 0.5, "nothing_of_their_own": 0.25, "different": 0.75}


def test_pairs_of_neighbouring_words() -> None:
    assert dataset_statistics.vocabulary(["a b a b", "B a"]) == {
        "words": 6,
        "different_words": 2,
        "different_pairs_share": 0.5,  # ab and ba of ab, ba, ab, ba
    }


def test_verbs_are_ranked_with_their_objects() -> None:
    texts = [
        "Name a city.",
        "Write a poem.",
        "Write a song.",
        "Write a song about rain.",
        "Write!",
        "?",
    ]
    assert dataset_statistics.verbs(texts) == {
        "num_verbs": 2,
        "num_pairs": 4,
        "top": [
            {"verb": "write", "count": 4, "objects": {"song": 2, "poem": 1}},
            {"verb": "name", "count": 1, "objects": {"city": 1}},
        ],
    }


def test_equal_material_gives_equal_files(written: Path, tmp_path: Path) -> None:
    dataset.write_dataset(made_of(ROWS, TASKS), tmp_path / "twin")
    files = [path.relative_to(written) for path in written.rglob("*") if path.is_file()]
    assert len(files) == 12
    assert not [
        f
        for f in files
        if (written / f).read_bytes() != (tmp_path / "twin/dataset" / f).read_bytes()
    ]


def test_figures_of_nothing_are_left_out() -> None:
    statistics = dataset_statistics.of_rows(dataset.rows_of(material(3, 0)), ["Sing."])
    statistics |= {"verbs": dataset_statistics.verbs(["?"]), "rewards": {}, "input_words": {}}
    assert list(dataset_plots.pngs(statistics)) == ["seed_overlap", "lengths"]
    drawn = {plot.title: svg for plot, svg in dataset_plots.svgs(statistics)}
    assert [title for title, svg in drawn.items() if not svg] == [
        "Verbs and their objects",
        "Reward of the rows",
    ]


def test_the_circle_names_verbs_and_objects() -> None:
    texts = ["Write a poem."] * 5 + ["Write a song."] * 3 + ["Name a city."] * 2
    draw = plots.inline_svg(600, 600)(dataset_plots.verb_circle)
    svg = draw({"verbs": dataset_statistics.verbs(texts)})
    assert re.findall(r">([a-z]+)</text>", svg) == ["write", "poem", "song", "name", "city"]
