"""What a long run holds in memory does not grow with its steps.

    python tests/test_growth.py WORKDIR 10000

prints the memory after each of so many steps.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
from updates import CONFIG, base

from refine_af import seeds
from refine_af.rewards import Example
from refine_af.rlaf import RlafStage

STEPS = 300
OPTIONS = dataclasses.replace(
    CONFIG.ppo,
    batch_size=4,
    num_epochs=1,
    num_microbatches=1,
    num_eval_prompts=0,
    eval_every=0,
    sampling=dataclasses.replace(CONFIG.ppo.sampling, max_new_tokens=4),
)


def oracle(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    return {name: np.zeros(len(examples), np.float32) for name in ("rew", "und", "nat", "coh")}


class Quick(RlafStage):
    """Every step updates and writes down; its answers are the first ones."""

    first: ClassVar[list[Any]] = []
    sizes: ClassVar[list[int]] = []  # of memory at each step, bytes

    def _sampled(self, *args: Any) -> Any:
        if not self.first:
            self.first.append(super()._sampled(*args))
        return self.first[0]

    def _learn(self, *args: Any) -> Any:
        self.sizes.append(psutil.Process().memory_info().rss)
        return super()._learn(*args)


def main(workdir: Path, steps: int) -> None:
    # One save: Orbax keeps some KiB of each (docs/checkpoints.md).
    options = dataclasses.replace(OPTIONS, num_steps=steps, checkpoint_every=steps)
    config = dataclasses.replace(CONFIG, ppo=options)
    texts = [f"Name {i} colours." for i in range(8)]
    Quick(config, base(), oracle, seeds.load(None), texts, [], workdir).run()
    print(json.dumps(Quick.sizes))


@pytest.mark.slow
def test_memory_of_a_long_run_is_flat(tmp_path: Path) -> None:
    """In a process of its own: JAX's debug modes and captured output grow."""
    command = [sys.executable, __file__, str(tmp_path), str(STEPS)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    sizes = json.loads(ended.stdout)
    assert len(sizes) == STEPS
    medians = np.median(np.reshape(sizes, (-1, 50)), axis=1) / 2**20  # of 50 steps each
    print("MiB:", medians.round(1).tolist())
    # A leak grows all the time; an allocator takes another piece now and then.
    growth = np.diff(medians[len(medians) // 3 :])
    assert np.median(growth) < 0.5


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
