"""Benchmark of the novelty filter and of a data set's statistics against `rouge-score`.

The instructions are made of the seed tasks' words: the beginning of one task and the end of the
same or of another, with some words of others in between. So they have the seeds' lengths, and all
degrees of likeness occur.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from refine_af import benchmarks, dataset_statistics, records, seeds
from refine_af.benchmarks import Limits, Measured, Row
from refine_af.config import Model
from refine_af.novelty import NoveltyPool
from refine_af.randomness import generator

CASES = {  # the reference takes half a minute for 500 candidates, and nine for 2,000
    "filter500": 500,  # candidates, decided as by rouge-score, or the program ends
    "filter2000": 2000,
    "filter15000": 15_000,  # accepted instructions, and the statistics of their data set
}
SHORT = ["filter500", "filter15000"]
T = TypeVar("T")
_MAX_SIMILARITY = 0.7
_AT_ONCE = 128  # candidates; stage 1 has as many in a batch of prompts
_SAME = 0.4  # share of the instructions that are a seed's but for some words
_MOST_CHANGED = 0.6  # share of an instruction's words that are others


def rows(_: Model, __: Limits, repeats: int, names: Sequence[str]) -> Iterator[Row]:
    """The suite's lines of the table.

    Raises:
        AssertionError: the filter decides otherwise than rouge-score.
    """
    theirs = None
    for name in names:
        if name != "filter15000":
            theirs, expected = _isolated(reference, CASES[name])
            ours, found = _isolated(decisions, CASES[name], repeats)
            assert found == expected, "the filter decides otherwise than rouge-score"
            yield benchmarks.row("novelty", name, "pairs/s", ours, theirs, "rouge-score", None)
            continue
        theirs = theirs or _isolated(reference, CASES["filter500"])[0]
        ours, pairs = _isolated(with_statistics, CASES[name], repeats)
        theirs = dataclasses.replace(theirs, rate=CASES[name] * theirs.rate / pairs)
        title = "rouge-score by its pairs a second"
        yield benchmarks.row("novelty", name, "instructions/s", ours, theirs, title, None)


def _isolated(function: Callable[..., tuple[Measured, T]], *arguments: int) -> tuple[Measured, T]:
    """`function(*arguments)` in a process of its own, which took so much memory."""
    (measured, found), peak = benchmarks.in_process(function, *arguments)
    return dataclasses.replace(measured, peak_mib=peak), found


def candidates() -> Iterator[str]:
    """Instructions without end, always the same."""
    known = [text.split() for text in _seed_instructions()]
    words = [word for text in known for word in text]
    rng = generator(0, "benchmark/novelty")
    while True:
        first, last = (known[i] for i in rng.integers(len(known), size=2))
        last = first if rng.random() < _SAME else last
        text = first[: len(first) // 2] + last[len(last) // 2 :]
        others = rng.integers(len(words), size=len(text))
        kept = rng.random(len(text)) >= _MOST_CHANGED * rng.random()
        pairs = zip(text, others, kept, strict=True)
        yield " ".join(word if keep else words[other] for word, other, keep in pairs)


def first_candidates(count: int) -> list[str]:
    """So many of them."""
    return list(itertools.islice(candidates(), count))


def _seed_instructions() -> list[str]:
    return [task.instruction for task in seeds.load()]


def _prepared(pool: NoveltyPool) -> Iterator[str]:
    """The candidates, each of them prepared with others of its batch, as stage 1 does."""
    texts = candidates()
    while True:
        batch = list(itertools.islice(texts, _AT_ONCE))
        pool.prepare(batch)
        yield from batch


def decisions(count: int, repeats: int) -> tuple[Measured, list[bool]]:
    """Pairs of texts compared a second, and whether each candidate is novel, by the filter."""
    novel: list[bool] = []

    def run() -> float:
        novel.clear()
        pool, pairs = NoveltyPool(_seed_instructions()), 0
        for text in itertools.islice(_prepared(pool), count):
            pairs += len(pool)
            novel.append(pool.is_novel(text, pool.compare(text), _MAX_SIMILARITY))
            if novel[-1]:
                pool.add(text)
        return pairs

    return benchmarks.measure(run, repeats), novel


def reference(count: int) -> tuple[Measured, list[bool]]:
    """As `decisions`, by `rouge-score` as Self-Instruct calls it, but in one process; once."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    texts = first_candidates(count)
    novel: list[bool] = []

    def run() -> float:
        pool, pairs = _seed_instructions(), 0
        for text in texts:
            scores = [scorer.score(known, text)["rougeL"].fmeasure for known in pool]
            pairs += len(scores)
            novel.append(max(scores) <= _MAX_SIMILARITY)
            if novel[-1]:
                pool.append(text)
        return pairs

    return benchmarks.measure(run, 0), novel


def with_statistics(count: int, repeats: int) -> tuple[Measured, int]:
    """Accepted instructions a second, with their statistics; and the pairs that were compared."""
    pairs = 0

    def run() -> float:
        nonlocal pairs
        pairs = 0
        pool = NoveltyPool(_seed_instructions())
        accepted: list[records.Row] = []
        for text in _prepared(pool):
            pairs += len(pool)
            neighbours = pool.compare(text)
            if pool.is_novel(text, neighbours, _MAX_SIMILARITY):
                pool.add(text)
                row: records.Row = {"id": text, "instruction": text, "input": text, "output": text}
                row |= {"is_classification": False, "reward": neighbours.average}
                accepted.append(row)
            if len(accepted) == count:
                dataset_statistics.of_rows(accepted, _seed_instructions())
                return count
        raise AssertionError("the candidates have no end")

    return benchmarks.measure(run, repeats), pairs
