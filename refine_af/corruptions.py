"""Answers made worse on purpose: what a reward oracle learns to tell from good ones.

In the manner of UniEval (arXiv 2210.07197): each corruption spoils one thing that is known, so
labels cost nothing. Which quality suffers (0), is left alone (1), or is not judged (None):

    corruption   light                          heavy                          nat   und   coh
    shuffled     a third of the words, in a row all words                      0     0     None, 0
    dropped      a sixth of the words           half of the words              0     0     None, 0
    repeated     3 to 8 words said twice        the same four to six times     0     1     None
    truncated    60-90% of the words are left   15-50% are left                0     1     None
    off_topic    a sentence of another answer   half of it is another answer   None  1     0
    mismatched   another answer of like length  any other answer               1     1     0

`nat`: would someone write that? `und`: can the words be understood? `coh`: does it answer this
task, and hold together? The first two concern the answer alone; `coh` needs the task.

Random numbers come in as a generator, a function of (seed, row) where the caller made it so.
"""

import re
from collections.abc import Sequence

import numpy as np

from refine_af.rewards import Example

SEVERITIES = ("light", "heavy")
QUALITIES = ("nat", "und", "coh")
Labels = tuple[float | None, float | None, float | None]  # of QUALITIES

CLEAN: Labels = (1.0, 1.0, 1.0)
LABELS: dict[tuple[str, str], Labels] = {
    ("shuffled", "light"): (0.0, 0.0, None),
    ("shuffled", "heavy"): (0.0, 0.0, 0.0),
    ("dropped", "light"): (0.0, 0.0, None),
    ("dropped", "heavy"): (0.0, 0.0, 0.0),
    ("repeated", "light"): (0.0, 1.0, None),
    ("repeated", "heavy"): (0.0, 1.0, None),
    ("truncated", "light"): (0.0, 1.0, None),
    ("truncated", "heavy"): (0.0, 1.0, None),
    ("off_topic", "light"): (None, 1.0, 0.0),
    ("off_topic", "heavy"): (None, 1.0, 0.0),
    ("mismatched", "light"): (1.0, 1.0, 0.0),
    ("mismatched", "heavy"): (1.0, 1.0, 0.0),
}
CORRUPTIONS = tuple(dict.fromkeys(name for name, _ in LABELS))

_LEAST_WORDS = 4  # of an answer whose words are tampered with: a label has nothing to shuffle
_LEAST_SENTENCE = 4  # words of a sentence that is recognisably from elsewhere
_TRIES = 20
_ALIKE = 8  # answers nearest in length, one of which is taken
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_FINISHED = re.compile(r"[.!?:;)\]}\"'”`\u2019]$")


def corrupt(
    name: str,
    severity: str,
    example: Example,
    others: Sequence[Example],
    rng: np.random.Generator,
) -> Example | None:
    """The example with a worse output; None where this corruption cannot make it worse.

    Args:
        name: of CORRUPTIONS.
        severity: of SEVERITIES.
        others: where answers and sentences from elsewhere are taken from; may hold the example.
    """
    text = example.output
    if name == "mismatched":
        found = mismatched(example, others, rng, severity)
    elif name == "off_topic":
        found = off_topic(example, others, rng, severity)
    else:
        found = _TAMPERING[name](text, rng, severity) if num_words(text) >= _LEAST_WORDS else text
    if found.split() == text.split() or not found.strip():
        return None
    return Example(example.instruction, example.input, found)


def num_words(text: str) -> int:
    """Runs of characters between blanks."""
    return len(text.split())


# The answer alone


def shuffled(text: str, rng: np.random.Generator, severity: str) -> str:
    """The same words in another order; the blanks between them, line breaks too, stay."""
    words, blanks = _pieces(text)
    size = len(words) if severity == "heavy" else min(max(-(-len(words) // 3), 3), len(words))
    first = int(rng.integers(len(words) - size + 1))
    window = words[first : first + size]
    for _ in range(_TRIES):
        mixed = [window[i] for i in rng.permutation(size)]
        if mixed != window:
            break
    return _joined([*words[:first], *mixed, *words[first + size :]], blanks)


def dropped(text: str, rng: np.random.Generator, severity: str) -> str:
    """Without some of its words: in light cases scattered ones or as many in a row."""
    words, blanks = _pieces(text)
    heavy = severity == "heavy"
    size = min(max(round(len(words) * (1 / 2 if heavy else 1 / 6)), 2), len(words) - 1)
    if heavy or rng.random() < 0.5:
        gone = set(rng.choice(len(words), size, replace=False).tolist())
    else:
        first = int(rng.integers(len(words) - size))  # never the end: that is `truncated`
        gone = set(range(first, first + size))
    kept = [i for i in range(len(words)) if i not in gone]
    return _joined([words[i] for i in kept], ["", *(blanks[i] for i in kept[1:])])


def repeated(text: str, rng: np.random.Generator, severity: str) -> str:
    """With a run of its words said again right after itself, once or three to five times."""
    words, blanks = _pieces(text)
    size = min(int(rng.integers(3, 9)), len(words))
    last = int(rng.integers(size, len(words) + 1))
    times = int(rng.integers(3, 6)) if severity == "heavy" else 1
    again = words[last - size : last] * times
    between = [" ", *blanks[last - size + 1 : last]] * times
    return _joined(
        [*words[:last], *again, *words[last:]], [*blanks[:last], *between, *blanks[last:]]
    )


def truncated(text: str, rng: np.random.Generator, severity: str) -> str:
    """Its beginning, cut within a sentence or a line; the text itself where that is not found."""
    words, blanks = _pieces(text)
    low, high = (0.15, 0.5) if severity == "heavy" else (0.6, 0.9)
    for _ in range(_TRIES):
        size = max(round(len(words) * rng.uniform(low, high)), 1)
        if size < len(words) and "\n" not in blanks[size] and not _FINISHED.search(words[size - 1]):
            return _joined(words[:size], blanks[:size])
    return text


_TAMPERING = {
    "shuffled": shuffled,
    "dropped": dropped,
    "repeated": repeated,
    "truncated": truncated,
}


def _pieces(text: str) -> tuple[list[str], list[str]]:
    """(words, what stands before each of them), the text's own margins left out."""
    text = text.strip()
    return re.findall(r"\S+", text), ["", *re.findall(r"\s+", text)]


def _joined(words: Sequence[str], blanks: Sequence[str]) -> str:
    return "".join(blank + word for blank, word in zip(blanks, words, strict=True))


# The answer and its task


def mismatched(
    example: Example, others: Sequence[Example], rng: np.random.Generator, severity: str
) -> str:
    """The answer to something else.

    A light mismatch is the answer to another input of the same instruction; where there is none,
    one of like length. A heavy one is any answer. Without another answer, the text itself.
    """
    own = example.output.split()
    found = [e for e in others if e.context != example.context and e.output.split() != own]
    if severity == "light" and found:
        siblings = [e for e in found if e.instruction == example.instruction]
        nearest = sorted(found, key=lambda e: abs(np.log(max(num_words(e.output), 1) / len(own))))
        found = siblings or nearest[: max(_ALIKE, len(found) // 10)]
    return found[int(rng.integers(len(found)))].output if found else example.output


def off_topic(
    example: Example, others: Sequence[Example], rng: np.random.Generator, severity: str
) -> str:
    """With sentences of another answer: one somewhere, or two or three for the second half."""
    own = _sentences(example.output)
    for _ in range(_TRIES):
        other = others[int(rng.integers(len(others)))]
        foreign = [s for s in _sentences(other.output) if num_words(s) >= _LEAST_SENTENCE]
        foreign = [s for s in foreign if s not in own]
        if foreign and other.instruction != example.instruction:
            break
    else:
        return example.output
    if severity == "light":
        own.insert(int(rng.integers(1, len(own) + 1)), foreign[int(rng.integers(len(foreign)))])
    else:
        size = min(int(rng.integers(2, 4)), len(foreign))
        first = int(rng.integers(len(foreign) - size + 1))
        own = [*own[: max(len(own) // 2, 1)], *foreign[first : first + size]]
    return ("\n" if "\n" in example.output.strip() else " ").join(own)


def _sentences(text: str) -> list[str]:
    return [part for part in _SENTENCE_END.split(text.strip()) if part.strip()]
