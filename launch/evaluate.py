"""Evaluate on Super-NaturalInstructions tasks: a workdir's arms, any model, or given predictions.

With --config and --workdir: the stage. With --model or --predictions, and --output: alone.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from absl import logging

from refine_af import base_model, evaluation, pipeline, records, superni
from refine_af.config import TRACKS, Evaluation, Model
from refine_af.launch import _files, _stages, flags

_WORKDIR = flags.workdir_flags()
_MODEL = absl_flags.DEFINE_string("model", None, flags.MODEL_HELP)
_PREDICTIONS = absl_flags.DEFINE_string(
    "predictions", None, "JSONL rows with id and prediction; they are scored, no model runs."
)
_TASKS = absl_flags.DEFINE_string(
    "tasks", "", "Directory of task files; empty: the 12 bundled tasks."
)
_SPLIT = absl_flags.DEFINE_string(
    "split", "", "File with a task name a line; empty: every task of --tasks."
)
_TRACK = absl_flags.DEFINE_enum(
    "track", "default", TRACKS, "ROUGE-L of English words, or (xlingual) of GPT-2's tokens."
)
_OUTPUT = absl_flags.DEFINE_string(
    "output", None, "Directory for evaluation.json and, of a model, its answers."
)
_NUM_EXAMPLES = absl_flags.DEFINE_integer(
    "num_examples", 2, "Solved examples of its task before each question.", lower_bound=0
)
_FORMAT = flags.format_flag()
_BATCH_SIZE = absl_flags.DEFINE_integer(
    "batch_size", 32, "Questions answered together.", lower_bound=1
)
_DTYPE = flags.dtype_flag("float32")
_MAX_INSTANCES = absl_flags.DEFINE_integer(
    "max_instances", 100, "The first of each task that count.", lower_bound=1
)
_MAX_NEW_TOKENS = absl_flags.DEFINE_integer(
    "max_new_tokens", 128, "Tokens of an answer at most.", lower_bound=1
)
_MAX_SOURCE_TOKENS = absl_flags.DEFINE_integer(
    "max_source_tokens",
    1024,
    "Tokens of a prompt; examples from the first that would exceed them are left out.",
    lower_bound=1,
)
_MESH = flags.mesh_flag()
_OPTIONS = "options.json"  # that answers of a model were made with
_ANSWERING = (  # what only a model needs
    *(_NUM_EXAMPLES, _FORMAT, _BATCH_SIZE, _DTYPE, _MAX_NEW_TOKENS, _MAX_SOURCE_TOKENS, _MESH),
)


def _alone() -> bool:
    """Whether the flags are not those of the stage; `--help` shows all of them."""
    return not any(re.match(r"--?(config\b|help$|h$)", argument) for argument in sys.argv[1:])


def main() -> None:
    """The stage of a run, or an evaluation by itself."""
    if not _alone():
        alone = (_MODEL, _PREDICTIONS, _TASKS, _SPLIT, _TRACK, _OUTPUT, _MAX_INSTANCES, *_ANSWERING)
        flags.exclude(alone, "--config", "a run has its own")
        _stages.run(["evaluate"], *_WORKDIR)
        return
    if (_MODEL.value is None) == (_PREDICTIONS.value is None):
        raise ValueError("give --config and --workdir, or --model, or --predictions")
    if _PREDICTIONS.value:
        flags.exclude(_ANSWERING, "--predictions", "no model runs")
    output = _files.output_directory(_OUTPUT, "scores")
    if _PREDICTIONS.value and (output / _OPTIONS).exists():
        raise ValueError(
            f"--output={output}: has the evaluation of a model; take another directory"
        )
    options = Evaluation(
        tasks=_TASKS.value,
        split=_SPLIT.value,
        track=_TRACK.value,
        num_examples=_NUM_EXAMPLES.value,
        format=_FORMAT.value,
        batch_size=_BATCH_SIZE.value,
        max_instances=_MAX_INSTANCES.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        max_source_tokens=_MAX_SOURCE_TOKENS.value,
    )
    tasks = evaluation.load_tasks(options)
    if _PREDICTIONS.value:
        rows = _files.read_input(Path(_PREDICTIONS.value).expanduser(), ("id", "prediction"))
        found = {row["id"]: row["prediction"] for row in rows}
        if len(found) < len(rows):
            again = len(rows) - len(found)
            logging.warning("%s: %d ids come again; the last counts", _PREDICTIONS.value, again)
        evaluation.check_predictions(found, tasks, Path(_PREDICTIONS.value))
        arms = {"predictions": found}
        result = evaluation.write_scores_of(arms, tasks, output / evaluation.SCORES)
    else:
        result = _evaluate_model(options, tasks, output)
    for arm, scores in result["arms"].items():
        print(f"{arm}: {json.dumps(scores['all'])}")
        print(evaluation.as_table(scores))


def _evaluate_model(options: Evaluation, tasks: list[superni.Task], output: Path) -> dict[str, Any]:
    model = Model(source=flags.require(_MODEL), dtype=_DTYPE.value, param_dtype=_DTYPE.value)
    made_with = dataclasses.asdict(model) | dataclasses.asdict(options)
    _check_same(output / _OPTIONS, made_with)
    base = base_model.load(model, flags.mesh_of(_MESH), check=True)
    engine = base.engine(options.batch_size)
    asked = evaluation.questions(tasks, base.tokenizer, options, base.config.max_positions)
    predictions = output / evaluation.PREDICTIONS
    records.write_text(output / _OPTIONS, json.dumps(made_with, indent=1) + "\n")
    params = base.for_sampling()
    evaluation.predict(engine, params, asked, options, predictions, model.source)
    return evaluation.write_scores(tasks, predictions, output / evaluation.SCORES)


def _check_same(path: Path, options: dict[str, Any]) -> None:
    """Answers are taken up where they were left, but only those of the same model and options."""
    known = records.read_json(path) if records.exists(path) else options
    if known != options:
        unlike = pipeline.unlike(known, options)
        raise ValueError(
            f"{path}: made with another model or options{unlike}; take another --output"
        )


if __name__ == "__main__":
    flags.start(main, with_config=not _alone())
