"""Where people look at a PPO run while it goes on: TensorBoard, Weights & Biases."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.summary_pb2 import Summary

from refine_af import records
from refine_af.config import Experiment, Ppo, config_hash
from refine_af.events import EventFile
from refine_af.models import processes
from refine_af.records import Row

_COLUMNS = ("instruction", "input", "output", "reward", "finish_reason")  # of the table of samples


class Tracker(Protocol):
    """One place that figures and texts go to."""

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step, by name."""

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """Answers after a step, as `ppo/samples.jsonl` has them."""

    def close(self) -> None:
        """Write what is held back."""


class TensorBoard:
    """Event files in the folder; what an earlier start wrote from `first` on is hidden."""

    def __init__(self, folder: Path, config: Experiment, first: int) -> None:
        del config
        self._file = EventFile(folder, first)

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        scalars = [Summary.Value(tag=name, simple_value=x) for name, x in values.items()]
        self._file.add(step, Summary(value=scalars))

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """See `Tracker`; a table in Markdown."""
        lines = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_cells, rows)]
        escaped = [[_markdown(cell) for cell in line] for line in lines]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)
        self._file.add(step, summary.text("samples", table))

    def close(self) -> None:
        """See `Tracker`."""
        self._file.close()


class WeightsAndBiases:
    """A run of the project `refine-af`; a second start of the same workdir goes on in it.

    Steps that are made again have a second point. WANDB_MODE, WANDB_PROJECT and the like apply.
    """

    def __init__(self, folder: Path, config: Experiment, first: int) -> None:
        del first
        self._wandb: Any = importlib.import_module("wandb")
        mark = folder / "wandb.id"  # a workdir's own: two with one config are two runs
        if not mark.exists():
            name = f"{config_hash(config)}-{np.random.default_rng().integers(2**32):08x}"
            records.write_text(mark, name)
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "refine-af"),  # an argument would override it
            id=mark.read_text(),
            resume="allow",
            dir=str(folder),
            config=dataclasses.asdict(config),
        )
        self._run.define_metric("*", step_metric="ppo_step")

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({**values, "ppo_step": step})

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """See `Tracker`."""
        table = self._wandb.Table(columns=list(_COLUMNS), data=[_cells(row) for row in rows])
        self._run.log({"samples": table, "ppo_step": step})

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


_TRACKERS: dict[str, Callable[[Path, Experiment, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


@contextmanager
def open_trackers(folder: Path, config: Experiment, first: int) -> Iterator[list[Tracker]]:
    """The trackers that `ppo.trackers` names; of several processes the writer alone has any.

    Args:
        folder: for their files; made when missing.
        first: step that this start begins with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        opened: list[Tracker] = []
        for name in config.ppo.trackers if processes.is_writer() else ():
            opened.append(_TRACKERS[name](folder, config, first))
            stack.callback(opened[-1].close)
        yield opened


def check(options: Ppo) -> None:
    """See to it that the packages of `options.trackers` are there.

    Raises:
        ValueError: one is not.
    """
    if "wandb" in options.trackers and importlib.util.find_spec("wandb") is None:
        raise ValueError("ppo.trackers: wandb is not installed; pip install -e '.[wandb]'")


def _cells(row: Row) -> list[Any]:
    return [row[name] for name in _COLUMNS]


def _markdown(cell: Any) -> str:
    """A cell of a Markdown table: on one line, with nothing that ends it."""
    return (
        str(cell)
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace("|", "\\|")
        .replace("\n", "<br>")
    )
