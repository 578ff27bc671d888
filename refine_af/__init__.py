"""REFINE-AF: instruction tuning by PPO from automated feedback, in JAX and Flax."""

from importlib import metadata

__version__ = metadata.version("refine-af")
