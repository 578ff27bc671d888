"""Material for data sets, made here, for tests."""

from typing import Any

import numpy as np

from refine_af.configs import tiny
from refine_af.dataset import Material
from refine_af.records import Row
from refine_af.seeds import Instance, SeedTask

SEEDS = [
    SeedTask(f"seed_{i}", text, (Instance("", "out"),), False)
    for i, text in enumerate(["Write a short poem about rain.", "Name the capital of a country."])
]


def instruction(number: int, text: str, **fields: Any) -> Row:
    """An accepted one, from a prompt with a seed and, past the first, with the first one."""
    return {
        "id": f"instruction_{number:05d}",
        "instruction": text,
        "is_classification": number % 3 == 1,
        "avg_similarity": 0.125,
        "most_similar": {SEEDS[0].instruction: 0.5, SEEDS[1].instruction: 0.25},
        "prompt_ids": ["seed_1", *(["instruction_00000"] if number else [])],
        "model": "random:tiny",
        "seed": 0,
        "batch": 0,
        **fields,
    }


def instance(task: Row, text: str, output: str, reward: float | None = 0.0, **fields: Any) -> Row:
    """An accepted one; without a reward as of a run that does not score."""
    scores = {"reward": reward, "components": {"rew": reward, "reward": reward}}
    return {
        "id": task["id"],
        "instruction": task["instruction"],
        "is_classification": task["is_classification"],
        "input": text,
        "output": output,
        "demo_ids": ["seed_0"],
        "prompt": f"Task: {task['instruction']}\nInput:",
        "batch": 0,
        **({} if reward is None else scores),
        **fields,
    }


def made_of(instances: list[Row], instructions: list[Row], arm: str = "refine_af") -> Material:
    """With some reasons for drops."""
    rejected = {"instructions": {"similar": 1200}, "instances": {"truncated": 2, "duplicate": 3}}
    return Material(tiny.get_config(), arm, SEEDS, instructions, instances, rejected)


def material(count: int, seed: int) -> Material:
    """So many rows of noise."""
    rng = np.random.default_rng(seed)
    tasks = [instruction(i, rng.bytes(100).hex()) for i in range(count)]
    return made_of(
        [instance(task, "", "yes", reward=i / count) for i, task in enumerate(tasks)], tasks
    )
