"""The stages in their order, each of which takes up what the workdir holds."""

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from refine_af import (
    base_model,
    checkpoints,
    dataset,
    evaluation,
    finetuning,
    instances,
    instructions,
    memory,
    oracles,
    ppo_evaluation,
    records,
    rlaf,
    seeds,
)
from refine_af.base_model import BaseModel
from refine_af.config import Experiment, config_hash
from refine_af.evaluation import PREDICTIONS, SCORES
from refine_af.finetuning import FinetuningStage
from refine_af.instances import InstanceStage
from refine_af.instructions import InstructionStage
from refine_af.models import processes
from refine_af.report import write_report
from refine_af.rewards import Oracle
from refine_af.rlaf import RlafStage
from refine_af.seeds import SeedTask

CONFIG = "config.json"
TIMINGS = "timings.json"


def claim(config: Experiment, workdir: Path, *, force: bool) -> None:
    """Write the resolved config into the workdir, or check that it is the one there.

    Forced, it replaces the one there, whose hash stays on record: its checkpoints may be used.

    Raises:
        ValueError: the workdir, or a checkpoint in it, was made with another config, and `force`
            is not set.
    """
    processes.once(lambda: _claim(config, workdir, force))


def _claim(config: Experiment, workdir: Path, force: bool) -> None:
    path = workdir / CONFIG
    mine, known = config_hash(config), records.read_json(path)
    listed = known.get("earlier", [])
    if not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
        raise ValueError(f"{path}: earlier={listed!r}: expected a list of hashes")
    earlier = set(listed)
    for where, theirs in {
        path: known.get("hash"),
        **{folder: checkpoints.config_of(folder) for folder in _checkpoints(workdir)},
    }.items():
        if theirs in (None, mine, *earlier):
            continue
        if not force:
            raise ValueError(
                f"{where}: this workdir was made with config {theirs}, not {mine}; take another "
                "--workdir, or --force_config to go on with the new one"
            )
        earlier.add(theirs)
    content: dict[str, Any] = {"config": dataclasses.asdict(config), "hash": mine}
    if earlier:
        content["earlier"] = sorted(earlier)
    if known != json.loads(json.dumps(content)):
        records.write_text(path, json.dumps(content, indent=1) + "\n")


def _checkpoints(workdir: Path) -> list[Path]:
    return [workdir / stage.CHECKPOINTS for stage in (rlaf, finetuning)]


@dataclasses.dataclass(frozen=True)
class Run:
    """A config at work in a directory; what stages share is loaded once, when first needed."""

    config: Experiment
    workdir: Path

    @functools.cached_property
    def seeds(self) -> list[SeedTask]:
        """Seed tasks of the run."""
        return seeds.load(self.config.seed_tasks or None)

    @functools.cached_property
    def base(self) -> BaseModel:
        """Base model on the mesh."""
        return base_model.load(self.config.model, self.config.mesh, check=True)

    def oracle(self, cache: Path | None = None) -> Oracle:
        """Reward oracle of the run; `cache`: file of scores that it knows already."""
        return oracles.load(self.config, lambda: self.base, cache)

    def accepted_instructions(self) -> list[records.Row]:
        """Rows of stage 1.

        Raises:
            ValueError: it has not finished.
        """
        stage = InstructionStage(self.config, self.seeds, self.workdir)
        if not stage.complete:
            raise ValueError(
                f"{self.workdir / instructions.ACCEPTED}: {len(stage.accepted)} of "
                f"{self.config.instructions.num_instructions} instructions; "
                "run generate_instructions first"
            )
        return stage.accepted

    @property
    def has_dataset(self) -> bool:
        """Whether stage 3 has finished: the card is the last that it writes."""
        return records.exists(self.workdir / "dataset/README.md")


# A stage returns whether there was anything to do.


def generate_instructions(run: Run) -> bool:
    """Stage 1."""
    stage = InstructionStage(run.config, run.seeds, run.workdir)
    if stage.complete:
        return False
    engine = run.base.engine(run.config.instructions.batch_size)
    stage.run(engine, run.base.for_sampling())
    return True


def train_ppo(run: Run) -> bool:
    """Stage 2."""
    rows = run.accepted_instructions()
    if rlaf.finished(run.config, run.workdir):
        return False
    texts = [row["instruction"] for row in rows]
    oracle = run.oracle(run.workdir / rlaf.SCORES)
    parts = ppo_evaluation.split(texts, run.config.ppo.num_eval_prompts, run.config.seed)
    RlafStage(run.config, run.base, oracle, run.seeds, *parts, run.workdir).run()
    return True


def generate_instances(run: Run) -> bool:
    """Stage 3, and the data set."""
    if run.has_dataset:
        return False
    rows = run.accepted_instructions()
    params = rlaf.tuned_policy(run.config, run.base, run.workdir)
    InstanceStage(run.config, run.base, run.seeds, rows, run.workdir).run(params)
    files = {instances.ACCEPTED: dataset.FIELDS, instances.REJECTED: ("reason",)}
    kept, dropped = (records.read_rows(run.workdir / name, files[name]) for name in files)
    records.check_bools(kept, "is_classification", run.workdir / instances.ACCEPTED)
    target = run.workdir / "dataset"
    processes.once(lambda: dataset.write_dataset(run.config, kept, dropped, target))
    return True


def finetune(run: Run) -> bool:
    """Fine-tuning of the base model on the accepted instances."""
    if not run.has_dataset:
        raise ValueError(f"{run.workdir / 'dataset'}: not finished; run generate_instances first")
    rows = records.read_rows(run.workdir / instances.ACCEPTED, ("instruction", "input", "output"))
    if finetuning.finished(run.workdir):
        return False
    FinetuningStage(run.config, run.base, rows, run.workdir).run()
    return True


def evaluate(run: Run) -> bool:
    """Scores of the base model and of the fine-tuned one."""
    options = run.config.evaluation
    tasks = evaluation.load_tasks(options)
    if records.exists(run.workdir / SCORES):
        return False
    adapters = {
        "base": None,
        "refine_af": finetuning.tuned_adapter(run.config, run.base, run.workdir),
    }
    asked = evaluation.questions(tasks, run.base.tokenizer, options)
    predictions = run.workdir / PREDICTIONS
    for arm, adapter in adapters.items():
        lora = run.config.sft.lora if adapter else None
        engine = run.base.engine(options.batch_size)
        params = run.base.for_sampling(adapter, lora)
        evaluation.predict(engine, params, asked, options, predictions, arm)
    evaluation.write_scores(tasks, predictions, run.workdir / SCORES)
    return True


def report(run: Run) -> bool:
    """`report.html` from whatever stages have run; not timed, since it shows the timings."""
    print(f"report: {processes.once(lambda: str(write_report(run.workdir)))}")
    return False


STAGES: dict[str, Callable[[Run], bool]] = {
    "generate_instructions": generate_instructions,
    "train_ppo": train_ppo,
    "generate_instances": generate_instances,
    "finetune": finetune,
    "evaluate": evaluate,
    "report": report,
}


def run_stage(run: Run, name: str) -> None:
    """Run one stage and add its wall time to the workdir's timings.

    Raises:
        ValueError: it ran out of memory; with advice.
    """
    began = time.monotonic()
    worked = True  # also when it is interrupted
    try:
        worked = STAGES[name](run)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if memory.ran_out(error):
            raise ValueError(memory.advice(name, run.config, error)) from None
        raise
    finally:
        if worked:
            spent, failing = time.monotonic() - began, sys.exception() is not None
            # Beside an error of the stage, another one of its timing is not worth telling.
            with contextlib.suppress(*(OSError, ValueError) if failing else ()):
                processes.by_writer(lambda: _add_time(run.workdir / TIMINGS, name, spent))


def _add_time(path: Path, name: str, seconds: float) -> None:
    timings = records.read_json(path)
    before = timings.get(name, 0.0)
    if type(before) not in (int, float):
        raise ValueError(f"{path}: {name}={before!r}: expected seconds")
    timings[name] = round(before + seconds, 2)
    records.write_text(path, json.dumps(timings, indent=1) + "\n")
