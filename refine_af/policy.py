"""What PPO trains: the policy and its critic, as an adapter on frozen weights or as all weights.

The trainable parameters are a tree of float32 arrays:

    {"policy": trunk, "value_head": ..., "critic": trunk}        trunk = {"adapter": LoRA}
                                                                       or {"model": all weights}

`critic` is there only where the critic has a trunk of its own; else the value head reads the
policy's hidden states. The reference is always the frozen base model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from refine_af import config as config_lib
from refine_af.base_model import BaseModel
from refine_af.models import heads
from refine_af.models.transformer import Definition, Params
from refine_af.randomness import key_of


@dataclasses.dataclass(frozen=True)
class Policy:
    """The policy of a run: static facts; its parameters come from `new_params` and then updates."""

    base: BaseModel
    options: config_lib.Ppo

    @property
    def definition(self) -> Definition:
        """Of the trunks."""
        lora = self.options.trained == "lora"
        return self.base.adapted(self.options.lora) if lora else self.base.definition

    def new_params(self, seed: int) -> Params:
        """Before the first step: policy and critic are the base model, values are 0."""
        head = self.base.replicate(heads.init_value_head(self.base.config.embed_dim))
        params = {"policy": self._trunk(key_of(seed, "ppo/adapter")), "value_head": head}
        if self.options.critic == "separate":
            params["critic"] = self._trunk(key_of(seed, "ppo/critic"))
        return params

    def _trunk(self, key: Array) -> Params:
        if self.options.trained == "lora":
            return {"adapter": self.base.new_adapter(self.options.lora, key)}
        return {"model": jax.tree.map(_master, self.base.params)}

    def for_sampling(self, params: Params, *, int8_weights: bool = False) -> Params:
        """Parameters of the policy for an engine, see `BaseModel.for_sampling`."""
        weights, adapter = trunk(self.base.params, params["policy"])
        base = dataclasses.replace(self.base, params=weights)
        return base.for_sampling(adapter, self.options.lora, int8_weights=int8_weights)


@jax.jit
def _master(x: Array) -> Array:
    """A float32 copy, laid out as `x`: of a float32 base, too, since the update eats it."""
    return x.astype(jnp.float32) + 0.0


def trunk(base: Params, trained: Params) -> tuple[Params, Params | None]:
    """(weights to compute with, adapter) of a trunk; master weights are cast as the base is."""
    if "adapter" in trained:
        return base, trained["adapter"]
    return jax.tree.map(lambda x, like: x.astype(like.dtype), trained["model"], base), None
