"""Stage 3: the tuned model writes an input and an output for every instruction."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from refine_af import prompts, records, rewards, tokens
from refine_af.base_model import BaseModel
from refine_af.config import Experiment
from refine_af.models.transformer import Params
from refine_af.progress import bar
from refine_af.randomness import generator, seed_of
from refine_af.records import Row
from refine_af.requests import Completion, Request
from refine_af.rewards import Example, Oracle
from refine_af.seeds import SeedTask

ACCEPTED = "instances.jsonl"
REJECTED = "rejected_instances.jsonl"


class _Asked(NamedTuple):
    """A request and where its prompt came from."""

    request: Request
    text: str
    demo_ids: list[str]  # seed tasks shown in it, in their order


class Pair(NamedTuple):
    """A usable answer, and which of the answers to its instruction it is."""

    input: str
    output: str
    answer: int


@dataclasses.dataclass(frozen=True)
class InstanceStage:
    """What stays the same over all batches of instructions."""

    config: Experiment
    base: BaseModel
    seeds: Sequence[SeedTask]
    instructions: Sequence[Row]  # rows of instructions.jsonl
    workdir: Path
    oracle: Oracle | None = None  # scores what is kept

    def run(self, params: Params) -> None:
        """Write and filter answers to all instructions; `params` are with the adapter."""
        paths = [self.workdir / ACCEPTED, self.workdir / REJECTED]
        size = self.config.instances.batch_size
        first, found = records.resume(paths, strings=("id",))
        answers = self.config.instances.answers_per_instruction
        rows = min(size, len(self.instructions)) * answers
        engine = self.base.engine(rows)
        total, done = len(self.instructions), self._num_done(found)
        with bar("instances", total=total, unit="instruction", done=done) as progress:
            for batch, start in enumerate(range(done, total, size), first):
                tasks = self.instructions[start : start + size]
                asked = [a for row in range(len(tasks)) for a in self._asked(batch, row, tasks)]
                requests = [a.request for a in asked]
                completions = engine.generate(params, requests, progress.count_tokens)
                kept, dropped = self._sort(tasks, asked, completions, batch)
                self._score(kept)
                records.append_rows(paths[1], dropped)
                records.append_rows(paths[0], kept)
                progress.update(len(tasks))

    def _num_done(self, found: Iterable[Iterable[Row]]) -> int:
        """Instructions that rows were written for, in batches of whatever size."""
        numbers = {task["id"]: number for number, task in enumerate(self.instructions)}
        known = (numbers.get(row["id"], -1) for rows in found for row in rows)
        return 1 + max(known, default=-1)

    def _asked(self, batch: int, row: int, tasks: Sequence[Row]) -> list[_Asked]:
        """One request for each answer wanted, each with its own demonstrations and seed."""
        options, seed = self.config, self.config.seed
        shown = prompts.demos(self.seeds, options.prompts)
        asked = []
        for answer in range(options.instances.answers_per_instruction):
            rng = generator(seed, "instances/demos", batch, row, answer)
            picked = prompts.pick(shown, options.prompts.num_demos, rng)
            text = prompts.with_demos(tasks[row]["instruction"], picked)
            ids = tokens.encode_prompt(self.base.tokenizer, text, options.prompts.format)
            key = seed_of(seed, "instances/request", batch, row, answer)
            request = Request(tuple(ids), options.instances.sampling, key)
            asked.append(_Asked(request, text, [demo.id for demo in picked]))
        return asked

    def _sort(
        self,
        tasks: Sequence[Row],
        asked: Sequence[_Asked],
        completions: Sequence[Completion],
        batch: int,
    ) -> tuple[list[Row], list[Row]]:
        """Rows that are kept and that are dropped, of the answers to a batch of instructions."""
        kept: list[Row] = []
        dropped: list[Row] = []
        answers = self.config.instances.answers_per_instruction
        for row, task in enumerate(tasks):
            mine = slice(row * answers, (row + 1) * answers)
            pairs, faults = select(
                completions[mine],
                limit=self.config.instances.max_per_instruction,
                accept_unmarked=self.config.prompts.accept_unmarked_output,
            )
            common = {"id": task["id"], "instruction": task["instruction"]}
            label = {"is_classification": task["is_classification"]}
            for pair in pairs:
                _, text, demo_ids = asked[mine][pair.answer]
                written = {"input": pair.input, "output": pair.output}
                source = {"demo_ids": demo_ids, "prompt": text}
                kept.append(common | label | written | source | {"batch": batch})
            dropped += [
                {**common, "completion": text, "reason": reason, "batch": batch}
                for text, reason in faults
            ]
        return kept, dropped

    def _score(self, rows: Sequence[Row]) -> None:
        """Put the reward and what it is made of into each row."""
        if self.oracle is None:
            return
        examples = [Example(row["instruction"], row["input"], row["output"]) for row in rows]
        options = rewards.absolute(self.config.reward)
        judgements = rewards.judge(self.oracle, examples, [True] * len(rows), options)
        for row, judgement in zip(rows, judgements, strict=True):
            row["reward"] = round(judgement.reward, 6)
            row["components"] = judgement.components


def select(
    completions: Sequence[Completion], *, limit: int, accept_unmarked: bool
) -> tuple[list[Pair], list[tuple[str, str]]]:
    """(usable pairs, (completion, reason) of the others) among the answers to one instruction.

    Self-Instruct's rules (arXiv 2212.10560, appendix A): the same non-empty input with different
    outputs drops all answers; duplicates and more than `limit` pairs are dropped.
    """
    pairs: dict[tuple[str, str], int] = {}
    faults: list[tuple[str, str]] = []
    for answer, completion in enumerate(completions):
        pair = prompts.parse_instance(completion.text, accept_unmarked=accept_unmarked)
        reason = fault(pair, completion.finish_reason)
        if pair is None or reason:
            faults.append((completion.text, reason or "unparsable"))
        elif pair in pairs:
            faults.append((completion.text, "duplicate"))
        else:
            pairs[pair] = answer
    found = [Pair(*pair, answer) for pair, answer in pairs.items()]
    inputs = [pair.input for pair in found if pair.input]
    if len(set(inputs)) < len(inputs):
        found, surplus, reason = [], found, "conflicting_outputs"
    else:
        found, surplus, reason = found[:limit], found[limit:], "over_quota"
    return found, faults + [(completions[pair.answer].text, reason) for pair in surplus]


def fault(pair: prompts.Pair | None, finish_reason: str) -> str | None:
    """Reason to drop an answer by itself, or None."""
    reason = prompts.fault(pair)
    if finish_reason == "length" and reason not in prompts.UNREADABLE:
        return "truncated"
    return reason
