"""The PPO update of one rollout: `update(state, rollout, key) -> (state, metrics)`, one program."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from refine_af import config as config_lib
from refine_af import ppo, rollout, training
from refine_af.mesh import keep_rows_split
from refine_af.models import heads
from refine_af.models.transformer import Definition, Params
from refine_af.rollout import Reading, Rollout
from refine_af.training import TrainState

Metrics = dict[str, Float[Array, ""]]


def optimizer(options: config_lib.Ppo) -> optax.GradientTransformation:
    """Adam with global-norm clipping, linear warm-up and linear decay to 0."""
    total = options.num_steps * options.num_epochs * options.num_minibatches
    warmup = min(options.warmup_steps, total)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(
                options.learning_rate / (warmup + 1), options.learning_rate, warmup
            ),
            optax.linear_schedule(options.learning_rate, 0.0, max(total - warmup, 1)),
        ],
        [warmup],
    )
    return optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm),
        optax.adam(schedule, eps=options.adam_eps),
    )


class _Batch(NamedTuple):
    """A rollout with all that its loss needs; every leaf has the rows first."""

    rows: Rollout
    reading: Reading
    advantages: Float[Array, "B R"]
    returns: Float[Array, "B R"]


def make_update(
    policy: Definition, options: config_lib.Ppo, mesh: jax.sharding.Mesh
) -> Callable[[Params, TrainState, Rollout, Reading, Array], tuple[TrainState, Metrics]]:
    """Jitted `update(base, state, rollout, reading, key)`; `state` is donated.

    All epochs, minibatches and microbatches are scans in one program. Each epoch draws a fresh
    permutation. Losses are divided by the token count of their minibatch, over all devices.
    """
    tx = optimizer(options)
    temperature = options.sampling.temperature

    def loss_fn(base: Params, count: Array, params: Params, batch: _Batch) -> tuple[Array, Metrics]:
        rows, reading, advantages, returns = batch
        hidden, logprobs, entropy = rollout.predictions(
            policy,
            base,
            params["adapter"],
            rows.tokens,
            rows.start,
            rows.mask.shape[1],
            temperature,
            remat=True,
        )
        values = heads.value(params["value_head"], hidden)
        surrogate = jax.vmap(ppo.policy_loss, in_axes=(0, 0, 0, 0, None))(
            logprobs, reading.logprobs, advantages, rows.mask, options.clip_eps
        )
        critic = jax.vmap(ppo.value_loss, in_axes=(0, 0, 0, 0, None))(
            values, reading.values, returns, rows.mask, options.value_clip_eps
        )
        sums = {
            "policy_loss": jnp.sum(surrogate.loss) / count,
            "value_loss": jnp.sum(critic) / count,
            "entropy": jnp.sum(entropy * rows.mask) / count,
            "clip_fraction": jnp.sum(surrogate.clipped) / count,
            "approx_kl": jnp.sum(surrogate.approx_kl) / count,
            "ratio_max": jnp.max(surrogate.ratio_max),
        }
        loss = sums["policy_loss"] + options.value_coef * sums["value_loss"]
        return loss - options.entropy_coef * sums["entropy"], sums

    def minibatch(
        base: Params, batch: _Batch, state: TrainState, index: Array
    ) -> tuple[TrainState, Metrics]:
        chosen = keep_rows_split(mesh, jax.tree.map(lambda x: x[index], batch))
        count = jnp.maximum(jnp.sum(chosen.rows.mask), 1.0)
        grads, loss, sums = training.accumulate(
            functools.partial(loss_fn, base, count), state.params, chosen, options.num_microbatches
        )
        state, norm = training.guarded_step(tx, state, grads)
        return state, {**sums, "loss": loss, "grad_norm": norm}

    def update(
        base: Params, state: TrainState, rows: Rollout, reading: Reading, key: Array
    ) -> tuple[TrainState, Metrics]:
        batch_size = rows.score.shape[0]
        advantages, returns = estimate(rows, reading, state.kl_coef, options)
        batch = _Batch(rows, reading, advantages, returns)
        keys = jax.random.split(key, options.num_epochs)
        order = jax.vmap(lambda k: jax.random.permutation(k, batch_size))(keys)
        order = order.reshape(options.num_epochs * options.num_minibatches, -1)
        state, history = jax.lax.scan(functools.partial(minibatch, base, batch), state, order)
        kl = jnp.sum(ppo.kl_k1(reading.logprobs, reading.ref_logprobs) * rows.mask) / batch_size
        metrics = _summary(history, rows, reading, returns, state.kl_coef, kl)
        coef = ppo.adapt_kl_coef(
            state.kl_coef, kl, options.kl_target, options.kl_horizon, batch_size
        )
        return state._replace(step=state.step + 1, kl_coef=coef), metrics

    return jax.jit(update, donate_argnums=1)


def estimate(
    rows: Rollout, reading: Reading, kl_coef: Array, options: config_lib.Ppo
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """(advantages, whitened over the whole batch if asked; returns) of a rollout."""
    rewards = jax.vmap(ppo.shaped_rewards, in_axes=(0, 0, 0, 0, None))(
        rows.score, reading.logprobs, reading.ref_logprobs, rows.mask, kl_coef
    )
    advantages, returns = jax.vmap(ppo.gae, in_axes=(0, 0, 0, None, None))(
        rewards, reading.values, rows.mask, options.gamma, options.gae_lambda
    )
    if options.whiten_advantages:
        advantages = ppo.whiten(advantages, rows.mask)
    return advantages, returns


def _summary(
    history: Metrics,
    rows: Rollout,
    reading: Reading,
    returns: Array,
    kl_coef: Array,
    kl: Array,
) -> Metrics:
    """Means over the optimizer steps (the maximum for `ratio_max`), and figures of the rollout.

    KL is summed over an answer and averaged over answers, in nats.
    """
    k3 = ppo.kl_k3(reading.logprobs, reading.ref_logprobs)
    steps = {
        f"ppo/{name}": jnp.nanmax(x) if name.endswith("_max") else jnp.nanmean(x)
        for name, x in history.items()
    }
    return {
        **steps,
        "ppo/explained_variance": ppo.explained_variance(reading.values, returns, rows.mask),
        "kl/k1": kl,
        "kl/k3": jnp.sum(k3 * rows.mask) / rows.score.shape[0],
        "kl/coef": kl_coef,
    }
