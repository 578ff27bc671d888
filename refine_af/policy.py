"""What PPO trains: the policy and its critic, as an adapter on frozen weights or as all weights.

The trainable parameters are a tree of float32 arrays:

    {"policy": trained, "value_head": ..., "critic": trained}        trained: see `trunk`

`critic` is there only where the critic has a trunk of its own; else the value head reads the
policy's hidden states. The reference is always the frozen base model.
"""

import dataclasses

from refine_af import config as config_lib
from refine_af import trunk
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
        return trunk.definition(self.base, self.options)

    def new_params(self, seed: int) -> Params:
        """Before the first step: policy and critic are the base model, values are 0."""
        head = self.base.replicate(heads.init_value_head(self.base.config.embed_dim))
        policy = trunk.new(self.base, self.options, key_of(seed, "ppo/adapter"))
        params = {"policy": policy, "value_head": head}
        if self.options.critic == "separate":
            params["critic"] = trunk.new(self.base, self.options, key_of(seed, "ppo/critic"))
        return params

    def for_sampling(self, params: Params, *, int8_weights: bool = False) -> Params:
        """Parameters of the policy for an engine, see `BaseModel.for_sampling`."""
        return trunk.for_sampling(
            self.base, self.options, params["policy"], int8_weights=int8_weights
        )
