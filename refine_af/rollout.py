"""A rollout: prompts, sampled answers and their rewards, as the arrays that PPO reads.

Prompts and answers are packed into rows, so that little is computed on padding. What the models
say of a rollout is about *predictions*, the columns whose next token belongs to an answer; what PPO
makes of it is about *answers*. Index arrays lead from one to the other.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from refine_af import logprobs, packing, trunk
from refine_af.models import heads, processes, transformer
from refine_af.models.transformer import Definition, Params
from refine_af.requests import Completion, Request


class Rollout(NamedTuple):
    """N answers of at most R tokens, each behind its prompt, in B rows of T columns.

    A row has at most K predictions. Rows at the end, and columns, may be empty.
    """

    tokens: Int[Array, "B T"]
    start: Int[Array, "B T"]  # first column of the text that a token belongs to
    columns: Int[Array, "B K"]  # predictions: the next column's token is one of an answer
    predicts: Float[Array, "B K"]  # 1; 0 where a row has fewer
    answer: Int[Array, "B K"]  # which of the N * R answer tokens is predicted
    place: Int[Array, "N R"]  # which of the B * K predictions is of this token
    mask: Float[Array, "N R"]  # 1 on answer tokens, the end token included
    score: Float[Array, "N"]  # reward of the answer, float32

    def of_answers(self, x: Float[Array, "B K"]) -> Float[Array, "N R"]:
        """Something about predictions, answer by answer; 0 behind their ends."""
        return jnp.where(self.mask > 0, x.reshape(-1)[self.place], 0.0)

    def of_predictions(self, x: Float[Array, "N R"]) -> Float[Array, "B K"]:
        """Something about answer tokens, row by row; 0 where nothing is predicted."""
        return jnp.where(self.predicts > 0, x.reshape(-1)[self.answer], 0.0)


class Layout(NamedTuple):
    """Shape of all rollouts of a run."""

    row_length: int  # T, at least the longest prompt and R together
    answer_length: int  # R
    row_multiple: int  # number of rows is a multiple of this


class Reading(NamedTuple):
    """What the policy, critic and reference say of a rollout before the update; constants."""

    logprobs: Float[Array, "N R"]
    values: Float[Array, "N R"]
    ref_logprobs: Float[Array, "N R"]


def build(
    requests: Sequence[Request],
    completions: Sequence[Completion],
    scores: Sequence[float],
    layout: Layout,
) -> Rollout:
    """Arrays of a rollout, on the host.

    So that few programs are compiled, the number of rows is rounded up to a multiple of
    `row_multiple`, and many rows by a quarter or less; that of predictions a row by a half or less.
    """
    counts = [len(completion.token_ids) for completion in completions]
    sizes = [len(r.prompt_ids) + n for r, n in zip(requests, counts, strict=True)]
    least = -(-sum(sizes) // layout.row_length)
    step = layout.row_multiple
    step *= max(packing.power_of_two(least // step + 1) // 8, 1)
    packed = packing.spread(sizes, layout.row_length, -(-least // step) * step)
    most = max(sum(counts[number] for number in numbers) for numbers in packed)
    shape = -(-len(packed) // step) * step, packing.bucket(most)
    texts = [(r.prompt_ids, c.token_ids) for r, c in zip(requests, completions, strict=True)]
    rows, firsts = packing.lay(texts, packed, (shape[0], layout.row_length, shape[1]))
    answer = np.zeros(shape, np.int32)
    place = np.zeros((len(sizes), layout.answer_length), np.int32)
    for number, ((row, first), count) in enumerate(zip(firsts, counts, strict=True)):
        along = np.arange(count)
        answer[row, first : first + count] = along + number * layout.answer_length
        place[number, :count] = along + row * shape[1] + first
    mask = np.arange(layout.answer_length)[None] < np.asarray(counts)[:, None]
    answers = mask.astype(np.float32), np.asarray(scores, np.float32)
    arrays: list[Any] = [*rows, answer, place, *answers]
    return Rollout(*arrays)


def padding_share(
    requests: Sequence[Request], completions: Sequence[Completion], rows: Rollout
) -> float:
    """Share of the rows' columns that no text has."""
    used = sum(len(r.prompt_ids) for r in requests) + sum(len(c.token_ids) for c in completions)
    return 1.0 - used / rows.tokens.size


class Places(NamedTuple):
    """Some rows of a rollout, as models read them."""

    tokens: Int[Array, "B T"]
    start: Int[Array, "B T"]
    columns: Int[Array, "B K"]


def hidden_states(
    definition: Definition,
    base: Params,
    adapter: Params | None,
    places: Places,
    *,
    remat: str = "none",
) -> Float[Array, "B K D"]:
    """Final hidden states at `columns`."""
    model = transformer.bind(definition, base, adapter)
    hidden, _ = model(places.tokens, places.start, remat=remat)
    return jnp.take_along_axis(hidden, places.columns[..., None], axis=1)


def predictions(
    definition: Definition,
    base: Params,
    adapter: Params | None,
    places: Places,
    temperature: float,
    *,
    remat: str = "none",
) -> tuple[Float[Array, "B K D"], Float[Array, "B K"], Float[Array, "B K"]]:
    """(hidden states at `columns`, log-probabilities of the tokens after them, entropy).

    The distribution is `softmax(logits / temperature)` for every caller: policy, reference and
    update agree with the sampler on what it is.
    """
    hidden = hidden_states(definition, base, adapter, places, remat=remat)
    targets = jnp.take_along_axis(places.tokens, places.columns + 1, axis=1)
    model = transformer.bind(definition, base, adapter)
    return hidden, *logprobs.of_targets(model, hidden, targets, temperature)


def read(
    policy: Definition,
    reference: Definition,
    base: Params,
    trainable: Params,
    rollout: Rollout,
    temperature: float,
    num_pieces: int,
) -> Reading:
    """Log-probabilities, values and reference log-probabilities, in `num_pieces` cuts of rows.

    The reference is the frozen base.
    """

    weights, adapter = trunk.weights(base, trainable["policy"])

    def piece(places: Places) -> Reading:
        hidden, chosen, _ = predictions(policy, weights, adapter, places, temperature)
        if "critic" in trainable:
            critic = trunk.weights(base, trainable["critic"])
            hidden = hidden_states(policy, *critic, places)
        values = heads.value(trainable["value_head"], hidden)
        _, ref, _ = predictions(reference, base, None, places, temperature)
        return Reading(chosen, values, ref)

    cut = jax.tree.map(
        lambda x: x.reshape(-1, num_pieces, *x.shape[1:]).swapaxes(0, 1),
        Places(rollout.tokens, rollout.start, rollout.columns),
    )
    reading = jax.lax.map(piece, cut)
    shape = rollout.columns.shape
    return jax.tree.map(lambda x: rollout.of_answers(x.swapaxes(0, 1).reshape(shape)), reading)


def drift(completions: Sequence[Completion], reading: Reading) -> float:
    """Largest difference between the sampler's and the trainer's log-probabilities, nats."""
    trained = processes.to_host(reading.logprobs)
    apart = [
        np.abs(np.asarray(c.full_logprobs) - trained[row, : len(c.full_logprobs)])
        for row, c in enumerate(completions)
    ]
    return float(np.concatenate(apart).max(initial=0.0))  # NaN where one is NaN


jit_read = jax.jit(read, static_argnums=(0, 1, 5, 6))
