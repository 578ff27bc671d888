"""Rotary positions (RoFormer, arXiv 2104.09864). Axis letters as in `layers`."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from refine_af.models.config import LinearRope, Llama3Rope

Rotary = tuple[Float[Array, "B 1 T H/2"], Float[Array, "B 1 T H/2"]]  # cosines, sines


def frequencies(head_dim: int, theta: float, scaling: LinearRope | Llama3Rope | None) -> np.ndarray:
    """Radians a position, `theta^(-2i/H)` and scaled, float32 [H/2]."""
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return plain.astype(np.float32)
    slow = plain / scaling.factor
    if isinstance(scaling, LinearRope):
        return slow.astype(np.float32)
    turns = scaling.original_positions * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    fast = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (fast * plain + (1 - fast) * slow).astype(np.float32)


def tables(positions: Int[Array, "B T"], radians: np.ndarray) -> Rotary:
    """Cosines and sines of `position * radians`, float32."""
    angles = positions.astype(jnp.float32)[:, None, :, None] * radians[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B N T H"], rotary: Rotary) -> Float[Array, "B N T H"]:
    """Rotate the pairs `(x[i], x[i + H/2])`, the order in which Hugging Face stores q and k."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
