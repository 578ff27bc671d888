"""Corruptions: what each does to a text, and that held-out tasks stay out of training."""

import collections
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refine_af import corruptions, oracle_evaluation, oracle_examples, seeds
from refine_af.corruptions import CORRUPTIONS, LABELS, SEVERITIES
from refine_af.rewards import Example
from refine_af.seeds import Instance, SeedTask

WORDS = st.lists(st.text("abcdexyz.,", min_size=1, max_size=6), min_size=4, max_size=60)
NUMBERS = st.integers(0, 2**32 - 1)
SEVERITY = st.sampled_from(SEVERITIES)
TASKS = seeds.load()
STORY = (
    "The river rose slowly at first. By noon it had reached the old mill and the bridge. "
    "Nobody in the village slept that night, because the water kept coming."
)
OTHERS = [
    Example("Tell me about rain.", "", STORY),
    Example("Name a colour.", "", "blue"),
    Example("Name a fruit.", "", "apple"),
    Example("Explain bees.", "", "Bees dance to show where flowers are. They fly far every day."),
]


def rng(number: int) -> np.random.Generator:
    return np.random.default_rng(number)


def is_within(part: list[str], whole: list[str]) -> bool:
    """Whether `part` is what is left of `whole` when some words go."""
    rest = iter(whole)
    return all(word in rest for word in part)


# The answer alone


@given(WORDS, NUMBERS, SEVERITY)
def test_shuffled_has_the_same_words_and_the_same_blanks(words, number, severity):
    text = "\n".join([" ".join(words[:2]), " ".join(words[2:])])
    found = corruptions.shuffled(text, rng(number), severity)
    assert collections.Counter(found.split()) == collections.Counter(words)
    assert [c for c in found if c.isspace()] == [c for c in text if c.isspace()]
    moved = [i for i, (a, b) in enumerate(zip(found.split(), words, strict=True)) if a != b]
    if severity == "light" and moved:
        assert moved[-1] - moved[0] < max(-(-len(words) // 3), 3)


@given(WORDS, NUMBERS, SEVERITY)
def test_dropped_keeps_the_order_and_loses_the_share_that_it_should(words, number, severity):
    found = corruptions.dropped(" ".join(words), rng(number), severity).split()
    assert is_within(found, words)
    share = 1 / 2 if severity == "heavy" else 1 / 6
    assert len(words) - len(found) == min(max(round(len(words) * share), 2), len(words) - 1)


@given(WORDS, NUMBERS, SEVERITY)
def test_repeated_says_a_run_of_words_again_where_it_stands(words, number, severity):
    found = corruptions.repeated(" ".join(words), rng(number), severity).split()
    extra = len(found) - len(words)
    times = (1,) if severity == "light" else (3, 4, 5)
    splits = [
        (first, size, n)
        for n in times
        for size in range(3, 9)
        for first in range(len(words) - size + 1)
        if size * n == extra
    ]
    assert any(
        found == words[: first + size] + words[first : first + size] * n + words[first + size :]
        for first, size, n in splits
    )


@given(WORDS, NUMBERS, SEVERITY)
def test_truncated_is_a_beginning_that_ends_within_a_sentence(words, number, severity):
    text = " ".join(words)
    found = corruptions.truncated(text, rng(number), severity)
    assert text.startswith(found)
    if found != text:
        assert found[-1] != "."
        shares = (0.15, 0.5) if severity == "heavy" else (0.6, 0.9)
        least, most = (max(round(len(words) * share), 1) for share in shares)
        assert least <= len(found.split()) <= most


def test_truncated_never_ends_with_a_line() -> None:
    """A list without its last items looks finished."""
    lines = "1. one two\n2. three four\n3. five six\n4. seven eight"
    for number in range(100):
        found = corruptions.truncated(lines, rng(number), "light")
        assert not lines[len(found) :].startswith("\n")


# The answer and its task


def test_a_mismatch_is_the_answer_to_something_else_and_a_light_one_is_of_like_length() -> None:
    many = [Example(f"Task {n}.", "", " ".join(["word"] * n)) for n in range(1, 41)]
    own = many[19]
    for number in range(50):
        light = corruptions.mismatched(own, many, rng(number), "light")
        assert light != own.output
        assert 14 <= len(light.split()) <= 26
    heavy = {corruptions.mismatched(own, many, rng(n), "heavy") for n in range(400)}
    assert heavy == {e.output for e in many} - {own.output}


def test_the_hardest_mismatch_is_the_answer_to_another_input_of_the_same_task() -> None:
    siblings = [Example("Sum.", f"1 + {n}", str(1 + n)) for n in range(3)]
    for number in range(20):
        found = corruptions.mismatched(siblings[0], [*OTHERS, *siblings], rng(number), "light")
        assert found in ("2", "3")


@pytest.mark.parametrize("severity", SEVERITIES)
def test_off_topic_brings_sentences_of_another_answer(severity: str) -> None:
    own = OTHERS[0]
    for number in range(50):
        found = corruptions.off_topic(own, OTHERS, rng(number), severity)
        bees = ["Bees dance to show where flowers are.", "They fly far every day."]
        foreign = sum(sentence in found for sentence in bees)
        assert found.startswith("The river rose slowly at first.")
        assert foreign == (1 if severity == "light" else 2)
        assert ("kept coming" in found) == (severity == "light")


@given(NUMBERS, st.sampled_from(sorted(LABELS)), st.integers(0, len(TASKS) - 1))
def test_the_same_draw_gives_the_same_text_and_it_is_never_the_old_one(number, kind, row):
    examples = oracle_examples.examples_of(TASKS)
    found = corruptions.corrupt(*kind, examples[row], examples, rng(number))
    assert found == corruptions.corrupt(*kind, examples[row], examples, rng(number))
    if found is not None:
        assert (found.instruction, found.input) == (examples[row].instruction, examples[row].input)
        assert found.output.strip() and found.output.split() != examples[row].output.split()


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_label_has_no_words_to_tamper_with(name: str, severity: str) -> None:
    """It can be the wrong label, or be followed by something else."""
    found = corruptions.corrupt(name, severity, OTHERS[1], OTHERS, rng(0))
    assert (found is not None) == (name in ("mismatched", "off_topic"))


def test_where_nothing_can_be_worse_there_is_none() -> None:
    alone = [OTHERS[0]]
    for name in ("mismatched", "off_topic"):
        assert corruptions.corrupt(name, "light", alone[0], alone, rng(0)) is None
    same = Example("Say it.", "", "no no no no no")
    assert corruptions.corrupt("shuffled", "heavy", same, [same], rng(0)) is None


def test_every_corruption_lowers_something() -> None:
    assert set(LABELS) == {(name, s) for name in CORRUPTIONS for s in SEVERITIES}
    assert all(0.0 in known for known in LABELS.values())


# Held-out tasks


def test_the_split_is_a_fifth_by_the_hash_of_the_id() -> None:
    training, unseen = oracle_examples.split(TASKS)
    assert (len(training), len(unseen)) == (140, 35)
    assert unseen == [
        t for t in TASKS if hashlib.sha256(t.id.encode()).hexdigest() < f"{int(0.2 * 2**64):016x}"
    ]
    assert oracle_examples.split(TASKS[::-1])[1] == unseen[::-1]


def test_nothing_of_a_held_out_task_is_trained_on() -> None:
    training, unseen = oracle_examples.split(TASKS)
    examples = oracle_examples.examples_of(training)
    secret = oracle_examples.examples_of(unseen)
    groups = [
        oracle_examples.corrupted_group(example, examples, 0, epoch, row)
        for epoch in range(3)
        for row, example in enumerate(examples)
    ]
    answers = [answer.example for group in groups for answer in group]
    assert not {e.instruction for e in answers} & {e.instruction for e in secret}
    seen = " ".join(" ".join(e.output.split()) for e in answers)
    long = [" ".join(e.output.split()) for e in secret if len(e.output.split()) >= 4]
    assert len(long) > 20 and not [text for text in long if text in seen]
    assert {e.output for e in answers}.isdisjoint(e.output for e in secret)
    pairs = oracle_evaluation.corrupted_pairs(unseen, 1)
    assert {pair.better for pair in pairs} == set(secret)
    mine = {e.output for e in secret}
    assert all(p.worse.output in mine for p in pairs if p.corruption == "mismatched")


def test_a_task_that_shares_a_text_with_a_held_out_one_is_left_out() -> None:
    training, unseen = oracle_examples.split(TASKS)
    answer = unseen[0].instances[0].output
    twin = SeedTask(training[0].id, "Something else.", (Instance("", f"{answer} \n"),), False)
    found, kept = oracle_examples.split([twin, *training[1:], *unseen])
    assert (found, kept) == (training[1:], unseen)


def test_too_few_tasks_are_refused() -> None:
    message = "2 seed tasks give 2 to train on and 0 held out; expected at least 2 of each"
    with pytest.raises(ValueError, match=message):
        oracle_examples.split(oracle_examples.split(TASKS)[0][:2])


def test_a_group_is_a_function_of_seed_epoch_and_row() -> None:
    examples = oracle_examples.examples_of(TASKS)
    numbers = [(0, 0, 1), (1, 0, 1), (0, 1, 1)]
    groups = [oracle_examples.corrupted_group(examples[1], examples, *n) for n in numbers]
    assert groups[0] == oracle_examples.corrupted_group(examples[1], examples, 0, 0, 1)
    assert groups[0] != groups[1] != groups[2] != groups[0]
    assert {group[0] for group in groups} == {groups[0][0]}
