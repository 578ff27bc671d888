"""Stage 2: reinforcement learning from automated feedback.

One step: pick instructions -> sample answers with the policy -> read policy, critic and
reference -> score them with the oracle -> update.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import CheckpointManager

from refine_af import (
    alarms,
    checkpoints,
    flops,
    memory,
    policy_update,
    ppo_evaluation,
    prompts,
    records,
    rewards,
    rollout,
    rollout_metrics,
    tokens,
    tracking,
    training,
)
from refine_af.base_model import BaseModel
from refine_af.config import Experiment, Reward, config_hash
from refine_af.mesh import batch_parts, shard_batch
from refine_af.models import processes
from refine_af.models.transformer import Params
from refine_af.policy import Policy
from refine_af.progress import bar
from refine_af.randomness import generator, key_of, seed_of
from refine_af.records import Row
from refine_af.requests import Completion, Request
from refine_af.rollout import Layout, Reading, Rollout
from refine_af.score_cache import CachedOracle
from refine_af.seeds import SeedTask
from refine_af.tracking import Tracker
from refine_af.training import TrainState

CHECKPOINTS = "ppo/checkpoints"
METRICS = "ppo/metrics.jsonl"
ROLLOUTS = "ppo/rollouts.jsonl"
SAMPLES = "ppo/samples.jsonl"
ALARMS = "ppo/alarms.jsonl"
_RECORDS = (METRICS, ROLLOUTS, SAMPLES, ALARMS)
SCORES = "ppo/scores.sqlite"  # what the oracle has said of answers
_Batch = tuple[list[Request], list[str]]  # prompts, and their instructions
_MAX_SKIPPED = 5  # optimizer steps with a gradient that is not finite


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

    def run(self) -> None:
        """Take all steps that are not done yet; state, metrics and answers go to the workdir."""
        measured = self._held_out_requests()
        layout = self._layout(self._longest_prompt(measured))
        directory, keep = self.workdir / CHECKPOINTS, self.config.ppo.keep_checkpoints
        with checkpoints.open_manager(directory, keep=keep) as manager:
            shapes = jax.eval_shape(lambda: new_state(self.config, self.base))
            memory.check_state(shapes, shapes.params, self.base.mesh, "train_ppo")
            new = new_state(self.config, self.base)
            checkpoints.check_space(manager, new, keep)
            first, state = checkpoints.restore_latest(manager, new)
            state = self._train(manager, first, state, measured, layout)
        if measured:
            self._evaluate(state, measured, layout)

    def _train(
        self,
        manager: CheckpointManager,
        first: int,
        state: TrainState,
        measured: Sequence[Request],
        layout: Layout,
    ) -> TrainState:
        """Steps from `first` on."""
        options = self.config.ppo
        update = policy_update.make_update(
            Policy(self.base, options).definition, options, self.base.mesh
        )
        for name in _RECORDS:
            records.cut(self.workdir / name, first, "step")
        history = alarms.window(records.read_rows(self.workdir / METRICS))
        batches: dict[int, _Batch] = {}
        ahead: dict[int, _Sampled] = {}
        steps = range(first, options.num_steps)

        def sampled(step: int, state: TrainState) -> _Sampled:
            batch = batches.pop(step) if step in batches else self._requests(step)
            return self._sampled(state, batch, layout)

        def sample(step: int, state: TrainState) -> _Scored:
            found = ahead.pop(step, None) or sampled(step, state)
            if self._samples_ahead(step + 1):
                ahead[step + 1] = sampled(step + 1, state)
            return self._scored(found)

        def make_batch(step: int) -> None:
            if step < steps.stop:
                batches[step] = self._requests(step)

        def learn(
            step: int, state: TrainState, scored: _Scored
        ) -> tuple[TrainState, dict[str, str]]:
            upcoming = step + 1 + (step + 1 in ahead)
            meanwhile = functools.partial(make_batch, upcoming)
            state, metrics = self._learn(step, state, update, scored, meanwhile)
            training.check_skipped(state, _MAX_SKIPPED, f"ppo step {step}", metrics)
            samples: list[Row] = []
            if options.eval_every and (step + 1) % options.eval_every == 0:
                figures, samples = self._look(step, state, measured[:: options.num_eval_samples])
                metrics |= figures
            history[:] = alarms.window([*history, {"step": step, **metrics}])
            self._record(history, scored.rows(step), samples, trackers)
            return state, {
                "reward": f"{metrics['reward/mean']:.3f}",
                "kl": f"{metrics['kl/k1']:.2f}",
                "tokens_per_second": f"{metrics['time/tokens_per_second']:.0f}",
            }

        with (
            tracking.open_trackers(self.workdir / "ppo", self.config, first) as trackers,
            bar("ppo", total=steps.stop, unit="step", done=first) as progress,
        ):
            return checkpoints.advance(
                manager,
                state,
                steps,
                prepare=sample,
                learn=learn,
                due=lambda done: done % options.checkpoint_every == 0,
                resumable=lambda done: not self._samples_ahead(done),
                config=config_hash(self.config),
                progress=progress,
            )

    def _longest_prompt(self, others: Sequence[Request]) -> int:
        """Tokens of the longest prompt of all steps; none of them is kept."""
        steps = range(self.config.ppo.num_steps)
        made = (request for step in steps for request in self._requests(step)[0])
        return max(len(request.prompt_ids) for request in itertools.chain(others, made))

    def _samples_ahead(self, step: int) -> bool:
        """Whether a step's answers are of the policy one step back.

        Not those behind a checkpoint, which does not hold that policy: a resumed run is to sample
        what an undisturbed one has sampled.
        """
        options = self.config.ppo
        follows_checkpoint = step % options.checkpoint_every == 0
        return options.sample_ahead and step < options.num_steps and not follows_checkpoint

    def _record(
        self,
        history: Sequence[Row],
        rows: Sequence[Row],
        samples: Sequence[Row],
        trackers: Sequence[Tracker],
    ) -> None:
        """Write down the newest step, and tell of trouble that began with it."""
        step = history[-1]["step"]
        found = alarms.check(history, self.config.ppo)
        for line in found:
            logging.warning("ppo step %d: %s", step, line)
        records.append_rows(
            self.workdir / ALARMS, [{"step": step, "alarm": line} for line in found]
        )
        records.append_rows(self.workdir / ROLLOUTS, rows)
        records.append_rows(self.workdir / SAMPLES, samples)
        records.append_rows(self.workdir / METRICS, history[-1:])
        figures = {name: value for name, value in history[-1].items() if name != "step"}
        for tracker in trackers:
            tracker.figures(step, figures)
            if samples:
                tracker.samples(step, samples)

    def _layout(self, longest_prompt: int) -> Layout:
        """Shape of the run's rollouts."""
        options = self.config.ppo
        most = options.sampling.max_new_tokens
        return Layout(
            row_length=tokens.bucket(max(longest_prompt + most, options.row_length)),
            answer_length=most,
            row_multiple=self._num_pieces * batch_parts(self.base.mesh),
        )

    @property
    def _num_pieces(self) -> int:
        return self.config.ppo.num_minibatches * self.config.ppo.num_microbatches

    def _requests(self, step: int) -> _Batch:
        """The step's prompts and their instructions: passes over shuffled instructions."""
        options = self.config.ppo
        total, group = len(self.instructions), options.group_size
        shown = prompts.demos(self.seeds, self.config.prompts)
        rng = generator(self.config.seed, "ppo/demos", step)
        requests: list[Request] = []
        chosen: list[str] = []
        for row in range(options.batch_size):
            seed = seed_of(self.config.seed, "ppo/request", step, row)
            if row % group:  # another answer to the same prompt
                requests.append(dataclasses.replace(requests[-1], seed=seed))
                chosen.append(chosen[-1])
                continue
            index = (step * options.batch_size + row) // group
            order = generator(self.config.seed, "ppo/order", index // total).permutation(total)
            instruction = self.instructions[order[index % total]]
            requests.append(self._request(instruction, shown, rng, seed))
            chosen.append(instruction)
        return requests, chosen

    def _held_out_requests(self) -> list[Request]:
        """Several for each held-out instruction, all with its one prompt."""
        shown, requests = prompts.demos(self.seeds, self.config.prompts), []
        for i, instruction in enumerate(self.held_out):
            for sample in range(self.config.ppo.num_eval_samples):
                rng = generator(self.config.seed, "ppo/eval_demos", i)
                seed = seed_of(self.config.seed, "ppo/eval", i, sample)
                requests.append(self._request(instruction, shown, rng, seed))
        return requests

    def _request(
        self, instruction: str, shown: Sequence[SeedTask], rng: np.random.Generator, seed: int
    ) -> Request:
        text = prompts.instance_prompt(instruction, shown, self.config.prompts.num_demos, rng)
        ids = tokens.encode_prompt(self.base.tokenizer, text, self.config.prompts.format)
        return Request(tuple(ids), self.config.ppo.sampling, seed)

    def _sampled(self, state: TrainState, batch: _Batch, layout: Layout) -> "_Sampled":
        """Answers of the policy as it is, and what it, critic and reference say of them."""
        requests, instructions = batch
        began = time.monotonic()
        completions = self._sample(state.params, requests, instructions)
        sampled = time.monotonic()
        rows, reading = self._read(state, requests, completions, layout)
        jax.block_until_ready(reading)
        times = {"time/sample": sampled - began, "time/read": time.monotonic() - sampled}
        return _Sampled(requests, instructions, completions, rows, reading, times)

    def _scored(self, sampled: "_Sampled") -> "_Scored":
        began = time.monotonic()
        judged = self._judge(sampled.instructions, sampled.completions, self.config.reward)
        return _Scored(sampled, *judged, time.monotonic() - began)

    def _learn(
        self,
        step: int,
        state: TrainState,
        update: Any,
        scored: "_Scored",
        meanwhile: Callable[[], None],
    ) -> tuple[TrainState, dict[str, float]]:
        """Update the policy with answers; `state` is donated, `meanwhile` runs on the host."""
        (requests, _, completions, rows, reading, times), _, judgements, seconds = scored
        began = time.monotonic()
        scores = np.asarray([j.reward for j in judgements], np.float32)
        rows = rows._replace(score=shard_batch(self.base.mesh, scores))
        key = key_of(self.config.seed, "ppo/permutation", step)
        state, metrics = update(self.base.params, state, rows, reading, key)
        meanwhile()
        figures = {name: float(value) for name, value in metrics.items()}
        times |= {"time/score": seconds, "time/update": time.monotonic() - began}
        figures |= rollout_metrics.of(completions, judgements)
        figures["ppo/skipped"] = float(state.skipped)
        figures["batch/padding_share"] = rollout.padding_share(requests, completions, rows)
        figures["drift/logprob_max"] = rollout.drift(completions, reading)
        figures |= times
        figures["time/tokens_per_second"] = sum(len(c.token_ids) for c in completions) / sum(
            times.values()
        )
        figures["time/mfu"] = self._operations(requests, completions) / (
            flops.peak(self.config.model.dtype) * (times["time/read"] + times["time/update"])
        )
        figures["memory/peak_gib"] = rollout_metrics.peak_memory()
        return state, figures

    def _operations(self, requests: Sequence[Request], completions: Sequence[Completion]) -> float:
        """Of a rollout's reading and update."""
        predictions = sum(len(c.token_ids) for c in completions)
        texts = sum(len(r.prompt_ids) for r in requests) + predictions
        return flops.of_step(self.base.config, self.config.ppo, texts, predictions)

    def _look(
        self, step: int, state: TrainState, requests: Sequence[Request]
    ) -> tuple[dict[str, float], list[Row]]:
        """(figures named `eval/...`, rows) of an answer to each held-out instruction."""
        completions = self._sample(state.params, list(requests), self.held_out)
        examples, judgements = self._judge(
            self.held_out, completions, rewards.absolute(self.config.reward)
        )
        figures = rollout_metrics.of(completions, judgements)
        return {f"eval/{name}": value for name, value in figures.items()}, _answer_rows(
            step, self.held_out, completions, examples, judgements
        )

    def _judge(
        self, instructions: Sequence[str], completions: Sequence[Completion], options: Reward
    ) -> tuple[list[rewards.Example | None], list[rewards.Judgement]]:
        examples = [self._parse(*pair) for pair in zip(instructions, completions, strict=True)]
        ended = [c.finish_reason == "stop" for c in completions]
        return examples, rewards.judge(self.oracle, examples, ended, options)

    def _read(
        self,
        state: TrainState,
        requests: Sequence[Request],
        completions: Sequence[Completion],
        layout: Layout,
    ) -> tuple[Rollout, Reading]:
        """A batch of answers on the mesh, not yet scored, and what the models say of it."""
        options = self.config.ppo
        unscored = [0.0] * len(completions)
        rows = shard_batch(self.base.mesh, rollout.build(requests, completions, unscored, layout))
        return rows, rollout.jit_read(
            Policy(self.base, options).definition,
            self.base.definition,
            self.base.params,
            state.params,
            rows,
            options.sampling.temperature,
            self._num_pieces,
        )

    def _evaluate(self, state: TrainState, requests: list[Request], layout: Layout) -> None:
        """Compare the answers to held-out instructions before and after training."""
        count = self.config.ppo.num_eval_samples
        instructions = [text for text in self.held_out for _ in range(count)]
        progress = bar("ppo evaluation", total=2 * len(requests), unit="answer")

        def answer(arm: str) -> ppo_evaluation.Arm:
            params = state.params if arm == "after" else new_state(self.config, self.base).params
            completions = self._sample(params, requests, instructions, progress)
            _, judgements = self._judge(
                instructions, completions, rewards.absolute(self.config.reward)
            )
            if arm == "before":
                return completions, judgements, np.zeros(len(requests))
            return completions, judgements, self._kl(state, requests, completions, layout)

        with progress:
            ppo_evaluation.compare(self.workdir, self.held_out, count, answer, self.config)

    def _kl(
        self,
        state: TrainState,
        requests: Sequence[Request],
        completions: Sequence[Completion],
        layout: Layout,
    ) -> np.ndarray:
        """Log-ratio of policy and reference over each answer, a rollout's worth at a time."""
        size, found = self.config.ppo.batch_size, []
        for first in range(0, len(requests), size):
            some = np.resize(np.arange(first, min(first + size, len(requests))), size).tolist()
            chosen = [requests[i] for i in some], [completions[i] for i in some]
            _, reading = self._read(state, *chosen, layout)
            ratio = processes.to_host(reading.logprobs - reading.ref_logprobs)
            found.append(ratio.sum(axis=1))
        return np.concatenate(found)[: len(requests)]

    def _sample(
        self,
        params: Params,
        requests: list[Request],
        instructions: Sequence[str],
        progress: bar | None = None,
    ) -> list[Completion]:
        """Answers; an oracle that does not need the device scores the first ones meanwhile."""
        options = self.config.ppo
        int8 = options.int8_weights
        engine = self.base.engine(
            options.batch_size, int8_weights=int8, int8_cache=options.int8_cache
        )
        weights = Policy(self.base, options).for_sampling(params, int8_weights=int8)

        def finished(number: int, completion: Completion) -> None:
            example = self._parse(instructions[number], completion)
            if example and isinstance(self.oracle, CachedOracle):
                self.oracle.prefetch([example])
            if progress:
                progress.update()

        counted = progress.count_tokens if progress else None
        return engine.generate(weights, requests, counted, finished)

    def _parse(self, instruction: str, completion: Completion) -> rewards.Example | None:
        pair = prompts.parse_instance(
            completion.text, accept_unmarked=self.config.prompts.accept_unmarked_output
        )
        return rewards.Example(instruction, *pair) if pair and pair[1] else None


class _Sampled(NamedTuple):
    """A rollout before it is scored."""

    requests: list[Request]
    instructions: list[str]
    completions: list[Completion]
    rows: Rollout  # score: 0
    reading: Reading
    times: dict[str, float]  # seconds by phase


class _Scored(NamedTuple):
    """A rollout to learn from."""

    sampled: _Sampled
    examples: list[rewards.Example | None]
    judgements: list[rewards.Judgement]
    seconds: float

    def rows(self, step: int) -> list[Row]:
        """What is written down of it."""
        instructions, completions = self.sampled.instructions, self.sampled.completions
        return _answer_rows(step, instructions, completions, self.examples, self.judgements)


def new_state(config: Experiment, base: BaseModel) -> TrainState:
    """State before the first step."""
    params = Policy(base, config.ppo).new_params(config.seed)
    optimizer = policy_update.optimizer(config.ppo)
    return base.place_state(training.new_state(params, optimizer, config.ppo.kl_coef))


def _answer_rows(
    step: int,
    instructions: Sequence[str],
    completions: Sequence[Completion],
    examples: Sequence[rewards.Example | None],
    judgements: Sequence[rewards.Judgement],
) -> list[Row]:
    return [
        {
            "step": step,
            "row": row,
            "instruction": instruction,
            "completion": completion.text,
            "input": example.input if example else None,
            "output": example.output if example else None,
            "reward": round(judgement.reward, 6),
            "components": judgement.components,
            "finish_reason": completion.finish_reason,
        }
        for row, (instruction, completion, example, judgement) in enumerate(
            zip(instructions, completions, examples, judgements, strict=True)
        )
    ]


def finished(config: Experiment, workdir: Path) -> bool:
    """Whether all steps are done, and measured where that is asked for."""
    measured = not config.ppo.num_eval_prompts or ppo_evaluation.measured(config, workdir)
    return measured and steps_done(workdir) >= config.ppo.num_steps


def steps_done(workdir: Path) -> int:
    """Steps that the newest finished checkpoint has behind it."""
    return checkpoints.latest_step(workdir / CHECKPOINTS)


def tuned_policy(config: Experiment, base: BaseModel, workdir: Path) -> Params:
    """Parameters for an engine, of the policy after the last PPO step.

    Raises:
        ValueError: stage 2 has not finished, or its last checkpoint is damaged.
    """
    directory = workdir / CHECKPOINTS
    step, state = steps_done(workdir), None
    if step >= config.ppo.num_steps:
        with checkpoints.open_manager(directory, keep=config.ppo.keep_checkpoints) as manager:
            step, state = checkpoints.restore_latest(manager, new_state(config, base))
    if state is None or step < config.ppo.num_steps:
        raise ValueError(
            f"{directory}: PPO has done {step} of {config.ppo.num_steps} steps; run train_ppo first"
        )
    return Policy(base, config.ppo).for_sampling(state.params)
