"""Stage 1: the model writes new instructions (Self-Instruct, arXiv 2212.10560, section 2.2)."""

import dataclasses
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from refine_af import records, tokens
from refine_af.config import Experiment
from refine_af.engine import Engine, Progress
from refine_af.models.transformer import Params
from refine_af.novelty import NoveltyPool
from refine_af.progress import bar
from refine_af.randomness import generator, seed_of
from refine_af.records import Row
from refine_af.requests import Completion, Request
from refine_af.seeds import SeedTask

T = TypeVar("T")

ACCEPTED = "instructions.jsonl"
REJECTED = "rejected_instructions.jsonl"

HEADER = "Come up with a series of tasks:\n"
CLASSIFICATION_HEADER = (
    "Come up with a series of classification tasks. Name the possible labels in each:\n"
)
_MIN_WORDS, _MAX_WORDS = 4, 150
_BLACKLIST = (
    "image",
    "images",
    "graph",
    "graphs",
    "picture",
    "pictures",
    "file",
    "files",
    "map",
    "maps",
    "draw",
    "plot",
    "go to",
)
_BLACKLISTED = re.compile(r"\b(" + "|".join(_BLACKLIST) + r")\b", re.IGNORECASE)
_NUMBER = re.compile(r"^\d+\s*\.(?!\d)\s*")  # of an item; 3.14 is none
_NEXT_ITEM = re.compile(r"\n\s*\d+\s*\.(?!\d)")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A few-shot prompt and where it came from."""

    text: str
    ids: tuple[str, ...]  # of the demonstrations, in order
    is_classification: bool


def build_prompt(
    instructions: Sequence[tuple[str, str]], *, is_classification: bool = False
) -> Prompt:
    """Numbered list of (id, instruction), ending in the number of the next one."""
    header = CLASSIFICATION_HEADER if is_classification else HEADER
    lines = [
        f"{number}. {_collapse(text).rstrip(':')}\n"
        for number, (_, text) in enumerate(instructions, start=1)
    ]
    text = header + "".join(lines) + f"{len(lines) + 1}."
    return Prompt(text, tuple(key for key, _ in instructions), is_classification)


def parse(text: str, *, cut: bool) -> tuple[list[str], list[str]]:
    """(complete instructions, incomplete ones) of a continuation of the numbered list.

    Args:
        cut: the text ended by length, so that its last item is incomplete.
    """
    items = [_NUMBER.sub("", _collapse(item)) for item in _NEXT_ITEM.split("\n" + text)]
    complete, rest = (items[:-1], items[-1:]) if cut else (items, [])
    return [item for item in complete if item], [item for item in rest if item]


def unusable(instruction: str) -> str | None:
    """Reason to drop an instruction whatever the pool holds, or None."""
    words = instruction.split()
    if len(words) < _MIN_WORDS:
        return "too_short"
    if len(words) > _MAX_WORDS:
        return "too_long"
    if _BLACKLISTED.search(instruction):
        return "blacklisted_word"
    if instruction.lower().startswith("write a program"):
        return "starts_with_write_a_program"
    if instruction[0] in string.punctuation:
        return "starts_with_punctuation"
    if not instruction[0].isascii():
        return "non_ascii_start"
    return None


def _collapse(text: str) -> str:
    return " ".join(text.split())


@dataclasses.dataclass
class InstructionStage:
    """State of stage 1 between batches: the pool, and the rows written so far."""

    config: Experiment
    seeds: Sequence[SeedTask]
    workdir: Path

    def __post_init__(self) -> None:
        """Take up what an earlier start left on disk."""
        self.paths = [self.workdir / ACCEPTED, self.workdir / REJECTED]
        rows = records.read_rows(self.paths[0], ("id", "instruction"))
        records.check_bools(rows, "is_classification", self.paths[0])
        self.accepted: list[Row] = rows
        self.batch = 0
        if not self.complete:
            self.batch, (self.accepted, _) = records.resume(self.paths)
        self.pool = NoveltyPool(
            [seed.instruction for seed in self.seeds] + [r["instruction"] for r in self.accepted]
        )

    @property
    def complete(self) -> bool:
        """Whether enough instructions are accepted (they are written after the rejected ones)."""
        return len(self.accepted) >= self.config.instructions.num_instructions

    def run(self, engine: Engine, params: Params) -> None:
        """Write batches of prompts until there are enough instructions.

        Raises:
            ValueError: `max_batches` did not give enough.
        """
        options = self.config.instructions
        done = len(self.accepted)
        with bar(
            "instructions", total=options.num_instructions, unit="kept", done=done
        ) as progress:
            while not self.complete:
                if self.batch >= options.max_batches:
                    raise ValueError(
                        f"instructions: {len(self.accepted)} of {options.num_instructions} after "
                        f"{self.batch} batches; raise instructions.max_batches, or change "
                        "instructions.sampling (see rejected_instructions.jsonl for reasons)"
                    )
                before = len(self.accepted)
                self._one_batch(engine, params, progress.count_tokens)
                progress.update(len(self.accepted) - before)

    def _one_batch(self, engine: Engine, params: Params, count_tokens: Progress) -> None:
        prompts = self._prompts()
        requests = [
            Request(
                tuple(tokens.encode_prompt(engine.tokenizer, prompt.text, "raw")),
                self.config.instructions.sampling,
                seed_of(self.config.seed, "instructions/request", self.batch, row),
            )
            for row, prompt in enumerate(prompts)
        ]
        completions = engine.generate(params, requests, count_tokens)
        accepted, rejected = self._sort(prompts, completions)
        records.append_rows(self.paths[1], rejected)
        records.append_rows(self.paths[0], accepted)
        self.accepted += accepted
        self.batch += 1

    def _prompts(self) -> list[Prompt]:
        """The batch's prompts: 6 seeds and 2 generated instructions each, shuffled.

        Seeds stand in while there are not enough generated ones. Without a classification task
        among the seeds none is asked for.
        """
        options = self.config.instructions
        rng = generator(self.config.seed, "instructions/demos", self.batch)
        shown = any(seed.is_classification for seed in self.seeds)
        prompts = []
        for _ in range(options.batch_size):
            wanted = bool(rng.random() < options.classification_share) and shown
            seeds = [s for s in self.seeds if s.is_classification or not wanted]
            generated = [r for r in self.accepted if r["is_classification"] or not wanted]
            made = _pick(rng, generated, options.num_generated_demos)
            total = options.num_seed_demos + options.num_generated_demos
            pairs = [(s.id, s.instruction) for s in _pick(rng, seeds, total - len(made))]
            pairs += [(r["id"], r["instruction"]) for r in made]
            order = rng.permutation(len(pairs))
            prompts.append(build_prompt([pairs[i] for i in order], is_classification=wanted))
        return prompts

    def _sort(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[list[Row], list[Row]]:
        accepted: list[Row] = []
        rejected: list[Row] = []
        parsed = [parse(c.text, cut=c.finish_reason == "length") for c in completions]
        self.pool.prepare([text for complete, _ in parsed for text in complete])
        for prompt, (complete, cut) in zip(prompts, parsed, strict=True):
            rejected += [self._rejection(text, "incomplete") for text in cut]
            for text in complete:
                row = self._judge(text, prompt, len(self.accepted) + len(accepted))
                (rejected if "reason" in row else accepted).append(row)
        return accepted, rejected

    def _judge(self, text: str, prompt: Prompt, number: int) -> Row:
        """Row of an instruction; one with a `reason` is rejected."""
        if number >= self.config.instructions.num_instructions:
            return self._rejection(text, "over_quota")
        if reason := unusable(text):
            return self._rejection(text, reason)
        neighbours = self.pool.compare(text)
        if not self.pool.is_novel(text, neighbours, self.config.instructions.max_similarity):
            return {
                **self._rejection(text, "similar"),
                "most_similar": neighbours.most_similar,
            }
        self.pool.add(text)
        return {
            "id": f"instruction_{number:05d}",
            "instruction": text,
            "is_classification": prompt.is_classification,
            "avg_similarity": round(neighbours.average, 4),
            "most_similar": neighbours.most_similar,
            "prompt_ids": list(prompt.ids),
            "model": self.config.model.source,
            "seed": self.config.seed,
            "batch": self.batch,
        }

    def _rejection(self, text: str, reason: str) -> Row:
        return {"instruction": text, "reason": reason, "batch": self.batch}


def _pick(rng: np.random.Generator, items: Sequence[T], count: int) -> list[T]:
    if not items:
        return []
    chosen = rng.choice(len(items), size=min(count, len(items)), replace=False)
    return [items[i] for i in chosen]
