"""The card of an oracle: how it was made, how well it does on tasks that were held out."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax

from refine_af import benchmarks, oracle_evaluation, plots
from refine_af.models import processes
from refine_af.oracle_evaluation import Scores
from refine_af.records import Row, write_text
from refine_af.trained_oracle import Description

CARD, CALIBRATION = "README.md", "calibration.png"

_TEXT = """# Reward oracle on {model}

LoRA (rank {lora.rank}, alpha {lora.alpha:g}, on {linears}) and four heads (`rew`, `nat`, `und`,
`coh`) on the frozen model; it reads up to {max_length} tokens of a task and an answer. Made by

    {command}

{facts}

## Accuracy on held-out tasks

Share of pairs, in percent, whose good answer scores above the corrupted one, of the adapter as it
is stored here. `nat`, `und` and `coh` are given where the corruption lowers that quality; `reward`
is the default formula over all four.

{table}

## Reliability

![Predicted against observed probabilities]({calibration})

`rew`: of two answers, the predicted probability that the preferred one is the better. The others:
the predicted probability of the label against its share. Larger dots hold more examples.

## Limits

It knows corruptions, not truth: a fluent wrong answer to the right question scores well. Its
figures are those of short English tasks like the seed tasks, and of corruptions like those that it
was trained on.
"""


def write(
    directory: Path, description: Description, scores: Scores, command: str, facts: Sequence[str]
) -> list[Row]:
    """Write `README.md` and `calibration.png`; returns the accuracies that they show.

    Args:
        command: that made the oracle.
        facts: lines about its training: data, time, date.
    """
    rows = oracle_evaluation.accuracies(scores)
    chart = plots.calibration(oracle_evaluation.reliability(scores))
    processes.by_writer(lambda: (directory / CALIBRATION).write_bytes(chart))
    devices = jax.devices()
    hardware = (
        f"hardware: {benchmarks.processor()}, {os.cpu_count()} cores; JAX on {len(devices)} x "
        f"{devices[0].device_kind}"
    )
    text = _TEXT.format(
        model=description.model,
        lora=description.lora,
        linears=description.lora.pattern.replace("|", ", "),
        max_length=description.max_length,
        command=command,
        facts="\n".join(f"- {fact}" for fact in (*facts, hardware)),
        table=oracle_evaluation.table(rows),
        calibration=CALIBRATION,
    )
    write_text(directory / CARD, text)
    return rows
