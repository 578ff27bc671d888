"""A model that is trained: through an adapter on frozen weights, or all of its weights.

What is trained is a tree of float32 arrays: {"adapter": LoRA}, or {"model": all weights}.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from refine_af import config as config_lib
from refine_af.base_model import BaseModel
from refine_af.models.transformer import Definition, Params

Options = config_lib.Ppo | config_lib.Sft  # that say what is trained


def definition(base: BaseModel, options: Options) -> Definition:
    """Of the model with what is trained."""
    return base.adapted(options.lora) if options.trained == "lora" else base.definition


def new(base: BaseModel, options: Options, key: Array) -> Params:
    """Before the first step: the model is the base model."""
    if options.trained == "lora":
        return {"adapter": base.new_adapter(options.lora, key)}
    return {"model": jax.tree.map(_master, base.params)}


@jax.jit
def _master(x: Array) -> Array:
    """A float32 copy, laid out as `x`: of a float32 base, too, since the update eats it."""
    return x.astype(jnp.float32) + 0.0


def weights(base: Params, trained: Params) -> tuple[Params, Params | None]:
    """(weights to compute with, adapter); master weights are cast as the base is."""
    if "adapter" in trained:
        return base, trained["adapter"]
    return jax.tree.map(lambda x, like: x.astype(like.dtype), trained["model"], base), None


def for_sampling(
    base: BaseModel, options: Options, trained: Params, *, int8_weights: bool = False
) -> Params:
    """Parameters for an engine, see `BaseModel.for_sampling`."""
    params, adapter = weights(base.params, trained)
    tuned = dataclasses.replace(base, params=params)
    return tuned.for_sampling(adapter, options.lora, int8_weights=int8_weights)
