"""Evaluated runs side by side: outcomes by task, gains, and how sure they are.

Two runs are compared on the same instances of the same tasks, so every gain is paired. A task is
won when its ROUGE-L, to the four decimals of `evaluation.json`, is higher than that of the other
run. Intervals are percentile bootstraps of a mean (`scipy.stats.bootstrap`; Efron and Tibshirani,
1993, "An Introduction to the Bootstrap", chapter 13):

    over all         tasks are drawn again, each with its gain: how sure it is for other such tasks
    of a category    its instances are drawn again, each with its gain: how sure it is for these
    of a task        tasks, had they other instances

Every interval draws from the same seed anew. Several seeds of one training may stand for one run,
by the means of their scores.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from refine_af import records
from refine_af.arms import TITLES
from refine_af.randomness import generator

CONFIDENCE, NUM_RESAMPLES = 0.95, 9_999
_SCORES = "evaluation.json"
_MOST_DRAWN = 4_000_000  # numbers in memory at a time

Interval = tuple[float, float] | None  # None: one value alone, or values that are not known
Scores = Mapping[str, Any]  # what `superni.score` returns
TaskScores = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluated model."""

    name: str  # for readers
    where: str  # for errors
    scores: Scores
    instances: Mapping[str, TaskScores]  # ROUGE-L x 100 by task and id; may be empty


def open_run(text: str) -> Run:
    """Read a run from the `evaluation.json` of a directory, or the mean of several runs.

    Args:
        text: `[NAME=]DIR[:ARM][+DIR[:ARM]...]`. Without an arm, the only one or else the last of
            `TITLES` that is there; without a name, the directory and the arm as given.

    Raises:
        ValueError: there is no such file or arm, it is not as `evaluate` writes it, or the runs
            are of different tasks or instances.
    """
    name, place = "", text
    if not Path(place).expanduser().is_dir() and "=" in text:
        name, _, place = text.partition("=")
    directory, arm = _folder_and_arm(place)
    whole = directory.is_dir() and "+" not in arm
    runs = [_open(part) for part in ([place] if whole else place.split("+"))]
    return dataclasses.replace(_mean(runs), name=name or place)


def _folder_and_arm(place: str) -> tuple[Path, str]:
    directory, arm = Path(place).expanduser(), ""
    if not directory.is_dir() and ":" in place:
        folder, _, arm = place.rpartition(":")
        directory = Path(folder).expanduser()
    return directory, arm


def _open(place: str) -> Run:
    directory, arm = _folder_and_arm(place)
    path = directory / _SCORES
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; expected [NAME=]DIR[:ARM][+DIR[:ARM]...] of evaluated runs"
        )
    content = records.read_json(path)
    runs = runs_of(content, str(path))
    arm = arm or next((known for known in reversed(TITLES) if known in runs), "")
    arm = next(iter(runs)) if len(runs) == 1 and not arm else arm
    if arm not in runs:
        raise ValueError(f"{path}: has the arms {list(runs)}; expected DIR:ARM with one of them")
    return runs[arm]


def _mean(runs: Sequence[Run]) -> Run:
    """Seeds of one training as one run: every score is the mean of theirs (4 decimals)."""
    first, *others = runs
    if not others:
        return first
    if len({run.where for run in runs}) < len(runs):
        raise ValueError(f"{first.where}: twice in a mean, expected different runs")
    for run in others:
        if run.name != first.name:
            arms = f"{first.name!r} and {run.name!r}"
            raise ValueError(f"{first.where} and {run.where}: {arms}, expected one arm in a mean")
        check_pair(first, run)

    def of(part: str) -> dict[str, Any]:
        names = first.scores[part]
        return {name: _mean_row([run.scores[part][name] for run in runs]) for name in names}

    return Run(
        first.name,
        ", ".join(run.where for run in runs),
        {
            "all": _mean_row([run.scores["all"] for run in runs]),
            "tasks": of("tasks"),
            "categories": of("categories"),
        },
        {
            task: {id: _mean_of([run.instances[task][id] for run in runs]) for id in ids}
            for task, ids in first.instances.items()
            if all(task in run.instances for run in runs)
        },
    )


def _mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means = {key: _mean_of([row[key] for row in rows]) for key in ("exact_match", "rougeL")}
    return {**rows[0], **means}


def _mean_of(values: Sequence[float]) -> float:
    return round(math.fsum(values) / len(values), 4)


def runs_of(content: Mapping[str, Any], where: str) -> dict[str, Run]:
    """Arms of an `evaluation.json`, in the order of `TITLES`, others after the first.

    Raises:
        ValueError: it is not as `evaluate` writes it.
    """
    known = list(TITLES)
    try:
        arms = content["arms"]
        order = sorted(arms, key=lambda arm: known.index(arm) if arm in known else 1)
        found = {arm: _run(arm, content, where) for arm in order}
    except (AttributeError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: not as the stage writes it ({reason})") from None
    return found


def _run(arm: str, content: Mapping[str, Any], where: str) -> Run:
    scores = content["arms"][arm]
    for part in ("tasks", "categories"):
        for row in scores[part].values():
            _check_row(row)
    _check_row(scores["all"])
    if not scores["tasks"]:
        raise LookupError("no tasks")
    for row in scores["tasks"].values():
        scores["categories"][row["category"]]
    instances = content.get("instances", {}).get(arm, {})
    for task, row in instances.items():
        scores["tasks"][task]
        for value in row.values():
            _check_score(value)
    return Run(TITLES.get(arm, arm), where, scores, instances)


def _check_row(row: Mapping[str, Any]) -> None:
    if type(row["instances"]) is not int or row["instances"] < 1:
        raise TypeError(f"{row['instances']!r} is no number of instances")
    for key in ("exact_match", "rougeL"):
        _check_score(row[key])


def _check_score(value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value <= 100:
        raise TypeError(f"{value!r} is no score from 0 to 100")


def by_task(scores: Scores) -> dict[str, float]:
    """ROUGE-L of every task."""
    return {name: row["rougeL"] for name, row in scores["tasks"].items()}


def outcomes(first: TaskScores, second: TaskScores) -> dict[str, float]:
    """On how many tasks the second run's score is above, equal to or below the first's.

    Args:
        first, second: scores of the same tasks, at least one.

    Returns:
        The counts `won`, `tied` and `lost`, and `share_improved`, 100 * won / tasks (4 decimals).
    """
    gains = [second[name] - first[name] for name in first]
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    share = round(100 * won / len(gains), 4)
    return {"won": won, "tied": len(gains) - won - lost, "lost": lost, "share_improved": share}


def interval(values: Sequence[float], seed: int) -> Interval:
    """Bootstrap interval of the mean of `values`; None of fewer than two."""
    if len(values) < 2:
        return None
    found = stats.bootstrap(
        (np.asarray(values, np.float64),),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, _MOST_DRAWN // len(values)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=generator(seed, "comparison/bootstrap"),
    ).confidence_interval
    return round(float(found.low), 4), round(float(found.high), 4)


def compare(runs: Sequence[Run], seed: int = 0) -> dict[str, Any]:
    """Compare every run with those before it.

    Args:
        runs: at least two, a baseline before what is held against it.
        seed: of the bootstrap.

    Returns:
        For JSON: `method`; `runs` with their scores over all, and by category and task; and
        `pairs`, each of a `first` and a `second` run with the second's `won`, `tied`, `lost`,
        `share_improved` and `gain` (the mean over tasks of the gain in ROUGE-L), the intervals of
        these two, and the same by category and task.

    Raises:
        ValueError: fewer than two runs, two of one name, or runs of different tasks or instances.
    """
    _check_runs(runs)
    return {
        "method": {
            "score": "rougeL",
            "interval": "percentile bootstrap, scipy.stats.bootstrap",
            "drawn": {"all": "tasks", "category": "instances", "task": "instances"},
            "confidence": CONFIDENCE,
            "num_resamples": NUM_RESAMPLES,
            "seed": seed,
        },
        "runs": [{"name": run.name, "evaluation": run.where, **run.scores} for run in runs],
        "pairs": [_pair(*two, seed) for two in itertools.combinations(runs, 2)],
    }


def _pair(first: Run, second: Run, seed: int) -> dict[str, Any]:
    before, after = by_task(first.scores), by_task(second.scores)
    gains = {name: after[name] - before[name] for name in sorted(before)}
    single = _instance_gains(first, second)
    members: dict[str, list[str]] = {}
    for name in gains:
        members.setdefault(second.scores["tasks"][name]["category"], []).append(name)
    improved = [100.0 * (gain > 0) for gain in gains.values()]
    return {
        "first": first.name,
        "second": second.name,
        "num_tasks": len(gains),
        **outcomes(before, after),
        "share_improved_interval": interval(improved, seed),
        "gain": round(math.fsum(gains.values()) / len(gains), 4),
        "gain_interval": interval(list(gains.values()), seed),
        "categories": {
            category: {
                "num_tasks": len(names),
                **outcomes(_only(names, before), _only(names, after)),
                **_gain(
                    first.scores["categories"][category], second.scores["categories"][category]
                ),
                "gain_interval": interval(_pooled([single[name] for name in names]), seed),
            }
            for category, names in sorted(members.items())
        },
        "tasks": {
            name: {
                "outcome": "won" if gain > 0 else "lost" if gain < 0 else "tied",
                **_gain(first.scores["tasks"][name], second.scores["tasks"][name]),
                "gain_interval": interval(single[name], seed),
            }
            for name, gain in gains.items()
        },
    }


def _pooled(gains: Sequence[Sequence[float]]) -> list[float]:
    """All together; none where those of a task are not known, since a part would mislead."""
    return [gain for task in gains for gain in task] if all(gains) else []


def _only(names: Sequence[str], scores: TaskScores) -> dict[str, float]:
    return {name: scores[name] for name in names}


def _gain(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {"gain": round(second["rougeL"] - first["rougeL"], 4)}


def _instance_gains(first: Run, second: Run) -> dict[str, list[float]]:
    """By task the gains of its instances; none where a run does not have their scores."""
    return {
        name: [second.instances[name][id] - score for id, score in first.instances[name].items()]
        if name in first.instances and name in second.instances
        else []
        for name in first.scores["tasks"]
    }


def _check_runs(runs: Sequence[Run]) -> None:
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run to compare, expected at least two")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"runs to compare: {names}, expected a different NAME= for each")
    for run in runs[1:]:
        check_pair(runs[0], run)


def check_pair(first: Run, second: Run) -> None:
    """Refuse runs that are not of the same tasks and instances.

    Raises:
        ValueError: with the first difference.
    """
    where = f"{first.where} and {second.where}"
    for part, what in (("tasks", "task"), ("categories", "category")):
        _same(first.scores[part], second.scores[part], what, where)
    for task in first.scores["tasks"]:
        rows = [run.scores["tasks"][task] for run in (first, second)]
        sizes = [f"{row['instances']} of {row['category']!r}" for row in rows]
        if sizes[0] != sizes[1]:
            found = " and ".join(sizes)
            raise ValueError(
                f"{where}: {task} has {found} instances, expected the same in both; evaluate both "
                "with the same tasks, split and max_instances"
            )
    for task in first.instances.keys() & second.instances.keys():
        _same(first.instances[task], second.instances[task], "instance", where)


def _same(first: Mapping[str, Any], second: Mapping[str, Any], what: str, where: str) -> None:
    odd = first.keys() ^ second.keys()
    if odd:
        raise ValueError(
            f"{where}: only one has scores of the {what} {min(odd)!r}, expected the same in both"
        )


def to_json(comparison: Mapping[str, Any]) -> str:
    """What `compare` returned, as the text of a file."""
    return json.dumps(comparison, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
