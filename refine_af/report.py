"""The report of a run: `report.html`, one page that needs nothing but itself.

It is built from whatever a workdir holds at the time; a stage without files is named as not run.
The page has its figures and styles inline, runs no script and loads nothing. All text that a
model wrote is escaped. Equal workdirs give equal bytes.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup

from refine_af import (
    arms,
    comparison,
    comparison_report,
    dataset_plots,
    dataset_statistics,
    diversity,
    plots,
)
from refine_af.pages import clip, environment
from refine_af.records import Row, read_json, read_rows, stream_rows, write_text

Section = dict[str, Any]
T = TypeVar("T")

_TEMPLATE = "report.html.j2"
_NUM_SAMPLES = 8
_NUM_ROLLOUTS = 4  # shown of the first and of the last step
_NUM_LOOKS = 4  # answers to one instruction during training
_NUM_PREDICTIONS = 12
_MAX_EXAMPLE = 160  # characters of the example of a drop reason

# How a row or a table that no stage has written shows itself.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, jinja2.UndefinedError)

# Figures of answers to held-out instructions.
_PAGE = "report.html"
_FIGURES = {
    "reward": "reward",
    "kl": "KL from the starting model (nats per answer)",
    "tokens": "length (tokens)",
    "ended": "share that end by themselves",
    "usable": "share with a usable output",
}

_INSTRUCTION_REASONS = {
    "too_short": "fewer words than an instruction needs",
    "too_long": "more words than the limit",
    "blacklisted_word": "asks for something that text cannot be, such as an image or a file",
    "starts_with_write_a_program": "begins with “Write a program”",
    "starts_with_punctuation": "the first character is punctuation",
    "non_ascii_start": "the first character is not ASCII",
    "similar": "too close to an instruction that the pool already has (ROUGE-L)",
    "incomplete": "cut off by the token limit",
    "over_quota": "written when there were enough already",
}
_INSTANCE_REASONS = {
    "unparsable": "the answer does not have the form “Input: … Output: …”",
    "empty_output": "nothing after “Output:”",
    "input_equals_output": "the output repeats the input",
    "ends_with_colon": "the input or the output breaks off at a colon",
    "duplicate": "the same input and output were accepted before",
    "conflicting_outputs": "one input with different outputs: all pairs of the instruction go",
    "over_quota": "more pairs than one instruction may have",
    "truncated": "cut off by the token limit",
}


def write_report(workdir: Path) -> Path:
    """Writes the workdir's `report.html`; an earlier one is replaced in a single step.

    Returns:
        The path of the report.

    Raises:
        ValueError: there is no such directory, or a file in it is not what a stage writes.
    """
    if not workdir.is_dir():
        raise ValueError(
            f"no workdir at {workdir}: expected the directory of a run; check the path"
        )
    config = read_json(workdir / "config.json")
    sections = {name: _section(name, workdir) for name in _SECTIONS}
    others = any(path.name != _PAGE for path in workdir.iterdir())
    if not config and not any(sections.values()) and others:
        raise ValueError(f"{workdir}: no run: expected its config.json or files of a stage")
    try:
        page = environment().get_template(_TEMPLATE).render(**sections, config=config)
    except (*_MALFORMED, ValueError) as error:
        raise ValueError(
            f"{workdir}: a file in it is not as the stages write it ({error})"
        ) from error
    path = workdir / _PAGE
    write_text(path, page)
    return path


def _section(name: str, workdir: Path) -> Section | dict[str, Section] | None:
    build, files = _SECTIONS[name]
    try:
        return build(workdir)
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{workdir}: {files}: not as the stage writes them ({reason})") from error


# The sections; None where a stage has left nothing.


def _instructions(workdir: Path) -> Section | None:
    accepted = read_rows(workdir / "instructions.jsonl")
    rejected = read_rows(workdir / "rejected_instructions.jsonl")
    if not accepted and not rejected:
        return None
    texts = [row["instruction"] for row in accepted]
    words = [len(text.split()) for text in texts]
    overlaps = [max(row["most_similar"].values(), default=0.0) for row in accepted]
    counts = diversity.verb_object_counts(texts)
    return {
        "model": accepted[0]["model"] if accepted else None,
        "num_accepted": len(accepted),
        "num_written": len(accepted) + len(rejected),
        "num_classification": sum(row["is_classification"] for row in accepted),
        "median_words": _median(words),
        "median_overlap": _median(overlaps),
        "num_verbs": len({verb for verb, _ in counts}),
        "num_pairs": len(counts),
        "reasons": _reasons(rejected, "instruction", _INSTRUCTION_REASONS),
        "samples": [{**row, "nearest": _nearest(row)} for row in _spread(accepted, _NUM_SAMPLES)],
        "overlap": Markup(plots.overlap(overlaps)),
        "lengths": Markup(plots.instruction_lengths(words)),
        "verbs": Markup(plots.verbs(counts)),
    }


def _ppo(workdir: Path) -> Section | None:
    rows = read_rows(workdir / "ppo" / "metrics.jsonl")
    if not rows:
        return None
    window = max(1, min(10, len(rows) // 4))
    return {
        "num_steps": len(rows),
        "window": window,
        "first_reward": _mean(rows[:window], "reward/mean"),
        "last_reward": _mean(rows[-window:], "reward/mean"),
        "seconds": {
            part: _median(_values(rows, f"time/{part}")) for part in ("sample", "score", "update")
        },
        "metrics": _extremes(rows),
        "alarms": read_rows(workdir / "ppo" / "alarms.jsonl"),
        "samples": _during_training(read_rows(workdir / "ppo" / "samples.jsonl")),
        "rollouts": _first_and_last(stream_rows(workdir / "ppo" / "rollouts.jsonl")),
        "components_of": _component_names(rows),
        "held_out": _held_out(workdir),
        "reward": Markup(plots.reward(rows)),
        "components": Markup(plots.reward_components(rows, _component_names(rows))),
        "divergence": Markup(plots.divergence(rows)),
        "answers": Markup(plots.answers(rows)),
        "policy": Markup(plots.policy(rows)),
        "critic": Markup(plots.critic(rows)),
    }


def _component_names(rows: Sequence[Row]) -> list[str]:
    """Components that the oracle gave, the paper's first in its order."""
    paper = ("rew", "nat", "und", "coh")
    names = {key.removeprefix("reward/") for row in rows for key in row if key[:7] == "reward/"}
    names -= {"mean", "std", "usable_share"}
    return [n for n in paper if n in names] + sorted(names.difference(paper))


def _held_out(workdir: Path) -> Section | None:
    """Answers to instructions that training did not see, before and after."""
    found = read_json(workdir / "ppo" / "evaluation.json")
    if not found:
        return None
    before, after = found["before"], found["after"]
    labels = [f"{i + 1}. {text}" for i, text in enumerate(found["instructions"])]
    rewards = {
        f"{arm} PPO": dict(zip(labels, found["rewards"][arm], strict=True))
        for arm in ("before", "after")
    }
    return {
        **{key: found[key] for key in ("num_instructions", "num_samples", "difference")},
        "rows": [
            *((label, before[key], after[key]) for key, label in _FIGURES.items()),
            *(
                (f"{name}, of usable ones", before["components"].get(name), x)
                for name, x in after["components"].items()
            ),
        ],
        "figure": Markup(plots.held_out(rewards)),
    }


def _by_arm(workdir: Path, build: Callable[[Path], Section | None]) -> dict[str, Section]:
    """What `build` finds of each arm that has it, by the arm's title."""
    found = {arms.TITLES[arm]: build(arms.folder(workdir, arm)) for arm in arms.ARMS}
    return {title: section for title, section in found.items() if section}


def _instances(folder: Path) -> Section | None:
    accepted = read_rows(folder / "instances.jsonl")
    rejected = read_rows(folder / "rejected_instances.jsonl")
    if not accepted and not rejected:
        return None
    return {
        "num_accepted": len(accepted),
        "num_written": len(accepted) + len(rejected),
        "num_instructions": len({row["id"] for row in accepted}),
        "num_with_input": sum(bool(row["input"]) for row in accepted),
        "median_words": _median([len(row["output"].split()) for row in accepted]),
        "reasons": _reasons(rejected, "completion", _INSTANCE_REASONS),
        "samples": _spread(accepted, _NUM_SAMPLES),
    }


def _data_sets(workdir: Path) -> Section | None:
    """The data set of each arm in numbers, and the figures of the first."""
    found = _by_arm(workdir, lambda folder: read_json(folder / "dataset/statistics.json"))
    if not found:
        return None
    tables = [dataset_statistics.table(statistics) for statistics in found.values()]
    names = dict.fromkeys(name for table in tables for name in table)
    figures = dataset_plots.svgs(next(iter(found.values())))
    return {
        "arms": list(found),
        "rows": [(name, [table.get(name) for table in tables]) for name in names],
        "plots": [(Markup(svg), plot) for plot, svg in figures],
    }


def _finetuning(folder: Path) -> Section | None:
    rows = read_rows(folder / "sft" / "metrics.jsonl")
    if not rows:
        return None
    return {
        "num_steps": len(rows),
        "num_epochs": rows[-1]["epoch"],
        "losses": _values(rows, "loss"),
        "held_out": _values(rows, "eval_loss"),
        "loss": Markup(plots.finetuning_loss(rows)),
    }


def _evaluation(workdir: Path) -> Section | None:
    path = workdir / "evaluation.json"
    content = read_json(path)
    if not content.get("arms"):
        return None
    runs = comparison.runs_of(content, str(path))
    names = list(runs)
    compared = comparison.compare(list(runs.values())) if len(runs) > 1 else None
    pairs = compared["pairs"] if compared else []
    method = {
        pair["first"]: pair for pair in pairs if pair["second"] == arms.TITLES[arms.REFINE_AF]
    }
    against = [pair for pair in pairs if pair["second"] == runs[names[-1]].name]
    rouge = {run.name: comparison.by_task(run.scores) for run in runs.values()}
    return {
        "arms": {arm: run.name for arm, run in runs.items()},
        "scores": {arm: run.scores for arm, run in runs.items()},
        "first": names[0],
        "last": names[-1],
        "baseline": method.get(arms.TITLES[arms.SELF_INSTRUCT]),
        "comparisons": dict(zip(names, against, strict=False)),
        "comparison": comparison_report.section(compared) if compared else None,
        "predictions": _predictions(read_rows(workdir / "predictions.jsonl")),
        "figure": Markup(plots.evaluation(rouge)),
    }


def _timings(workdir: Path) -> Section | None:
    seconds = read_json(workdir / "timings.json")
    if not seconds:
        return None
    names = {stage.replace("_", " "): time for stage, time in seconds.items()}
    return {"total": sum(seconds.values()), "figure": Markup(plots.timings(names))}


# By the template's name of it, with the files that it is made of.
_SECTIONS: dict[str, tuple[Callable[[Path], Section | dict[str, Section] | None], str]] = {
    "instructions": (_instructions, "instructions.jsonl, rejected_instructions.jsonl"),
    "ppo": (_ppo, "ppo/metrics.jsonl, ppo/rollouts.jsonl, ppo/evaluation.json"),
    "instances": (
        lambda workdir: _by_arm(workdir, _instances),
        "instances.jsonl, rejected_instances.jsonl",
    ),
    "data_sets": (_data_sets, "dataset/statistics.json"),
    "finetuning": (lambda workdir: _by_arm(workdir, _finetuning), "sft/metrics.jsonl"),
    "evaluation": (_evaluation, "evaluation.json, predictions.jsonl"),
    "timings": (_timings, "timings.json"),
}


# Rows and numbers for the tables.


def _spread(rows: Sequence[T], count: int) -> list[T]:
    """At most `count` rows, evenly spaced from the first to the last: a sample nobody picked."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * (len(rows) - 1) // (count - 1)] for i in range(count)]


def _nearest(row: Row) -> tuple[str, float] | None:
    """The pool entry most similar to an accepted instruction, and the similarity."""
    return max(row["most_similar"].items(), key=lambda item: item[1], default=None)


def _reasons(rejected: Iterable[Row], text: str, meanings: Mapping[str, str]) -> list[Section]:
    """The reasons for dropping, most frequent first, each with its meaning and first example."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rejected:
        groups[row["reason"]].append(row)
    return [
        {
            "name": reason.replace("_", " "),
            "meaning": meanings.get(reason, ""),
            "count": len(rows),
            "example": clip(rows[0][text], _MAX_EXAMPLE),
        }
        for reason, rows in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def _during_training(samples: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Some instructions, each with its answers after some of the steps that were looked at."""
    answers: dict[str, list[Row]] = defaultdict(list)
    for row in samples:
        answers[row["instruction"]].append(row)
    return [
        (instruction, _spread(rows, _NUM_LOOKS))
        for instruction, rows in _spread(list(answers.items()), _NUM_ROLLOUTS)
    ]


def _first_and_last(rollouts: Iterable[Row]) -> list[tuple[int, list[Row]]]:
    """Some rollouts of the first and of the last step that has any."""
    steps: dict[int, list[Row]] = defaultdict(list)
    for row in rollouts:
        steps[row["step"]].append(row)
        if len(steps) > 2:
            del steps[sorted(steps)[1]]
    ends = sorted({min(steps), max(steps)}) if steps else []
    return [(step, _spread(steps[step], _NUM_ROLLOUTS)) for step in ends]


def _predictions(rows: Iterable[Row]) -> list[Section]:
    """All arms' predictions for the instance with the smallest id, of some tasks."""
    found: dict[str, dict[str, Section]] = defaultdict(dict)
    for row in rows:
        new = {key: row.get(key) for key in ("task", "id", "input", "references")} | {"arms": {}}
        found[row["task"]].setdefault(row["id"], new)["arms"][row["arm"]] = row["prediction"]
    return [by_id[min(by_id)] for by_id in _spread(list(found.values()), _NUM_PREDICTIONS)]


def _extremes(rows: Sequence[Row]) -> list[tuple[str, list[float]]]:
    """First, last, smallest and largest value of every metric."""
    names = sorted({name for row in rows for name in row} - {"step"})
    columns = {name: _values(rows, name) for name in names}
    return [(name, [v[0], v[-1], min(v), max(v)]) for name, v in columns.items() if v]


def _values(rows: Iterable[Row], key: str) -> list[float]:
    values = [row[key] for row in rows if row.get(key) is not None]
    return [value for value in values if math.isfinite(value)]


def _mean(rows: Iterable[Row], key: str) -> float | None:
    values = _values(rows, key)
    return statistics.fmean(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
