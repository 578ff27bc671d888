"""Log-probabilities of given tokens, without ever holding the logits of a whole batch."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from refine_af.models import transformer
from refine_af.models.transformer import Definition, Params, Transformer

_CHUNK = 256  # positions whose logits exist at the same time


def of_targets(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    temperature: float = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log-probability of each target, entropy in nats), float32.

    `log softmax(logits / temperature)` is computed for about 256 positions at a time, some columns
    of every row, and again in the backward pass: peak memory does not grow with batch x length x
    vocabulary, and rows stay on the devices that hold them.
    """
    batch, length, dim = hidden.shape
    columns = max(_CHUNK // batch, 1)
    padding = -length % columns
    padded = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    wanted = jnp.pad(targets, ((0, 0), (0, padding)))

    @jax.checkpoint
    def chunk(pieces: tuple[Array, Array]) -> tuple[Array, Array]:
        logprobs = jax.nn.log_softmax(model.logits(pieces[0]) / temperature, axis=-1)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return jnp.take_along_axis(logprobs, pieces[1][..., None], axis=-1)[..., 0], entropy

    chunks = (
        padded.reshape(batch, -1, columns, dim).swapaxes(0, 1),
        wanted.reshape(batch, -1, columns).swapaxes(0, 1),
    )

    def joined(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(batch, -1)[:, :length]

    chosen, entropy = jax.lax.map(chunk, chunks)
    return joined(chosen), joined(entropy)


@functools.partial(jax.jit, static_argnums=0)
def mean_of_span(
    definition: Definition,
    params: Params,
    tokens: Int[Array, "B T"],
    first: Int[Array, "B"],
    length: Int[Array, "B"],
) -> Float[Array, "B"]:
    """Mean log-probability of tokens[first:length] given all before them (rows padded right)."""
    model = transformer.bind(definition, params)
    hidden, _ = model(tokens, jnp.zeros_like(first))
    logprobs, _ = of_targets(model, hidden[:, :-1], tokens[:, 1:])
    column = jnp.arange(1, tokens.shape[1])[None]
    inside = (column >= first[:, None]) & (column < length[:, None])
    return jnp.sum(jnp.where(inside, logprobs, 0.0), -1) / jnp.maximum(inside.sum(-1), 1)


@functools.partial(jax.jit, static_argnums=0)
def next_token(
    definition: Definition,
    params: Params,
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    candidates: Int[Array, "C"],
) -> Float[Array, "B C"]:
    """Log-probability of each candidate as the token after tokens[:length] (rows padded right)."""
    model = transformer.bind(definition, params)
    hidden, _ = model(tokens, jnp.zeros_like(length))
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(model.logits(last), axis=-1)[:, candidates]
