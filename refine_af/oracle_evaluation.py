"""How well an oracle tells good answers from corrupted ones, on tasks that were held out."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from refine_af import config as config_lib
from refine_af import corruptions, oracle_examples, rewards
from refine_af.corruptions import CORRUPTIONS, LABELS, QUALITIES, SEVERITIES
from refine_af.oracle_examples import Group
from refine_af.randomness import generator
from refine_af.records import Row
from refine_af.rewards import Example, Oracle
from refine_af.seeds import SeedTask

PREFERENCES = "preferences"
_COLUMNS = ("rew", *QUALITIES, "reward")
_SEED = 20_250_506  # of the corruptions that measure: the same for every oracle
_NUM_BINS = 10


class Pair(NamedTuple):
    """Two answers to one task, the first the better one."""

    corruption: str  # or PREFERENCES
    severity: str
    better: Example
    worse: Example


class Curve(NamedTuple):
    """Reliability: of the examples with about this prediction, the share for which it held."""

    predicted: list[float]  # mean of each bin that is not empty
    observed: list[float]
    counts: list[int]


def corrupted_pairs(tasks: Sequence[SeedTask], num_draws: int) -> list[Pair]:
    """Every answer against each corruption and severity of it, `num_draws` times.

    Pairs whose texts are equal, and equal pairs of two draws, are left out: a label has no words
    to shuffle.
    """
    examples = oracle_examples.examples_of(tasks)
    pairs: dict[Pair, None] = {}
    for kind, (name, severity) in enumerate(LABELS):
        for row, example in enumerate(examples):
            for draw in range(num_draws):
                rng = generator(_SEED, "oracle/held_out", kind, row, draw)
                worse = corruptions.corrupt(name, severity, example, examples, rng)
                if worse is not None:
                    pairs[Pair(name, severity, example, worse)] = None
    return list(pairs)


def preference_pairs(groups: Sequence[Group]) -> list[Pair]:
    """The first answer of each group against the others."""
    return [
        Pair(PREFERENCES, "", group[0].example, other.example)
        for group in groups
        for other in group[1:]
    ]


class Scores(NamedTuple):
    """Pairs, and the components of both sides, float64 [P] each."""

    pairs: Sequence[Pair]
    better: Mapping[str, np.ndarray]
    worse: Mapping[str, np.ndarray]


def score(oracle: Oracle, pairs: Sequence[Pair]) -> Scores:
    """Components of all answers; `reward` is the default formula's."""
    examples = [p.better for p in pairs] + [p.worse for p in pairs]
    unique = list(dict.fromkeys(examples))
    table = dict(oracle(unique))
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    table["reward"] = np.asarray([rewards.combine(row, config_lib.Reward()) for row in rows])
    place = {example: i for i, example in enumerate(unique)}
    index = np.asarray([place[example] for example in examples])
    better, worse = index[: len(pairs)], index[len(pairs) :]
    return Scores(
        pairs,
        {name: column[better] for name, column in table.items()},
        {name: column[worse] for name, column in table.items()},
    )


def accuracies(scores: Scores) -> list[Row]:
    """Rows `corruption, severity, pairs, rew, nat, und, coh, reward`, the last one over all.

    An accuracy is the share of pairs whose better answer scores above the other one (a tie is a
    half). A quality that a corruption leaves alone, or that is not judged, has None.
    """
    right = {
        name: (scores.better[name] > scores.worse[name])
        + 0.5 * (scores.better[name] == scores.worse[name])
        for name in _COLUMNS
    }
    names = np.asarray([pair.corruption for pair in scores.pairs])
    severities = np.asarray([pair.severity for pair in scores.pairs])
    rows = []
    for name in (*CORRUPTIONS, PREFERENCES):
        both = [(severity, (names == name) & (severities == severity)) for severity in SEVERITIES]
        for severity, chosen in [*both, ("all", names == name)]:
            known = _suffering(name, severity)
            if chosen.any():
                rows.append(_row(name, severity, right, chosen, known))
    everything = np.ones(len(names), bool)
    return [*rows, _row("all", "all", right, everything, ())]


def _suffering(name: str, severity: str) -> list[str]:
    """Qualities that a corruption lowers."""
    labels = [LABELS[name, s] for s in SEVERITIES if severity in (s, "all") and (name, s) in LABELS]
    columns = zip(*labels, strict=True)
    return [q for q, known in zip(QUALITIES, columns, strict=False) if set(known) == {0.0}]


def _row(
    name: str,
    severity: str,
    right: Mapping[str, np.ndarray],
    chosen: np.ndarray,
    known: Sequence[str],
) -> Row:
    row: Row = {"corruption": name, "severity": severity, "pairs": int(chosen.sum())}
    shown = ("rew", *known, "reward")
    return row | {c: float(right[c][chosen].mean()) if c in shown else None for c in _COLUMNS}


def find(rows: Sequence[Row], corruption: str, severity: str = "all") -> Row:
    """Row of one corruption."""
    return next(r for r in rows if (r["corruption"], r["severity"]) == (corruption, severity))


def table(rows: Sequence[Row]) -> str:
    """Accuracies in percent, as a table in Markdown."""
    lines = [
        f"| {'corruption':<11} | severity | pairs |" + "".join(f"{c:>7} |" for c in _COLUMNS),
        "|---|---|---:|" + "---:|" * len(_COLUMNS),
    ]
    for row in rows:
        cells = ["" if row[c] is None else f"{100 * row[c]:.1f}" for c in _COLUMNS]
        lines.append(
            f"| {row['corruption']:<11} | {row['severity']:<8} | {row['pairs']:>5} |"
            + "".join(f"{cell:>7} |" for cell in cells)
        )
    return "\n".join(lines)


def reliability(scores: Scores) -> dict[str, Curve]:
    """Curves of `rew` (probability of the preferred answer) and of each quality.

    `rew` is seen from its favourite: predicted sigmoid(|difference|), observed how often it is
    the better answer. Qualities are over the labels of each answer of a pair, good ones once.
    """
    difference = scores.better["rew"] - scores.worse["rew"]
    curves = {"rew": _curve(1 / (1 + np.exp(-np.abs(difference))), difference > 0)}
    for column, name in enumerate(QUALITIES):
        known: dict[Example, tuple[float, float]] = {}
        for i, pair in enumerate(scores.pairs):
            label = LABELS.get((pair.corruption, pair.severity), (None,) * len(QUALITIES))[column]
            if pair.corruption in CORRUPTIONS:
                known[pair.better] = float(scores.better[name][i]), 1.0
            if label is not None:
                known[pair.worse] = float(scores.worse[name][i]), label
        if known:
            predicted, observed = np.asarray(list(known.values())).T
            curves[name] = _curve(predicted, observed)
    return curves


def _curve(predicted: np.ndarray, observed: np.ndarray) -> Curve:
    bins = np.minimum((predicted * _NUM_BINS).astype(int), _NUM_BINS - 1)
    chosen = [bins == i for i in np.unique(bins)]
    return Curve(
        [float(predicted[c].mean()) for c in chosen],
        [float(observed[c].mean()) for c in chosen],
        [int(c.sum()) for c in chosen],
    )
