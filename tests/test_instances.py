"""Stage 3 and the prompt that it shares with stage 2: parsing, filters, batches, scores."""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_af import instances, prompts, records, seeds
from refine_af.configs import tiny
from refine_af.instances import InstanceStage, fault, select
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.prompts import parse_instance
from refine_af.requests import Completion, Request
from refine_af.rewards import Example, Oracle
from refine_af.seeds import Instance, SeedTask

# The prompt


def seed_task(number: int, text: str = "") -> SeedTask:
    pair = Instance(f"in {number}", f"out {number}{text}")
    return SeedTask(f"s{number}", f"Task {number}.", (pair, Instance("never", "shown")), False)


def test_the_prompt_ends_where_the_input_is_to_be_written() -> None:
    text = prompts.instance_prompt("Sing.", [seed_task(1)], 1, np.random.default_rng(0))
    assert text == (
        "Come up with an example for each task: an input, which may be empty, and the output.\n\n"
        "Task: Task 1.\nInput: in 1\nOutput: out 1\n\n"
        "Task: Sing.\nInput:"
    )


def test_demonstrations_are_drawn_without_repetition() -> None:
    shown = [seed_task(i) for i in range(4)]
    rng = np.random.default_rng(0)
    texts = [prompts.instance_prompt("Sing.", shown, 3, rng) for _ in range(8)]
    assert len(set(texts)) > 2
    for text in texts:
        drawn = [line for line in text.split("\n") if line.startswith("Task: Task")]
        assert len(set(drawn)) == 3
    assert prompts.instance_prompt("Sing.", shown, 0, rng) == prompts.HEADER + "Task: Sing.\nInput:"


def test_only_short_seeds_are_shown() -> None:
    options = dataclasses.replace(tiny.get_config().prompts, num_demos=2, max_demo_chars=16)
    short = [seed_task(1), seed_task(2)]
    assert len("Task 1." + "in 1" + "out 1") == 16
    assert prompts.demos([*short, seed_task(3, "!")], options) == short
    message = r"max_demo_chars=16: only 1 seed tasks are that short, prompts.num_demos=2 are needed"
    with pytest.raises(ValueError, match=message):
        prompts.demos([short[0], seed_task(3, "!")], options)


# Parsing


@pytest.mark.parametrize(
    ("completion", "pair"),
    [
        (" 1 2\nOutput: 3", ("1 2", "3")),
        (" 1 2\n  Output:3 \n", ("1 2", "3")),
        ("\nOutput: 3", ("", "3")),
        ("Output: 3", ("", "3")),
        (" 1\n2\n\nOutput: 3\n4", ("1\n2", "3\n4")),
        (" 1\nOutput: 2\nOutput: 3", ("1", "2")),
        (" 1\nOutput: 2\n\nInput: 3\nOutput: 4", ("1", "2")),
        (" 1\nOutput : 2\nInput 2: 3", ("1", "2")),
        (" 1\nOutput: an\nInputs: Output: 3", ("1", "an\nInputs: Output: 3")),
        (" 1\nOutput:", ("1", "")),
        ("Input: 1\nOutput: 2", ("1", "2")),
        (" the Input: 1\nOutput: 2", ("the Input: 1", "2")),
        ("1, Output: 2", None),
        ("1\noutput: 2", None),
        ("", None),
    ],
)
def test_an_answer_is_an_input_and_an_output(completion: str, pair: tuple[str, str] | None) -> None:
    assert parse_instance(completion, accept_unmarked=False) == pair
    assert parse_instance(completion, accept_unmarked=True) == (pair or ("", completion.strip()))


# Filters


@pytest.mark.parametrize(
    ("pair", "finish_reason", "reason"),
    [
        (("1", "2"), "stop", None),
        (("", "2"), "stop", None),
        (("1", "2: 3"), "stop", None),
        (None, "stop", "unparsable"),
        (None, "length", "unparsable"),
        (("1", ""), "stop", "empty_output"),
        (("", ""), "length", "empty_output"),
        (("1", "2"), "length", "truncated"),
        (("1", "1"), "stop", "input_equals_output"),
        (('"A red  hat."', "A red hat!"), "stop", "input_equals_output"),
        (("a red hat", "A red hat."), "stop", None),
        (("-5", "5"), "stop", None),
        (("1 + 2", "1 - 2"), "stop", None),
        (("?", "!"), "stop", None),
        (("1:", "2"), "stop", "ends_with_colon"),
        (("1", "2:"), "stop", "ends_with_colon"),
    ],
)
def test_an_answer_alone_has_at_most_one_fault(
    pair: tuple[str, str] | None, finish_reason: str, reason: str | None
) -> None:
    assert fault(pair, finish_reason) == reason


def completions(*pairs: tuple[str, str] | str) -> list[Completion]:
    """Answers of these pairs; a plain text is taken as it is."""
    texts = [p if isinstance(p, str) else f" {p[0]}\nOutput: {p[1]}" for p in pairs]
    return [Completion(text, (), (), (), "stop") for text in texts]


@pytest.mark.parametrize(
    ("answers", "kept", "reasons"),
    [
        ([("1", "a"), ("2", "b")], [("1", "a"), ("2", "b")], []),
        ([("1", "a"), ("1", "a")], [("1", "a")], ["duplicate"]),
        ([("", "a"), ("", "b")], [("", "a"), ("", "b")], []),  # no input, no conflict
        ([("1", "a"), ("2", "b"), ("1", "c")], [], ["conflicting_outputs"] * 3),
        ([("1", "a"), ("1", "1"), ("", "")], [("1", "a")], ["input_equals_output", "empty_output"]),
        (["plain", ("1", "a")], [("1", "a")], ["unparsable"]),
        ([(str(i), "a") for i in range(5)], [(str(i), "a") for i in range(3)], ["over_quota"] * 2),
        ([("1", "a"), ("2", "a"), ("3", "a"), ("1", "b")], [], ["conflicting_outputs"] * 4),
        ([], [], []),
    ],
    ids=str,
)
def test_answers_to_one_instruction_are_sifted(
    answers: list[Any], kept: list[tuple[str, str]], reasons: list[str]
) -> None:
    """At most three are kept; a conflict past the limit counts as well."""
    pairs, faults = select(completions(*answers), limit=3, accept_unmarked=False)
    assert [(pair.input, pair.output) for pair in pairs] == kept
    texts = [
        parse_instance(completions(*answers)[p.answer].text, accept_unmarked=False) for p in pairs
    ]
    assert texts == kept
    assert [reason for _, reason in faults] == reasons
    assert len(pairs) + len(faults) == len(answers)
    assert {text for text, _ in faults} <= {c.text for c in completions(*answers)}


def test_unmarked_text_is_an_output_when_the_config_says_so() -> None:
    pairs, faults = select(completions("la la", "la la"), limit=3, accept_unmarked=True)
    assert (pairs, faults) == ([("", "la la", 0)], [("la la", "duplicate")])


# Batches, with an engine that needs no model

TASKS = [
    {"id": f"t{i}", "instruction": f"Do number {i}.", "is_classification": i % 3 == 0}
    for i in range(10)
]  # 3 batches of up to 4


def says(request: Request) -> Completion:
    """Answers that depend on the prompt and the seed, of few words, so that some collide."""
    rng = np.random.default_rng(zlib.crc32(repr((request.prompt_ids, request.seed)).encode()))
    words = ["red", "blue", "", "two:"]
    first, second = rng.choice(words, 2, p=[0.4, 0.3, 0.2, 0.1])
    reason = "length" if rng.random() < 0.1 else "stop"
    text = f" {first}\nOutput: {second}" if rng.random() < 0.9 else " "
    return Completion(text, (), (), (), reason)


class FakeBase:
    """A base model and its engine in one, without weights; keeps all requests."""

    def __init__(self) -> None:
        self.tokenizer = byte_tokenizer()
        self.requests: list[list[Request]] = []

    def engine(self, num_slots: int) -> "FakeBase":
        self.num_slots = num_slots
        return self

    def generate(
        self, params: Any, requests: Sequence[Request], progress: Callable[[int], None]
    ) -> list[Completion]:
        assert len(requests) <= self.num_slots
        self.requests.append(list(requests))
        progress(1)
        return [says(request) for request in requests]


CONFIG = dataclasses.replace(
    tiny.get_config(),
    prompts=dataclasses.replace(tiny.get_config().prompts, accept_unmarked_output=False),
)


FILES = (instances.ACCEPTED, instances.REJECTED)


def run(workdir: Path, oracle: Oracle | None = None, **fields: Any) -> list[list[Request]]:
    """Runs the stage; returns what it asked for, by batch."""
    base: Any = FakeBase()
    section = dataclasses.replace(CONFIG.instances, **fields)
    config = dataclasses.replace(CONFIG, instances=section)
    InstanceStage(config, base, seeds.load(), TASKS, workdir, oracle).run({})
    return base.requests


def contents(workdir: Path) -> list[bytes]:
    return [(workdir / name).read_bytes() for name in FILES]


def test_every_answer_ends_in_one_of_the_files(tmp_path: Path) -> None:
    run(tmp_path)
    kept, dropped = (records.read_rows(tmp_path / name) for name in FILES)
    assert len(kept) + len(dropped) == 4 * len(TASKS)
    by_id = {task["id"]: task for task in TASKS}
    for row in kept:
        task = by_id[row["id"]]
        assert row["instruction"] == task["instruction"]
        assert row["is_classification"] == task["is_classification"]
        assert fault((row["input"], row["output"]), "stop") is None
    pairs = Counter((row["id"], row["input"], row["output"]) for row in kept)
    assert set(pairs.values()) == {1}
    with_input = Counter((row["id"], row["input"]) for row in kept if row["input"])
    assert set(with_input.values()) == {1}
    assert {row["batch"] for row in kept + dropped} == {0, 1, 2}
    assert len({row["reason"] for row in dropped}) >= 6


def test_requests_ask_for_each_instruction_with_its_own_seed(tmp_path: Path) -> None:
    batches = run(tmp_path)
    assert [len(batch) for batch in batches] == [16, 16, 8]
    requests = [request for batch in batches for request in batch]
    assert len({request.seed for request in requests}) == len(requests)
    for number, request in enumerate(requests):
        text = byte_tokenizer().decode(request.prompt_ids)
        assert text.startswith(prompts.HEADER)
        assert text.endswith(f"\n\nTask: Do number {number // 4}.\nInput:")
        assert request.sampling == CONFIG.instances.sampling


def crash(workdir: Path, writes: int, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """A run that stops after so many writes."""
    append, left = records.append_rows, writes

    def fail(path: Path, rows: list[records.Row]) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        append(path, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records, "append_rows", fail)
        run(workdir, **fields)


@pytest.mark.parametrize("writes", range(6))
def test_a_crash_before_any_write_changes_nothing(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    crash(tmp_path / "twice", writes, monkeypatch)
    run(tmp_path / "twice")
    assert contents(tmp_path / "twice") == contents(tmp_path / "whole")


def test_a_second_run_makes_the_last_batch_again_with_the_same_result(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    assert [len(batch) for batch in run(tmp_path)] == [8]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2), (4, 3)])
def test_with_another_batch_size_no_instruction_is_left_out_or_asked_twice(
    sizes: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash(tmp_path, 3, monkeypatch, batch_size=sizes[0])
    run(tmp_path, batch_size=sizes[1])
    rows = [row for name in FILES for row in records.read_rows(tmp_path / name)]
    assert Counter(row["id"] for row in rows) == {task["id"]: 4 for task in TASKS}


@pytest.mark.parametrize("row", [{"batch": 1}, {"batch": 1, "id": [3]}], ids=["none", "list"])
def test_rows_without_an_id_are_named(row: dict[str, Any], tmp_path: Path) -> None:
    newest = {"batch": 2, "id": "t9"}
    (tmp_path / instances.ACCEPTED).write_text(records.to_line(row) + records.to_line(newest))
    with pytest.raises(ValueError, match=rf"{instances.ACCEPTED}:1: 'id' (is missing|must be)"):
        run(tmp_path)


def test_a_row_names_its_prompt_and_the_seeds_in_it(tmp_path: Path) -> None:
    requests = [request for batch in run(tmp_path) for request in batch]
    texts = [byte_tokenizer().decode(request.prompt_ids) for request in requests]
    tasks = {task.id: task for task in seeds.load()}
    for row in records.read_rows(tmp_path / instances.ACCEPTED):
        answers = [
            parse_instance(says(request).text, accept_unmarked=False)
            for request, text in zip(requests, texts, strict=True)
            if text == row["prompt"]
        ]
        assert (row["input"], row["output"]) in answers
        shown = [tasks[key] for key in row["demo_ids"]]
        assert len(shown) == CONFIG.prompts.num_demos
        assert row["prompt"] == prompts.with_demos(row["instruction"], shown)


def test_what_is_kept_is_scored_on_one_scale(tmp_path: Path) -> None:
    """That of the components themselves, whatever normalisation training used."""

    def oracle(examples: Sequence[Example]) -> dict[str, np.ndarray]:
        lengths = [float(len(e.context) + 10 * len(e.output)) for e in examples]
        return {"rew": np.asarray(lengths), "nat": np.ones(len(examples))}

    options = dataclasses.replace(CONFIG.reward, normalise="batch", und=0.0, coh=0.0)
    config = dataclasses.replace(CONFIG, reward=options)
    base: Any = FakeBase()
    InstanceStage(config, base, seeds.load(), TASKS, tmp_path, oracle).run({})
    rows = records.read_rows(tmp_path / instances.ACCEPTED)
    assert len({row["reward"] for row in rows}) > 3
    for row in rows:
        rew = len(f"{row['instruction']}\n{row['input']}".strip()) + 10 * len(row["output"])
        assert row["components"] == {"rew": rew, "nat": 1.0}
        assert row["reward"] == pytest.approx(0.0078 * rew + 0.3212 - 0.0274, abs=1e-6)
    run(tmp_path / "without")
    assert "reward" not in records.read_rows(tmp_path / "without" / instances.ACCEPTED)[0]
