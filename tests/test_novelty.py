"""The novelty filter decides as `rouge-score` would, to the last bit."""

import functools
import itertools
from collections import Counter

import numpy as np
import pytest
from rouge_score import rouge_scorer, scoring

from refine_af import benchmark_novelty, novelty, seeds
from refine_af.novelty import NoveltyPool

SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def reference(pool_text: str, text: str) -> float:
    return SCORER.score(pool_text, text)["rougeL"].fmeasure


@functools.cache
def random_texts(count: int, seed: int) -> tuple[str, ...]:
    """Up to 20 words out of three, so that overlaps of every size are common."""
    rng = np.random.default_rng(seed)
    return tuple(
        " ".join(f"w{i}" for i in rng.integers(0, 3, rng.integers(1, 21))) for _ in range(count)
    )


@functools.cache
def random_scores() -> np.ndarray:
    """ROUGE-L F of 300 candidates (rows) with a pool of 20, by `rouge-score`."""
    candidates, pool = random_texts(300, seed=0), random_texts(20, seed=1)
    return np.asarray([[reference(p, c) for p in pool] for c in candidates])


@functools.cache
def ties() -> tuple[tuple[int, int, int], ...]:
    """All (n, m, L) with 2 L / (n + m) = 7 / 10 for texts of up to 150 words."""
    sizes = itertools.product(range(1, 151), repeat=2)
    return tuple(
        (n, m, 7 * (n + m) // 20)
        for n, m in sizes
        if (n + m) % 20 == 0 and 7 * (n + m) <= 20 * min(n, m)
    )


def overlapping(n: int, m: int, common: int) -> tuple[str, str]:
    """Texts of n and m words whose longest common subsequence has `common` words."""
    shared = [f"s{i}" for i in range(common)]
    first = shared + [f"a{i}" for i in range(n - common)]
    return " ".join(first), " ".join([f"b{i}" for i in range(m - common)] + shared)


def is_novel(pool: NoveltyPool, text: str, max_similarity: float) -> bool:
    return pool.is_novel(text, pool.compare(text), max_similarity)


@pytest.mark.slow
def test_2000_instructions_are_decided_as_by_rouge_score() -> None:
    """Those of the benchmark. A pair whose words, in whatever order, have too few in common is left
    out: its longest common subsequence cannot have more.
    """
    pool = [task.instruction for task in seeds.load()]
    counts = [Counter(SCORER._tokenizer.tokenize(text)) for text in pool]
    expected = []
    for text in benchmark_novelty.first_candidates(2000):
        words = Counter(SCORER._tokenizer.tokenize(text))
        near = (
            known
            for known, other in zip(pool, counts, strict=True)
            if 2 * (words & other).total() >= 0.69 * (words.total() + other.total())
        )
        expected.append(all(reference(known, text) <= 0.7 for known in near))
        if expected[-1]:
            pool.append(text), counts.append(words)
    assert benchmark_novelty.decisions(2000, 0)[1] == expected
    assert 1400 < sum(expected) < 1700


def test_rouge_l_is_bit_equal_to_rouge_score() -> None:
    candidates, pool = (
        [[int(word[1:]) for word in text.split()] for text in random_texts(count, seed)]
        for count, seed in ((300, 0), (20, 1))
    )
    ours = [[novelty.rouge_l(p, c) for p in pool] for c in candidates]
    np.testing.assert_array_equal(ours, random_scores())


@pytest.mark.parametrize("max_similarity", [0.7, 2 / 3, 0.75, 8 / 11])
def test_decisions_are_those_of_rouge_score(max_similarity: float) -> None:
    pool = NoveltyPool(random_texts(20, seed=1))
    expected = random_scores().max(axis=1) <= max_similarity
    assert 30 < expected.sum() < 270, "both decisions must occur"
    assert (abs(random_scores() - max_similarity) < 1e-12).sum() > 20, "and ties"
    novel = [is_novel(pool, text, max_similarity) for text in random_texts(300, seed=0)]
    np.testing.assert_array_equal(novel, expected)


def test_exact_ties_fall_as_the_formula_rounds_them() -> None:
    """.7 is kept, but 2pr/(p+r) lands above .7 for more than half of the lengths that give it."""
    above = 0
    for n, m, common in ties():
        first, second = overlapping(n, m, common)
        score = scoring.fmeasure(common / m, common / n)
        assert score == pytest.approx(0.7, abs=1e-15)
        assert is_novel(NoveltyPool([first]), second, 0.7) == (score <= 0.7), (n, m, common)
        above += score > 0.7
    assert (above, len(ties())) == (272, 531)


@pytest.mark.parametrize(("n", "m", "common"), ties()[:12])
def test_the_arithmetic_of_ties_is_that_of_rouge_score(n: int, m: int, common: int) -> None:
    first, second = overlapping(n, m, common)
    assert reference(first, second) == scoring.fmeasure(common / m, common / n)


def test_a_tie_with_one_text_does_not_hide_a_nearer_one() -> None:
    """Ties of both kinds, and one word more in common."""
    by_score = {scoring.fmeasure(c / m, c / n) > 0.7: (n, m, c) for n, m, c in ties()[::-1]}
    kept, _ = overlapping(*by_score[False])
    text = overlapping(*by_score[False])[1]
    assert is_novel(NoveltyPool([kept]), text, 0.7)
    assert not is_novel(NoveltyPool([kept, text + " more"]), text, 0.7)


def test_neighbours_are_the_ten_most_similar_with_the_average_of_all() -> None:
    texts = random_texts(20, seed=1)
    pool = NoveltyPool(texts)
    for row, text in enumerate(random_texts(300, seed=0)[:50]):
        scores = random_scores()[row]
        found = pool.compare(text)
        assert found.average == pytest.approx(scores.mean(), abs=1e-12)
        assert found.maximum == pytest.approx(scores.max(), abs=1e-12)
        assert list(found.most_similar.values()) == sorted(scores.round(4), reverse=True)[:10]
        by_text = dict(zip(texts, scores.round(4), strict=True))
        assert all(by_text[other] == score for other, score in found.most_similar.items())


def test_an_added_text_is_compared_with() -> None:
    pool = NoveltyPool(["sing a song"])
    assert is_novel(pool, "name two colours", 0.7)
    pool.add("name three colours")
    assert pool.compare("name two colours").most_similar == {
        "name three colours": round(2 / 3, 4),
        "sing a song": 0.0,
    }
    assert is_novel(pool, "name two colours", 0.7)
    assert not is_novel(pool, "name two colours", 0.66)


def test_texts_that_are_compared_together_come_out_as_one_by_one() -> None:
    """Also where the pool grows meanwhile, by a copy of one that is still to come."""
    texts = [*random_texts(300, seed=0)[:150], "", "!"]
    alone, together = NoveltyPool(random_texts(20, seed=1)), NoveltyPool(random_texts(20, seed=1))
    assert list(together.compare_all(texts)) == [alone.compare(text) for text in texts]
    together.prepare(texts)
    for text, later in zip(texts, [*texts[1:], "more"], strict=True):
        assert together.compare(text) == alone.compare(text)
        for pool in (alone, together):
            pool.add(later)
    empty = NoveltyPool([])
    empty.prepare(["sing"])
    empty.add("sing")
    assert empty.compare("sing").maximum == 1.0
    assert len(empty) == 1


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("write, a SONG!", 1.0),  # case and punctuation do not count
        ("writes a song", 2 / 3),  # no stemming
        ("song a write", 1 / 3),  # order does
        ("...", 0.0),
        ("", 0.0),
    ],
)
def test_words_are_those_of_rouge_score(text: str, score: float) -> None:
    assert reference("write a song", text) == pytest.approx(score)
    assert NoveltyPool(["write a song"]).compare(text).maximum == pytest.approx(score)


@pytest.mark.parametrize("pool", [[], [""], ["?!", "sing"]], ids=str)
def test_a_text_without_words_is_like_nothing(pool: list[str]) -> None:
    neighbours = NoveltyPool(pool).compare("!!")
    assert (neighbours.average, neighbours.maximum) == (0, 0)
    assert set(neighbours.most_similar.values()) <= {0.0}
    assert is_novel(NoveltyPool(pool), "!!", 0.7)


def test_a_copy_is_kept_only_if_everything_is() -> None:
    pool = NoveltyPool(["sing a song"])
    assert not is_novel(pool, "Sing a song.", 0.99)
    assert is_novel(pool, "Sing a song.", 1.0)


def test_a_large_pool_is_compared_in_one_go() -> None:
    """A million pairs: minutes for `rouge-score`, part of a second here."""
    texts = [f"{text} t{i}" for i, text in enumerate(random_texts(20_000, seed=2))]
    pool = NoveltyPool(texts)
    for text in random_texts(50, seed=3):
        neighbours = pool.compare(text)
        for other, score in list(neighbours.most_similar.items())[:2]:
            assert round(reference(other, text), 4) == score
