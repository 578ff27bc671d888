"""A rollout: prompts, sampled answers and their rewards, as the arrays that PPO reads."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from refine_af import logprobs, tokens
from refine_af.models import heads, transformer
from refine_af.models.transformer import Definition, Params
from refine_af.requests import Completion, Request


class Rollout(NamedTuple):
    """B answers; prompts padded on the left to P columns, answers on the right to R.

    Answer token i stands in column P + i for every row, so the hidden states that predict answers
    are the columns P-1 .. P+R-2 of the whole batch.
    """

    tokens: Int[Array, "B P+R"]
    start: Int[Array, "B"]  # first real column
    mask: Float[Array, "B R"]  # 1 on answer tokens, the end token included
    score: Float[Array, "B"]  # reward of the answer, float32


class Reading(NamedTuple):
    """What the policy, critic and reference say of a rollout before the update; constants."""

    logprobs: Float[Array, "B R"]
    values: Float[Array, "B R"]
    ref_logprobs: Float[Array, "B R"]


def build(
    requests: Sequence[Request],
    completions: Sequence[Completion],
    scores: Sequence[float],
    prompt_length: int,
    answer_length: int,
) -> Rollout:
    """Arrays of a rollout, not yet on the mesh."""
    prompts, start = tokens.pad_left([r.prompt_ids for r in requests], prompt_length)
    answers = tokens.pad_right([c.token_ids for c in completions], answer_length)
    lengths = np.asarray([len(c.token_ids) for c in completions])
    mask = np.arange(answer_length)[None] < lengths[:, None]
    return Rollout(
        tokens=jnp.asarray(np.concatenate([prompts, answers], axis=1)),
        start=jnp.asarray(start),
        mask=jnp.asarray(mask, jnp.float32),
        score=jnp.asarray(scores, jnp.float32),
    )


def predictions(
    definition: Definition,
    base: Params,
    adapter: Params | None,
    batch_tokens: Int[Array, "B P+R"],
    start: Int[Array, "B"],
    answer_length: int,
    temperature: float,
    *,
    remat: bool = False,
) -> tuple[Float[Array, "B R D"], Float[Array, "B R"], Float[Array, "B R"]]:
    """(hidden states that predict the answers, log-probabilities of the answers, entropy).

    The distribution is `softmax(logits / temperature)` for every caller: policy, reference and
    update agree with the sampler on what it is.
    """
    model = transformer.bind(definition, base, adapter)
    hidden, _ = model(batch_tokens, start, remat=remat)
    hidden = hidden[:, -answer_length - 1 : -1]
    chosen, entropy = logprobs.of_targets(
        model, hidden, batch_tokens[:, -answer_length:], temperature
    )
    return hidden, chosen, entropy


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

    The reference is the same base with its adapter off.
    """
    length = rollout.mask.shape[1]

    def piece(rows: tuple[Array, Array]) -> Reading:
        hidden, chosen, _ = predictions(
            policy, base, trainable["adapter"], *rows, length, temperature
        )
        values = heads.value(trainable["value_head"], hidden)
        _, ref, _ = predictions(reference, base, None, *rows, length, temperature)
        return Reading(chosen, values, ref)

    cut = jax.tree.map(
        lambda x: x.reshape(-1, num_pieces, *x.shape[1:]).swapaxes(0, 1),
        (rollout.tokens, rollout.start),
    )
    reading = jax.lax.map(piece, cut)
    masked = rollout.mask
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(masked.shape) * masked, reading)


def drift(completions: Sequence[Completion], reading: Reading) -> float:
    """Largest difference between the sampler's and the trainer's log-probabilities, nats."""
    trained = np.asarray(reading.logprobs)
    return max(
        float(
            np.abs(np.asarray(c.full_logprobs) - trained[row, : len(c.full_logprobs)]).max(
                initial=0.0
            )
        )
        for row, c in enumerate(completions)
    )


jit_read = jax.jit(read, static_argnums=(0, 1, 5, 6))
