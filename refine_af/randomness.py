"""Random numbers as a function of (seed, stage, step, row): resuming needs no stored state."""

import enum

import jax
import numpy as np
from jaxtyping import Array


class Stage(enum.IntEnum):
    """Places that draw random numbers; the values are part of every run's results."""

    INSTRUCTIONS = 1
    PPO = 2
    INSTANCES = 3
    SFT = 4
    EVALUATION = 5


def generator(seed: int, stage: Stage, *steps: int) -> np.random.Generator:
    """NumPy generator for host-side choices."""
    return np.random.default_rng([seed, stage, *steps])


def seed_of(seed: int, stage: Stage, *steps: int) -> int:
    """A 32-bit seed for one request."""
    return int(np.random.SeedSequence([seed, stage, *steps]).generate_state(1)[0])


def key_of(seed: int, stage: Stage, *steps: int) -> Array:
    """A JAX key."""
    return jax.random.key(seed_of(seed, stage, *steps))
