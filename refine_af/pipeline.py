"""The stages in their order, each of which takes up what the workdir holds.

What belongs to one arm of a run alone is in that arm's folder (`arms.folder`), all else in the
workdir: instructions, the evaluation and the report are of all arms.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
    mesh,
    oracles,
    other_sets,
    ppo_evaluation,
    prompts,
    records,
    rlaf,
    seeds,
    tracking,
)
from refine_af.arms import ARMS, REFINE_AF, folder
from refine_af.base_model import BaseModel
from refine_af.config import Experiment, config_hash
from refine_af.evaluation import PREDICTIONS, SCORES
from refine_af.finetuning import FinetuningStage
from refine_af.instances import InstanceStage
from refine_af.instructions import InstructionStage
from refine_af.models import processes
from refine_af.models.writing import writing
from refine_af.report import write_report
from refine_af.rewards import Oracle
from refine_af.rlaf import RlafStage
from refine_af.seeds import SeedTask

CONFIG = "config.json"
TIMINGS = "timings.json"


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """A block in which no other program works in `workdir`: two would write into the same files.

    Where the file system has no locks, nobody is kept out.

    Raises:
        ValueError: one is at work.
        OSError: the directory cannot be made.
    """

    def lock() -> None:
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir, os.O_RDONLY)
        locks.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{workdir}: another program is at work there; wait for its end, or stop it"
            ) from None
        except OSError:
            return

    with contextlib.ExitStack() as locks:
        processes.once(lock)
        yield


def claim(config: Experiment, workdir: Path, *, force: bool) -> None:
    """Write the resolved config into the workdir, or check that it is the one there.

    Forced, it replaces the one there, whose hash stays on record: its checkpoints may be used.

    Raises:
        ValueError: the results in the workdir, or a checkpoint, were made with another config, and
            `force` is not set.
    """
    processes.once(lambda: _claim(config, workdir, force))


def _claim(config: Experiment, workdir: Path, force: bool) -> None:
    path = workdir / CONFIG
    mine, known = config_hash(config), records.read_json(path)
    listed = known.get("earlier", [])
    if not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
        raise ValueError(f"{path}: earlier={listed!r}: expected a list of hashes")
    earlier = set(listed)
    content: dict[str, Any] = {"config": json.loads(json.dumps(dataclasses.asdict(config)))}
    for where, theirs in {
        path: known.get("hash"),
        **{saved: checkpoints.config_of(saved) for saved in _checkpoints(workdir)},
    }.items():
        if theirs in (None, mine, *earlier):
            continue
        if where == path and not _has_results(workdir):
            continue
        if not force:
            fields = unlike(known.get("config"), content["config"]) if where == path else ""
            raise ValueError(
                f"{where}: this workdir was made with config {theirs}, not {mine}{fields}; take "
                "another --workdir, or --force_config to go on with the new one"
            )
        earlier.add(theirs)
    content["hash"] = mine
    if earlier:
        content["earlier"] = sorted(earlier)
    if known != content:
        records.write_text(path, json.dumps(content, indent=1) + "\n")


def _has_results(workdir: Path) -> bool:
    """Whether there is more than a start leaves that found nothing to work with."""
    files = (path for path in workdir.rglob("*") if path.is_file())
    return any(path.name not in (CONFIG, TIMINGS) for path in files)


def unlike(theirs: Any, mine: dict[str, Any]) -> str:
    """The first fields in which two configs differ, for people."""
    there, here = (dict(_fields(config)) for config in (theirs, mine))
    names = [name for name in there | here if there.get(name) != here.get(name)]
    shown = [f"{name}={there.get(name)!r} there, {here.get(name)!r} here" for name in names[:3]]
    more = [f"{len(names) - 3} more fields"] if len(names) > 3 else []
    return f" ({'; '.join(shown + more)})"


def _fields(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):
            yield from _fields(value, f"{path}{name}.")
        elif not path.startswith("mesh."):  # may change
            yield path + name, value


def _checkpoints(workdir: Path) -> list[Path]:
    tuned = [folder(workdir, arm) / finetuning.CHECKPOINTS for arm in ARMS]
    return [workdir / rlaf.CHECKPOINTS, *tuned]


@dataclasses.dataclass(frozen=True)
class Run:
    """A config at work in a directory; what stages share is loaded once, when first needed."""

    config: Experiment
    workdir: Path
    arms: Sequence[str] = (REFINE_AF,)  # of ARMS
    profile_steps: int = 0  # of PPO and of each fine-tuning, to trace

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

    def check(self, names: Sequence[str]) -> None:
        """Find what the named stages need without reading a model: a run is old when it is needed.

        Raises:
            ValueError: the oracle, a tracker or another set that the config names cannot be found,
                too few seed tasks are short enough to be shown, or its mesh is not that of these
                devices.
        """
        trains = REFINE_AF in self.arms and {"generate_instructions", "train_ppo"} & {*names}
        writes = {"generate_instructions", "train_ppo", "generate_instances"} & {*names}
        pending = not all(dataset.finished(folder(self.workdir, arm)) for arm in self.arms)
        scores = writes and self.config.instances.score and pending
        if (trains and not rlaf.finished(self.config, self.workdir)) or scores:
            oracles.check(self.config)
        if REFINE_AF in self.arms and "train_ppo" in names:
            tracking.check(self.config.ppo)
        if writes and pending:
            prompts.demos(self.seeds, self.config.prompts)
            mesh.make_mesh(self.config.mesh)
            processes.once(lambda: other_sets.check(self.config.dataset))


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
    """Stage 2; the other arm does without."""
    if REFINE_AF not in run.arms:
        return False
    rows = run.accepted_instructions()
    if rlaf.finished(run.config, run.workdir):
        return False
    texts = [row["instruction"] for row in rows]
    oracle = run.oracle(run.workdir / rlaf.SCORES)
    parts = ppo_evaluation.split(texts, run.config.ppo.num_eval_prompts, run.config.seed)
    shared = run.config, run.base, oracle, run.seeds
    RlafStage(*shared, *parts, run.workdir, run.profile_steps).run()
    return True


def generate_instances(run: Run) -> bool:
    """Stage 3, and the data set, of each arm."""
    return any([_generate_instances(run, arm, folder(run.workdir, arm)) for arm in run.arms])


def _generate_instances(run: Run, arm: str, target: Path) -> bool:
    if dataset.finished(target):
        return False
    rows = run.accepted_instructions()
    tuned = arm == REFINE_AF
    params = (
        rlaf.tuned_policy(run.config, run.base, run.workdir) if tuned else run.base.for_sampling()
    )
    oracle = run.oracle() if run.config.instances.score else None
    InstanceStage(run.config, run.base, run.seeds, rows, target, oracle).run(params)
    kept = records.read_rows(target / instances.ACCEPTED, dataset.FIELDS)
    records.check_bools(kept, "is_classification", target / instances.ACCEPTED)
    made_of = dataset.Material(
        config=run.config,
        arm=arm,
        seeds=run.seeds,
        instructions=rows,
        instances=kept,
        rejected={
            "instructions": _reasons(run.workdir / instructions.REJECTED),
            "instances": _reasons(target / instances.REJECTED),
        },
    )
    processes.once(lambda: dataset.write_dataset(made_of, target))
    return True


def _reasons(path: Path) -> Counter[str]:
    return Counter(row["reason"] for row in records.read_rows(path, ("reason",)))


def finetune(run: Run) -> bool:
    """Fine-tuning of the base model on the data set of each arm."""
    return any([_finetune(run, folder(run.workdir, arm)) for arm in run.arms])


def _finetune(run: Run, target: Path) -> bool:
    rows = dataset.read(target)
    if finetuning.finished(target):
        return False
    FinetuningStage(run.config, run.base, rows, target, run.profile_steps).run()
    return True


def evaluate(run: Run) -> bool:
    """Scores of the base model and of every arm that is fine-tuned; those over all are printed."""
    worked = _evaluate(run)
    outline = evaluation.outline(run.workdir / SCORES)
    processes.by_writer(lambda: print(outline))
    return worked


def _evaluate(run: Run) -> bool:
    options = run.config.evaluation
    tasks = evaluation.load_tasks(options)
    arms = [arm for arm in ARMS if finetuning.finished(folder(run.workdir, arm))] or run.arms
    if {"base", *arms} <= records.read_json(run.workdir / SCORES).get("arms", {}).keys():
        return False
    for arm in arms:
        finetuning.check_finished(folder(run.workdir, arm))
    asked = evaluation.questions(tasks, run.base.tokenizer, options, run.base.config.max_positions)
    predictions = run.workdir / PREDICTIONS
    for arm in ("base", *arms):
        engine = run.base.engine(options.batch_size)
        params = (
            run.base.for_sampling()
            if arm == "base"
            else finetuning.tuned_model(run.config, run.base, folder(run.workdir, arm))
        )
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


def run_stage(run: Run, name: str) -> bool:
    """Run one stage and add its wall time to the workdir's timings.

    Returns:
        Whether there was anything to do.

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
    return worked


def _add_time(path: Path, name: str, seconds: float) -> None:
    timings = records.read_json(path)
    before = timings.get(name, 0.0)
    if type(before) not in (int, float):
        raise ValueError(f"{path}: {name}={before!r}: expected seconds")
    timings[name] = round(before + seconds, 2)
    records.write_text(path, json.dumps(timings, indent=1) + "\n")
