"""What the compiled PPO update of a 7B model would need; nothing of it is ever allocated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from refine_af import config as config_lib
from refine_af import mesh as mesh_lib
from refine_af import policy_update, training
from refine_af.base_model import lora_config
from refine_af.configs import tiny
from refine_af.models import heads, transformer
from refine_af.models.registry import PRESETS
from refine_af.rollout import Reading, Rollout

ROWS, LENGTH, ANSWER = 8, 1024, 512
PPO = dataclasses.replace(
    tiny.get_config().ppo,
    batch_size=ROWS,
    num_epochs=2,
    num_minibatches=2,
    num_microbatches=2,
    lora=config_lib.Lora(),
    sampling=config_lib.Sampling(temperature=1.0, max_new_tokens=ANSWER),
)


def temporary_bytes(vocab: int) -> int:
    """Of an update of LLaMA-2-7B with so large a vocabulary, on one device."""
    model = dataclasses.replace(
        PRESETS["llama2-7b"], vocab_size=vocab, dtype="float32", param_dtype="float32"
    )
    lora = lora_config(PPO.lora)

    def make() -> Any:
        base, adapter = transformer.init(model, lora, key=jax.random.key(0))
        params = {
            "policy": {"adapter": adapter},
            "value_head": heads.init_value_head(model.embed_dim),
        }
        return base, training.new_state(params, policy_update.optimizer(PPO), PPO.kl_coef)

    answers = jnp.zeros((ROWS, ANSWER))
    columns = jnp.zeros((ROWS, ANSWER), jnp.int32)
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    rows = Rollout(tokens, tokens, columns, answers, columns, columns, answers, jnp.zeros((ROWS,)))
    mesh = mesh_lib.make_mesh(config_lib.Mesh(), jax.devices()[:1])
    base, state = jax.eval_shape(make)
    update = policy_update.make_update(transformer.define(model, lora), PPO, mesh, state)
    lowered: Any = update
    compiled = lowered.lower(
        base, state, rows, Reading(answers, answers, answers), jax.random.key(0)
    ).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_vocabulary() -> None:
    small, large = (temporary_bytes(vocab) for vocab in (32_000, 128_256))
    assert large <= 1.01 * small, (small, large)
