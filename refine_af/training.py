"""What PPO and fine-tuning share: the train state, accumulated gradients, a guarded step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from refine_af import ppo

Tree = Any
MAX_SKIPPED = 5  # steps in a row whose gradient is not finite
# (params, microbatch) -> (sum of losses / global count, dict of sums to be added up)
LossFn = Callable[[Tree, Tree], tuple[Array, dict[str, Array]]]


class TrainState(NamedTuple):
    """Everything that a step reads and writes; a pytree, donated to the update."""

    step: Int[Array, ""]  # rollouts (PPO) or optimizer steps (SFT) done
    params: Tree  # trainable, float32: see `policy`; in fine-tuning, see `trunk`
    opt_state: Tree
    kl_coef: Float[Array, ""]  # of the controller; unused (0) in fine-tuning
    scores: ppo.Moments  # of all rewards so far; unused (empty) in fine-tuning
    skipped: Int[Array, ""]  # steps dropped in a row because a gradient was not finite


def new_state(params: Tree, optimizer: optax.GradientTransformation, kl_coef: float) -> TrainState:
    """State before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        kl_coef=jnp.asarray(kl_coef, jnp.float32),
        scores=ppo.Moments(*jnp.zeros(3, jnp.float32)),
        skipped=jnp.zeros((), jnp.int32),
    )


def accumulate(
    loss_fn: LossFn, params: Tree, batch: Tree, num_microbatches: int
) -> tuple[Tree, Array, dict[str, Array]]:
    """(gradient, loss, sums) added up over equal cuts of the batch's first axis.

    `loss_fn` divides by a count of the whole batch, so sums of pieces are the whole's values and
    the cut changes nothing but memory. A sum whose name ends in `_max` is a maximum instead.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def cut(x: Array) -> Array:
        # Rows i, i + n, ... : a device that holds a run of rows has its share of each piece.
        return x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)

    def merge(name: str, total: Array, new: Array) -> Array:
        return jnp.maximum(total, new) if name.endswith("_max") else total + new

    def step(carry: Tree, micro: Tree) -> tuple[Tree, None]:
        grads, loss, sums = carry
        (new_loss, new_sums), new_grads = value_and_grad(params, micro)
        sums = {name: merge(name, sums[name], new_sums[name]) for name in sums}
        return (jax.tree.map(jnp.add, grads, new_grads), loss + new_loss, sums), None

    pieces = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(loss_fn, params, jax.tree.map(lambda x: x[0], pieces))[1]
    zero_sums = {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()}
    start = (jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.float32), zero_sums)
    (grads, loss, sums), _ = jax.lax.scan(step, start, pieces)
    return grads, loss, sums


def guarded_step(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Tree, **extra: Any
) -> tuple[TrainState, Float[Array, ""]]:
    """One optimizer step, or none when the gradient is not finite; also the gradient's norm.

    `step` is left to the caller; `extra` goes to the optimizer.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    safe = jax.tree.map(lambda g: jnp.where(finite, g, 0.0), grads)
    updates, opt_state = optimizer.update(safe, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old)

    return state._replace(
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        skipped=jnp.where(finite, 0, state.skipped + 1),
    ), norm


def in_place(step: Callable[..., tuple[TrainState, Tree]], state: TrainState) -> Any:
    """Jitted `step(base, state, ...)`; `state` is donated, and the next one laid out as it was.

    Left to itself, XLA may lay it out otherwise on a mesh: the second step would be a program of
    its own, and a run that goes on from a checkpoint, with the first one, would round otherwise.

    Args:
        state: any of the run, or its shapes with shardings.
    """
    layout = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=1, out_shardings=(layout, None))


def check_skipped(
    state: TrainState,
    where: str,
    figures: Mapping[str, float] | None = None,
    limit: int = MAX_SKIPPED,
) -> None:
    """Stop a run whose gradients are not finite any more.

    Args:
        figures: of the step; those named `nonfinite/NAME` count such values of a quantity.

    Raises:
        ValueError: more than `limit` steps in a row have been skipped.
    """
    skipped = int(state.skipped)
    if skipped <= limit:
        return
    found = [
        k.partition("/")[2] for k, n in (figures or {}).items() if k.startswith("nonfinite/") and n
    ]
    fault = f"; not finite: {', '.join(found)}" if found else ""
    raise ValueError(
        f"{where}: {skipped} steps in a row had a gradient that is not finite (limit {limit})"
        f"{fault}; lower the learning rate or use float32, in another workdir: the weights of this "
        "one may be ruined"
    )
