"""Evaluate models on Super-NaturalInstructions tasks: greedy answers, scores, a file of each."""

import bisect
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from transformers import PreTrainedTokenizerBase

from refine_af import comparison, records, superni, tokens
from refine_af import config as config_lib
from refine_af.config import Sampling
from refine_af.engine import Engine
from refine_af.models import processes
from refine_af.models.transformer import Params
from refine_af.progress import bar
from refine_af.requests import Request
from refine_af.seeds import EVALUATION_DIR
from refine_af.superni import Instance, Task

PREDICTIONS = "predictions.jsonl"
SCORES = "evaluation.json"
_FIELDS = ("arm", "task", "id", "prediction")  # of a prediction


def load_tasks(options: config_lib.Evaluation) -> list[Task]:
    """Tasks that the options name; the bundled ones by default."""
    directory = Path(options.tasks) if options.tasks else EVALUATION_DIR
    split = Path(options.split) if options.split else None
    return superni.load_tasks(directory, split, options.max_instances, options.track)


@dataclasses.dataclass(frozen=True)
class Question:
    """One instance with its prompt."""

    task: str
    instance: Instance
    prompt_ids: tuple[int, ...]


def questions(
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    options: config_lib.Evaluation,
    context: int,
) -> list[Question]:
    """All instances, shortest prompt first, so that batches pad little.

    An input that the context has no room for loses its end; a warning says how many did.

    Args:
        context: tokens that the model reads and writes at most.

    Raises:
        ValueError: a task has no room even without an input.
    """

    room = context - options.max_new_tokens

    def encode(text: str, fmt: str) -> list[int]:
        return tokens.encode_prompt(tokenizer, text, fmt)

    def ask(task: Task, instance: Instance) -> list[int]:
        prompt = superni.build_prompt(
            task,
            instance,
            options.num_examples,
            lambda text: len(encode(text, "raw")),
            min(options.max_source_tokens, room),
        )
        # Without the blank after "Output:", the model's first token brings its own.
        return encode(prompt.rstrip(), options.format)

    found, num_cut = [], 0
    for task in tasks:
        for instance in task.instances:
            ids = ask(task, instance)
            if len(ids) > room:
                ids, num_cut = ask(task, _shortened(task, instance, ask, room)), num_cut + 1
            found.append(Question(task.name, instance, tuple(ids)))
    if num_cut:
        logging.warning(
            "evaluation: the ends of %d inputs were cut off, which left no room for %d tokens in "
            "the model's context of %d",
            num_cut,
            options.max_new_tokens,
            context,
        )
    return sorted(found, key=lambda q: (len(q.prompt_ids), q.task, q.instance.id))


def _shortened(
    task: Task, instance: Instance, ask: Callable[[Task, Instance], list[int]], room: int
) -> Instance:
    """With as much of the beginning of its input as leaves a prompt of `room` tokens."""

    def of(length: int) -> Instance:
        return dataclasses.replace(instance, input=instance.input[:length])

    if len(ask(task, of(0))) > room:
        raise ValueError(
            f"{task.name}: its definition and examples leave no room in the model's context; lower "
            "evaluation.max_source_tokens or evaluation.max_new_tokens"
        )
    lengths = range(len(instance.input))
    least = bisect.bisect_right(lengths, room, key=lambda n: len(ask(task, of(n))))
    return of(max(least - 1, 0))


def predict(
    engine: Engine,
    params: Params,
    asked: Sequence[Question],
    options: config_lib.Evaluation,
    path: Path,
    arm: str,
) -> None:
    """Append the answers of one arm that are not in `path` yet, a batch at a time."""
    size = options.batch_size
    records.cut(path)
    rows = records.read_rows(path, _FIELDS)
    known = {(row["task"], row["id"]) for row in rows if row["arm"] == arm}
    # A chat model ends its turn; a plain one goes on with the next example after a blank line.
    stop = ("\n\n",) if options.format == "raw" else ()
    sampling = Sampling(temperature=0.0, max_new_tokens=options.max_new_tokens, stop=stop)
    with bar(f"evaluate {arm}", total=len(asked), unit="answer") as progress:
        for first in range(0, len(asked), size):
            batch = asked[first : first + size]
            missing = [q for q in batch if (q.task, q.instance.id) not in known]
            if missing:
                # The whole batch is asked again, so that its numerics are those of one go.
                answers = engine.generate(
                    params,
                    [Request(q.prompt_ids, sampling) for q in batch],
                    progress.count_tokens,
                )
                texts = dict(zip(batch, answers, strict=True))
                records.append_rows(path, [_row(arm, q, texts[q].text.strip()) for q in missing])
            progress.update(len(batch))


def _row(arm: str, question: Question, prediction: str) -> records.Row:
    instance = question.instance
    return {
        "arm": arm,
        "task": question.task,
        "id": instance.id,
        "input": instance.input,
        "references": list(instance.references),
        "prediction": prediction,
    }


def write_scores(tasks: Sequence[Task], predictions: Path, target: Path) -> dict[str, Any]:
    """Score every arm of a predictions file, as `write_scores_of`."""
    arms: dict[str, dict[str, str]] = {}
    for row in records.read_rows(predictions, _FIELDS):
        arms.setdefault(row["arm"], {})[row["id"]] = row["prediction"]
    return write_scores_of(arms, tasks, target)


def write_scores_of(
    arms: Mapping[str, Mapping[str, str]], tasks: Sequence[Task], target: Path
) -> dict[str, Any]:
    """Score predictions by arm and instance id, and write the scores as JSON.

    Returns:
        What is written: `arms`, for each what `superni.score` returns; `comparison`, the outcomes
        of `refine_af` against `base` where there are both; `instances`, the ROUGE-L (x 100, 4
        decimals) of each instance by arm, task and id, which a comparison of runs needs.
    """
    return processes.once(lambda: _write_scores_of(arms, tasks, target))


def _write_scores_of(
    arms: Mapping[str, Mapping[str, str]], tasks: Sequence[Task], target: Path
) -> dict[str, Any]:
    single = {arm: superni.score_instances(tasks, found) for arm, found in arms.items()}
    scores = {arm: superni.summarize(tasks, found) for arm, found in single.items()}
    result: dict[str, Any] = {"arms": scores}
    if {"base", "refine_af"} <= scores.keys():
        rouge = [comparison.by_task(scores[arm]) for arm in ("base", "refine_af")]
        result["comparison"] = comparison.outcomes(*rouge)
    result["instances"] = {
        arm: {
            task.name: {each.id: round(100 * found[each.id][1], 4) for each in task.instances}
            for task in tasks
        }
        for arm, found in single.items()
    }
    records.write_text(target, json.dumps(result, indent=1) + "\n")
    return result


def check_predictions(predictions: Mapping[str, str], tasks: Sequence[Task], where: Path) -> None:
    """Warn of instances without a prediction, which count as the empty string.

    Raises:
        ValueError: no prediction is for any instance.
    """
    ids = [instance.id for task in tasks for instance in task.instances]
    missing = [id for id in ids if id not in predictions]
    if len(missing) == len(ids):
        raise ValueError(f"{where}: no id is one of the tasks', such as {ids[0]}")
    if missing:
        text = "%s: %d of %d instances have no prediction and count as empty, the first is %s"
        logging.warning(text, where, len(missing), len(ids), missing[0])


def outline(path: Path) -> str:
    """Scores over all in an `evaluation.json` as text, a line for each arm.

    Raises:
        ValueError: it is not as `write_scores` writes it.
    """
    runs = comparison.runs_of(records.read_json(path), str(path))
    base = runs.get("base")
    width = max(len(run.name) for run in runs.values())
    lines = []
    for run in runs.values():
        scores = run.scores["all"]
        line = f"{run.name:{width}}  ROUGE-L {scores['rougeL']:7.4f}"
        line += f", exact match {scores['exact_match']:7.4f}"
        if base and run is not base:
            comparison.check_pair(base, run)
            tasks = comparison.outcomes(*(comparison.by_task(r.scores) for r in (base, run)))
            line += f"; against the base model {tasks['won']} tasks won, {tasks['tied']} tied, "
            line += f"{tasks['lost']} lost"
        lines.append(line)
    return "\n".join(lines)


def as_table(scores: Mapping[str, Any]) -> str:
    """Scores of one arm as text: a line for each task, for each category and for all."""
    rows = [
        *(("task", name, row) for name, row in scores["tasks"].items()),
        *(("category", name, row) for name, row in scores["categories"].items()),
        ("all", "", scores["all"]),
    ]
    width = max(len(name) for _, name, _ in rows)
    lines = [f"{'':8} {'':{width}} {'instances':>9} {'exact_match':>11} {'rougeL':>8}"]
    lines += [
        f"{kind:8} {name:{width}} {row['instances']:9} {row['exact_match']:11.4f} "
        f"{row['rougeL']:8.4f}"
        for kind, name, row in rows
    ]
    return "\n".join(lines)
