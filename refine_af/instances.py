"""Stage 3: the tuned model writes an input and an output for every instruction."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from refine_af import prompts, records, tokens
from refine_af.base_model import BaseModel
from refine_af.config import Experiment
from refine_af.models.transformer import Params
from refine_af.progress import bar
from refine_af.randomness import generator, seed_of
from refine_af.records import Row
from refine_af.requests import Completion, Request
from refine_af.seeds import SeedTask

ACCEPTED = "instances.jsonl"
REJECTED = "rejected_instances.jsonl"


@dataclasses.dataclass(frozen=True)
class InstanceStage:
    """What stays the same over all batches of instructions."""

    config: Experiment
    base: BaseModel
    seeds: Sequence[SeedTask]
    instructions: Sequence[Row]  # rows of instructions.jsonl
    workdir: Path

    def run(self, params: Params) -> None:
        """Write and filter answers to all instructions; `params` are with the adapter."""
        paths = [self.workdir / ACCEPTED, self.workdir / REJECTED]
        size = self.config.instances.batch_size
        first, _ = records.resume(paths)
        answers = self.config.instances.answers_per_instruction
        rows = min(size, len(self.instructions)) * answers
        engine = self.base.engine(rows)
        total = len(self.instructions)
        done = min(first * size, total)
        with bar("instances", total=total, unit="instruction", done=done) as progress:
            for batch in range(first, -(-len(self.instructions) // size)):
                tasks = self.instructions[batch * size : (batch + 1) * size]
                requests = [
                    r for row in range(len(tasks)) for r in self._requests(batch, row, tasks)
                ]
                completions = engine.generate(params, requests, progress.count_tokens)
                groups = [completions[i * answers : (i + 1) * answers] for i in range(len(tasks))]
                kept, dropped = self._sort(tasks, groups, batch)
                records.append_rows(paths[1], dropped)
                records.append_rows(paths[0], kept)
                progress.update(len(tasks))

    def _requests(self, batch: int, row: int, tasks: Sequence[Row]) -> list[Request]:
        """One request for each answer wanted, each with its own demonstrations and seed."""
        options, seed = self.config, self.config.seed
        shown = prompts.demos(self.seeds, options.prompts)
        requests = []
        for answer in range(options.instances.answers_per_instruction):
            rng = generator(seed, "instances/demos", batch, row, answer)
            text = prompts.instance_prompt(
                tasks[row]["instruction"], shown, options.prompts.num_demos, rng
            )
            ids = tokens.encode_prompt(self.base.tokenizer, text, options.prompts.format)
            key = seed_of(seed, "instances/request", batch, row, answer)
            requests.append(Request(tuple(ids), options.instances.sampling, key))
        return requests

    def _sort(
        self, tasks: Sequence[Row], groups: Sequence[Sequence[Completion]], batch: int
    ) -> tuple[list[Row], list[Row]]:
        kept: list[Row] = []
        dropped: list[Row] = []
        for task, group in zip(tasks, groups, strict=True):
            pairs, faults = select(
                group,
                limit=self.config.instances.max_per_instruction,
                accept_unmarked=self.config.prompts.accept_unmarked_output,
            )
            common = {"id": task["id"], "instruction": task["instruction"]}
            label = {"is_classification": task["is_classification"]}
            kept += [{**common, **label, "input": x, "output": y, "batch": batch} for x, y in pairs]
            dropped += [
                {**common, "completion": text, "reason": reason, "batch": batch}
                for text, reason in faults
            ]
        return kept, dropped


def select(
    completions: Sequence[Completion], *, limit: int, accept_unmarked: bool
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(usable pairs, (completion, reason) of the others) among the answers to one instruction.

    Self-Instruct's rules (arXiv 2212.10560, appendix A): the same non-empty input with different
    outputs drops all answers; duplicates and more than `limit` pairs are dropped.
    """
    pairs: dict[tuple[str, str], str] = {}
    faults: list[tuple[str, str]] = []
    for completion in completions:
        pair = prompts.parse_instance(completion.text, accept_unmarked=accept_unmarked)
        reason = fault(pair, completion.finish_reason)
        if pair is None or reason:
            faults.append((completion.text, reason or "unparsable"))
        elif pair in pairs:
            faults.append((completion.text, "duplicate"))
        else:
            pairs[pair] = completion.text
    inputs = [x for x, _ in pairs if x]
    if len(set(inputs)) < len(inputs):
        return [], faults + [(text, "conflicting_outputs") for text in pairs.values()]
    surplus = list(pairs.values())[limit:]
    return list(pairs)[:limit], faults + [(text, "over_quota") for text in surplus]


def fault(pair: tuple[str, str] | None, finish_reason: str) -> str | None:
    """Reason to drop an answer by itself, or None."""
    if pair is None:
        return "unparsable"
    text, output = pair
    if not output:
        return "empty_output"
    if finish_reason == "length":
        return "truncated"
    if text == output:
        return "input_equals_output"
    if text.endswith(":") or output.endswith(":"):
        return "ends_with_colon"
    return None
