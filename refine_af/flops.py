"""Floating-point operations of a PPO step, and what a device can do at best: for MFU.

MFU is the share of the peak that the *model's* operations reach (Chowdhery et al., arXiv
2204.02311, appendix B): what is computed again to save memory does not count, nor does attention.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from refine_af.config import Ppo
from refine_af.models.config import ModelConfig
from refine_af.models.weights import expected_shapes


class Chip(NamedTuple):
    """What is known of a device: Google Cloud's documentation, NVIDIA's data sheets."""

    operations: float  # dense bfloat16, a second
    bandwidth: float  # bytes of its memory, a second
    memory: int  # GiB; of a GPU those that the driver leaves


CHIPS = {
    "TPU v4": Chip(275e12, 1.228e12, 32),
    "TPU v5 lite": Chip(197e12, 0.819e12, 16),
    "TPU v5e": Chip(197e12, 0.819e12, 16),
    "TPU v5": Chip(459e12, 2.765e12, 95),
    "TPU v5p": Chip(459e12, 2.765e12, 95),
    "TPU v6 lite": Chip(918e12, 1.64e12, 32),
    "TPU v6e": Chip(918e12, 1.64e12, 32),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 1.555e12, 39),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2.039e12, 79),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3.35e12, 79),
    "NVIDIA H200": Chip(989e12, 4.8e12, 139),
}
_SIZE = 2048  # of the product that is measured where the device is not known


@functools.cache
def peak(dtype: str) -> float:
    """Operations a second of all devices.

    As the maker says of bfloat16, or measured in a tenth of a second in `dtype`.
    """
    kind = jax.devices()[0].device_kind
    if kind in CHIPS:
        return CHIPS[kind].operations * jax.device_count()
    # Simulated devices share one processor, so that its rate is that of all.
    return product_rate(jnp.dtype(dtype), _SIZE)


def least_seconds(kind: str, operations: float, read: float) -> float | None:
    """Time that a device of this kind cannot do without; None for one that is not listed.

    Args:
        operations: bfloat16 products.
        read: bytes of its memory.
    """
    if kind not in CHIPS:
        return None
    chip = CHIPS[kind]
    return max(operations / chip.operations, read / chip.bandwidth)


def product_rate(dtype: jnp.dtype, size: int) -> float:
    """Largest measured operations a second of a product of two `size x size` matrices."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)  # GPUs are faster on zeros
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    return 2 * size**3 / fastest(lambda: product(x))


def fastest(run: Callable[[], jax.Array]) -> float:
    """Seconds of the fastest of five runs behind a first one."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times[1:])


@functools.cache  # a model is traced for it
def _num_weights(model: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(model).values())


def forward(model: ModelConfig, num_tokens: int, num_predictions: int) -> float:
    """Of all linear maps: two for each weight and token, in the head for each prediction."""
    weights = _num_weights(model)
    head = model.vocab_size * model.embed_dim
    layers = weights - head * (1 if model.tie_embeddings else 2)
    return 2.0 * (layers * num_tokens + head * num_predictions)


def of_step(model: ModelConfig, options: Ppo, num_tokens: int, num_predictions: int) -> float:
    """Of reading a rollout and of its update.

    A backward pass costs as much as a forward one for what goes back through frozen weights, and
    twice as much where they have gradients.
    """
    policy = forward(model, num_tokens, num_predictions)
    critic = forward(model, num_tokens, 0) if options.critic == "separate" else 0.0
    passes = options.num_epochs * (2 if options.trained == "lora" else 3)
    return 2 * policy + critic + passes * (policy + critic)
