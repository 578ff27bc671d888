"""Supervised fine-tuning of the base model, adapter or all weights; loss on responses only."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from orbax.checkpoint import CheckpointManager

from refine_af import checkpoints, memory, records, rollout, sft_examples, training, trunk
from refine_af import config as config_lib
from refine_af.base_model import BaseModel, lora_config
from refine_af.config import Experiment, config_hash
from refine_af.mesh import batch_parts, param_shardings, shard_batch
from refine_af.models import convert, lora, sources
from refine_af.models.transformer import Definition, Params
from refine_af.models.weights import TreeWeights
from refine_af.packing import Answered
from refine_af.profiling import Profile
from refine_af.progress import bar
from refine_af.randomness import generator, key_of
from refine_af.records import Row
from refine_af.rollout import Places
from refine_af.sft_examples import Batches, Pair, encode
from refine_af.training import TrainState

CHECKPOINTS = "sft/checkpoints"
METRICS = "sft/metrics.jsonl"
ADAPTER = "sft/adapter"  # in PEFT's format
EXPORT = "sft/hf"
PROFILE = "sft/profile"


def response_loss(
    definition: Definition,
    base: Params,
    count: Float[Array, ""],
    trained: Params,
    examples: Answered,
    *,
    remat: str,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Negative log-likelihood of the response tokens, summed and divided by `count`."""
    weights, adapter = trunk.weights(base, trained)
    places = Places(examples.tokens, examples.start, examples.columns)
    _, chosen, _ = rollout.predictions(definition, weights, adapter, places, 1.0, remat=remat)
    return -jnp.sum(chosen * examples.predicts) / count, {}


def optimizer(options: config_lib.Sft, total_steps: int) -> optax.GradientTransformation:
    """Adam, linear warm-up, cosine decay to 0, global-norm clipping."""
    warmup = max(round(options.warmup_share * total_steps), 1)
    first = options.learning_rate / (warmup + 1)
    schedule = optax.warmup_cosine_decay_schedule(
        first, options.learning_rate, warmup, max(total_steps, warmup + 1)
    )
    return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), optax.adam(schedule))


def make_step(
    definition: Definition,
    options: config_lib.Sft,
    tx: optax.GradientTransformation,
    num_pieces: int,
) -> Callable[[Params, TrainState, Answered], tuple[TrainState, dict[str, Array]]]:
    """`step(base, state, examples)` in `num_pieces` cuts of rows, for `training.in_place`."""

    def step(
        base: Params, state: TrainState, examples: Answered
    ) -> tuple[TrainState, dict[str, Array]]:
        count = jnp.maximum(jnp.sum(examples.predicts), 1.0)
        grads, loss, _ = training.accumulate(
            functools.partial(response_loss, definition, base, count, remat=options.remat),
            state.params,
            examples,
            num_pieces,
        )
        state, norm = training.guarded_step(tx, state, grads)
        return state._replace(step=state.step + 1), {"loss": loss, "grad_norm": norm}

    return step


@dataclasses.dataclass(frozen=True)
class FinetuningStage:
    """What stays the same over all steps of fine-tuning."""

    config: Experiment
    base: BaseModel
    rows: Sequence[Row]  # of instances.jsonl
    workdir: Path
    profile_steps: int = 0  # to trace

    def run(self) -> None:
        """Train, and export the merged model as a Hugging Face directory.

        Raises:
            ValueError: no example is short enough.
        """
        options = self.config.sft
        tx = optimizer(options, self.batches.num_steps)
        metrics = self.workdir / METRICS
        losses: dict[int, float] = {}  # held out, by the steps done

        def best() -> int | None:
            return min(losses, key=losses.__getitem__) if options.keep_best and losses else None

        with checkpoints.open_manager(
            self.workdir / CHECKPOINTS, keep=options.keep_checkpoints, best=best
        ) as manager:
            shapes = jax.eval_shape(lambda: self._new_state(tx))
            memory.check_state(shapes, shapes.params, self.base.mesh, "finetune")
            export = convert.num_bytes(self.base.source.weights, "float32")
            keep = options.keep_checkpoints + options.keep_best
            checkpoints.check_space(manager, shapes, keep, beside=export)
            like = checkpoints.shapes_of(self._new_state(tx))  # whose arrays are gone
            first, found = checkpoints.restore_latest(manager, like)
            records.cut(metrics, first, "step")
            kept = manager.all_steps()
            for row in records.read_rows(metrics):
                if row.get("eval_loss") is not None and row["step"] + 1 in kept:
                    losses[row["step"] + 1] = row["eval_loss"]
            state = found or self._new_state(tx)
            trained = self._train(manager, first, state, tx, losses).params
            del found, state  # the best one takes their place
            if best() is not None:
                checkpoints.finish(manager)
                chosen = checkpoints.restore_best(manager, like, losses)[1]
                trained = chosen.params if chosen else trained
        self._export(trained)

    def _train(
        self,
        manager: CheckpointManager,
        first: int,
        state: TrainState,
        tx: optax.GradientTransformation,
        losses: dict[int, float],  # is added to
    ) -> TrainState:
        """Steps from `first` on."""
        options, batches = self.config.sft, self.batches
        steps = range(first, batches.num_steps)
        definition = trunk.definition(self.base, options)
        step = make_step(definition, options, tx, batches.layout.num_pieces)
        step_fn = training.in_place(step, state)

        def prepare(step: int, _: TrainState) -> tuple[Answered, int]:
            pairs = batches.of_step(step)
            return self._packed(pairs), sft_examples.num_tokens(pairs)

        def learn(
            step: int, state: TrainState, prepared: tuple[Answered, int]
        ) -> tuple[TrainState, dict[str, str]]:
            began = time.monotonic()
            batch, count = prepared
            state, figures = step_fn(self.base.params, state, batch)
            row = {"step": step, "epoch": (step + 1) / batches.per_epoch}
            row |= {name: float(value) for name, value in figures.items()}
            row["batch/padding_share"] = 1.0 - count / batch.tokens.size
            row["time/tokens_per_second"] = count / (time.monotonic() - began)
            if batches.held_out and (step + 1) % batches.per_epoch == 0:
                loss = row["eval_loss"] = self._eval_loss(definition, state)
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
                prepare=prepare,
                learn=learn,
                due=lambda done: (
                    done % options.checkpoint_every == 0 or (options.keep_best and done in losses)
                ),
                config=config_hash(self.config),
                progress=progress,
                profile=Profile(self.workdir / PROFILE, self.profile_steps),
            )

    @functools.cached_property
    def batches(self) -> Batches:
        """The examples that fit, some held out.

        Raises:
            ValueError: none fits.
        """
        options, seed = self.config.sft, self.config.seed
        eos = self.base.end_id
        pairs = [encode(row, self.base.tokenizer, options.format, eos) for row in self.rows]
        fitting = [pair for pair in pairs if sft_examples.num_tokens([pair]) <= options.max_length]
        if not fitting:
            raise ValueError(
                f"sft: none of {len(pairs)} examples fits sft.max_length={options.max_length}"
            )
        order = generator(seed, "sft/split").permutation(len(fitting))
        held_out = int(options.eval_share * len(fitting))
        shuffled = [fitting[i] for i in order]
        parts = batch_parts(self.base.mesh)
        return Batches(options, seed, shuffled[held_out:], shuffled[:held_out], parts)

    def _new_state(self, tx: optax.GradientTransformation) -> TrainState:
        key = key_of(self.config.seed, "sft/adapter")
        trained = trunk.new(self.base, self.config.sft, key)
        state: TrainState = self.base.place_state(training.new_state(trained, tx, 0.0))
        return state

    def _packed(self, pairs: Sequence[Pair]) -> Answered:
        rows: Answered = shard_batch(self.base.mesh, sft_examples.pack(pairs, self.batches.layout))
        return rows

    def _eval_loss(self, definition: Definition, state: TrainState) -> float:
        """Mean loss a response token on the examples that were held out."""
        total, count = 0.0, 0.0
        for pairs in self.batches.of_held_out():
            batch = self._packed(pairs)
            loss, _ = _jit_response_loss(
                definition, self.base.params, np.float32(1.0), state.params, batch
            )
            total += float(loss)
            count += float(jnp.sum(batch.predicts))
        return total / count

    def _export(self, trained: Params) -> None:
        """Write the tuned model for transformers, in float32, and an adapter for `peft`, too."""
        source, target = self.base.source, self.workdir / EXPORT
        if "model" in trained:
            convert.export(source, TreeWeights(trained["model"]), target)
            return
        adapter, shape = trained["adapter"], lora_config(self.config.sft.lora)
        lora.write_peft(adapter, shape, self.base.config, self.workdir / ADAPTER, source.name)
        convert.export(source, lora.MergedWeights(self.base.params, adapter, shape), target)


_jit_response_loss = jax.jit(functools.partial(response_loss, remat="none"), static_argnums=0)


def check_finished(workdir: Path) -> None:
    """See to it that there is a tuned model.

    Raises:
        ValueError: fine-tuning has not finished.
    """
    if not finished(workdir):
        raise ValueError(f"{workdir / EXPORT}: fine-tuning has not finished; run finetune first")


def tuned_model(config: Experiment, base: BaseModel, workdir: Path) -> Params:
    """Parameters for an engine, of the model that fine-tuning has exported.

    Raises:
        ValueError: fine-tuning has not finished, or its files are damaged.
    """
    check_finished(workdir)
    options, model = config.sft, config.model
    if options.trained == "lora":
        trained = {"adapter": lora.read_peft(workdir / ADAPTER, base.config)[1]}
    else:
        export = sources.open_model(
            str(workdir / EXPORT), dtype=model.dtype, param_dtype=model.param_dtype
        )
        trained = {"model": export.load(param_shardings(base.config, None, base.mesh)[0])}
    return trunk.for_sampling(base, options, trained)


def finished(workdir: Path) -> bool:
    """Whether the export, the stage's last act, is there."""
    return records.exists(workdir / EXPORT)
