"""Heads on top of the decoder's final hidden states."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from refine_af.models.transformer import Params


def init_value_head(embed_dim: int) -> Params:
    """Linear map to one value, zero at the start so that the first advantages are the returns."""
    return {"kernel": jnp.zeros((embed_dim,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def value(head: Params, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Value of each position, float32."""
    product = jnp.einsum(
        "...d,d->...",
        hidden,
        head["kernel"].astype(hidden.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return product + head["bias"]


def init_scores(embed_dim: int, num_scores: int, *, key: Array) -> Params:
    """Linear map to several numbers; small, so that none of them is certain at the start."""
    kernel = jax.random.normal(key, (embed_dim, num_scores), jnp.float32) * 0.1 * embed_dim**-0.5
    return {"kernel": kernel, "bias": jnp.zeros((num_scores,), jnp.float32)}


def scores(head: Params, hidden: Float[Array, "N D"]) -> Float[Array, "N S"]:
    """The numbers of each of N hidden states, float32."""
    product = jnp.einsum(
        "nd,ds->ns",
        hidden.astype(jnp.float32),
        head["kernel"],
        precision=jax.lax.Precision.HIGHEST,
    )
    return product + head["bias"][None]
