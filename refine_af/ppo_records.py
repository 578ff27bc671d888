"""What stage 2 writes down at each step, and where it tells people of it."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from absl import logging

from refine_af import alarms, records, tracking
from refine_af.config import Experiment
from refine_af.progress import bar
from refine_af.records import Row
from refine_af.tracking import Tracker

METRICS = "ppo/metrics.jsonl"
ROLLOUTS = "ppo/rollouts.jsonl"
SAMPLES = "ppo/samples.jsonl"
ALARMS = "ppo/alarms.jsonl"
LOOKS = "ppo/looks.json"  # of a finished run with `keep_best`


class Log:
    """Files of rows, trackers and alarms of a run."""

    def __init__(self, workdir: Path, config: Experiment, trackers: Sequence[Tracker]) -> None:
        self._workdir, self._config, self._trackers = workdir, config, trackers
        self._history = alarms.window(records.read_rows(workdir / METRICS))

    def write(
        self,
        step: int,
        figures: Mapping[str, float],
        rows: Sequence[Row],
        samples: Sequence[Row],
    ) -> None:
        """Write down a step, and tell of trouble that began with it.

        Args:
            rows: answers of its rollout. samples: to held-out instructions, if it has any.
        """
        rows, samples = ([{"step": step, **row} for row in some] for some in (rows, samples))
        self._history = alarms.window([*self._history, {"step": step, **figures}])
        found = alarms.check(self._history, self._config.ppo)
        for line in found:
            with bar.external_write_mode(file=sys.stderr):  # on a line of its own
                logging.warning("ppo step %d: %s", step, line)
        alarmed = [{"step": step, "alarm": line} for line in found]
        records.append_rows(self._workdir / ALARMS, alarmed)
        records.append_rows(self._workdir / ROLLOUTS, rows)
        records.append_rows(self._workdir / SAMPLES, samples)
        records.append_rows(self._workdir / METRICS, self._history[-1:])
        for tracker in self._trackers:
            tracker.figures(step, figures)
            if samples:
                tracker.samples(step, samples)


@contextmanager
def open_log(workdir: Path, config: Experiment, first: int) -> Iterator[Log]:
    """A log whose files are cut back to what was before step `first`."""
    for name in (METRICS, ROLLOUTS, SAMPLES, ALARMS):
        records.cut(workdir / name, first, "step")
    with tracking.open_trackers(workdir / "ppo", config, first) as trackers:
        yield Log(workdir, config, trackers)


def looks(workdir: Path) -> dict[int, float]:
    """Mean reward of the held-out instructions so far, by the number of steps behind each look."""
    found = {r["step"]: r.get("eval/reward/mean") for r in records.read_rows(workdir / METRICS)}
    return {step: reward for step, reward in found.items() if reward is not None}


def write_looks(workdir: Path, found: Mapping[int, float]) -> None:
    """Write down all looks of a run that has come to its end."""
    records.write_text(workdir / LOOKS, json.dumps(found) + "\n")


def read_looks(workdir: Path) -> dict[int, float]:
    """What `write_looks` has written; empty when there is none.

    Raises:
        ValueError: it is not as it was written.
    """
    try:
        return {int(step): float(x) for step, x in records.read_json(workdir / LOOKS).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{workdir / LOOKS}: not as train_ppo writes it ({error})") from None
