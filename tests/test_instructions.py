"""Stage 1: prompts, parsing, the reasons to drop, and batches that survive a crash."""

import dataclasses
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_af import instructions, novelty, records, seeds
from refine_af.configs import tiny
from refine_af.instructions import InstructionStage, build_prompt, parse, unusable
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.requests import Completion, Request

# The prompt


def test_the_prompt_is_that_of_self_instruct() -> None:
    shown = [(f"id{i}", f"Task  number\n{i}:") for i in range(1, 9)]
    prompt = build_prompt(shown)
    assert prompt.text == (
        "Come up with a series of tasks:\n"
        "1. Task number 1\n"
        "2. Task number 2\n"
        "3. Task number 3\n"
        "4. Task number 4\n"
        "5. Task number 5\n"
        "6. Task number 6\n"
        "7. Task number 7\n"
        "8. Task number 8\n"
        "9."
    )
    assert prompt.ids == tuple(f"id{i}" for i in range(1, 9))
    assert not prompt.is_classification


def test_classification_tasks_are_asked_for_with_their_labels() -> None:
    prompt = build_prompt([("a", "Is it a cat? Answer: yes: or no:")], is_classification=True)
    first, second, last = prompt.text.split("\n")
    assert "classification tasks" in first
    assert "labels" in first
    assert second == "1. Is it a cat? Answer: yes: or no", "the final colon alone goes"
    assert (last, prompt.is_classification) == ("2.", True)


# Parsing


@pytest.mark.parametrize(
    ("text", "items"),
    [
        (
            " Sing a song.\n10. Name\n  a colour.\n11 . Count.",
            ["Sing a song.", "Name a colour.", "Count."],
        ),
        ("\n9. Sing a song.\n10.Name a colour.\n", ["Sing a song.", "Name a colour."]),
        (" 9. Sing a song.", ["Sing a song."]),
        (" Convert 3. Then add 2. Stop", ["Convert 3. Then add 2. Stop"]),
        (
            " Round it to\n3.14 or so.\n10. 2.5 is half of what?",
            ["Round it to 3.14 or so.", "2.5 is half of what?"],
        ),
        ("\n10.\n11.  \n12. Count.", ["Count."]),
        ("", []),
    ],
    ids=["items", "number-first", "number-again", "inside", "decimals", "empty", "nothing"],
)
def test_items_are_split_at_numbers_that_begin_a_line(text: str, items: list[str]) -> None:
    assert parse(text, cut=False) == (items, [])


@pytest.mark.parametrize(
    ("text", "complete", "incomplete"),
    [
        (" Sing a song.\n10. Name a col", ["Sing a song."], ["Name a col"]),
        (" Sing a so", [], ["Sing a so"]),
        (" Sing a song.\n10.", ["Sing a song."], []),  # the cut came after a whole item
        (" Sing a song.\n1", [], ["Sing a song. 1"]),
        ("", [], []),
    ],
)
def test_the_last_item_of_a_cut_text_is_set_apart(
    text: str, complete: list[str], incomplete: list[str]
) -> None:
    assert parse(text, cut=True) == (complete, incomplete)


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("Sing a song", "too_short"),
        ("", "too_short"),
        ("Sing a short song", None),
        ("word " * 150, None),
        ("word " * 151, "too_long"),
        *[
            (f"Describe the {word} in words", "blacklisted_word")
            for word in ("image", "Images", "graph", "graphs", "picture", "pictures", "file")
        ],
        *[
            (f"Please {word} what you see", "blacklisted_word")
            for word in ("FILES", "map", "maps", "draw", "plot", "go to")
        ],
        ("Describe a photographic mapping, filed and plotted", None),
        ("Write a program that adds numbers", "starts_with_write_a_program"),
        ("write a Program that adds numbers", "starts_with_write_a_program"),
        ("Explain how to write a program", None),
        ("- a list of words", "starts_with_punctuation"),
        ("(Optional) name two cities", "starts_with_punctuation"),
        ("Émile asks for two cities", "non_ascii_start"),
        ("Ask Émile for two cities", None),
    ],
    ids=lambda value: str(value)[:24],
)
def test_unusable_instructions_have_a_reason(instruction: str, reason: str | None) -> None:
    assert unusable(instruction) == reason


# Batches, with an engine that needs no model

WORDS = re.findall(r"\w+", "the a song poem colour number name sing count list city cat two long")
SEEDS = seeds.load()
CONFIG = dataclasses.replace(
    tiny.get_config(),
    instructions=dataclasses.replace(
        tiny.get_config().instructions,
        num_instructions=38,
        batch_size=4,
        max_batches=9,
        classification_share=0.5,
    ),
)


def says(*parts: object) -> Completion:
    """Three numbered items that depend on `parts`: short, long, known, forbidden, cut."""
    rng = np.random.default_rng(zlib.crc32(repr(parts).encode()))
    items = [" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(3)]
    items.append(str(rng.choice(["Draw the cat for me", SEEDS[0].instruction, "Count the " * 80])))
    order = rng.permutation(4)
    reason = "length" if rng.random() < 0.4 else "stop"
    return Completion("\n10. ".join(items[i] for i in order), (), (), (), reason)


class FakeEngine:
    """Answers with `reply` of the prompt and its seed; keeps the prompts."""

    def __init__(self, reply: Callable[[Request], Completion]) -> None:
        self.tokenizer = byte_tokenizer()
        self.reply = reply
        self.prompts: list[list[str]] = []

    def generate(
        self, params: Any, requests: Sequence[Request], progress: Callable[[int], None]
    ) -> list[Completion]:
        self.prompts.append([self.tokenizer.decode(r.prompt_ids) for r in requests])
        progress(1)
        return [self.reply(request) for request in requests]


def run(workdir: Path, reply: Callable[[Request], Completion] | None = None) -> FakeEngine:
    engine = FakeEngine(reply or (lambda request: says(request.prompt_ids, request.seed)))
    InstructionStage(CONFIG, SEEDS, workdir).run(engine, {})
    return engine


def contents(workdir: Path) -> list[bytes]:
    return [
        (workdir / name).read_bytes() for name in (instructions.ACCEPTED, instructions.REJECTED)
    ]


def rows_of(workdir: Path) -> tuple[list[records.Row], list[records.Row]]:
    accepted, rejected = (instructions.ACCEPTED, instructions.REJECTED)
    return records.read_rows(workdir / accepted), records.read_rows(workdir / rejected)


def test_every_instruction_ends_in_one_of_the_files(tmp_path: Path) -> None:
    engine = run(tmp_path)
    accepted, rejected = rows_of(tmp_path)
    assert [row["id"] for row in accepted] == [f"instruction_{i:05d}" for i in range(38)]
    reasons = {"incomplete", "over_quota", "too_short", "too_long", "blacklisted_word", "similar"}
    assert {row["reason"] for row in rejected} == reasons
    assert len(accepted) + len(rejected) == 4 * 4 * len(engine.prompts)
    assert Counter(row["batch"] for row in accepted + rejected) == dict.fromkeys(
        range(len(engine.prompts)), 16
    )
    over = [row["batch"] for row in rejected if row["reason"] == "over_quota"]
    assert set(over) == {len(engine.prompts) - 1}, "only the last batch can be too much"


def test_accepted_instructions_are_novel_and_say_where_they_come_from(tmp_path: Path) -> None:
    run(tmp_path)
    pool = novelty.NoveltyPool([seed.instruction for seed in SEEDS])
    known = {seed.id for seed in SEEDS}
    for row in rows_of(tmp_path)[0]:
        neighbours = pool.compare(row["instruction"])
        assert neighbours.maximum <= 0.7
        assert row["most_similar"] == neighbours.most_similar
        assert row["avg_similarity"] == round(neighbours.average, 4)
        assert set(row["prompt_ids"]) <= known
        assert (row["model"], row["seed"]) == ("random:tiny", 0)
        pool.add(row["instruction"])
        known.add(row["id"])
    similar = [row for row in rows_of(tmp_path)[1] if row["reason"] == "similar"]
    assert all(max(row["most_similar"].values()) > 0.7 for row in similar)


def test_prompts_show_seeds_and_then_instructions_of_earlier_batches(tmp_path: Path) -> None:
    engine = run(tmp_path)
    texts = {s.id: " ".join(s.instruction.split()).rstrip(":") for s in SEEDS}
    classification = {texts[s.id] for s in SEEDS if s.is_classification}
    accepted = {row["instruction"]: row for row in rows_of(tmp_path)[0]}
    seen = Counter[bool]()
    for batch, prompts in enumerate(engine.prompts):
        for prompt in prompts:
            header, *lines, last = prompt.split("\n")
            shown = [re.sub(r"^\d+\. ", "", line) for line in lines]
            own = [text for text in shown if text in accepted]
            assert (len(shown), last) == (8, "9.")
            assert all(accepted[text]["batch"] < batch for text in own)
            wanted = "classification" in header
            assert len(own) == 2 or batch == 0 or wanted
            assert not wanted or classification.issuperset(set(shown) - set(own))
            assert not wanted or all(accepted[text]["is_classification"] for text in own)
            seen[wanted] += 1
    assert min(seen.values()) > 2, "both headers must occur"


def test_too_few_instructions_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    nothing = Completion("No.", (), (), (), "stop")
    message = r"0 of 38 after 9 batches; raise instructions.max_batches, or change "
    with pytest.raises(ValueError, match=message):
        run(tmp_path, reply=lambda _: nothing)
    assert {row["reason"] for row in rows_of(tmp_path)[1]} == {"too_short"}


def test_a_crash_before_any_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th write fails, for every n; the files after the second start are the same bytes."""
    run(tmp_path / "whole")
    append, crashes = records.append_rows, 0
    while True:
        left = crashes

        def fail(path: Path, rows: list[records.Row]) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            append(path, rows)

        workdir = tmp_path / str(crashes)
        monkeypatch.setattr(records, "append_rows", fail)
        try:
            run(workdir)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(records, "append_rows", append)
            run(workdir)
        assert contents(workdir) == contents(tmp_path / "whole"), f"write {crashes}"
        crashes += 1
    assert crashes > 4, "several batches of two writes"


@pytest.mark.parametrize("torn", [1, 40, 500])
def test_a_torn_file_is_mended(torn: int, tmp_path: Path) -> None:
    """The last bytes of the accepted rows did not reach the disk."""
    run(tmp_path)
    before = contents(tmp_path)
    (tmp_path / instructions.ACCEPTED).write_bytes(before[0][:-torn])
    run(tmp_path)
    assert contents(tmp_path) == before


def test_a_complete_stage_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    assert run(tmp_path).prompts == []
    assert contents(tmp_path) == before
