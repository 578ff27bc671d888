"""Log-probabilities of given tokens, without ever holding the logits of a batch or a vocabulary."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from refine_af.models import transformer
from refine_af.models.config import ModelConfig
from refine_af.models.transformer import Definition, Params, Transformer

# Logits exist for so many positions on a device and vocabulary entries at the same time.
_POSITIONS, _ENTRIES = 256, 16_384
_MOST_SHARDS = 8  # devices that a block of the vocabulary can be split over

_Sums = tuple[Array, Array, Array, Array]


def of_targets(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    temperature: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log-probability of each target, entropy in nats), float32.

    The distribution is `softmax(logits / temperature)`. Computed for about 256 positions a device
    at a time, some columns of every row, so that rows stay on the devices that hold them and a head
    that is split over devices is gathered for few pieces; and for blocks of
    the vocabulary (all of it at once where it has no divisor), in both directions: peak memory
    grows with neither.
    """
    assert model.stacked or model.config.tie_embeddings, "unstacked, the head lies the other way"
    batch, length, dim = hidden.shape
    columns = max(_POSITIONS * model.row_parts(batch) // batch, 1)
    columns = -(-length // -(-length // columns))  # of equal pieces, little is padding
    padding = -length % columns
    padded = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    wanted = jnp.pad(targets, ((0, 0), (0, padding)))
    heat = jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    chunks = (
        padded.reshape(batch, -1, columns, dim).swapaxes(0, 1),
        wanted.reshape(batch, -1, columns).swapaxes(0, 1),
    )

    def joined(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(batch, -1)[:, :length]

    chosen, entropy = _of_chunks(model.config, heat, model.head_kernel, *chunks)
    return joined(chosen), joined(entropy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_chunks(
    config: ModelConfig,
    heat: Float[Array, ""],
    kernel: Float[Array, "..."],
    hidden: Float[Array, "N B K D"],
    targets: Int[Array, "N B K"],
) -> tuple[Float[Array, "N B K"], Float[Array, "N B K"]]:
    """`of_targets` of N pieces, one after another."""
    return _forward(config, heat, kernel, hidden, targets)[0]


def _forward(
    config: ModelConfig, heat: Array, kernel: Array, hidden: Array, targets: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    def chunk(piece: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        found = _stream(config, heat, kernel, *map(_flat, piece, (1, 0)))
        return jax.tree.map(lambda x: x.reshape(piece[1].shape), found)

    chosen, entropy, normaliser = jax.lax.map(chunk, (hidden, targets))
    return (chosen, entropy), (heat, kernel, hidden, targets, entropy, normaliser)


def _backward(
    config: ModelConfig, saved: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    """The gradient of the kernel is added up over the pieces in float32, whatever its dtype."""
    heat, kernel, hidden, targets, entropy, normaliser = saved

    def chunk(total: Array, piece: tuple[Array, ...]) -> tuple[Array, Array]:
        rows, *rest = map(_flat, piece, (1, 0, 0, 0, 0, 0))
        of_hidden, of_kernel = _pull(config, heat, kernel, rows, *rest)
        return total + of_kernel, of_hidden.reshape(piece[0].shape)

    start = jnp.zeros(kernel.shape, jnp.float32)
    pieces = hidden, targets, entropy, normaliser, *cotangents
    of_kernel, of_hidden = jax.lax.scan(chunk, start, pieces)
    of_heat = jnp.zeros_like(heat)  # nobody asks for it
    return of_heat, of_kernel.astype(kernel.dtype), of_hidden, None


_of_chunks.defvjp(_forward, _backward)


def _flat(x: Array, features: int) -> Array:
    """Rows of all leading axes; the last `features` axes stay."""
    return x.reshape(-1, *x.shape[x.ndim - features :])


def _stream(
    config: ModelConfig, heat: Array, kernel: Array, hidden: Array, targets: Array
) -> tuple[Array, Array, Array]:
    """(log-probabilities, entropies, logarithm of the sum of exponentials)."""

    def block(carry: _Sums, index: Array) -> tuple[_Sums, None]:
        most, total, mean, chosen = carry
        index = _tied(index, hidden)
        logits = _logits(config, heat, hidden, _cut(config, kernel, index))
        hits = _entries(config, index)[None] == targets[:, None]
        chosen = chosen + jnp.sum(jnp.where(hits, logits, 0.0), axis=-1)
        new = jnp.maximum(most, jnp.max(logits, axis=-1))
        shift, scale = most - new, jnp.exp(most - new)
        weights = jnp.exp(logits - new[:, None])
        # Sums of exp(z - most) and of exp(z - most) (z - most) over the entries so far.
        mean = scale * (mean + total * shift) + jnp.sum(weights * (logits - new[:, None]), -1)
        return (new, scale * total + jnp.sum(weights, axis=-1), mean, chosen), None

    zeros = jnp.zeros(targets.shape, jnp.float32)
    start = (zeros + jnp.finfo(jnp.float32).min / 2, zeros, zeros, zeros)
    blocks = jnp.arange(num_blocks(config.vocab_size))
    (most, total, mean, chosen), _ = jax.lax.scan(block, start, blocks)
    normaliser = most + jnp.log(total)
    return chosen - normaliser, jnp.log(total) - mean / total, normaliser


def _pull(
    config: ModelConfig,
    heat: Array,
    kernel: Array,
    hidden: Array,
    targets: Array,
    entropy: Array,
    normaliser: Array,
    of_chosen: Array,
    of_entropy: Array,
) -> tuple[Array, Array]:
    """(cotangent of `hidden`, of `kernel`) from those of `_stream`'s first two results.

    Logits once more: `d chosen = hit - p`, `d entropy = -p (log p + entropy)` by logit.
    """

    def block(total: Array, index: Array) -> tuple[Array, Array]:
        index = _tied(index, hidden)
        logits, pull = jax.vjp(
            functools.partial(_logits, config, heat), hidden, _cut(config, kernel, index)
        )
        logprobs = logits - normaliser[:, None]
        p = jnp.exp(logprobs)
        hits = _entries(config, index)[None] == targets[:, None]
        slope = of_chosen[:, None] * (hits - p)
        slope -= of_entropy[:, None] * p * (logprobs + entropy[:, None])
        of_hidden, of_kernel = pull(slope)
        return total + of_hidden.astype(jnp.float32), of_kernel

    blocks = jnp.arange(num_blocks(config.vocab_size))
    of_hidden, of_kernel = jax.lax.scan(block, jnp.zeros(hidden.shape, jnp.float32), blocks)
    return of_hidden.astype(hidden.dtype), _whole(config, of_kernel)


def _tied(index: Array, hidden: Array) -> Array:
    """`index`, known no earlier than `hidden`.

    Else JAX would cut all blocks before the loop over positions: a second copy of the head.
    """
    tied: Array = jax.lax.optimization_barrier((index, hidden))[0]
    return tied


def _logits(config: ModelConfig, heat: Array, hidden: Array, kernel: Array) -> Float[Array, "T V"]:
    axis = transformer.vocabulary_axis(config)
    return transformer.logits_of(config, hidden, kernel, axis) / heat


# A block takes entries from all over the vocabulary, some of each eighth of it: where the head is
# split over devices, every block is too. Axes of the vocabulary: [eighth, block, entry].


@functools.cache
def num_blocks(vocab: int) -> int:
    """Smallest divisor that leaves blocks small enough; 1 where the vocabulary has none."""
    fits = (n for n in range(1, vocab // 1024 + 1) if vocab % n == 0 and vocab // n <= _ENTRIES)
    return next(fits, 1)


def _split(config: ModelConfig) -> tuple[int, int, int]:
    blocks = num_blocks(config.vocab_size)
    shards = math.gcd(config.vocab_size // blocks, _MOST_SHARDS)
    return shards, blocks, config.vocab_size // blocks // shards


def _cut(config: ModelConfig, kernel: Array, index: Array) -> Array:
    """One block of the head's kernel."""
    axis = transformer.vocabulary_axis(config)
    shape = list(kernel.shape)
    shape[axis : axis + 1] = _split(config)
    part = jax.lax.dynamic_index_in_dim(kernel.reshape(shape), index, axis + 1, keepdims=False)
    shape[axis : axis + 3] = [-1]
    return part.reshape(shape)


def _entries(config: ModelConfig, index: Array) -> Int[Array, "V"]:
    """Token ids of a block."""
    shards, blocks, size = _split(config)
    ids = jnp.arange(config.vocab_size, dtype=jnp.int32).reshape(shards, blocks, size)
    return jax.lax.dynamic_index_in_dim(ids, index, 1, keepdims=False).reshape(-1)


def _whole(config: ModelConfig, parts: Array) -> Array:
    """Kernel whose blocks these are, stacked."""
    axis = transformer.vocabulary_axis(config)
    shards, blocks, size = _split(config)
    shape = list(parts.shape[1:])
    cut = parts.reshape(blocks, *shape[:axis], shards, size, *shape[axis + 1 :])
    shape[axis] = config.vocab_size
    return jnp.moveaxis(cut, 0, axis + 1).reshape(shape)


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
