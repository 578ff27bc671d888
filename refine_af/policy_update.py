"""The PPO update of one rollout: `update(state, rollout, key) -> (state, metrics)`, one program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from refine_af import config as config_lib
from refine_af import policy as policy_lib
from refine_af import ppo, rollout, training, trunk
from refine_af.base_model import BaseModel
from refine_af.mesh import keep_rows_split
from refine_af.models import heads
from refine_af.models.transformer import Definition, Params
from refine_af.rollout import Places, Reading, Rollout
from refine_af.training import TrainState

Metrics = dict[str, Float[Array, ""]]


def optimizer(options: config_lib.Ppo) -> optax.GradientTransformation:
    """Adam or Adafactor behind global-norm clipping.

    With a critic's warm-up its `update` takes `policy_learns`; the policy's moments and schedule
    begin when that is first true.
    """
    step = _optimizer(options, options.num_steps)
    if options.critic_warmup:
        policy = optax.conditionally_mask(
            _optimizer(options, options.num_steps - options.critic_warmup),
            lambda _, *, policy_learns: policy_learns,
            forward_extra_args=True,
        )
        step = optax.partition({True: policy, False: step}, _is_of_policy)
    return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), step)


def _is_of_policy(params: Params) -> dict[str, bool]:
    return {name: name == "policy" for name in params}


def _optimizer(options: config_lib.Ppo, num_rollouts: int) -> optax.GradientTransformation:
    rate = schedule(options, num_rollouts)
    if options.optimizer == "adam":
        return optax.adam(rate, eps=options.adam_eps)
    # Its own clipping and scaling by the parameters' size are for training from scratch.
    return optax.adafactor(
        rate, multiply_by_parameter_scale=False, clipping_threshold=None, eps=1e-30
    )


def schedule(options: config_lib.Ppo, num_rollouts: int) -> optax.Schedule:
    """Learning rate after so many steps were taken: a linear warm-up, then a decay to 0.

    It gets there if all steps of so many rollouts are taken, none skipped and no epoch cut short.
    """
    total = num_rollouts * options.num_epochs * options.num_minibatches
    warmup = min(options.warmup_steps, total)
    rate, rest = options.learning_rate, max(total - warmup, 1)
    decay = {
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "constant": optax.constant_schedule(rate),
    }
    rise = optax.linear_schedule(rate / (warmup + 1), rate, warmup)
    return optax.join_schedules([rise, decay[options.schedule]], [warmup])


def learning_rate(state: TrainState, options: config_lib.Ppo) -> Float[Array, ""]:
    """Of the policy's next step."""
    counts = [count for _, count in optax.tree.get_all_with_path(state.opt_state, "count")]
    rate = schedule(options, options.num_steps - options.critic_warmup)
    return jnp.asarray(rate(functools.reduce(jnp.minimum, counts or [state.step])), jnp.float32)


def new_state(config: config_lib.Experiment, base: BaseModel) -> TrainState:
    """State of a run before the first step."""
    params = policy_lib.Policy(base, config.ppo).new_params(config.seed)
    state = training.new_state(params, optimizer(config.ppo), config.ppo.kl_coef)
    placed: TrainState = base.place_state(state)
    return placed


class _Batch(NamedTuple):
    """Rows of a rollout with all that their loss needs."""

    tokens: Int[Array, "B T"]
    start: Int[Array, "B T"]
    columns: Int[Array, "B K"]
    mask: Float[Array, "B K"]
    logprobs: Float[Array, "B K"]
    values: Float[Array, "B K"]
    advantages: Float[Array, "B K"]
    returns: Float[Array, "B K"]


def make_update(
    policy: Definition, options: config_lib.Ppo, mesh: jax.sharding.Mesh, state: TrainState
) -> Callable[[Params, TrainState, Rollout, Reading, Array], tuple[TrainState, Metrics]]:
    """Jitted `update(base, state, rollout, reading, key)`, as of `training.in_place`.

    All epochs, minibatches and microbatches are scans in one program. Each epoch draws a fresh
    permutation of the rows. Losses are divided by the token count of their minibatch, over all
    devices.

    Args:
        state: any of the run, or its shapes with shardings.
    """
    tx = optimizer(options)
    temperature = options.sampling.temperature
    value_coef = options.value_coef if options.estimator == "gae" else 0.0
    clipped_loss = functools.partial(
        ppo.policy_loss, clip_eps=options.clip_eps, dual_clip=options.dual_clip
    )

    def loss_fn(base: Params, count: Array, params: Params, batch: _Batch) -> tuple[Array, Metrics]:
        places = Places(batch.tokens, batch.start, batch.columns)
        weights = trunk.weights(base, params["policy"])
        hidden, logprobs, entropy = rollout.predictions(
            policy, *weights, places, temperature, remat=options.remat
        )
        if "critic" in params:
            critic_weights = trunk.weights(base, params["critic"])
            hidden = rollout.hidden_states(policy, *critic_weights, places, remat=options.remat)
        values = heads.value(params["value_head"], hidden)
        surrogate = jax.vmap(clipped_loss)(logprobs, batch.logprobs, batch.advantages, batch.mask)
        critic = jax.vmap(ppo.value_loss, in_axes=(0, 0, 0, 0, None))(
            values, batch.values, batch.returns, batch.mask, options.value_clip_eps
        )
        sums = {
            "policy_loss": jnp.sum(surrogate.loss) / count,
            "value_loss": jnp.sum(critic.loss) / count,
            "value_clip_fraction": jnp.sum(critic.clipped) / count,
            "entropy": jnp.sum(entropy * batch.mask) / count,
            "clip_fraction": jnp.sum(surrogate.clipped) / count,
            "approx_kl": jnp.sum(surrogate.approx_kl) / count,
            "ratio_max": jnp.max(surrogate.ratio_max),
        }
        loss = sums["policy_loss"] + value_coef * sums["value_loss"]
        return loss - options.entropy_coef * sums["entropy"], sums

    def minibatch(
        base: Params, batch: _Batch, carry: tuple[TrainState, Array], index: Array
    ) -> tuple[tuple[TrainState, Array], Metrics]:
        state, moved = carry
        chosen = keep_rows_split(mesh, jax.tree.map(lambda x: x[index], batch))
        count = jnp.maximum(jnp.sum(chosen.mask), 1.0)
        grads, loss, sums = training.accumulate(
            functools.partial(loss_fn, base, count), state.params, chosen, options.num_microbatches
        )
        extra = {}
        if options.critic_warmup:
            learns = state.step >= options.critic_warmup
            grads |= {"policy": jax.tree.map(lambda g: jnp.where(learns, g, 0.0), grads["policy"])}
            extra = {"policy_learns": learns}
        new_state, norm = training.guarded_step(tx, state, grads, **extra)
        if options.max_update_kl:
            moved = sums["approx_kl"] > options.max_update_kl
            new_state = jax.tree.map(lambda a, b: jnp.where(moved, a, b), state, new_state)
        return (new_state, moved), {
            **sums,
            "loss": loss,
            "grad_norm": norm,
            "ran": jnp.ones(()),
            "taken": jnp.where(jnp.isfinite(norm) & ~moved, 1.0, 0.0),
            "skipped": jnp.where(jnp.isfinite(norm), 0.0, 1.0),
            "nonfinite/loss": 1.0 - jnp.isfinite(loss),
            **{
                f"nonfinite/gradient of {name}": 1.0 - jnp.isfinite(optax.tree.norm(tree))
                for name, tree in grads.items()
            },
        }

    def unless_moved(run: Any, carry: tuple[TrainState, Array], index: Array) -> Any:
        """The epochs end early where the policy has moved too far from the one that sampled."""
        shapes = jax.eval_shape(run, carry, index)[1]
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.cond(carry[1], lambda: (carry, nothing), lambda: run(carry, index))

    def update(
        base: Params, state: TrainState, rows: Rollout, reading: Reading, key: Array
    ) -> tuple[TrainState, Metrics]:
        batch_size, first_rate = rows.score.shape[0], learning_rate(state, options)
        state = state._replace(scores=state.scores.add(rows.score))
        advantages, returns = estimate(rows, reading, state, options)
        numbers = reading.logprobs, reading.values, advantages, returns
        places = rows.tokens, rows.start, rows.columns, rows.predicts
        batch = _Batch(*places, *map(rows.of_predictions, numbers))
        keys = jax.random.split(key, options.num_epochs)
        empty = jnp.sum(rows.predicts, axis=1) == 0
        order = jax.vmap(functools.partial(_dealt, empty, options.num_minibatches))(keys)
        order = order.reshape(options.num_epochs * options.num_minibatches, -1)
        run = functools.partial(minibatch, base, batch)
        if options.max_update_kl:
            run = functools.partial(unless_moved, run)
        (state, _), history = jax.lax.scan(run, (state, jnp.zeros((), bool)), order)
        kl = jnp.sum(ppo.kl_k1(reading.logprobs, reading.ref_logprobs) * rows.mask) / batch_size
        metrics = _summary(history, rows, reading, kl_coef(state, options), kl)
        metrics["ppo/learning_rate"] = first_rate
        if options.estimator == "gae":
            explained = ppo.explained_variance(reading.values, returns, rows.mask)
            metrics["ppo/explained_variance"] = explained
        else:
            del metrics["ppo/value_loss"], metrics["ppo/value_clip_fraction"]
        if options.kl_controller == "adaptive":
            coef = ppo.adapt_kl_coef(
                state.kl_coef, kl, options.kl_target, options.kl_horizon, batch_size
            )
            state = state._replace(kl_coef=coef)
        return state._replace(step=state.step + 1), metrics

    step: Callable[..., tuple[TrainState, Metrics]] = training.in_place(update, state)
    return step


def _dealt(empty: Bool[Array, "B"], num_minibatches: int, key: Array) -> Int[Array, "M B/M"]:
    """Rows of each minibatch: shuffled and dealt out, empty ones last, so that all have answers."""
    order = jax.random.permutation(key, empty.shape[0])
    order = order[jnp.argsort(empty[order], stable=True)]
    return order.reshape(-1, num_minibatches).T


def estimate(
    rows: Rollout, reading: Reading, state: TrainState, options: config_lib.Ppo
) -> tuple[Float[Array, "N R"], Float[Array, "N R"]]:
    """(advantages; returns, 0 without a critic) of a rollout.

    With `rloo` and `grpo` every token of an answer has the advantage of its total reward, the KL
    penalty included, among the answers to its prompt; GRPO's authors have the penalty in the loss.
    """
    scores = state.scores.scale(rows.score) if options.scale_scores else rows.score
    rewards = jax.vmap(ppo.shaped_rewards, in_axes=(0, 0, 0, 0, None))(
        scores, reading.logprobs, reading.ref_logprobs, rows.mask, kl_coef(state, options)
    )
    if options.estimator != "gae":
        totals = jnp.sum(rewards, axis=1).reshape(-1, options.group_size)
        relative = jax.vmap(_OF_GROUPS[options.estimator])(totals).reshape(-1)
        return relative[:, None] * rows.mask, jnp.zeros_like(rewards)
    if options.whiten_rewards:
        rewards = ppo.whiten(rewards, rows.mask, shift_mean=False)
    advantages, returns = jax.vmap(ppo.gae, in_axes=(0, 0, 0, None, None))(
        rewards, reading.values, rows.mask, options.gamma, options.gae_lambda
    )
    if options.whiten_advantages:
        advantages = ppo.whiten(advantages, rows.mask)
    return advantages, returns


_OF_GROUPS = {"rloo": ppo.rloo, "grpo": ppo.grpo}


def kl_coef(state: TrainState, options: config_lib.Ppo) -> Float[Array, ""]:
    """The controller's, or the option's: that may have been changed between two starts of a run."""
    fixed = options.kl_controller == "fixed"
    return jnp.full_like(state.kl_coef, options.kl_coef) if fixed else state.kl_coef


def _summary(history: Metrics, rows: Rollout, reading: Reading, coef: Array, kl: Array) -> Metrics:
    """Means over the optimizer steps (the maximum for `ratio_max`), and figures of the rollout.

    A figure that was not finite at one step is not finite here. KL is summed over an answer and
    averaged over answers, in nats.
    """
    k3 = ppo.kl_k3(reading.logprobs, reading.ref_logprobs)
    history = dict(history)
    ran, taken, skipped = (history.pop(name) for name in ("ran", "taken", "skipped"))
    faults = {name: jnp.sum(x) for name, x in history.items() if name.startswith("nonfinite/")}
    steps = {
        f"ppo/{name}": jnp.max(jnp.where(ran > 0, x, 0.0))
        if name.endswith("_max")
        else jnp.sum(x) / jnp.sum(ran)
        for name, x in history.items()
        if name not in faults
    }
    numbers = {"score": rows.score, **reading._asdict()}
    return {
        **steps,
        **faults,
        **{f"nonfinite/{name}": jnp.sum(~jnp.isfinite(x)) * 1.0 for name, x in numbers.items()},
        "ppo/steps_taken": jnp.sum(taken),
        "ppo/steps_skipped": jnp.sum(skipped),
        "kl/k1": kl,
        "kl/k3": jnp.sum(k3 * rows.mask) / rows.score.shape[0],
        "kl/coef": coef,
    }
