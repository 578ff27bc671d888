"""An oracle of rules: length, form and language of the output. It needs no model."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from refine_af.rewards import Example

_FEW, _MANY = 3, 150  # words of a usual output
_MARKERS = re.compile(
    r"^\s*(task|instruction|input|output|response|question|answer)\s*:", re.I | re.M
)
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"))


def rules(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Components, each in [0, 1]: `length`, `format`, `language` and `variety`.

    `length`: 1 from 3 to 150 words, in proportion below, inversely above. `format`: share that
    holds of: ends like a sentence, brackets and quotes are closed, no heading of the prompt
    ("Task:") is repeated. `language`: share of the letters in the script that most of the task's
    letters have. `variety`: share of different ones among the output's word trigrams.
    """
    columns = {"length": _length, "format": _format, "language": _language, "variety": _variety}
    return {name: np.asarray([rule(e) for e in examples]) for name, rule in columns.items()}


def _length(example: Example) -> float:
    count = len(example.output.split())
    return min(count / _FEW, 1.0) if count < _MANY else _MANY / count


def _format(example: Example) -> float:
    text = example.output.strip()
    ends = bool(text) and (text[-1] in ".!?)]}\"'`" or len(text.split()) < _FEW)
    closed = all(text.count(a) == text.count(b) for a, b in _PAIRS) and text.count('"') % 2 == 0
    return (ends + closed + (_MARKERS.search(text) is None)) / 3


def _language(example: Example) -> float:
    asked, given = (
        Counter(map(_script, filter(str.isalpha, t))) for t in (example.context, example.output)
    )
    if not asked or not given:
        return 1.0
    return given[asked.most_common(1)[0][0]] / given.total()


def _script(letter: str) -> str:
    """First word of the letter's name, which is its script: LATIN, CYRILLIC, CJK, ..."""
    return unicodedata.name(letter, "?").split()[0]


def _variety(example: Example) -> float:
    words = example.output.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0
