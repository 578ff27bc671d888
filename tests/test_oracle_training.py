"""Training an oracle: the losses by hand, a toy that is learnt, the program from end to end."""

import functools
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from programs import Program, jsonl, refused

from refine_af import (
    base_model,
    oracle_card,
    oracle_evaluation,
    oracle_examples,
    oracle_training,
    plots,
    records,
    trained_oracle,
)
from refine_af.base_model import BaseModel
from refine_af.config import Lora, Mesh, Model
from refine_af.corruptions import CLEAN, QUALITIES
from refine_af.oracle_evaluation import Pair, Scores
from refine_af.oracle_examples import Answer
from refine_af.oracle_training import OracleOptions
from refine_af.rewards import Example
from refine_af.seeds import Instance, SeedTask

OPTIONS = OracleOptions(
    seed=0,
    num_epochs=40,
    learning_rate=1e-2,
    batch_size=2,
    max_length=64,
    lora=Lora(rank=4, alpha=8.0),
)


@functools.cache
def tiny() -> BaseModel:
    model = Model(source="random:tiny", dtype="float32", param_dtype="float32")
    return base_model.load(model, Mesh(data=8, fsdp=1))


# Losses


def test_bradley_terry_by_hand() -> None:
    """-log sigmoid(log 3) = log 4/3; of equals log 2; the other way round log 4."""
    better = jnp.asarray([math.log(3.0), 1.0, 0.0, 9.0])
    worse = jnp.asarray([0.0, 1.0, math.log(3.0), -9.0])
    each = [math.log(4 / 3), math.log(2), math.log(4)]
    for i, wanted in enumerate(each):
        one = jnp.zeros(4).at[i].set(1.0)
        assert oracle_training.bradley_terry(better, worse, one) == pytest.approx(wanted, rel=1e-6)
    three = jnp.asarray([1.0, 1.0, 1.0, 0.0])
    wanted = sum(each) / 3
    assert oracle_training.bradley_terry(better, worse, three) == pytest.approx(wanted, rel=1e-6)
    assert oracle_training.bradley_terry(better, worse, jnp.zeros(4)) == 0


def test_binary_cross_entropy_by_hand() -> None:
    """p = 3/4: -log 3/4 of a yes, -log 1/4 of a no; what is not known does not count."""
    logits = jnp.asarray([[math.log(3.0), math.log(3.0), 50.0], [0.0, 7.0, -50.0]])
    labels = jnp.asarray([[1.0, 0.0, np.nan], [1.0, np.nan, np.nan]])
    wanted = (math.log(4 / 3) + math.log(4) + math.log(2)) / 3
    found = oracle_training.binary_cross_entropy(logits, labels)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert oracle_training.binary_cross_entropy(logits, jnp.full((2, 3), jnp.nan)) == 0


# Batches


def group(*outputs: str) -> list[Answer]:
    labels = [CLEAN, *[(0.0, None, 1.0)] * (len(outputs) - 1)]
    return [Answer(Example("Do.", "", o), known) for o, known in zip(outputs, labels, strict=True)]


def test_a_batch_holds_each_group_whole_and_points_at_its_last_tokens() -> None:
    groups = [group("good", "bad", "worse"), group("fine", "x" * 9), group("good", "ugly")]
    made = oracle_examples.batches(groups, tiny().tokenizer, tiny().end_id, 2, 64)
    texts = []
    for batch in made:
        assert batch.tokens.shape == (2, 64) == batch.start.shape
        last = batch.tokens[batch.rows, batch.columns]
        for i in range(int(batch.weights.sum())):
            pair = []
            for text in (batch.better[i], batch.worse[i]):
                row, column = batch.rows[text], batch.columns[text]
                assert last[text] == tiny().end_id
                ids = batch.tokens[row, batch.start[row, column] : column + 1]
                wanted = [1, 1, 1] if text == batch.better[i] else [0, np.nan, 1]
                np.testing.assert_array_equal(batch.labels[text], wanted)
                pair.append(tiny().tokenizer.decode(ids[:-1]).removeprefix("Task: Do.\nResponse: "))
            texts.append(tuple(pair))
    wanted = [("good", "bad"), ("good", "worse"), ("fine", "x" * 9), ("good", "ugly")]
    assert sorted(texts) == sorted(wanted)
    assert sum(batch.weights.sum() for batch in made) == 4


def test_packing_changes_no_loss() -> None:
    """Two groups in one row of 128, or each text in a row of its own."""
    groups = [group("good", "bad"), group("fine", "awful", "no")]
    params = oracle_training.new_params(tiny(), OPTIONS)
    definition = tiny().adapted(OPTIONS.lora)
    found = []
    for num_rows, length in ((1, 256), (8, 32)):
        (batch,) = oracle_examples.batches(
            groups, tiny().tokenizer, tiny().end_id, num_rows, length
        )
        loss, parts = oracle_training.losses(definition, tiny().params, params, batch)
        found.append([float(loss), *map(float, parts.values())])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


# Learning


NOUNS = ("cat", "dog", "sun", "sea", "tea", "map", "key", "hat", "jam", "log", "owl", "pen")


def toy() -> tuple[list[list[Answer]], list[Pair]]:
    """The good answer says the word, the bad one says it backwards or another one."""
    groups, pairs = [], []
    for i, noun in enumerate(NOUNS):
        task = f"Say {noun}."
        good = Example(task, "", noun.upper() + "!")
        bad = Example(task, "", NOUNS[i - 1])
        groups.append([Answer(good, CLEAN), Answer(bad, (0.0, 0.0, 0.0))])
        pairs.append(Pair("preferences", "", good, bad))
    return groups, pairs


@pytest.mark.slow
def test_loss_falls_accuracy_rises_and_the_same_seed_gives_the_same_oracle(tmp_path: Path) -> None:
    groups, pairs = toy()
    rows: list[records.Row] = []
    written = []
    for name in ("one", "two"):
        params = oracle_training.train(tiny(), [], groups, OPTIONS, rows.append)
        directory = tmp_path / name
        directory.mkdir()
        trained_oracle.write(params, oracle_training.description(tiny(), OPTIONS), directory)
        written.append(
            [(directory / f).read_bytes() for f in ("adapter.safetensors", "oracle.json")]
        )
    assert written[0] == written[1]
    first, again = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert [r["loss"] for r in first] == [r["loss"] for r in again]
    assert first[0]["rew_loss"] == pytest.approx(math.log(2), rel=0.1)
    assert first[-1]["loss"] < 0.3 * first[0]["loss"]
    assert first[-1]["rew_accuracy"] == 1 == first[-1]["quality_accuracy"]
    scores = oracle_evaluation.score(trained_oracle.load(tmp_path / "one", tiny()), pairs)
    assert oracle_evaluation.find(oracle_evaluation.accuracies(scores), "all")["rew"] == 1
    assert min(scores.better["nat"]) > 0.5 > max(scores.worse["nat"])
    other = OracleOptions(**{**vars(OPTIONS), "seed": 1, "num_epochs": 1})
    oracle_training.train(tiny(), [], groups, other, rows.append)
    assert rows[-1]["loss"] != first[0]["loss"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_epochs", 0, "num_epochs=0: expected at least 1"),
        ("max_length", 8, "max_length=8: expected at least 16"),
        ("learning_rate", 0.0, "learning_rate=0.0: expected > 0"),
        ("seed", -1, "seed=-1: expected at least 0"),
    ],
)
def test_options_that_train_nothing_are_refused(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OracleOptions(**{**vars(OPTIONS), name: value})


# Measuring


def scores_of(values: list[tuple[str, str, float, float]]) -> Scores:
    pairs = [
        Pair(name, severity, Example("do", "", f"good {i}"), Example("do", "", f"bad {i}"))
        for i, (name, severity, _, _) in enumerate(values)
    ]
    better = np.asarray([v[2] for v in values])
    worse = np.asarray([v[3] for v in values])
    names = ("rew", *QUALITIES, "reward")
    return Scores(pairs, dict.fromkeys(names, better), dict.fromkeys(names, worse))


def test_accuracies_by_hand() -> None:
    """A tie is a half; a quality shows only where the corruption lowers it in all its rows."""
    rows = oracle_evaluation.accuracies(
        scores_of(
            [
                ("shuffled", "light", 0.9, 0.1),
                ("shuffled", "heavy", 0.2, 0.3),
                ("shuffled", "heavy", 0.5, 0.5),
                ("mismatched", "heavy", 0.9, 0.2),
            ]
        )
    )
    found = {(r["corruption"], r["severity"]): r for r in rows}
    row = {"corruption": "shuffled", "severity": "heavy", "pairs": 2, "reward": 0.25}
    assert found["shuffled", "heavy"] == row | dict.fromkeys(("rew", *QUALITIES), 0.25)
    assert found["shuffled", "all"]["nat"] == 0.5
    assert found["shuffled", "all"]["coh"] is None  # light ones are not judged
    assert (found["mismatched", "all"]["nat"], found["mismatched", "all"]["coh"]) == (None, 1.0)
    assert (found["all", "all"]["pairs"], found["all", "all"]["rew"]) == (4, 0.625)
    line = "| shuffled    | heavy    |     2 |   25.0 |   25.0 |   25.0 |   25.0 |   25.0 |"
    assert line in oracle_evaluation.table(rows).splitlines()


def test_reliability_by_hand() -> None:
    curves = oracle_evaluation.reliability(
        scores_of([("repeated", "light", 0.95, 0.15), ("repeated", "light", 0.95, 0.17)])
    )
    assert set(curves) == {"rew", "nat", "und", "coh"}
    assert curves["nat"].predicted == pytest.approx([0.16, 0.95])
    assert (curves["nat"].observed, curves["nat"].counts) == ([0.0, 1.0], [2, 2])
    assert curves["und"].observed == [1.0, 1.0]  # what is said twice can be understood
    assert curves["coh"].counts == [2]
    assert curves["rew"].counts == [2] and curves["rew"].observed == [1.0]
    assert plots.calibration(curves) == plots.calibration(curves)


# The program


MEASURE = ("train_oracle", "--num_draws=1", "--dtype=float32")
TRAIN = (*MEASURE, "--model=random:tiny")
SMALL = (*TRAIN, "--num_epochs=1", "--batch_size=8", "--max_length=512", "--lora_rank=2")


def test_the_program_writes_a_whole_oracle_and_measures_it(
    program: Program, tmp_path: Path
) -> None:
    tasks = jsonl(
        tmp_path / "tasks",
        *(
            {
                "id": f"task {i}",
                "instruction": f"Say {noun} in a sentence.",
                "instances": [{"input": "", "output": f"I have a {noun} and it is very nice."}],
                "is_classification": False,
            }
            for i, noun in enumerate(NOUNS)
        ),
    )
    rows = [{"prompt": f"p {i}", "chosen": "yes", "rejected": f"no {i}"} for i in range(10)]
    preferences = jsonl(tmp_path / "preferences", *rows)
    data = (f"--seed_tasks={tasks}", f"--preferences={preferences}")
    output = tmp_path / "oracle"
    result = program(*SMALL, *data, f"--output={output}")
    assert result.code == 0, result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["oracle", "preferences", "tasks"]
    names = ["README.md", "adapter.safetensors", "calibration.png", "metrics.jsonl", "oracle.json"]
    assert sorted(p.name for p in output.iterdir()) == names
    card = (output / oracle_card.CARD).read_text()
    lines = [line for line in result.out.splitlines() if line.startswith("|")]
    assert len(lines) > 5 and all(line in card for line in lines)
    assert any(line.startswith("| preferences") for line in lines)
    assert f"--output={output}" in card and "random:tiny" in card
    assert (output / oracle_card.CALIBRATION).read_bytes().startswith(b"\x89PNG")
    steps = records.read_rows(output / "metrics.jsonl")
    assert [row["step"] for row in steps] == list(range(len(steps)))
    assert json.loads((output / "oracle.json").read_text())["model"] == "random:tiny"

    measured = program(*MEASURE, *data, f"--evaluate={output}")
    assert (measured.code, measured.out.splitlines()) == (0, lines)
    failed = program(*MEASURE, *data, f"--evaluate={output}", "--at_least=1.1")
    assert failed.code == 1
    assert failed.err.endswith(" of all pairs, below --at_least=1.1\n")

    exists = f"{output}: exists; give another --output, or remove it"
    assert program(*SMALL, *data, f"--output={output}") == refused(exists)


def test_an_interrupted_run_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(oracle_training, "train", stop)
    result = program(*SMALL, f"--output={tmp_path / 'oracle'}")
    assert (result.code, list(tmp_path.iterdir())) == (130, [])
    assert result.err == "\nstopped; nothing was written\n"


def test_a_floor_needs_an_oracle_to_measure(program: Program, tmp_path: Path) -> None:
    result = program(*SMALL, "--at_least=0.9", f"--output={tmp_path / 'oracle'}")
    assert result == refused("--at_least: needs --evaluate, the oracle to measure")


def test_a_bad_preference_is_named(program: Program, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows", {"prompt": "p", "chosen": "a"})
    result = program(*SMALL, f"--preferences={file}", f"--output={tmp_path / 'oracle'}")
    assert result == refused(f"{file}:1: 'rejected' is missing; the row has ['prompt', 'chosen']")


def test_preferences_that_teach_nothing_or_tell_a_secret_are_left_out() -> None:
    unseen = [SeedTask("s", "Sing  a song.", (Instance("", "La la."),), False)]
    rows = [
        {"prompt": "Sing a\nsong.", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "La la.", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": " a"},
        {"prompt": "p", "chosen": "a", "rejected": " "},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    sides = oracle_examples.preference_groups(rows, unseen)
    assert [[a.example.output for a in group] for side in sides for group in side] == [["a", "b"]]


def test_what_is_missing_is_named(program: Program, tmp_path: Path) -> None:
    assert program(*SMALL) == refused("--output is required; see --help")
    assert program(*MEASURE, f"--evaluate={tmp_path}").err.startswith(
        f"error: oracle {str(tmp_path)!r}: expected a directory with oracle.json, as train_oracle "
    )
