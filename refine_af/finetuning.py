"""Supervised fine-tuning of the base model (LoRA), loss on the response only."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from orbax.checkpoint import CheckpointManager
from transformers import PreTrainedTokenizerBase

from refine_af import checkpoints, logprobs, memory, records, tokens, training
from refine_af import config as config_lib
from refine_af.base_model import BaseModel, lora_config
from refine_af.config import Experiment, config_hash
from refine_af.mesh import shard_batch
from refine_af.models import convert, lora, transformer
from refine_af.models.transformer import Definition, Params
from refine_af.progress import bar
from refine_af.randomness import generator, key_of
from refine_af.records import Row
from refine_af.training import TrainState

CHECKPOINTS = "sft/checkpoints"
METRICS = "sft/metrics.jsonl"
ADAPTER = "sft/adapter"  # in PEFT's format
EXPORT = "sft/hf"

Pair = tuple[list[int], list[int]]  # ids of the prompt and of the response

# Stanford Alpaca's templates, https://github.com/tatsu-lab/stanford_alpaca.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


class Examples(NamedTuple):
    """Tokenised examples, padded on the right."""

    tokens: Int[Array, "B T"]
    targets: Float[Array, "B T-1"]  # 1 where token t+1 is part of the response


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, fmt: str, eos: int) -> Pair:
    """(prompt ids, response ids with the end token) of one triplet."""
    if fmt == "chat":
        text = f"{row['instruction']}\n{row['input']}".strip()
        prompt = tokens.encode_prompt(tokenizer, text, "chat")
    else:
        template = _ALPACA_WITH_INPUT if row["input"] else _ALPACA
        text = template.format(instruction=row["instruction"], input=row["input"])
        prompt = tokens.encode_prompt(tokenizer, text, "raw")
    response = tokenizer(row["output"], add_special_tokens=False).input_ids
    return prompt, [*response, eos]


def pad(pairs: Sequence[Pair], length: int) -> Examples:
    """Examples as arrays; rows of zeros targets may be added by giving empty pairs."""
    padded = tokens.pad_right([[*prompt, *response] for prompt, response in pairs], length)
    targets = np.zeros((len(pairs), length - 1), np.float32)
    for i, (prompt, response) in enumerate(pairs):
        first = max(len(prompt) - 1, 0)
        targets[i, first : first + len(response)] = 1.0
    return Examples(jnp.asarray(padded), jnp.asarray(targets))


def response_loss(
    definition: Definition,
    base: Params,
    count: Float[Array, ""],
    params: dict[str, Params],
    examples: Examples,
    *,
    remat: str,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Negative log-likelihood of the response tokens, summed and divided by `count`."""
    model = transformer.bind(definition, base, params["adapter"])
    start = jnp.zeros((examples.tokens.shape[0],), jnp.int32)
    hidden, _ = model(examples.tokens, start, remat=remat)
    chosen, _ = logprobs.of_targets(model, hidden[:, :-1], examples.tokens[:, 1:])
    return -jnp.sum(chosen * examples.targets) / count, {}


def optimizer(options: config_lib.Sft, total_steps: int) -> optax.GradientTransformation:
    """Adam, linear warm-up, cosine decay to 0, global-norm clipping."""
    warmup = max(round(options.warmup_share * total_steps), 1)
    first = options.learning_rate / (warmup + 1)
    schedule = optax.warmup_cosine_decay_schedule(
        first, options.learning_rate, warmup, max(total_steps, warmup + 1)
    )
    return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), optax.adam(schedule))


def make_step(
    definition: Definition, options: config_lib.Sft, tx: optax.GradientTransformation
) -> Callable[[Params, TrainState, Examples], tuple[TrainState, dict[str, Array]]]:
    """Jitted `step(base, state, examples)`; `state` is donated."""

    def step(
        base: Params, state: TrainState, examples: Examples
    ) -> tuple[TrainState, dict[str, Array]]:
        count = jnp.maximum(jnp.sum(examples.targets), 1.0)
        grads, loss, _ = training.accumulate(
            functools.partial(response_loss, definition, base, count, remat=options.remat),
            state.params,
            examples,
            options.num_microbatches,
        )
        state, norm = training.guarded_step(tx, state, grads)
        return state._replace(step=state.step + 1), {"loss": loss, "grad_norm": norm}

    return jax.jit(step, donate_argnums=1)


@dataclasses.dataclass(frozen=True)
class FinetuningStage:
    """What stays the same over all steps of fine-tuning."""

    config: Experiment
    base: BaseModel
    rows: Sequence[Row]  # of instances.jsonl
    workdir: Path

    def run(self) -> None:
        """Train, and export the merged model as a Hugging Face directory.

        Raises:
            ValueError: no example is short enough.
        """
        options = self.config.sft
        train, held_out = self._examples()
        per_epoch = -(-len(train) // options.batch_size)
        tx = optimizer(options, per_epoch * options.num_epochs)
        metrics = self.workdir / METRICS
        losses: dict[int, float] = {}  # held out, by the steps done

        def best() -> int | None:
            return min(losses, key=losses.__getitem__) if options.keep_best and losses else None

        with checkpoints.open_manager(
            self.workdir / CHECKPOINTS, keep=options.keep_checkpoints, best=best
        ) as manager:
            like = checkpoints.shapes_of(self._new_state(tx))
            memory.check_state(like, like.params, self.base.mesh, "finetune")
            export = convert.num_bytes(self.base.source.weights, "float32")  # merged
            keep = options.keep_checkpoints + options.keep_best
            checkpoints.check_space(manager, like, keep, beside=export)
            first, found = checkpoints.restore_latest(manager, like)
            records.cut(metrics, first, "step")
            kept = manager.all_steps()
            for row in records.read_rows(metrics):
                if row.get("eval_loss") is not None and row["step"] + 1 in kept:
                    losses[row["step"] + 1] = row["eval_loss"]
            state = found or self._new_state(tx)
            state = self._train(manager, first, state, (train, held_out), losses)
            adapter = state.params["adapter"]
            del found, state  # the best one takes their place
            if best() is not None:
                checkpoints.finish(manager)
                chosen = checkpoints.restore_best(manager, like, losses)[1]
                adapter = chosen.params["adapter"] if chosen else adapter
        self._export(adapter)

    def _train(
        self,
        manager: CheckpointManager,
        first: int,
        state: TrainState,
        examples: tuple[list[Pair], list[Pair]],  # to train on, held out
        losses: dict[int, float],  # is added to
    ) -> TrainState:
        """Steps from `first` on."""
        options, (train, held_out) = self.config.sft, examples
        per_epoch = -(-len(train) // options.batch_size)
        steps = range(first, per_epoch * options.num_epochs)
        definition = self.base.adapted(options.lora)
        step_fn = make_step(definition, options, optimizer(options, steps.stop))

        def learn(
            step: int, state: TrainState, prepared: tuple[Examples, int]
        ) -> tuple[TrainState, dict[str, str]]:
            began = time.monotonic()
            batch, count = prepared
            state, figures = step_fn(self.base.params, state, batch)
            row = {"step": step, "epoch": (step + 1) / per_epoch}
            row |= {name: float(value) for name, value in figures.items()}
            row["time/tokens_per_second"] = count / (time.monotonic() - began)
            if held_out and (step + 1) % per_epoch == 0:
                loss = row["eval_loss"] = self._eval_loss(definition, state, held_out)
                losses.update({step + 1: loss} if math.isfinite(loss) else {})
            training.check_skipped(state, f"fine-tuning step {step}")
            records.append_rows(self.workdir / METRICS, [row])
            rate = f"{row['time/tokens_per_second']:.0f}"
            return state, {"loss": f"{row['loss']:.3f}", "tokens_per_second": rate}

        with bar("fine-tuning", total=steps.stop, unit="step", done=first) as progress:
            return checkpoints.advance(
                manager,
                state,
                steps,
                prepare=lambda step, _: self._batch(train, step, per_epoch),
                learn=learn,
                due=lambda done: (
                    done % options.checkpoint_every == 0 or (options.keep_best and done in losses)
                ),
                config=config_hash(self.config),
                progress=progress,
            )

    def _examples(self) -> tuple[list[Pair], list[Pair]]:
        options = self.config.sft
        eos = self.base.end_id
        pairs = [encode(row, self.base.tokenizer, options.format, eos) for row in self.rows]
        fitting = [p for p in pairs if len(p[0]) + len(p[1]) <= options.max_length]
        if not fitting:
            raise ValueError(
                f"sft: none of {len(pairs)} examples fits sft.max_length={options.max_length}"
            )
        order = generator(self.config.seed, "sft/split").permutation(len(fitting))
        held_out = int(options.eval_share * len(fitting))
        shuffled = [fitting[i] for i in order]
        return shuffled[held_out:], shuffled[:held_out]

    def _new_state(self, tx: optax.GradientTransformation) -> TrainState:
        key = key_of(self.config.seed, "sft/adapter")
        adapter = self.base.new_adapter(self.config.sft.lora, key)
        return self.base.place_state(training.new_state({"adapter": adapter}, tx, 0.0))

    def _batch(self, train: Sequence[Pair], step: int, per_epoch: int) -> tuple[Examples, int]:
        """Examples of a step (the epoch's order is a function of its number), and their tokens."""
        options = self.config.sft
        epoch, index = divmod(step, per_epoch)
        order = generator(self.config.seed, "sft/order", epoch).permutation(len(train))
        chosen = order[index * options.batch_size : (index + 1) * options.batch_size]
        pairs = [train[i] for i in chosen]
        return self._padded(pairs), sum(len(p) + len(r) for p, r in pairs)

    def _padded(self, pairs: Sequence[Pair]) -> Examples:
        longest = tokens.bucket(max(len(p) + len(r) for p, r in pairs))
        idle: list[Pair] = [([], [])]
        filled = [*pairs, *idle * (self.config.sft.batch_size - len(pairs))]
        return shard_batch(self.base.mesh, pad(filled, longest))

    def _eval_loss(
        self,
        definition: Definition,
        state: TrainState,
        held_out: Sequence[Pair],
    ) -> float:
        """Mean loss a response token on the examples that were held out."""
        size = self.config.sft.batch_size
        total, count = 0.0, 0.0
        for first in range(0, len(held_out), size):
            batch = self._padded(held_out[first : first + size])
            loss, _ = _jit_response_loss(
                definition, self.base.params, np.float32(1.0), state.params, batch
            )
            total += float(loss)
            count += float(jnp.sum(batch.targets))
        return total / count

    def _export(self, adapter: Params) -> None:
        """Write the adapter for `peft`, and the merged model for transformers."""
        shape = lora_config(self.config.sft.lora)
        source, folder = self.base.source, self.workdir / ADAPTER
        lora.write_peft(adapter, shape, self.base.config, folder, source.name)
        merged = lora.MergedWeights(self.base.params, adapter, shape)
        convert.export(source, merged, self.workdir / EXPORT)


_jit_response_loss = jax.jit(functools.partial(response_loss, remat="none"), static_argnums=0)


def tuned_adapter(config: Experiment, base: BaseModel, workdir: Path) -> Params:
    """Adapter that fine-tuning has exported.

    Raises:
        ValueError: fine-tuning has not finished.
    """
    if not finished(workdir):
        raise ValueError(f"{workdir / EXPORT}: fine-tuning has not finished; run finetune first")
    return lora.read_peft(workdir / ADAPTER, base.config)[1]


def finished(workdir: Path) -> bool:
    """Whether the export, the stage's last act, is there."""
    return records.exists(workdir / EXPORT)
