"""Stage 2: reinforcement learning from automated feedback.

One step: pick instructions -> sample answers with the policy -> read policy, critic and
reference -> score them with the oracle -> update.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from orbax.checkpoint import CheckpointManager

from refine_af import (
    checkpoints,
    flops,
    memory,
    policy_update,
    ppo_evaluation,
    ppo_records,
    rewards,
    rollout,
    rollout_metrics,
    training,
)
from refine_af.actor import Actor, Answers
from refine_af.base_model import BaseModel
from refine_af.config import Experiment, config_hash
from refine_af.learner import Learner
from refine_af.models.transformer import Params
from refine_af.policy import Policy
from refine_af.ppo_prompts import Batch, Prompter
from refine_af.ppo_records import Log
from refine_af.profiling import Profile
from refine_af.progress import bar
from refine_af.requests import Completion
from refine_af.rollout import Reading, Rollout
from refine_af.seeds import SeedTask
from refine_af.training import TrainState

CHECKPOINTS = "ppo/checkpoints"
PROFILE = "ppo/profile"
SCORES = "ppo/scores.sqlite"  # what the oracle has said of answers


class _Sampled(NamedTuple):
    """A rollout before it is scored."""

    batch: Batch
    completions: list[Completion]
    rows: Rollout  # score: 0
    reading: Reading
    times: dict[str, float]  # seconds by phase


class _Scored(NamedTuple):
    """What a step learns from."""

    sampled: _Sampled
    answers: Answers
    times: dict[str, float]
    look: Answers | None  # to held-out instructions, of the policy before the update


@dataclasses.dataclass(frozen=True)
class RlafStage:
    """What stays the same over all PPO steps."""

    config: Experiment
    base: BaseModel
    oracle: rewards.Oracle
    seeds: Sequence[SeedTask]
    instructions: Sequence[str]  # to train on
    held_out: Sequence[str]
    workdir: Path
    profile_steps: int = 0  # to trace

    def run(self) -> None:
        """Take all steps that are not done yet; state, metrics and answers go to the workdir."""
        directory, options = self.workdir / CHECKPOINTS, self.config.ppo
        looks: dict[int, float] = {}  # mean reward of held-out instructions, by the steps done

        def best() -> int | None:
            return max(looks, key=looks.__getitem__) if options.keep_best and looks else None

        keep = options.keep_checkpoints
        with checkpoints.open_manager(directory, keep=keep, best=best) as manager:
            shapes = jax.eval_shape(self._new_state)
            memory.check_state(shapes, shapes.params, self.base.mesh, "train_ppo")
            checkpoints.check_space(manager, shapes, keep + options.keep_best)
            like = checkpoints.shapes_of(self._new_state())  # whose arrays are gone
            first, state = checkpoints.restore_latest(manager, like)
            state = self._new_state() if state is None else state
            with ppo_records.open_log(self.workdir, self.config, first) as log:
                found = ppo_records.looks(self.workdir)
                looks |= {step: found[step] for step in manager.all_steps() if step in found}
                state = self._train(manager, first, state, log, looks)
            if options.keep_best:
                looks[options.num_steps] = self._look(state).figures()["reward/mean"]
                earlier = {step: reward for step, reward in found.items() if step}
                ppo_records.write_looks(self.workdir, earlier | looks)
                checkpoints.finish(manager)
                del state  # the best one takes its place
                state = _best(manager, like, looks)
        if self.held_out:
            self._evaluate(state)

    def _new_state(self) -> TrainState:
        return policy_update.new_state(self.config, self.base)

    @functools.cached_property
    def _prompter(self) -> Prompter:
        texts = self.instructions, self.held_out
        return Prompter(self.config, self.base.tokenizer, self.seeds, *texts)

    @functools.cached_property
    def _actor(self) -> Actor:
        return Actor(self.config, self.base, self.oracle, self._longest_prompt)

    @functools.cached_property
    def _learner(self) -> Learner:
        return Learner(self.config, self.base, self._longest_prompt)

    @functools.cached_property
    def _longest_prompt(self) -> int:
        longest, new = self._prompter.longest(), self.config.ppo.sampling.max_new_tokens
        if longest + new > self.base.config.max_positions:
            raise ValueError(
                f"a prompt of PPO has {longest} tokens: with ppo.sampling.max_new_tokens={new} the "
                f"model's context of {self.base.config.max_positions} is too short; lower these, "
                "prompts.num_demos or prompts.max_demo_chars"
            )
        return longest

    def _train(
        self,
        manager: CheckpointManager,
        first: int,
        state: TrainState,
        log: Log,
        looks: dict[int, float],  # is added to
    ) -> TrainState:
        """Steps from `first` on."""
        options = self.config.ppo
        batches: dict[int, Batch] = {}  # made while the device was at an update
        ahead: dict[int, _Sampled] = {}  # rollouts of the policy one step back

        def sample(step: int, state: TrainState) -> _Sampled:
            batch = batches.pop(step) if step in batches else self._prompter.of_step(step)
            return self._sampled(step, state, batch)

        def prepare(step: int, state: TrainState) -> _Scored:
            look = self._look(state) if self._is_looked_at(step) else None
            found = ahead.pop(step, None) or sample(step, state)
            if self._samples_ahead(step + 1):
                ahead[step + 1] = sample(step + 1, state)
            return self._scored(found, look)

        def learn(
            step: int, state: TrainState, scored: _Scored
        ) -> tuple[TrainState, dict[str, str]]:
            upcoming = step + 1 + (step + 1 in ahead)

            def meanwhile() -> None:
                if upcoming < options.num_steps:
                    batches[upcoming] = self._prompter.of_step(upcoming)

            state, figures = self._learn(step, state, scored, meanwhile)
            samples = scored.look.rows() if scored.look else []
            if samples and step:  # nothing is saved of the first policy, which is the base
                looks[step] = figures["eval/reward/mean"]
            log.write(step, figures, scored.answers.rows(), samples)
            training.check_skipped(state, f"ppo step {step}", figures)
            return state, {
                "reward": f"{figures['reward/mean']:.3f}",
                "kl": f"{figures['kl/k1']:.2f}",
                "tokens_per_second": f"{figures['time/tokens_per_second']:.0f}",
            }

        with bar("ppo", total=options.num_steps, unit="step", done=first) as progress:
            return checkpoints.advance(
                manager,
                state,
                range(first, options.num_steps),
                prepare=prepare,
                learn=learn,
                due=self._is_due,
                resumable=lambda done: not self._samples_ahead(done),
                config=config_hash(self.config),
                progress=progress,
                profile=Profile(self.workdir / PROFILE, self.profile_steps),
            )

    def _samples_ahead(self, step: int) -> bool:
        """Whether a step's answers are of the policy one step back.

        Not those behind a checkpoint, which does not hold that policy: a resumed run is to sample
        what an undisturbed one has sampled.
        """
        options = self.config.ppo
        return options.sample_ahead and step < options.num_steps and not self._is_due(step)

    def _is_due(self, step: int) -> bool:
        """Whether a checkpoint is, after so many steps."""
        options = self.config.ppo
        chosen_from = options.keep_best and self._is_looked_at(step)
        return chosen_from or step % options.checkpoint_every == 0

    def _is_looked_at(self, step: int) -> bool:
        every = self.config.ppo.eval_every
        return every > 0 and step % every == 0

    def _look(self, state: TrainState) -> Answers:
        """An answer to each held-out instruction."""
        batch = self._prompter.of_held_out().every(self.config.ppo.num_eval_samples)
        completions = self._actor.sample(state.params, batch)
        return self._actor.judge(batch, completions, absolute=True)

    def _sampled(self, step: int, state: TrainState, batch: Batch) -> _Sampled:
        """Answers of the policy as it is, and what it, critic and reference say of them."""
        began = time.monotonic()
        completions = self._actor.sample(state.params, batch, step)
        sampled = time.monotonic()
        rows, reading = self._learner.read(state, batch.requests, completions)
        jax.block_until_ready(reading)
        times = {"time/sample": sampled - began, "time/read": time.monotonic() - sampled}
        return _Sampled(batch, completions, rows, reading, times)

    def _scored(self, sampled: _Sampled, look: Answers | None) -> _Scored:
        began = time.monotonic()
        answers = self._actor.judge(sampled.batch, sampled.completions)
        times = sampled.times | {"time/score": time.monotonic() - began}
        return _Scored(sampled, answers, times, look)

    def _learn(
        self, step: int, state: TrainState, scored: _Scored, meanwhile: Callable[[], None]
    ) -> tuple[TrainState, dict[str, float]]:
        """Update the policy with answers; `state` is donated, `meanwhile` runs on the host."""
        (batch, completions, rows, reading, _), answers, times, look = scored
        began = time.monotonic()
        rewarded = [judgement.reward for judgement in answers.judgements]
        state, metrics = self._learner.begin_update(step, state, rows, reading, rewarded)
        meanwhile()
        figures = {name: float(value) for name, value in metrics.items()}
        times = times | {"time/update": time.monotonic() - began}
        looked = look.figures() if look else {}
        figures |= answers.figures() | {f"eval/{name}": x for name, x in looked.items()}
        figures["ppo/skipped"] = float(state.skipped)
        figures["batch/padding_share"] = rollout.padding_share(batch.requests, completions, rows)
        figures["drift/logprob_max"] = rollout.drift(completions, reading)
        figures |= times
        num_tokens = sum(len(c.token_ids) for c in completions)
        figures["time/tokens_per_second"] = num_tokens / sum(times.values())
        figures["time/mfu"] = self._learner.operations(batch.requests, completions) / (
            flops.peak(self.config.model.dtype) * (times["time/read"] + times["time/update"])
        )
        figures["memory/peak_gib"] = rollout_metrics.peak_memory()
        return state, figures

    def _evaluate(self, state: TrainState) -> None:
        """Compare the answers to held-out instructions before and after training."""
        batch = self._prompter.of_held_out()
        size = len(batch.requests)
        progress = bar("ppo evaluation", total=2 * size, unit="answer")

        def answer(arm: str) -> ppo_evaluation.Arm:
            params = state.params
            if arm == "before":
                params = Policy(self.base, self.config.ppo).new_params(self.config.seed)
            completions = self._actor.sample(params, batch, progress=progress)
            answers = self._actor.judge(batch, completions, absolute=True)
            if arm == "before":
                return answers, np.zeros(size)
            return answers, self._learner.kl(state, batch.requests, completions)

        with progress:
            ppo_evaluation.compare(self.workdir, self.held_out, answer, self.config)


def finished(config: Experiment, workdir: Path) -> bool:
    """Whether all steps are done, and measured where that is asked for."""
    measured = not config.ppo.num_eval_prompts or ppo_evaluation.measured(config, workdir)
    return measured and steps_done(workdir) >= config.ppo.num_steps


def steps_done(workdir: Path) -> int:
    """Steps that the newest finished checkpoint has behind it."""
    return checkpoints.latest_step(workdir / CHECKPOINTS)


def tuned_policy(config: Experiment, base: BaseModel, workdir: Path) -> Params:
    """Parameters for an engine: of the policy after the last PPO step, or the best (`keep_best`).

    Raises:
        DamagedError: its checkpoint is damaged, and was set aside.
        ValueError: stage 2 has not finished.
    """
    directory, wanted = workdir / CHECKPOINTS, config.ppo.num_steps
    looks = ppo_records.read_looks(workdir) if config.ppo.keep_best else None

    def fault(step: int) -> str:
        return f"{directory}: PPO has done {step} of {wanted} steps; run train_ppo first"

    done = steps_done(workdir)
    if done < wanted or looks == {}:
        raise ValueError(fault(done))
    with checkpoints.open_manager(directory, keep=config.ppo.keep_checkpoints) as manager:
        like = checkpoints.shapes_of(policy_update.new_state(config, base))
        if looks:
            state = _best(manager, like, looks)
        else:
            step, last = checkpoints.restore_latest(manager, like)
            if last is None or step < wanted:
                raise checkpoints.DamagedError(fault(step))
            state = last
    return Policy(base, config.ppo).for_sampling(state.params)


def _best(manager: CheckpointManager, like: TrainState, looks: Mapping[int, float]) -> TrainState:
    """The state with the highest reward of those that are there and sound."""
    _, state = checkpoints.restore_best(manager, like, {step: -x for step, x in looks.items()})
    if state is None:
        raise checkpoints.DamagedError(
            f"{manager.directory}: no checkpoint of steps {sorted(looks)} is sound; run train_ppo"
        )
    return state
