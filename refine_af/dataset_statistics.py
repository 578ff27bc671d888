"""What a data set holds, in numbers: the tables and figures of Self-Instruct.

Wang et al., https://arxiv.org/abs/2212.10560: table 1 (counts and lengths in words), figure 3
(root verbs and their objects), figure 4 (ROUGE-L of each instruction with its nearest seed), figure
5 (lengths); besides, vocabulary and rewards.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from refine_af import diversity
from refine_af.novelty import NoveltyPool
from refine_af.records import Row

REWARD = "reward"  # columns of that and of each component, `reward_NAME`, are the quality
_NUM_VERBS, _NUM_OBJECTS = 20, 4  # shown, as in the paper
_WORD = re.compile(r"\w+")
_MOST_BARS = 25


def of_rows(rows: Sequence[Row], seeds: Sequence[str]) -> dict[str, Any]:
    """Statistics of a data set, ready for JSON.

    Args:
        rows: of the data set, at least one.
        seeds: instructions of the seed tasks.
    """
    instructions = list(dict.fromkeys(row["instruction"] for row in rows))
    outputs = [row["output"] for row in rows]
    inputs = [row["input"] for row in rows if row["input"]]
    rewards = [name for name in rows[0] if name == REWARD or name.startswith(f"{REWARD}_")]
    return {
        "rows": len(rows),
        "instructions": len({row["id"] for row in rows}),
        "classification_rows": sum(row["is_classification"] for row in rows),
        "rows_with_input": len(inputs),
        **of_instructions(instructions, seeds),
        "input_words": _of_lengths(inputs),
        "output_words": _of_lengths(outputs),
        "output_vocabulary": vocabulary(outputs),
        "output_shares": shares(rows),
        "rewards": {
            name: figures
            for name in rewards
            if (figures := summary([row[name] for row in rows if row[name] is not None]))
        },
    }


def shares(rows: Sequence[Row]) -> dict[str, float]:
    """Of the rows: outputs of one word, without a word that their input lacks, and different ones.

    A reward that is gamed shows here first: in copies, in one-word answers, in the same answer.
    """
    single = sum(len(row["output"].split()) == 1 for row in rows)
    own = [_words(row["output"]) - _words(row["input"]) for row in rows]
    different = len({row["output"] for row in rows})
    return {
        name: round(count / len(rows), 4)
        for name, count in {
            "one_word": single,
            "nothing_of_their_own": sum(not words for words in own),
            "different": different,
        }.items()
    }


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def table(statistics: Mapping[str, Any]) -> dict[str, float]:
    """What a table of several data sets compares, by its name there."""
    verbs, words = statistics["verbs"], statistics["instruction_vocabulary"]
    means = {
        f"mean {label}": statistics[name]["mean"]
        for label, name in {
            "words in an instruction": "instruction_words",
            "words in an input that is not empty": "input_words",
            "words in an output": "output_words",
            "ROUGE-L with the nearest seed": "seed_overlap",
        }.items()
        if statistics[name]
    }
    rewards = {f"mean {name}": x["mean"] for name, x in statistics["rewards"].items()}
    return {
        "rows": statistics["rows"],
        "instructions": statistics["instructions"],
        "rows with an input": statistics["rows_with_input"],
        "classification rows": statistics["classification_rows"],
        "different leading verbs": verbs["num_verbs"],
        "different pairs of verb and object": verbs["num_pairs"],
        "different words in instructions": words["different_words"],
        "different words in outputs": statistics["output_vocabulary"]["different_words"],
        **means,
        **{f"share of outputs {label}": share for label, share in _labelled(statistics)},
        **rewards,
    }


_SHARES = {
    "one_word": "of one word",
    "nothing_of_their_own": "with no word that the input lacks",
    "different": "that are different",
}


def _labelled(statistics: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Shares of outputs; none in a file of an earlier version."""
    found = statistics.get("output_shares", {})
    return [(label, found[name]) for name, label in _SHARES.items() if name in found]


def of_instructions(texts: Sequence[str], seeds: Sequence[str]) -> dict[str, Any]:
    """How diverse instructions are, and how far from the seeds'."""
    overlaps = [near.maximum for near in NoveltyPool(seeds).compare_all(texts)]
    return {
        "instruction_words": _of_lengths(texts),
        "instruction_vocabulary": vocabulary(texts),
        "seed_overlap": summary(overlaps, np.linspace(0, 1, 21)),
        "verbs": verbs(texts),
    }


def verbs(texts: Iterable[str]) -> dict[str, Any]:
    """Leading verbs with their objects; of the most frequent ones, each with its count."""
    counts = diversity.verb_object_counts(texts)
    objects: dict[str, Counter[str]] = defaultdict(Counter)
    for (verb, noun), count in counts.items():
        objects[verb][noun] += count
    ranked = sorted(objects.items(), key=lambda item: (-item[1].total(), item[0]))
    return {
        "num_verbs": len(objects),
        "num_pairs": len(counts),
        "top": [
            {"verb": verb, "count": nouns.total(), "objects": _most_frequent(nouns)}
            for verb, nouns in ranked[:_NUM_VERBS]
        ],
    }


def _most_frequent(nouns: Counter[str]) -> dict[str, int]:
    named = [item for item in nouns.items() if item[0]]
    return dict(sorted(named, key=lambda item: (-item[1], item[0]))[:_NUM_OBJECTS])


def vocabulary(texts: Iterable[str]) -> dict[str, Any]:
    """Words in lower case, different ones, and the share of pairs of neighbours that are."""
    words = [_WORD.findall(text.lower()) for text in texts]
    pairs = [pair for text in words for pair in itertools.pairwise(text)]
    return {
        "words": sum(map(len, words)),
        "different_words": len(set().union(*words)),
        "different_pairs_share": round(len(set(pairs)) / max(len(pairs), 1), 4),
    }


def _of_lengths(texts: Iterable[str]) -> dict[str, Any]:
    lengths = [len(text.split()) for text in texts]
    width = -(-(max(lengths, default=0) + 1) // _MOST_BARS)
    return summary(lengths, np.arange(0, max(lengths, default=0) + width + 1, width) - 0.5)


def summary(values: Sequence[float], edges: np.ndarray | None = None) -> dict[str, Any]:
    """Mean, deviation, extremes and quartiles with a histogram; {} without values."""
    if not values:
        return {}
    numbers = np.asarray(values, np.float64)
    counts, edges = np.histogram(numbers, _MOST_BARS if edges is None else edges)
    low, middle, high = np.quantile(numbers, [0.25, 0.5, 0.75])
    figures = {
        "mean": numbers.mean(),
        "deviation": numbers.std(),
        "least": numbers.min(),
        "first_quartile": low,
        "median": middle,
        "third_quartile": high,
        "largest": numbers.max(),
    }
    histogram = {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}
    return {name: round(float(x), 4) for name, x in figures.items()} | {"histogram": histogram}
