"""Random numbers as a function of (seed, purpose, numbers): resuming needs no stored state."""

import hashlib

import jax
import numpy as np
from jaxtyping import Array


def _sequence(seed: int, purpose: str, steps: tuple[int, ...]) -> np.random.SeedSequence:
    """Hashed, since NumPy's own mixing pads with zeros: (3,) and (3, 0) would be the same."""
    text = "/".join(map(str, (seed, purpose, *steps)))
    return np.random.SeedSequence(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16]))


def generator(seed: int, purpose: str, *steps: int) -> np.random.Generator:
    """NumPy generator for host-side choices.

    Args:
        purpose: what is drawn, such as "ppo/order"; no two places share one.
        steps: batch, step, row, ... of the draw.
    """
    return np.random.default_rng(_sequence(seed, purpose, steps))


def seed_of(seed: int, purpose: str, *steps: int) -> int:
    """A 32-bit seed, for one request say; arguments as of `generator`."""
    return int(_sequence(seed, purpose, steps).generate_state(1)[0])


def key_of(seed: int, purpose: str, *steps: int) -> Array:
    """A JAX key; arguments as of `generator`."""
    return jax.random.key(seed_of(seed, purpose, *steps))
