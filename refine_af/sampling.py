"""Sampling as pure functions on arrays: prefill, choose a token, decode a chunk of tokens.

Rows are padded on the left, so that all of them write their cache at the same column. A row's
random numbers depend on its seed and on how many tokens it has drawn, on nothing else.

The policy distribution of this project is `softmax(logits / temperature)` over the whole
vocabulary: its log-probabilities are what the sampler returns and what PPO uses, for policy and
reference alike. Top-k and top-p restrict which tokens are drawn; they do not change the
log-probabilities that are reported. At temperature 0 they are those of temperature 1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from refine_af.models import cache as cache_lib
from refine_af.models import transformer
from refine_af.models.cache import KVCache
from refine_af.models.transformer import Definition, Params

_CDF_BLOCK = 256  # entries a block of the two-level inverse CDF


class Limits(NamedTuple):
    """Sampling parameters, one entry a row."""

    temperature: Float[Array, "B"]  # 0: greedy
    top_k: Int[Array, "B"]  # 0: no limit
    top_p: Float[Array, "B"]  # 1: no limit
    presence_penalty: Float[Array, "B"]
    max_new_tokens: Int[Array, "B"]
    seed: UInt32[Array, "B"]


class DecodeState(NamedTuple):
    """A batch in the middle of decoding; B rows, C tokens of this chunk, V vocabulary."""

    cache: KVCache
    start: Int[Array, "B"]  # first real column
    logits: Float[Array, "B V"]  # of the next token
    drawn: Int[Array, "B"]  # tokens drawn so far
    done: Bool[Array, "B"]
    seen: Bool[Array, "B V"]  # tokens drawn before, for the presence penalty
    tokens: Int[Array, "B C"]
    logprobs: Float[Array, "B C"]


def prefill(
    definition: Definition,
    params: Params,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"],
    cache_length: int,
    chunk: int,
) -> DecodeState:
    """Run the prompts; only the last position's logits are computed."""
    model = transformer.bind(definition, params)
    batch = tokens.shape[0]
    hidden, whole = model(tokens, start)
    logits = model.logits(hidden[:, -1])
    return DecodeState(
        cache=cache_lib.lay_out(definition.config, whole, cache_length),
        start=start,
        logits=logits,
        drawn=jnp.zeros((batch,), jnp.int32),
        done=jnp.zeros((batch,), bool),
        seen=jnp.zeros(logits.shape, bool),
        tokens=jnp.zeros((batch, chunk), jnp.int32),
        logprobs=jnp.zeros((batch, chunk), jnp.float32),
    )


def decode(
    definition: Definition,
    params: Params,
    state: DecodeState,
    limits: Limits,
    eos_ids: tuple[int, ...],
    restricted: bool,
) -> DecodeState:
    """Draw up to C more tokens in one loop on the device; stops early when all rows are done.

    A row is done after it has drawn an end token or `max_new_tokens`. `tokens` and `logprobs`
    hold this chunk from column 0; entries of a done row are not meaningful.

    Args:
        restricted: whether any row uses top-k, top-p or a penalty (a static choice, so that plain
            sampling does not pay for them).
    """
    model = transformer.bind(definition, params)
    rows = jnp.arange(state.start.shape[0])
    chunk = state.tokens.shape[1]
    eos = jnp.asarray(eos_ids, jnp.int32)

    def step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        i, s = carry
        token, logprob = choose(s.logits, s.seen, s.drawn, limits, restricted=restricted)
        drawn = s.drawn + ~s.done
        done = s.done | (token[:, None] == eos[None]).any(-1) | (drawn >= limits.max_new_tokens)
        seen = s.seen.at[rows, token].set(True) if restricted else s.seen
        hidden, cache = model(token[:, None], s.start, cache=s.cache)
        return i + 1, DecodeState(
            cache=cache,
            start=s.start,
            logits=model.logits(hidden[:, 0]),
            drawn=drawn,
            done=done,
            seen=seen,
            tokens=s.tokens.at[:, i].set(token),
            logprobs=s.logprobs.at[:, i].set(logprob),
        )

    def going(carry: tuple[Array, DecodeState]) -> Array:
        i, s = carry
        return (i < chunk) & ~s.done.all()

    return jax.lax.while_loop(going, step, (jnp.zeros((), jnp.int32), state))[1]


def choose(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    drawn: Int[Array, "B"],
    limits: Limits,
    *,
    restricted: bool,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Next token of every row and its log-probability under the policy distribution.

    A draw is one uniform number a row and an inverse CDF: one pass over the vocabulary, where
    Gumbel noise would need a random number for each entry.
    """
    greedy = limits.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, limits.temperature)[:, None]
    logprobs = jax.nn.log_softmax(scaled, axis=-1)
    weights = jnp.exp(logprobs)
    best = logits
    if restricted:
        penalty = jnp.where(seen, limits.presence_penalty[:, None], 0.0)
        best = logits - penalty
        weights = jax.nn.softmax(best / jnp.where(greedy, 1.0, limits.temperature)[:, None])
        weights = jnp.where(weights >= _threshold(weights, limits), weights, 0.0)
    uniform = jax.vmap(_uniform)(limits.seed, drawn)
    sampled = jax.vmap(_inverse_cdf)(weights, uniform)
    token = jnp.where(greedy, jnp.argmax(best, axis=-1), sampled).astype(jnp.int32)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]


def _uniform(seed: UInt32[Array, ""], drawn: Int[Array, ""]) -> Float[Array, ""]:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), drawn))


def _threshold(weights: Float[Array, "B V"], limits: Limits) -> Float[Array, "B 1"]:
    """Least probability that both top-k and top-p admit; entries equal to it are kept.

    The nucleus is the smallest set of most likely tokens whose mass reaches p (arXiv 1904.09751).
    Its threshold t is the largest with `sum(w[w >= t]) >= p`; likewise `count(w >= t) >= k` for
    top-k. Both are found exactly by bisection over the bits of t (floats that are not negative
    are ordered like their bits): 31 passes instead of a sort of the vocabulary.
    """
    vocab = weights.shape[-1]
    k = jnp.where(limits.top_k == 0, vocab, limits.top_k)[:, None]
    # No limit is a mass out of reach: the bound stays at 0, however the sum of all is rounded.
    p = jnp.where(limits.top_p >= 1.0, jnp.inf, limits.top_p)[:, None]

    def admits(bits: Array) -> tuple[Array, Array]:
        kept = weights >= jax.lax.bitcast_convert_type(bits, jnp.float32)
        mass = jnp.sum(jnp.where(kept, weights, 0.0), axis=-1, keepdims=True)
        return mass >= p, jnp.sum(kept, axis=-1, keepdims=True) >= k

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        """Bounds [2, B, 1], for p and for k: `low` is admitted, `high` is not."""
        low, high = bounds
        middle = low + (high - low) // 2
        admitted = jnp.stack([admits(middle[0])[0], admits(middle[1])[1]])
        return jnp.where(admitted, middle, low), jnp.where(admitted, high, middle)

    top = jax.lax.bitcast_convert_type(jnp.max(weights, axis=-1, keepdims=True), jnp.int32)
    low = jnp.zeros((2, *top.shape), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.stack([top, top]) + 1))
    return jax.lax.bitcast_convert_type(jnp.max(low, axis=0), jnp.float32)


def _inverse_cdf(weights: Float[Array, "V"], uniform: Float[Array, ""]) -> Int[Array, ""]:
    """Index i with cdf(i-1) <= uniform * total < cdf(i), in two levels of running sums.

    Never an entry of weight zero, for any `uniform` in [0, 1].
    """
    blocks = jnp.pad(weights, (0, -weights.shape[0] % _CDF_BLOCK)).reshape(-1, _CDF_BLOCK)
    ends = _running_sum(blocks.sum(axis=-1))
    target = uniform * ends[-1]
    block = _first_above(ends, target)
    before = jnp.where(block > 0, jnp.maximum(ends[block - 1], 0.0), 0.0)
    inside = _running_sum(blocks[block])
    return block * _CDF_BLOCK + _first_above(inside, target - before)


def _running_sum(weights: Float[Array, "n"]) -> Float[Array, "n"]:
    """Running sum that rises at entries above zero only; -inf before the first of them.

    XLA adds in parallel: its own running sum may rise, or fall, by rounding alone.
    """
    return jax.lax.cummax(jnp.where(weights > 0, jnp.cumsum(weights), -jnp.inf))


def _first_above(sums: Float[Array, "n"], target: Float[Array, ""]) -> Int[Array, ""]:
    """First entry above `target`; where rounding leaves none, the last one that rises."""
    return jnp.minimum(jnp.searchsorted(sums, target, side="right"), jnp.argmax(sums))


jit_prefill = functools.partial(jax.jit, static_argnums=(0, 4, 5))(prefill)
jit_decode = functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=2)(decode)
