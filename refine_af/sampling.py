"""Sampling as pure functions on arrays: admit prompts to slots, decode, choose a token.

A batch has B slots. A slot's text may begin at any column of the cache's clock (`models.cache`);
its random numbers depend on its seed and on how many tokens it has drawn, on nothing else.

The policy distribution of this project is `softmax(logits / temperature)` over the whole
vocabulary: PPO uses its log-probabilities for policy and reference alike. Penalties, top-k, top-p
and min-p narrow the distribution that tokens are drawn from. Both log-probabilities are returned.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from refine_af import mesh as mesh_lib
from refine_af.models import cache as cache_lib
from refine_af.models import transformer
from refine_af.models.cache import KVCache, Prefix
from refine_af.models.rotary import Rotary
from refine_af.models.transformer import Definition, Params, Transformer

CHUNK = 32  # tokens of a slot between two looks of the host, at most; see also `drafting`
_CDF_BLOCK = 256  # entries a block of the two-level inverse CDF
_ARGMAX_BLOCKS = 256  # at most; the greatest common divisor with the vocabulary's size
IN_PROMPT, _DRAWN = 1, 2  # bits of `Slots.seen`


class Limits(NamedTuple):
    """Sampling parameters, one entry a slot."""

    temperature: Float[Array, "B"]  # 0: greedy
    top_k: Int[Array, "B"]  # 0: no limit
    top_p: Float[Array, "B"]  # 1: no limit
    min_p: Float[Array, "B"]  # 0: no limit
    presence_penalty: Float[Array, "B"]  # 0: none
    repetition_penalty: Float[Array, "B"]  # 1: none
    max_new_tokens: Int[Array, "B"]
    stop_ids: Int[Array, "B S"]  # tokens that end a text; -1 fills up
    seed: UInt32[Array, "B"]


class Needs(NamedTuple):
    """What any request of a run asks for: static, so that a run does not pay for the rest."""

    drawn: bool  # some temperature is above 0
    top_k: bool
    top_p: bool
    min_p: bool
    penalised: bool  # presence or repetition penalty

    @property
    def narrowed(self) -> bool:
        """Whether any row's distribution is cut."""
        return self.top_k or self.top_p or self.min_p


class Slots(NamedTuple):
    """A batch in the middle of decoding; V is the size of the vocabulary."""

    cache: KVCache
    start: Int[Array, "B"]  # first column of the slot's own text
    offset: Int[Array, "B"]  # tokens of the shared prefix before it
    token: Int[Array, "B"]  # drawn last; not in the cache yet
    drawn: Int[Array, "B"]  # tokens drawn so far
    done: Bool[Array, "B"]  # or empty
    seen: UInt8[Array, "B V"]  # tokens met so far, for penalties; [B, 0] without them
    limits: Limits


class Chosen(NamedTuple):
    """Tokens with their log-probabilities, float32."""

    token: Int[Array, "B *C"]
    logprob: Float[Array, "B *C"]  # in the distribution that it was drawn from
    full_logprob: Float[Array, "B *C"]  # in the policy distribution


class Pack(NamedTuple):
    """Prompts to be read, packed into R rows of T columns; A of them, and `num_prompts` are real.

    Prompts that are equal share their columns.
    """

    tokens: Int[Array, "R T"]
    start: Int[Array, "R T"]  # first column of the prompt that each token belongs to
    offset: Int[Array, "R T"]  # tokens of the shared prefix before that prompt
    row: Int[Array, "A"]  # where each prompt stands
    first: Int[Array, "A"]  # its first column; columns before these rows' own are in `scratch`
    last: Int[Array, "A"]  # its last column
    prefixed: Int[Array, "A"]  # tokens of the shared prefix before it
    slot: Int[Array, "A"]  # where each goes
    seen: UInt8[Array, "A V"]  # its tokens, those of the prefix too; [A, 0] without penalties
    limits: Limits  # of each
    num_prompts: Int[Array, ""]


def empty_slots(
    definition: Definition,
    mesh: jax.sharding.Mesh,
    batch: int,
    length: int,
    num_stops: int,
    needs: Needs,
) -> Slots:
    """B slots with nobody in them, for texts of up to `length` tokens, laid out on the mesh."""
    vocab = definition.config.vocab_size if needs.penalised else 0
    floats, whole = jnp.zeros((batch,), jnp.float32), jnp.zeros((batch,), jnp.int32)
    slots = Slots(
        cache=cache_lib.empty(definition.config, batch, length),
        start=whole,
        offset=whole,
        token=whole,
        drawn=whole,
        done=jnp.ones((batch,), bool),
        seen=jnp.zeros((batch, vocab), jnp.uint8),
        limits=Limits(
            temperature=floats,
            top_k=whole,
            top_p=floats,
            min_p=floats,
            presence_penalty=floats,
            repetition_penalty=floats,
            max_new_tokens=whole,
            stop_ids=jnp.full((batch, num_stops), -1, jnp.int32),
            seed=jnp.zeros((batch,), jnp.uint32),
        ),
    )
    shardings = jax.tree.map(lambda x: mesh_lib.slot_sharding(mesh, x.shape), slots)
    return jax.lax.with_sharding_constraint(slots, shardings)


def scratch(definition: Definition, length: int) -> KVCache:
    """An empty cache of one row, to read a prompt in pieces."""
    return cache_lib.empty(definition.config, 1, length)


def extend(
    definition: Definition,
    params: Params,
    scratch: KVCache,
    tokens: Int[Array, "1 T"],
    start: Int[Array, "1"],
    prefix: Prefix | None,
    offset: Int[Array, "1"],
) -> KVCache:
    """The next T columns of a prompt that is read in pieces; no logits are computed."""
    model = transformer.bind(definition, params)
    return model(tokens, start, cache=scratch, prefix=prefix, offset=offset)[1]


class Read(NamedTuple):
    """What reading a pack gave: everything that its prompts' slots need."""

    cache: KVCache
    chosen: Chosen  # first token of each prompt, [A]
    done: Bool[Array, "A"]  # whether it is also the last one


def read(
    definition: Definition,
    params: Params,
    pack: Pack,
    prefix: Prefix | None,
    scratch: KVCache | None,
    needs: Needs,
) -> Read:
    """Read the prompts of a pack, and draw the first token of each.

    Args:
        scratch: the columns before those of a pack of a single prompt.
    """
    model = transformer.bind(definition, params)
    hidden, cache = model(pack.tokens, pack.start, cache=scratch, prefix=prefix, offset=pack.offset)
    column = pack.last - (cache.end - pack.tokens.shape[1])
    logits = model.logits(hidden[pack.row, column])
    chosen = choose(logits, pack.seen, jnp.zeros_like(pack.slot), pack.limits, needs)
    return Read(cache, chosen, is_last(chosen.token, jnp.ones_like(pack.slot), pack.limits))


def place(slots: Slots, pack: Pack, found: Read) -> Slots:
    """Put prompts that were read into their slots."""

    def put_all(i: Array, slots: Slots) -> Slots:
        slot, last = pack.slot[i], pack.last[i]

        def put(column: Array, values: Array) -> Array:
            return column.at[slot].set(values[i])

        return Slots(
            cache=cache_lib.insert(slots.cache, slot, found.cache, pack.row[i], last),
            start=slots.start.at[slot].set(slots.cache.end - 1 - (last - pack.first[i])),
            offset=put(slots.offset, pack.prefixed),
            token=put(slots.token, found.chosen.token),
            drawn=slots.drawn.at[slot].set(1),
            done=put(slots.done, found.done),
            seen=put(slots.seen, note(pack.seen, found.chosen.token)),
            limits=jax.tree.map(put, slots.limits, pack.limits),
        )

    return jax.lax.fori_loop(0, pack.num_prompts, put_all, slots)


_Decoding = tuple[Array, Slots, Chosen]  # steps taken; tokens drawn


def decode(
    definition: Definition,
    params: Params,
    slots: Slots,
    prefix: Prefix | None,
    needs: Needs,
    steps: Int[Array, ""],
    wake: Int[Array, ""],
) -> tuple[Slots, Chosen]:
    """Draw up to `steps` more tokens (at most CHUNK) for every slot, in one loop on the device.

    The loop ends early when `wake` slots are done. Column j of what is returned
    holds the j-th token of this call; entries of a slot that is done are meaningless.
    """
    model = transformer.bind(definition, params)
    batch = slots.token.shape[0]
    nothing = jnp.zeros((batch, CHUNK), jnp.float32)
    found = Chosen(jnp.zeros((batch, CHUNK), jnp.int32), nothing, nothing)
    rotaries = model.rotaries_of(slots.cache.end, slots.start, slots.offset, CHUNK)

    def step(carry: _Decoding) -> _Decoding:
        i, slots, found = carry
        rotary = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=2), rotaries)
        slots, chosen = _step(model, slots, prefix, rotary, needs)
        return i + 1, slots, jax.tree.map(lambda a, b: a.at[:, i].set(b), found, chosen)

    def going(carry: _Decoding) -> Array:
        i, slots, _ = carry
        return (i < steps) & (jnp.sum(slots.done) < wake)

    _, slots, found = jax.lax.while_loop(going, step, (jnp.zeros((), jnp.int32), slots, found))
    return slots, found


def _step(
    model: Transformer,
    slots: Slots,
    prefix: Prefix | None,
    rotaries: tuple[Rotary, Rotary],
    needs: Needs,
) -> tuple[Slots, Chosen]:
    """One more token for every slot."""
    hidden, cache = model(
        slots.token[:, None],
        slots.start,
        cache=slots.cache,
        prefix=prefix,
        offset=slots.offset,
        rotaries=rotaries,
    )
    chosen = choose(model.logits(hidden[:, 0]), slots.seen, slots.drawn, slots.limits, needs)
    drawn = slots.drawn + ~slots.done
    slots = slots._replace(
        cache=cache,
        token=chosen.token,
        drawn=drawn,
        done=slots.done | is_last(chosen.token, drawn, slots.limits),
        seen=note(slots.seen, chosen.token),
    )
    return slots, chosen


def is_last(token: Int[Array, "B"], drawn: Int[Array, "B"], limits: Limits) -> Bool[Array, "B"]:
    """Whether a token, the `drawn`-th of its slot, ends the text."""
    stops = (token[:, None] == limits.stop_ids).any(-1)
    return stops | (drawn >= limits.max_new_tokens)


def note(seen: UInt8[Array, "B V"], token: Int[Array, "B"]) -> UInt8[Array, "B V"]:
    """`Slots.seen` with a token that was drawn."""
    if seen.shape[1] == 0:
        return seen
    rows = jnp.arange(seen.shape[0])
    return seen.at[rows, token].set(seen[rows, token] | _DRAWN)


def choose(
    logits: Float[Array, "B V"],
    seen: UInt8[Array, "B V"],
    drawn: Int[Array, "B"],
    limits: Limits,
    needs: Needs,
) -> Chosen:
    """Next token of every slot and its log-probabilities.

    Penalties change the logits, then the temperature divides them, then top-k, top-p (of what
    top-k has left) and min-p narrow them: the order of transformers. A draw is one uniform number
    a slot and an inverse CDF: one pass over the vocabulary, where Gumbel noise would need a random
    number for each entry. At temperature 0 the most likely token is taken, and its
    log-probabilities are those of temperature 1, not narrowed.
    """
    greedy = limits.temperature == 0
    divisor = jnp.where(greedy, 1.0, limits.temperature)[:, None]
    shifted = penalise(logits, seen, limits) if needs.penalised else logits
    scaled = shifted / divisor
    top = jnp.max(scaled, axis=-1, keepdims=True)
    token = _first_of_largest(scaled, top)
    weights = jnp.exp(scaled - top)
    kept = weights
    if needs.narrowed:
        threshold = jnp.where(greedy[:, None], 0.0, narrow(weights, limits, needs))
        kept = jnp.where(weights >= threshold, weights, 0.0)
    if needs.drawn:
        uniform = jax.vmap(_uniform)(limits.seed, drawn)
        sampled = jax.vmap(_inverse_cdf)(kept, uniform)
        token = jnp.where(greedy, token, sampled).astype(jnp.int32)

    def at_token(x: Array) -> Array:
        return jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]

    logprob = at_token(scaled) - top[:, 0] - jnp.log(jnp.sum(kept, axis=-1))
    if not needs.narrowed and not needs.penalised:
        return Chosen(token, logprob, logprob)
    full = logits / divisor
    return Chosen(token, logprob, at_token(full) - jax.nn.logsumexp(full, axis=-1))


def penalise(
    logits: Float[Array, "B V"], seen: UInt8[Array, "B V"], limits: Limits
) -> Float[Array, "B V"]:
    """Logits under the penalties of what was met before.

    Repetition (Keskar et al., arXiv 1909.05858): logits of tokens of the prompt or the answer are
    divided by it where positive, multiplied where negative. Presence: subtracted from the logits of
    tokens of the answer.
    """
    repetition = jnp.where(seen > 0, limits.repetition_penalty[:, None], 1.0)
    presence = jnp.where(seen & _DRAWN, limits.presence_penalty[:, None], 0.0)
    return jnp.where(logits > 0, logits / repetition, logits * repetition) - presence


def _first_of_largest(x: Float[Array, "B V"], largest: Float[Array, "B 1"]) -> Int[Array, "B"]:
    """Argmax in two levels: XLA's own takes longer than all else here on a CPU.

    Without an array as large as `x`: the smallest index of an entry that is the largest takes 4.9
    ms for 32 x 49,152 and this 1.9 (2 cores, jax 0.10.2).
    """
    size = x.shape[1] // math.gcd(x.shape[1], _ARGMAX_BLOCKS)
    blocks = x.reshape(x.shape[0], -1, size)
    block = jnp.argmax(jnp.max(blocks, axis=-1) == largest, axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * size + jnp.argmax(inside == largest, axis=-1)).astype(jnp.int32)


def _uniform(seed: UInt32[Array, ""], drawn: Int[Array, ""]) -> Float[Array, ""]:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), drawn))


def narrow(weights: Float[Array, "B V"], limits: Limits, needs: Needs) -> Float[Array, "B 1"]:
    """Least weight that top-k, top-p and min-p admit; entries equal to it are kept.

    Top-k keeps the k largest. The nucleus of top-p is the smallest set of largest entries whose
    mass reaches p of what top-k keeps (arXiv 1904.09751). Min-p asks for a share of the largest
    entry (arXiv 2407.01082). The first two thresholds, the largest t with `count(w >= t) >= k` and
    with `sum(w[w >= t]) >= p`, are found exactly by bisection over the bits of t (floats that are
    not negative are ordered like their bits), instead of by a sort of the vocabulary.

    Args:
        weights: not negative; need not add up to one.
    """
    top = jnp.max(weights, axis=-1, keepdims=True)
    threshold = limits.min_p[:, None] * top
    if needs.top_k:
        k = jnp.where(limits.top_k == 0, weights.shape[-1], limits.top_k)[:, None]
        least = _bisect(lambda t: jnp.sum(weights >= t, axis=-1, keepdims=True) >= k, top)
        weights = jnp.where(weights >= least, weights, 0.0)
        threshold = jnp.maximum(threshold, least)
    if needs.top_p:
        p, total = limits.top_p[:, None], jnp.sum(weights, axis=-1, keepdims=True)
        # No limit is a mass out of reach: the threshold is then 0, however the sum is rounded.
        mass = jnp.where(p >= 1.0, jnp.inf, p * total)

        def reaches(t: Array) -> Array:
            kept = jnp.where(weights >= t, weights, 0.0)
            return jnp.sum(kept, axis=-1, keepdims=True) >= mass

        threshold = jnp.maximum(threshold, _bisect(reaches, top))
    return threshold


def _bisect(admits: Callable[[Array], Array], top: Float[Array, "B 1"]) -> Float[Array, "B 1"]:
    """Largest float in [0, top] that is admitted; 0 where none is. What is below one is, too."""

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        admitted = admits(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(admitted, middle, low), jnp.where(admitted, high, middle)

    high = jax.lax.bitcast_convert_type(top, jnp.int32) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


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


def resize(definition: Definition, slots: Slots, length: int) -> Slots:
    """The same slots with room for texts of up to `length` tokens."""
    return slots._replace(cache=cache_lib.resize(definition.config, slots.cache, length))


def prefix_of(definition: Definition, scratch: KVCache, length: int) -> Prefix:
    """The newest columns of a cache of one row, to be shared."""
    return cache_lib.prefix_of(definition.config, scratch, length)


def select(slots: Slots, rows: Int[Array, "B'"]) -> Slots:
    """Fewer slots: those of the given numbers."""
    return jax.tree.map(lambda x: x[rows] if x.ndim else x, slots)


jit_empty = functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))(empty_slots)
jit_scratch = functools.partial(jax.jit, static_argnums=(0, 1))(scratch)
jit_extend = functools.partial(jax.jit, static_argnums=0, donate_argnums=2)(extend)
jit_read = functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=4)(read)
jit_place = functools.partial(jax.jit, donate_argnums=0)(place)
jit_decode = functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)(decode)
jit_resize = functools.partial(jax.jit, static_argnums=(0, 2))(resize)
jit_select = jax.jit(select)
jit_prefix = functools.partial(jax.jit, static_argnums=(0, 2))(prefix_of)
