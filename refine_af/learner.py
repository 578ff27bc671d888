"""The policy learns from answers: a rollout is read by the models, then comes the update."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from refine_af import flops, policy_update, rollout, tokens
from refine_af.base_model import BaseModel
from refine_af.config import Experiment
from refine_af.mesh import batch_parts, shard_batch
from refine_af.models import processes
from refine_af.policy import Policy
from refine_af.randomness import key_of
from refine_af.requests import Completion, Request
from refine_af.rollout import Layout, Reading, Rollout
from refine_af.training import TrainState


@dataclasses.dataclass(frozen=True)
class Learner:
    """Programs of a run on its mesh.

    Attributes:
        longest_prompt: of all that will be read, in tokens: rollouts of a run have one shape.
    """

    config: Experiment
    base: BaseModel
    longest_prompt: int
    _updates: list[Any] = dataclasses.field(default_factory=list, init=False)  # at most one

    def read(
        self, state: TrainState, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> tuple[Rollout, Reading]:
        """Answers on the mesh, not yet scored, and what the models say of them."""
        options = self.config.ppo
        unscored = [0.0] * len(completions)
        built = rollout.build(requests, completions, unscored, self._layout)
        rows = shard_batch(self.base.mesh, built)
        return rows, rollout.jit_read(
            self._policy.definition,
            self.base.definition,
            self.base.params,
            state.params,
            rows,
            options.sampling.temperature,
            self._num_pieces,
        )

    def begin_update(
        self,
        step: int,
        state: TrainState,
        rows: Rollout,
        reading: Reading,
        scores: Sequence[float],
    ) -> tuple[TrainState, policy_update.Metrics]:
        """(next state, metrics), which the device may still be at; `state` is donated."""
        score = shard_batch(self.base.mesh, np.asarray(scores, np.float32))
        key = key_of(self.config.seed, "ppo/permutation", step)
        rows = rows._replace(score=score)
        if not self._updates:
            of_policy = self._policy.definition, self.config.ppo, self.base.mesh
            self._updates.append(policy_update.make_update(*of_policy, state))
        (update,) = self._updates
        found: tuple[TrainState, policy_update.Metrics] = update(
            self.base.params, state, rows, reading, key
        )
        return found

    def kl(
        self, state: TrainState, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> np.ndarray:
        """Log-ratio of policy and reference over each answer, a rollout's worth at a time."""
        size, found = self.config.ppo.batch_size, []
        for first in range(0, len(requests), size):
            some = np.resize(np.arange(first, min(first + size, len(requests))), size).tolist()
            chosen = [requests[i] for i in some], [completions[i] for i in some]
            _, reading = self.read(state, *chosen)
            ratio = processes.to_host(reading.logprobs - reading.ref_logprobs)
            found.append(ratio.sum(axis=1))
        return np.concatenate(found)[: len(requests)]

    def operations(self, requests: Sequence[Request], completions: Sequence[Completion]) -> float:
        """Of a rollout's reading and update."""
        predictions = sum(len(c.token_ids) for c in completions)
        texts = sum(len(r.prompt_ids) for r in requests) + predictions
        return flops.of_step(self.base.config, self.config.ppo, texts, predictions)

    @functools.cached_property
    def _policy(self) -> Policy:
        return Policy(self.base, self.config.ppo)

    @property
    def _layout(self) -> Layout:
        options = self.config.ppo
        most = options.sampling.max_new_tokens
        return Layout(
            row_length=tokens.bucket(max(self.longest_prompt + most, options.row_length)),
            answer_length=most,
            row_multiple=self._num_pieces * batch_parts(self.base.mesh),
        )

    @property
    def _num_pieces(self) -> int:
        return self.config.ppo.num_minibatches * self.config.ppo.num_microbatches
