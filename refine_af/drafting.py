"""Several tokens of a slot from one pass of the model: a guess is read along, and checked.

The guess is what followed the last tokens where they stood before in the same text (prompt lookup).
Since the n-th token of a slot is a function of the logits and of the n-th random number of its
seed, a guess is right when it is that very token (exact match, Stern et al., arXiv 1811.03115):
temperature, cuts and penalties need no rule of their own, and texts are those of decoding without
guesses. It pays where the device waits for memory and texts repeat themselves.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8

from refine_af import sampling
from refine_af.models import attention, transformer
from refine_af.models import cache as cache_lib
from refine_af.models.cache import Prefix, Tail
from refine_af.models.config import ModelConfig
from refine_af.models.transformer import Definition, Params, Transformer
from refine_af.sampling import Chosen, Needs, Slots

PLACES = 2 * sampling.CHUNK  # columns that a loop writes, kept or not, at most
MOST = 15  # tokens of a guess
_LONGEST = 3  # last tokens that are looked for


def check(count: int, config: ModelConfig) -> None:
    """Refuse guesses of `count` tokens where they cannot be read.

    Raises:
        ValueError: says why.
    """
    if not 0 <= count <= MOST:
        raise ValueError(f"draft_tokens={count}: expected 0 to {MOST}")
    if count and attention.has_decode_kernel(config):
        raise ValueError(
            f"draft_tokens={count}: decode_kernel={config.decode_kernel!r} reads one token at a "
            "time; take decode_kernel='xla'"
        )


class _Drafting(NamedTuple):
    """A loop in the middle."""

    calls: Int[Array, ""]
    slots: Slots
    tail: Tail
    found: Chosen  # [B, PLACES]: tokens of this loop
    texts: Int[Array, "B L+PLACES"]  # with them
    end: Int[Array, "B"]  # first column behind each text


def propose(texts: Int[Array, "B L"], end: Int[Array, "B"], count: int) -> Int[Array, "B {count}"]:
    """A guess at the next `count` tokens of each text.

    It goes on as after the latest earlier place where the last 3 tokens stood, or else the last 2,
    or the last; over the end of the text it repeats itself. Without such a place the last token is
    repeated.

    Args:
        texts: -1, then the text up to column `end`, then anything.
    """
    index = jnp.arange(texts.shape[1], dtype=jnp.int32)[None]
    last = end[:, None] - 1
    alike = index < last
    matched = jnp.zeros_like(texts)
    for back in range(_LONGEST):
        earlier = jnp.pad(texts, ((0, 0), (back, 0)), constant_values=-1)[:, : texts.shape[1]]
        alike &= earlier == jnp.take_along_axis(texts, jnp.maximum(last - back, 0), axis=1)
        matched += alike
    best = jnp.max(jnp.where(matched > 0, matched * texts.shape[1] + index, 0), axis=1)
    at = jnp.where(best[:, None] > 0, best[:, None] % texts.shape[1], last - 1)
    ahead = jnp.arange(count, dtype=jnp.int32)[None] % (last - at)
    return jnp.take_along_axis(texts, at + 1 + ahead, axis=1)


def decode(
    definition: Definition,
    params: Params,
    slots: Slots,
    texts: Int[Array, "B L"],
    prefix: Prefix | None,
    needs: Needs,
    count: int,
    calls: Int[Array, ""],
    wake: Int[Array, ""],
) -> tuple[Slots, Chosen]:
    """`sampling.decode` with guesses of `count` tokens, in up to `calls` passes.

    Args:
        texts: prompt and answer of each slot up to `slots.token`, the last column; -1 before them.
        calls: at most `PLACES / (count + 1)`.
    """
    model = transformer.bind(definition, params)
    batch, length = texts.shape
    nothing = jnp.zeros((batch, PLACES), jnp.float32)
    tail = model.tail(slots.cache, slots.start, slots.offset, PLACES)
    first = _Drafting(
        jnp.zeros((), jnp.int32),
        slots,
        tail,
        Chosen(jnp.zeros((batch, PLACES), jnp.int32), nothing, nothing),
        jnp.pad(texts, ((0, 0), (0, PLACES)), constant_values=-1),
        jnp.full((batch,), length, jnp.int32),
    )

    def going(carry: _Drafting) -> Array:
        return (carry.calls < calls) & (jnp.sum(carry.slots.done) < wake)

    step = functools.partial(_step, model, prefix, needs, count, length)
    _, slots, tail, found, *_ = jax.lax.while_loop(going, step, first)
    cache, moved = cache_lib.aligned(tail)
    return slots._replace(cache=cache, start=slots.start + moved), found


def _step(
    model: Transformer,
    prefix: Prefix | None,
    needs: Needs,
    count: int,
    first_end: int,
    carry: _Drafting,
) -> _Drafting:
    """Read each slot's last token and a guess of what follows; keep what would have been drawn."""
    slots, tail = carry.slots, carry.tail
    guess = propose(carry.texts, carry.end, count)
    hidden, tail = model(
        jnp.concatenate([slots.token[:, None], guess], axis=1),
        slots.start,
        cache=tail,
        prefix=prefix,
        offset=slots.offset,
    )
    seen = _seen(slots.seen, guess)
    ahead = jnp.arange(count + 1, dtype=jnp.int32)[None]
    drawn = slots.drawn[:, None] + ahead
    limits = jax.tree.map(lambda x: jnp.repeat(x, count + 1, axis=0), slots.limits)
    flat = sampling.choose(_rows(model.logits(hidden)), _rows(seen), drawn.ravel(), limits, needs)
    last = sampling.is_last(flat.token, drawn.ravel() + 1, limits).reshape(guess.shape[0], -1)
    chosen = jax.tree.map(lambda x: x.reshape(last.shape), flat)
    goes_on = (chosen.token[:, :-1] == guess) & ~last[:, :-1]
    taken = 1 + jnp.sum(jnp.cumprod(goes_on, axis=1), axis=1)
    taken = jnp.where(slots.done, 0, taken)
    final = jnp.maximum(taken - 1, 0)[:, None]

    def at_final(x: Array) -> Array:
        return jnp.take_along_axis(x, final, axis=1)[:, 0]

    token = at_final(chosen.token)
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    so_far = carry.end - first_end
    return _Drafting(
        carry.calls + 1,
        slots._replace(
            token=jnp.where(slots.done, slots.token, token),
            drawn=slots.drawn + taken,
            done=slots.done | at_final(last),
            seen=sampling.note(jnp.take_along_axis(seen, final[..., None], axis=1)[:, 0], token),
        ),
        tail.keep(count + 1, taken),
        jax.tree.map(lambda old, new: put(old, new, so_far), carry.found, chosen),
        put(carry.texts, chosen.token, carry.end),
        carry.end + taken,
    )


def _rows(x: Array) -> Array:
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def _seen(before: UInt8[Array, "B V"], guess: Int[Array, "B K"]) -> UInt8[Array, "B K+1 V"]:
    """Tokens met before each token of a pass, if the guess is right."""
    found = [before]
    for i in range(guess.shape[1]):
        found.append(sampling.note(found[-1], guess[:, i]))
    return jnp.stack(found, axis=1)


jit_decode = functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=2)(decode)
