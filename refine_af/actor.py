"""The policy answers prompts, and the oracle says how good the answers are."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from refine_af import prompts, rewards, rollout_metrics
from refine_af.base_model import BaseModel
from refine_af.config import Experiment, Reward
from refine_af.models.transformer import Params
from refine_af.policy import Policy
from refine_af.ppo_prompts import Batch
from refine_af.progress import bar
from refine_af.records import Row
from refine_af.requests import Completion
from refine_af.rewards import Example, Judgement
from refine_af.score_cache import CachedOracle


class Answers(NamedTuple):
    """Answers to a batch, and what the oracle says of them."""

    batch: Batch
    completions: Sequence[Completion]
    pairs: Sequence[prompts.Pair | None]  # input and output; None: it cannot be read
    judgements: Sequence[Judgement]

    def figures(self) -> dict[str, float]:
        """See `rollout_metrics.of`."""
        return rollout_metrics.of(self.completions, self.judgements)

    def rows(self) -> list[Row]:
        """What is written down of them."""
        return [
            {
                "row": row,
                "instruction": instruction,
                "completion": completion.text,
                "input": pair[0] if pair else None,
                "output": pair[1] if pair else None,
                "fault": prompts.fault(pair),
                "reward": round(judgement.reward, 6),
                "components": judgement.components,
                "finish_reason": completion.finish_reason,
            }
            for row, (instruction, completion, pair, judgement) in enumerate(
                zip(self.batch.instructions, *self[1:], strict=True)
            )
        ]


@dataclasses.dataclass(frozen=True)
class Actor:
    """Samples and scores with a run's options.

    Attributes:
        longest_prompt: of all that will be asked, in tokens; see `Engine.longest_text`.
    """

    config: Experiment
    base: BaseModel
    oracle: rewards.Oracle
    longest_prompt: int

    def sample(
        self, params: Params, batch: Batch, rollout: int = -1, progress: bar | None = None
    ) -> list[Completion]:
        """Answers; an oracle that does not need the device scores the first ones meanwhile.

        Args:
            params: trained ones, see `policy`.
            rollout: number under which such an oracle keeps rollouts apart.
        """
        options = self.config.ppo
        int8 = options.int8_weights
        engine = self.base.engine(
            options.batch_size,
            int8_weights=int8,
            int8_cache=options.int8_cache,
            longest_text=self.longest_prompt + options.sampling.max_new_tokens,
        )
        weights = Policy(self.base, options).for_sampling(params, int8_weights=int8)

        def finished(number: int, completion: Completion) -> None:
            example = self._example(batch.instructions[number], self._parse(completion))
            if example and isinstance(self.oracle, CachedOracle):
                self.oracle.prefetch([example], rollout)
            if progress:
                progress.update()

        counted = progress.count_tokens if progress else None
        return engine.generate(weights, batch.requests, counted, finished)

    def judge(
        self, batch: Batch, completions: Sequence[Completion], *, absolute: bool = False
    ) -> Answers:
        """The answers with their rewards.

        Args:
            absolute: to compare batches: normalised over its own answers, each has one mean.
        """
        options: Reward = self.config.reward
        if absolute:
            options = rewards.absolute(options)
        pairs = [self._parse(completion) for completion in completions]
        examples = list(map(self._example, batch.instructions, pairs))
        ended = [c.finish_reason == "stop" for c in completions]
        judgements = rewards.judge(self.oracle, examples, ended, options)
        return Answers(batch, completions, pairs, judgements)

    def _parse(self, completion: Completion) -> prompts.Pair | None:
        return prompts.parse_instance(
            completion.text, accept_unmarked=self.config.prompts.accept_unmarked_output
        )

    def _example(self, instruction: str, pair: prompts.Pair | None) -> Example | None:
        """What the oracle is asked about; None for an answer that gets the floor reward."""
        reason = prompts.fault(pair)
        every = self.config.reward.floor == "dropped"
        floored = reason is not None and (every or reason in prompts.UNREADABLE)
        return None if pair is None or floored else Example(instruction, *pair)
