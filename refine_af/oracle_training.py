"""Training of a reward oracle (`trained_oracle`): LoRA and heads, the decoder itself is frozen.

For `rew` the loss of pairs, as in InstructGPT (arXiv 2203.02155, eq. 1) with all comparisons of
one task in one batch; for `nat`, `und`, `coh` binary cross-entropy, as in UniEval (arXiv
2210.07197). All of it is computed in float32 from one forward pass.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from refine_af import config as config_lib
from refine_af import oracle_examples, trained_oracle, training, validation
from refine_af.base_model import BaseModel
from refine_af.mesh import shard_batch
from refine_af.models import heads
from refine_af.models.transformer import Definition, Params
from refine_af.oracle_examples import Batch, Group
from refine_af.progress import bar
from refine_af.randomness import generator, key_of
from refine_af.records import Row
from refine_af.rewards import Example
from refine_af.trained_oracle import HEADS, Description
from refine_af.training import TrainState

_CENTRING = 0.01
_WARMUP_SHARE = 0.1  # of all steps
_MAX_GRAD_NORM = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OracleOptions:
    """How an oracle is trained."""

    seed: int
    num_epochs: int  # times that every task is seen, with new corruptions each time
    learning_rate: float
    batch_size: int  # rows of `max_length` tokens that texts are packed into
    max_length: int  # tokens of a task and an answer
    lora: config_lib.Lora

    def __post_init__(self) -> None:
        """Validate."""
        validation.require_at_least(0, self, "", "seed")
        validation.require_at_least(1, self, "", "num_epochs", "batch_size")
        validation.require_at_least(16, self, "", "max_length")
        validation.require_positive(self, "", "learning_rate")


def bradley_terry(
    better: Float[Array, "P"], worse: Float[Array, "P"], weights: Float[Array, "P"]
) -> Float[Array, ""]:
    """Negative log-likelihood of preferences, in nats, weighted mean over pairs.

    `-log sigmoid(r_better - r_worse)` (Bradley & Terry, Biometrika 39, 1952; InstructGPT, arXiv
    2203.02155, eq. 1). log 2 when the rewards are equal.

    Args:
        better: reward of the preferred answer of each pair. worse: of the other one.
        weights: 1, or 0 for a pair that does not count.
    """
    losses = jax.nn.softplus(worse - better)
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def binary_cross_entropy(
    logits: Float[Array, "N C"], labels: Float[Array, "N C"]
) -> Float[Array, ""]:
    """`-y log p - (1 - y) log(1 - p)`, p = sigmoid(logit), in nats, mean over known labels.

    Args:
        labels: y in [0, 1]; NaN where it is not known.
    """
    known = jnp.isfinite(labels)
    losses = optax.sigmoid_binary_cross_entropy(logits, jnp.where(known, labels, 0.0))
    return jnp.sum(jnp.where(known, losses, 0.0)) / jnp.maximum(jnp.sum(known), 1)


def losses(
    definition: Definition, base: Params, params: Params, batch: Batch
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss, and its parts with the shares of pairs and labels that are right.

    A hundredth of `(r_better + r_worse)^2` is added, which centres rewards at 0 (Eisenstein et
    al., arXiv 2312.09244): differences alone leave their level open.
    """
    places = batch.tokens, batch.start, batch.rows, batch.columns
    # Computing layers twice is faster than keeping them: 4 GiB of fresh pages a step, else.
    found = trained_oracle.logits(definition, base, params, *places, remat="full")
    better, worse = found[batch.better, 0], found[batch.worse, 0]
    pairs = bradley_terry(better, worse, batch.weights)
    qualities = binary_cross_entropy(found[:, 1:], batch.labels)
    count = jnp.maximum(jnp.sum(batch.weights), 1.0)
    level = jnp.sum(jnp.square(better + worse) * batch.weights) / count
    right = (found[:, 1:] > 0) == (batch.labels > 0.5)
    known = jnp.isfinite(batch.labels)
    parts = {
        "rew_loss": pairs,
        "quality_loss": qualities,
        "rew_accuracy": jnp.sum((better > worse) * batch.weights) / count,
        "quality_accuracy": jnp.sum(right & known) / jnp.maximum(jnp.sum(known), 1),
    }
    return pairs + qualities + _CENTRING * level, parts


def optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam with global-norm clipping, linear warm-up and linear decay to 0."""
    warmup = max(round(_WARMUP_SHARE * num_steps), 1)
    first = learning_rate / (warmup + 1)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(first, learning_rate, warmup),
            optax.linear_schedule(learning_rate, 0.0, max(num_steps - warmup, 1)),
        ],
        [warmup],
    )
    return optax.chain(optax.clip_by_global_norm(_MAX_GRAD_NORM), optax.adam(schedule))


def make_step(
    definition: Definition, tx: optax.GradientTransformation
) -> Callable[[Params, TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Jitted `step(base, state, batch)`; `state` is donated."""

    def step(base: Params, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        loss_fn = functools.partial(losses, definition, base)
        (loss, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        state, norm = training.guarded_step(tx, state, grads)
        return state._replace(step=state.step + 1), {"loss": loss, **parts, "grad_norm": norm}

    return jax.jit(step, donate_argnums=1)


def new_params(base: BaseModel, options: OracleOptions) -> Params:
    """An adapter that changes nothing yet, and heads that are certain of nothing."""
    key = key_of(options.seed, "oracle/heads")
    made = heads.init_scores(base.config.embed_dim, len(HEADS), key=key)
    adapter = base.new_adapter(options.lora, key_of(options.seed, "oracle/adapter"))
    return {"adapter": adapter, "heads": base.replicate(made)}


def all_batches(
    base: BaseModel,
    examples: Sequence[Example],
    preferences: Sequence[Group],
    options: OracleOptions,
) -> list[Batch]:
    """Batches of all epochs, a function of the seed and the data."""
    groups: list[Group] = []
    for epoch in range(options.num_epochs):
        made = [
            oracle_examples.corrupted_group(example, examples, options.seed, epoch, row)
            for row, example in enumerate(examples)
        ]
        made += preferences
        order = generator(options.seed, "oracle/order", epoch).permutation(len(made))
        groups += [made[i] for i in order if len(made[i]) > 1]
    return oracle_examples.batches(
        groups, base.tokenizer, base.end_id, options.batch_size, options.max_length
    )


def train(
    base: BaseModel,
    examples: Sequence[Example],
    preferences: Sequence[Group],
    options: OracleOptions,
    record: Callable[[Row], None],
) -> Params:
    """Adapter and heads after all epochs.

    Args:
        examples: good answers, whose corruptions are the worse ones.
        preferences: groups of a preference set; seen once an epoch, as the examples are.
        record: called with the figures of each step.

    Raises:
        ValueError: gradients are not finite any more.
    """
    todo = all_batches(base, examples, preferences, options)
    tx = optimizer(options.learning_rate, len(todo))
    step_fn = make_step(base.adapted(options.lora), tx)
    state = base.place_state(training.new_state(new_params(base, options), tx, 0.0))
    with bar("oracle", total=len(todo), unit="step") as progress:
        for step, batch in enumerate(todo):
            began = time.monotonic()
            state, figures = step_fn(base.params, state, shard_batch(base.mesh, batch))
            row: Row = {"step": step} | {name: float(value) for name, value in figures.items()}
            count = int(np.count_nonzero(batch.tokens))
            row["time/tokens_per_second"] = count / (time.monotonic() - began)
            training.check_skipped(state, f"oracle step {step}")
            record(row)
            progress.update()
            progress.count_tokens(count)
    params: Params = state.params
    return params


def description(base: BaseModel, options: OracleOptions) -> Description:
    """What the oracle that `train` makes is."""
    return Description(
        model=base.source.name,
        lora=options.lora,
        max_length=options.max_length,
        **trained_oracle.identity(base),
    )
