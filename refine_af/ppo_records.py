"""What stage 2 writes down at each step, and where it tells people of it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from absl import logging

from refine_af import alarms, records, tracking
from refine_af.config import Experiment
from refine_af.records import Row
from refine_af.tracking import Tracker

METRICS = "ppo/metrics.jsonl"
ROLLOUTS = "ppo/rollouts.jsonl"
SAMPLES = "ppo/samples.jsonl"
ALARMS = "ppo/alarms.jsonl"


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
