"""Exact ROUGE-L novelty filter, fast enough to compare each candidate with a whole pool.

ROUGE-L F of two token lists equals the normalised InDel similarity `2 LCS / (n + m)`, which
`rapidfuzz` computes bit-parallel. The last bits differ, though, so a decision within 1e-9 of the
threshold is taken with `rouge-score`'s own formula.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Indel, LCSseq
from rouge_score.tokenizers import DefaultTokenizer

_TOKENIZER = DefaultTokenizer(use_stemmer=False)
_MARGIN = 1e-9


def rouge_l(first: Sequence[int], second: Sequence[int]) -> float:
    """ROUGE-L F in [0, 1] exactly as `rouge-score` rounds it: 2pr/(p+r) in double precision."""
    lcs = LCSseq.similarity(first, second)
    if lcs == 0:
        return 0.0
    precision, recall = lcs / len(second), lcs / len(first)
    return 2 * precision * recall / (precision + recall)


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """How a candidate relates to the pool."""

    most_similar: dict[str, float]  # text -> ROUGE-L F, best first, at most ten
    average: float  # over the whole pool
    maximum: float


class NoveltyPool:
    """Texts that new ones are compared with; grows as texts are accepted."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Start with `texts` (seed instructions, say)."""
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []
        self._tokens: list[list[int]] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Put a text into the pool."""
        self._texts.append(text)
        self._tokens.append(self._encode(text))

    def compare(self, text: str) -> Neighbours:
        """ROUGE-L F of `text` with every text of the pool; the pool is the reference side."""
        query = self._encode(text)
        if not self._texts:
            return Neighbours({}, 0.0, 0.0)
        scores = process.cdist(
            [query], self._tokens, scorer=Indel.normalized_similarity, dtype=np.float64
        )[0]
        if not query:
            scores[:] = 0.0  # InDel calls two empty lists equal, ROUGE does not
        top = np.argsort(-scores, kind="stable")[:10]
        best = {self._texts[i]: round(float(scores[i]), 4) for i in top}
        return Neighbours(best, float(scores.mean()), float(scores[top[0]]))

    def is_novel(self, text: str, neighbours: Neighbours, max_similarity: float) -> bool:
        """Whether no pool text is more similar than `max_similarity`; exactly that much is kept."""
        if abs(neighbours.maximum - max_similarity) > _MARGIN:
            return neighbours.maximum < max_similarity
        query = self._encode(text)
        return all(rouge_l(tokens, query) <= max_similarity for tokens in self._tokens)

    def _encode(self, text: str) -> list[int]:
        words = _TOKENIZER.tokenize(text)
        return [self._ids.setdefault(word, len(self._ids)) for word in words]
