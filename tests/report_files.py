"""A workdir as a finished run leaves it, small and made by hand, with hostile text."""

import json
from pathlib import Path
from typing import Any

import data_sets

from refine_af import dataset, dataset_statistics
from refine_af.records import Row, append_rows

HOSTILE = "Explain <script>alert('x')</script> & \"quotes\" to a child."
DATA_SET_FIGURES = [
    "Verbs and their objects",
    "Overlap with the seed tasks",
    "Lengths",
    "Reward of the rows",
]
FIGURES = [
    "Overlap with the nearest instruction",
    "Length of the instructions",
    "What the instructions ask for",
    "Reward",
    "What the reward is made of",
    "Distance from the starting model",
    "Form of the answers",
    "Size of the policy updates",
    "Value head",
    "Reward of each held-out instruction",
    *DATA_SET_FIGURES,
    "Loss",
    "ROUGE-L on every task",
    "Gain in ROUGE-L on every task",
    "Wall-clock time of the stages",
]
PPO_KEYS = [
    *(f"reward/{key}" for key in ("std", "rew", "nat", "und", "coh", "usable_share")),
    *(f"kl/{key}" for key in ("k1", "k3", "coef")),
    *(f"length/{key}" for key in ("mean", "eos_rate")),
    *(
        f"ppo/{key}"
        for key in ("clip_fraction", "entropy", "ratio_max", "value_loss", "explained_variance")
    ),
    *(f"time/{key}" for key in ("sample", "score", "update")),
]


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def instruction(number: int, text: str) -> Row:
    return {
        "id": f"instruction_{number:05}",
        "instruction": text,
        "is_classification": number == 1,
        "avg_similarity": 0.1,
        "most_similar": {"Write a tale.": 0.5 + number / 100, "Name a town.": 0.2},
        "prompt_ids": ["seed_task_0"],
        "model": "tiny",
        "seed": 0,
        "batch": 0,
    }


def rollout(step: int, output: str | None) -> Row:
    return {
        "step": step,
        "row": 0,
        "instruction": "Write a story.",
        "completion": f"completion of step {step}",
        "input": None if output is None else "",
        "output": output,
        "reward": -1.0 if output is None else 0.25,
        "components": {} if output is None else {"rew": 1.5, "nat": 0.5, "und": 0.25, "coh": 0.125},
        "finish_reason": "length" if output is None else "stop",
    }


def scores(rouge: dict[str, float]) -> dict[str, Any]:
    tasks = {
        name: {"category": "Word Analogy", "instances": 20, "exact_match": 1.0, "rougeL": value}
        for name, value in rouge.items()
    }
    whole = {"instances": 60, "exact_match": 1.0, "rougeL": sum(rouge.values()) / len(rouge)}
    return {"tasks": tasks, "categories": {"Word Analogy": whole}, "all": whole}


def write_statistics(folder: Path, reward: float) -> None:
    """What the report reads of a data set."""
    tasks = [data_sets.instruction(i, HOSTILE) for i in range(2)]
    rows = [data_sets.instance(task, "a", "one two three", reward) for task in tasks]
    rows = dataset.rows_of(data_sets.made_of(rows, tasks))
    (folder / "dataset").mkdir(parents=True)
    write_json(folder / "dataset/statistics.json", dataset_statistics.of_rows(rows, ["Sing."]))


def write_stage_files(path: Path) -> None:
    texts = [HOSTILE, "Write a story.", "Write a poem.", "Name a city."]
    append_rows(path / "instructions.jsonl", [instruction(i, text) for i, text in enumerate(texts)])
    reasons = ["similar", "too_short", "similar", "similar"]
    append_rows(
        path / "rejected_instructions.jsonl",
        [{"instruction": f"dropped {i}", "reason": r, "batch": 0} for i, r in enumerate(reasons)],
    )
    means = [-0.5, -0.25, 0.0, 0.75]
    append_rows(
        path / "ppo/metrics.jsonl",
        [
            {"step": step, "reward/mean": mean} | {key: 0.5 + step / 10 for key in PPO_KEYS}
            for step, mean in enumerate(means)
        ],
    )
    append_rows(
        path / "ppo/rollouts.jsonl",
        [rollout(0, None), rollout(1, "the middle"), rollout(3, "the end")],
    )
    looks = [rollout(1, None), rollout(3, f"much later {HOSTILE}")]
    looks[1]["completion"] = looks[1]["output"]
    append_rows(path / "ppo/samples.jsonl", looks)
    append_rows(path / "ppo/alarms.jsonl", [{"step": 2, "alarm": f"length drift: {HOSTILE}"}])
    before, after = (
        {
            "reward": late - 0.5,
            "kl": 1.5 * late,
            "tokens": 9.0,
            "ended": 1.0,
            "usable": 0.5,
            "components": {"rew": 1.0 + late},
        }
        for late in (0, 1)
    )
    write_json(
        path / "ppo/evaluation.json",
        {
            "num_instructions": 2,
            "num_samples": 3,
            "before": before,
            "after": after,
            "difference": {"mean": 0.75, "low": -0.125, "high": 1.5, "share_better": 0.5},
            "rewards": {"before": [-1.0, 0.0], "after": [1.0, -0.5]},
            "instructions": ["Write <b>an ode.", "Name a town."],
        },
    )
    pair = {"is_classification": False, "input": "", "output": "one two three", "batch": 0}
    append_rows(
        path / "instances.jsonl",
        [{"id": f"instruction_0000{i}", "instruction": HOSTILE} | pair for i in (0, 0, 1)],
    )
    append_rows(
        path / "rejected_instances.jsonl",
        [{"id": "i", "instruction": "a", "completion": "b", "reason": "unparsable", "batch": 0}],
    )
    write_statistics(path, 0.25)
    losses = [{"step": s, "epoch": s / 2, "loss": 3.0 - s / 2} for s in (1, 2, 3)]
    append_rows(path / "sft/metrics.jsonl", [*losses[:2], losses[2] | {"eval_loss": 1.75}])


def write_workdir(path: Path) -> Path:
    """A finished run."""
    write_stage_files(path)
    arms = {
        "refine_af": scores({"a": 30.0, "b": 20.0, "c": 10.0}),
        "base": scores({"a": 10.0, "b": 25.0, "c": 10.0}),
    }
    write_json(path / "evaluation.json", {"arms": arms})
    append_rows(
        path / "predictions.jsonl",
        [
            {
                "arm": arm,
                "task": "a",
                "id": f"a-{i}",
                "input": f"question {i}",
                "references": [f"answer {i}", "or <this>"],
                "prediction": f"{arm} says {i}",
            }
            for arm in arms
            for i in range(2)
        ],
    )
    write_json(path / "timings.json", {"train_ppo": 100.0, "evaluate": 100.0})
    config = {"seed": 0, "ppo": {"lora": {"rank": 16}, "sampling": {"stop": ["\n"]}}}
    write_json(path / "config.json", {"config": config, "hash": "0123abcd"})
    return path
