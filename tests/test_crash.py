"""Runs that are killed at random moments and end as if nothing had happened."""

import glob
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from runs import Done, Programs, differences, names

# What each stage writes; how often a run is killed in it; at most after how many changes of that.
_STAGES = {
    "generate_instructions": (("config.json", "*instructions.jsonl*"), 2, 8),
    "train_ppo": (("ppo/*", "ppo/checkpoints/**/*"), 3, 40),
    "generate_instances": (("*instances.jsonl*", "dataset/*"), 2, 6),
    "finetune": (("sft/*", "sft/*/*", "sft/checkpoints/**/*"), 2, 40),
    "evaluate": (("predictions.jsonl",), 2, 1),
    "report": (("evaluation.json", "report.html*"), 1, 1),
}
_MAX_DELAY = 0.5  # seconds after a change


class Kill(NamedTuple):
    """A random moment: some seconds after so many changes of a stage's files."""

    stage: str
    changes: int
    delay: float
    torn: bool  # the last write was cut short, as by a power failure


def draw_kills(seed: int) -> list[Kill]:
    """In the order of the stages."""
    rng = np.random.default_rng(seed)
    return [
        Kill(stage, int(rng.integers(1, most + 1)), _MAX_DELAY * rng.random(), rng.random() < 0.5)
        for stage, (_, times, most) in _STAGES.items()
        for _ in range(times)
    ]


class Watch:
    """Counts the changes of files since it was made."""

    def __init__(self, workdir: Path, patterns: Sequence[str]) -> None:
        self.workdir, self.patterns, self.changes = workdir, patterns, 0
        self.grown: set[Path] = set()  # by the last change of each
        self.seen = self._look()

    def _look(self) -> dict[Path, tuple[int, int]]:
        found = {}
        for pattern in self.patterns:
            # Unlike Path.glob, this takes directories that vanish meanwhile.
            for name in glob.iglob(pattern, root_dir=self.workdir, recursive=True):
                path = self.workdir / name
                try:
                    status = path.stat()
                except OSError:  # gone since it was listed
                    continue
                found[path] = status.st_mtime_ns, status.st_size
        return found

    def count(self) -> int:
        seen = self._look()
        for path in seen:
            if seen[path] != self.seen.get(path):
                grows = seen[path][1] > self.seen.get(path, (0, 0))[1]
                (self.grown.add if grows else self.grown.discard)(path)
        self.changes += seen != self.seen
        self.seen = seen
        return self.changes

    def tear_newest(self) -> bool:
        """Whether rows were added last, whose end is then taken off.

        A resumed run first cuts a file back to its checkpoint; the rows left there are not torn.
        """
        newest = max(self.seen, key=self.seen.__getitem__)
        tears = newest.suffix == ".jsonl" and newest in self.grown
        if tears:
            os.truncate(newest, max(newest.stat().st_size - 5, 0))
        return tears


def is_killed(programs: Programs, workdir: Path, kill: Kill) -> bool:
    """Whether a pipeline that goes on in `workdir` was killed at its work."""
    stages = [*_STAGES]
    later = stages[stages.index(kill.stage) + 1 :]
    here = Watch(workdir, _STAGES[kill.stage][0])
    beyond = Watch(workdir, [pattern for stage in later for pattern in _STAGES[stage][0]])
    running = programs.start("pipeline", workdir)

    def ready() -> bool:
        if here.count() < kill.changes and not beyond.count():
            return False
        time.sleep(kill.delay)
        return True

    ended = running.stop_when(ready, signal.SIGKILL)
    here.count()
    tore = kill.torn and not beyond.count() and here.tear_newest()
    print(kill, f"after {here.changes} changes, {ended.seconds:.1f} s: {ended.code}, {tore=}")
    return ended.code == -signal.SIGKILL


def crash(programs: Programs, workdir: Path, kills: Sequence[Kill]) -> int:
    """How many of the kills hit a run, which is then brought to its end."""
    hits = sum([is_killed(programs, workdir, kill) for kill in kills])
    ended = programs.run("pipeline", workdir)
    assert ended.code == 0, ended.err
    return hits


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_runs_that_were_killed_end_as_if_undisturbed(
    undisturbed: Done, programs: Programs, tmp_path: Path
) -> None:
    """Two at a time, since each keeps one core busy."""
    workdirs = [tmp_path / str(seed) for seed in range(2)]
    with ThreadPoolExecutor(len(workdirs)) as pool:
        futures = [
            pool.submit(crash, programs, workdir, draw_kills(seed))
            for seed, workdir in enumerate(workdirs)
        ]
        hits = [future.result() for future in futures]
    assert sum(hits) >= 20, hits
    assert [differences(undisturbed.workdir, workdir) for workdir in workdirs] == [[], []]
    assert [names(workdir) for workdir in workdirs] == 2 * [names(undisturbed.workdir)]
