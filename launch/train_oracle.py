"""Train a reward oracle on a model, from corrupted seed tasks; or measure one (--evaluate)."""

import datetime
import functools
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags as absl_flags

from refine_af import (
    base_model,
    oracle_card,
    oracle_evaluation,
    oracle_examples,
    oracle_training,
    records,
    seeds,
    trained_oracle,
)
from refine_af.config import Lora, Mesh, Model
from refine_af.launch import _files, flags
from refine_af.models.convert import staged
from refine_af.oracle_evaluation import Pair, Scores
from refine_af.oracle_examples import Group
from refine_af.oracle_training import OracleOptions
from refine_af.progress import bar
from refine_af.seeds import SeedTask
from refine_af.trained_oracle import TrainedOracle

_MODEL = absl_flags.DEFINE_string("model", "smollm2-135m-instruct", flags.MODEL_HELP)
_OUTPUT = absl_flags.DEFINE_string(
    "output", None, "Directory to write the oracle in; it must not exist."
)
_SEED = absl_flags.DEFINE_integer(
    "seed", 0, "Random seed of corruptions, order and the new weights."
)
_NUM_EPOCHS = absl_flags.DEFINE_integer("num_epochs", 2, "Passes over the training data.")
_LEARNING_RATE = absl_flags.DEFINE_float(
    "learning_rate", 1e-3, "Highest learning rate, after the warm-up."
)
_BATCH_SIZE = absl_flags.DEFINE_integer(
    "batch_size", 4, "Rows of --max_length tokens a step; several texts are packed into each."
)
_MAX_LENGTH = absl_flags.DEFINE_integer(
    "max_length", 256, "Tokens of a task with its answer; longer ones are cut."
)
_LORA_RANK = absl_flags.DEFINE_integer(
    "lora_rank", 8, "Rank of the LoRA adapter; its alpha is twice that."
)
_LORA_PATTERN = absl_flags.DEFINE_string(
    "lora_pattern", Lora.pattern, "Regular expression of the linear maps that the adapter changes."
)
_DTYPE = flags.dtype_flag("bfloat16")
_SEED_TASKS = absl_flags.DEFINE_string(
    "seed_tasks", None, "JSONL file of seed tasks; default: the bundled 175."
)
_PREFERENCES = absl_flags.DEFINE_string(
    "preferences", None, "JSONL rows prompt, chosen, rejected to learn from besides."
)
_EVALUATE = absl_flags.DEFINE_string(
    "evaluate", None, "Measure this oracle, a directory or a shipped name; nothing is trained."
)
_NUM_DRAWS = absl_flags.DEFINE_integer(
    "num_draws", 6, "Corruptions of each kind and held-out task that measure.", lower_bound=1
)
_AT_LEAST = absl_flags.DEFINE_float(
    "at_least", None, "With --evaluate: exit 1 when the accuracy of `rew` over all is below."
)


_TRAINING = (
    *(_MODEL, _OUTPUT, _SEED, _NUM_EPOCHS, _LEARNING_RATE, _BATCH_SIZE, _MAX_LENGTH),
    *(_LORA_RANK, _LORA_PATTERN),
)


def measure(oracle: TrainedOracle, pairs: list[Pair]) -> Scores:
    """Scores of all answers, with a bar."""
    answers = {p.better for p in pairs} | {p.worse for p in pairs}
    with bar("evaluate", total=len(answers), unit="answer") as progress:

        def show(done: int) -> None:
            progress.update(done - progress.n)

        return oracle_evaluation.score(functools.partial(oracle, progress=show), pairs)


def evaluate(pairs: list[Pair]) -> None:
    """Print the accuracies of `--evaluate`; exit 1 when they are too low."""
    oracle = trained_oracle.load(flags.require(_EVALUATE), dtype=_DTYPE.value)
    rows = oracle_evaluation.accuracies(measure(oracle, pairs))
    print(oracle_evaluation.table(rows))
    accuracy = oracle_evaluation.find(rows, "all")["rew"]
    if _AT_LEAST.value is not None and accuracy < _AT_LEAST.value:
        print(
            f"{_EVALUATE.value}: rew is right on {accuracy:.3f} of all pairs, below "
            f"--at_least={_AT_LEAST.value}",
            file=sys.stderr,
        )
        sys.exit(1)


def read_preferences(unseen: Sequence[SeedTask]) -> tuple[list[Group], list[Group]]:
    """(training, held out) of `--preferences`; says how many rows are left out."""
    if not _PREFERENCES.value:
        return [], []
    rows = _files.read_input(
        Path(_PREFERENCES.value).expanduser(), ("prompt", "chosen", "rejected")
    )
    training, held_out = oracle_examples.preference_groups(rows, unseen)
    left_out = len(rows) - len(training) - len(held_out)
    if left_out:
        print(
            f"{_PREFERENCES.value}: {left_out} of {len(rows)} rows are left out: their answers are "
            "equal or empty, or they share a text with a held-out task",
            file=sys.stderr,
        )
    return training, held_out


def main() -> None:
    """Train, store, measure what was stored; the directory appears when all of it is done."""
    if _EVALUATE.value:
        flags.exclude(_TRAINING, "--evaluate", "nothing is trained")
    tasks, unseen = oracle_examples.split(seeds.load(_SEED_TASKS.value))
    preferences, unseen_preferences = read_preferences(unseen)
    pairs = oracle_evaluation.corrupted_pairs(unseen, _NUM_DRAWS.value)
    pairs += oracle_evaluation.preference_pairs(unseen_preferences)
    if _EVALUATE.value:
        evaluate(pairs)
        return
    if _AT_LEAST.value is not None:
        raise ValueError("--at_least: needs --evaluate, the oracle to measure")
    target = Path(flags.require(_OUTPUT)).expanduser()
    if target.exists():
        raise ValueError(f"{target}: exists; give another --output, or remove it")
    rank = _LORA_RANK.value
    options = OracleOptions(
        seed=_SEED.value,
        num_epochs=_NUM_EPOCHS.value,
        learning_rate=_LEARNING_RATE.value,
        batch_size=_BATCH_SIZE.value,
        max_length=_MAX_LENGTH.value,
        lora=Lora(rank=rank, alpha=2.0 * rank, pattern=_LORA_PATTERN.value),
    )
    model = Model(source=_MODEL.value, dtype=_DTYPE.value, param_dtype=_DTYPE.value)
    base = base_model.load(model, Mesh())
    began = time.monotonic()
    with staged(target, overwrite=False) as directory:
        params = oracle_training.train(
            base,
            oracle_examples.examples_of(tasks),
            preferences,
            options,
            lambda row: records.append_rows(directory / "metrics.jsonl", [row]),
        )
        took = time.monotonic() - began
        description = oracle_training.description(base, options)
        trained_oracle.write(params, description, directory)
        scores = measure(trained_oracle.load(directory, base), pairs)
        accuracies = write_card(directory, scores, len(tasks), len(preferences), took)
    print(oracle_evaluation.table(accuracies))
    print(target)


def write_card(
    directory: Path, scores: Scores, num_tasks: int, num_preferences: int, took: float
) -> list[records.Row]:
    """The card of this run."""
    facts = [
        f"data: {num_tasks} seed tasks, {_NUM_EPOCHS.value} times, each time with four new "
        f"corruptions of the answer; {num_preferences} preferences",
        f"measured on: {len({pair.better for pair in scores.pairs})} answers that were held out",
        f"time: {took / 60:.1f} minutes of training, {datetime.date.today()}",
    ]
    command = shlex.join(["python", "-m", "refine_af.launch.train_oracle", *sys.argv[1:]])
    description = trained_oracle.describe(directory)
    return oracle_card.write(directory, description, scores, command, facts)


if __name__ == "__main__":
    flags.start(main, resumes=False)
