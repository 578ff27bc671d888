"""What a reward oracle learns from: groups of answers to one task, the best one first.

A group is a seed task's answer with corruptions of it (`corruptions`), or a row of a preference
set. A fifth of the tasks is held out, by the hash of their id alone: a task is on the same side
in every run and in every file.
"""

import collections
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from refine_af import corruptions, packing
from refine_af.corruptions import CLEAN, SEVERITIES, Labels
from refine_af.packing import Rows
from refine_af.randomness import generator
from refine_af.records import Row
from refine_af.rewards import Example
from refine_af.seeds import SeedTask
from refine_af.trained_oracle import encode

_HELD_OUT_SHARE = 0.2
_AHEAD = 12  # groups from which a batch is filled
_UNKNOWN: Labels = (None, None, None)
# One corruption of each kind a group; whether an answer fits its task is the hardest to see.
_KINDS = (
    ("shuffled", "dropped"),
    ("repeated", "truncated"),
    ("off_topic", "mismatched"),
    ("mismatched",),
)


class Answer(NamedTuple):
    """An answer and what is known of it."""

    example: Example
    labels: Labels


Group = Sequence[Answer]  # the first is better than each of the others
Encoded = tuple[tuple[int, ...], Labels]


class Batch(NamedTuple):
    """Groups packed into rows: no padding but at the ends of rows, and one shape for all."""

    tokens: Int[Array, "B T"]
    start: Int[Array, "B T"]  # first column of the text that a token belongs to
    rows: Int[Array, "N"]  # of the last token of each text
    columns: Int[Array, "N"]
    labels: Float[Array, "N 3"]  # nat, und, coh; NaN where not judged
    better: Int[Array, "P"]  # text of each pair, of N
    worse: Int[Array, "P"]
    weights: Float[Array, "P"]  # 1, or 0 for a pair that fills up


def held_out(key: str) -> bool:
    """Whether the task of this id (or the prompt of this text) is kept from training."""
    digest = hashlib.sha256(key.encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_OUT_SHARE * 2**64


def split(tasks: Sequence[SeedTask]) -> tuple[list[SeedTask], list[SeedTask]]:
    """(training, held out); a task that shares a text with a held-out one is in neither.

    Raises:
        ValueError: too few tasks for mismatched answers on both sides.
    """
    kept = [task for task in tasks if held_out(task.id)]
    secret = {text for task in kept for text in _texts(task)}
    training = [t for t in tasks if not held_out(t.id) and secret.isdisjoint(_texts(t))]
    if min(len(kept), len(training)) < 2:
        raise ValueError(
            f"{len(tasks)} seed tasks give {len(training)} to train on and {len(kept)} held out; "
            "expected at least 2 of each: give more tasks"
        )
    return training, kept


def _texts(task: SeedTask) -> set[str]:
    """Instruction and answers, as they are compared."""
    return {" ".join(t.split()) for t in (task.instruction, *(i.output for i in task.instances))}


def examples_of(tasks: Iterable[SeedTask]) -> list[Example]:
    """All instances whose answer is not empty."""
    return [
        Example(task.instruction, instance.input, instance.output)
        for task in tasks
        for instance in task.instances
        if instance.output.strip()
    ]


def corrupted_group(
    example: Example, others: Sequence[Example], seed: int, epoch: int, row: int
) -> Group:
    """An answer and four corruptions of it, drawn by (seed, epoch, row); fewer for a label."""
    rng = generator(seed, "oracle/corruptions", epoch, row)
    found = [Answer(example, CLEAN)]
    for kind in _KINDS:
        name = kind[int(rng.integers(len(kind)))]
        severity = SEVERITIES[int(rng.integers(len(SEVERITIES)))]
        worse = corruptions.corrupt(name, severity, example, others, rng)
        if worse is not None:
            found.append(Answer(worse, corruptions.LABELS[name, severity]))
    return found


def preference_groups(
    rows: Sequence[Row], unseen: Sequence[SeedTask]
) -> tuple[list[Group], list[Group]]:
    """(training, held out) of rows `prompt, chosen, rejected`.

    A prompt is on one side only. A row is left out when its answers are the same, one is empty, or
    it shares a text with a held-out seed task.
    """
    secret = {text for task in unseen for text in _texts(task)}
    sides: tuple[list[Group], list[Group]] = [], []
    for row in rows:
        chosen, rejected = row["chosen"].strip(), row["rejected"].strip()
        known = {" ".join(text.split()) for text in (row["prompt"], chosen, rejected)}
        if not chosen or not rejected or chosen == rejected or known & secret:
            continue
        group = [Answer(Example(row["prompt"], "", text), _UNKNOWN) for text in (chosen, rejected)]
        sides[held_out(row["prompt"])].append(group)
    return sides


def batches(
    groups: Sequence[Group],
    tokenizer: PreTrainedTokenizerBase,
    end_id: int,
    num_rows: int,
    max_length: int,
) -> list[Batch]:
    """Batches of one shape: the first group that is left, and those of the next that fit beside it
    into `num_rows` rows.

    Raises:
        ValueError: there are no groups.
    """
    if not groups:
        raise ValueError("oracle: no task has an answer that can be made worse; give more tasks")
    encoded = [
        [(tuple(encode(a.example, tokenizer, end_id, max_length)), a.labels) for a in group]
        for group in groups
    ]
    cut: list[list[list[Encoded]]] = []
    filled: list[Rows] = []
    waiting = collections.deque(encoded)
    while waiting:
        ahead = [waiting.popleft() for _ in range(min(_AHEAD, len(waiting)))]
        chosen, rows = [0], _fit(ahead[:1], max_length)
        for i in range(1, len(ahead)):
            tried = _fit([ahead[j] for j in (*chosen, i)], max_length)
            if len(tried.used) <= num_rows:
                chosen, rows = [*chosen, i], tried
        cut.append([ahead[i] for i in chosen])
        filled.append(rows)
        left = [group for i, group in enumerate(ahead) if i not in chosen]
        waiting.extendleft(reversed(left))
    num_rows = max([num_rows, *(len(rows.used) for rows in filled)])
    num_texts = packing.power_of_two(max(sum(map(len, batch)) for batch in cut))
    return [
        _batch(batch, rows, num_rows, num_texts) for batch, rows in zip(cut, filled, strict=True)
    ]


def _fit(groups: Sequence[Sequence[Encoded]], length: int) -> Rows:
    return packing.first_fit([(ids, 0) for group in groups for ids, _ in group], length)


def _batch(
    groups: Sequence[Sequence[Encoded]], packed: Rows, num_rows: int, num_texts: int
) -> Batch:
    tokens, start, _ = packed.arrays(num_rows)
    rows, columns = (np.zeros(num_texts, np.int32) for _ in range(2))
    labels = np.full((num_texts, len(CLEAN)), np.nan, np.float32)
    better, worse = (np.zeros(num_texts, np.int32) for _ in range(2))
    weights = np.zeros(num_texts, np.float32)
    text = pair = 0
    for group in groups:
        best = text
        for ids, known in group:
            row, first = packed.places[ids, 0]
            rows[text], columns[text] = row, first + len(ids) - 1
            labels[text] = [np.nan if label is None else label for label in known]
            if text > best:
                better[pair], worse[pair], weights[pair] = best, text, 1.0
                pair += 1
            text += 1
    arrays = tokens, start, rows, columns, labels, better, worse, weights
    return Batch(*map(jnp.asarray, arrays))
