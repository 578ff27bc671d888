"""What stage 2 asks of the policy: instructions in passes over all of them, each with its demos."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from refine_af import prompts, tokens
from refine_af.config import Experiment
from refine_af.randomness import generator, seed_of
from refine_af.requests import Request
from refine_af.seeds import SeedTask


class Batch(NamedTuple):
    """Prompts, and the instruction that each is about."""

    requests: list[Request]
    instructions: list[str]

    def every(self, n: int) -> "Batch":
        """One in `n`, from the first on."""
        return Batch(self.requests[::n], self.instructions[::n])


@dataclasses.dataclass(frozen=True)
class Prompter:
    """Prompts of a run: a function of its seed and the step, whatever was done before."""

    config: Experiment
    tokenizer: Any
    seeds: Sequence[SeedTask]
    instructions: Sequence[str]  # to train on
    held_out: Sequence[str]

    def of_step(self, step: int) -> Batch:
        """`batch_size` prompts; each `group_size` in a row are equal but for their seeds."""
        options = self.config.ppo
        rng = generator(self.config.seed, "ppo/demos", step)
        batch = Batch([], [])
        for row in range(options.batch_size):
            seed = seed_of(self.config.seed, "ppo/request", step, row)
            if row % options.group_size:
                batch.requests.append(dataclasses.replace(batch.requests[-1], seed=seed))
                batch.instructions.append(batch.instructions[-1])
                continue
            instruction = self._instruction((step * options.batch_size + row) // options.group_size)
            batch.requests.append(self._request(instruction, rng, seed))
            batch.instructions.append(instruction)
        return batch

    def of_held_out(self) -> Batch:
        """`num_eval_samples` for each held-out instruction in a row, all with its one prompt."""
        batch = Batch([], [])
        for i, instruction in enumerate(self.held_out):
            rng = generator(self.config.seed, "ppo/eval_demos", i)
            request = self._request(instruction, rng, 0)
            for sample in range(self.config.ppo.num_eval_samples):
                seed = seed_of(self.config.seed, "ppo/eval", i, sample)
                batch.requests.append(dataclasses.replace(request, seed=seed))
                batch.instructions.append(instruction)
        return batch

    def longest(self) -> int:
        """Tokens of the longest prompt of all; none of them is kept."""
        steps = range(self.config.ppo.num_steps)
        made = (request for step in steps for request in self.of_step(step).requests)
        return max(len(r.prompt_ids) for r in itertools.chain(self.of_held_out().requests, made))

    def _instruction(self, number: int) -> str:
        """The one that is asked for as so many before it have been."""
        total = len(self.instructions)
        return self.instructions[_order(self.config.seed, number // total, total)[number % total]]

    def _request(self, instruction: str, rng: np.random.Generator, seed: int) -> Request:
        options = self.config.prompts
        text = prompts.instance_prompt(instruction, self._shown, options.num_demos, rng)
        ids = tokens.encode_prompt(self.tokenizer, text, options.format)
        return Request(tuple(ids), self.config.ppo.sampling, seed)

    @functools.cached_property
    def _shown(self) -> Sequence[SeedTask]:
        return prompts.demos(self.seeds, self.config.prompts)


@functools.lru_cache(maxsize=2)
def _order(seed: int, number: int, total: int) -> np.ndarray:
    """Of the instructions in a pass."""
    return generator(seed, "ppo/order", number).permutation(total)
