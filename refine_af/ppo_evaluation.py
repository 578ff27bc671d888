"""Did stage 2 raise the reward? Answers to instructions that it never saw, before and after.

The reward alone would not show that a policy has learned to please the oracle: length, KL and the
share of usable answers stand beside it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from refine_af import records
from refine_af.actor import Answers
from refine_af.config import Experiment, config_hash
from refine_af.randomness import generator

SUMMARY = "ppo/evaluation.json"
ANSWERS = "ppo/evaluation.jsonl"

Arm = tuple[Answers, np.ndarray]


def split(instructions: Sequence[str], num_held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """(instructions to train on, instructions to measure on), each in their order."""
    order = generator(seed, "ppo/held_out").permutation(len(instructions))
    held_out = set(order[:num_held_out].tolist())
    parts: tuple[list[str], list[str]] = ([], [])
    for i, instruction in enumerate(instructions):
        parts[i in held_out].append(instruction)
    return parts


def compare(
    workdir: Path,
    instructions: Sequence[str],
    answer: Callable[[str], Arm],
    config: Experiment,
) -> None:
    """Write what the policy of each arm, `before` and `after`, answers, and the difference.

    Args:
        instructions: held out, each of which has `num_eval_samples` answers in a row.
        answer: answers of an arm, and their KL from the reference (the sum of log-ratios over an
            answer, nats).
    """
    num_samples = config.ppo.num_eval_samples
    arms = {name: answer(name) for name in ("before", "after")}
    rows = [
        {
            "arm": arm,
            **row,
            "tokens": len(completion.token_ids),
            "kl": float(of_row),
        }
        for arm, (answers, kl) in arms.items()
        for row, completion, of_row in zip(answers.rows(), answers.completions, kl, strict=True)
    ]
    means = {
        arm: np.reshape([j.reward for j in answers.judgements], (-1, num_samples)).mean(axis=1)
        for arm, (answers, _) in arms.items()
    }
    summary = {
        "config": config_hash(config),
        "num_instructions": len(instructions),
        "num_samples": num_samples,
        **{arm: _figures([row for row in rows if row["arm"] == arm]) for arm in arms},
        "difference": difference(means["before"], means["after"], config.seed),
        "rewards": {arm: column.tolist() for arm, column in means.items()},
        "instructions": list(instructions),
    }
    records.write_text(workdir / ANSWERS, "".join(map(records.to_line, rows)))
    records.write_text(workdir / SUMMARY, json.dumps(summary, indent=1) + "\n")


def measured(config: Experiment, workdir: Path) -> bool:
    """Whether this has been done, for this very config."""
    return records.read_json(workdir / SUMMARY).get("config") == config_hash(config)


def difference(before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean of `after - before` over instructions, and its 95% bootstrap interval (percentiles)."""
    gains = after - before
    found = stats.bootstrap(
        (gains,), np.mean, method="percentile", rng=generator(seed, "ppo/bootstrap")
    ).confidence_interval
    return {
        "mean": float(gains.mean()),
        "low": float(found.low),
        "high": float(found.high),
        "share_better": float((gains > 0).mean()),
    }


def _figures(rows: Sequence[records.Row]) -> dict[str, Any]:
    """Means over the answers of an arm; components over those without the floor reward."""
    usable = [row["components"] for row in rows if row["components"] is not None]
    return {
        "reward": float(np.mean([row["reward"] for row in rows])),
        "kl": float(np.mean([row["kl"] for row in rows])),
        "tokens": float(np.mean([row["tokens"] for row in rows])),
        "ended": float(np.mean([row["finish_reason"] == "stop" for row in rows])),
        "usable": len(usable) / len(rows),
        "components": {
            name: float(np.mean([c[name] for c in usable])) for name in next(iter(usable), {})
        },
    }
