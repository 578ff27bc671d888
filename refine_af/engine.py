"""Requests in, completions out: batches of fixed size through prefill and chunked decode.

Requests are sorted by prompt length, so that a batch pads little. Between chunks of tokens the
host looks for stop strings; everything else happens on the device.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_af import sampling, tokens
from refine_af.config import Sampling
from refine_af.mesh import shard_batch
from refine_af.models.config import LoraConfig, ModelConfig
from refine_af.models.transformer import Params, define

_CHUNK = 32  # tokens decoded between two looks at the text

Progress = Callable[[int], None]  # called with the number of new tokens


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it; `seed` fixes its random numbers."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a request got.

    Attributes:
        text: up to, and without, the end token or stop string.
        token_ids: the drawn tokens, with the end token or the tokens of the stop string.
        logprobs: of each of them, under the policy distribution (see `sampling`).
        finish_reason: `stop` for an end token or a stop string, `length` otherwise.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Engine:
    """A decoder ready to sample; parameters are given to each call, never kept.

    Attributes:
        config: of the model whose (unstacked) parameters `generate` is given.
        batch_size: rows a batch; the last one is filled up with idle rows.
    """

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase | None  # None: completions have no text
    mesh: jax.sharding.Mesh
    eos_ids: tuple[int, ...]
    batch_size: int
    lora: LoraConfig | None = None  # of the adapter among the parameters

    def generate(
        self, params: Params, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[Completion]:
        """Completions in the order of the requests.

        Raises:
            ValueError: a prompt is empty, or does not leave room for one token in the context.
        """
        for number, request in enumerate(requests):
            self._check(number, request)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        completions: dict[int, Completion] = {}
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            batch = _Batch(self, [requests[i] for i in rows])
            completions.update(zip(rows, batch.run(params, progress), strict=True))
        return [completions[i] for i in range(len(requests))]

    def _check(self, number: int, request: Request) -> None:
        length = len(request.prompt_ids)
        if length == 0:
            raise ValueError(f"request {number}: the prompt is empty")
        if length >= self.config.max_positions:
            raise ValueError(
                f"request {number}: the prompt has {length} tokens, and the model's context is "
                f"{self.config.max_positions}; shorten it"
            )


class _Batch:
    """One batch on its way through the sampler: device state plus each row's text so far."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine = engine
        self.requests = requests
        self.token_ids: list[list[int]] = [[] for _ in requests]
        self.logprobs: list[list[float]] = [[] for _ in requests]
        self.ends: list[tuple[str, str] | None] = [None] * len(requests)  # text, finish reason

    def run(self, params: Params, progress: Progress | None) -> list[Completion]:
        engine = self.engine
        definition = define(engine.config, engine.lora, stacked=False)
        longest = max(len(r.prompt_ids) for r in self.requests)
        budget = max(self._budget(r) for r in self.requests)
        length = tokens.bucket(longest)
        idle = engine.batch_size - len(self.requests)
        prompts, start = tokens.pad_left(
            [*(r.prompt_ids for r in self.requests), *[[0]] * idle], length
        )
        chunk = min(_CHUNK, budget)
        limits, restricted = self._limits(idle)
        # The last chunk may run past the budget; its columns exist but are never read back.
        total = tokens.bucket(length + -(-budget // chunk) * chunk)
        prompts, start, limits = shard_batch(engine.mesh, (prompts, start, limits))
        state = sampling.jit_prefill(definition, params, prompts, start, total, chunk)
        while not all(self.ends):
            state = sampling.jit_decode(
                definition, params, state, limits, engine.eos_ids, restricted
            )
            new = self._take(np.asarray(state.tokens), np.asarray(state.logprobs))
            done = np.asarray([end is not None for end in self.ends] + [True] * idle)
            state = state._replace(done=shard_batch(engine.mesh, done))
            if progress:
                progress(new)
        return [
            Completion(end[0], tuple(ids), tuple(logprobs), end[1])
            for end, ids, logprobs in zip(self.ends, self.token_ids, self.logprobs, strict=True)
            if end is not None
        ]

    def _budget(self, request: Request) -> int:
        room = self.engine.config.max_positions - len(request.prompt_ids)
        return min(request.sampling.max_new_tokens, room)

    def _limits(self, idle: int) -> tuple[sampling.Limits, bool]:
        rows = [(r.sampling, self._budget(r), r.seed) for r in self.requests]
        rows += [(dataclasses.replace(rows[0][0], temperature=0.0), 1, 0)] * idle
        params = [row[0] for row in rows]
        restricted = any(p.top_k or p.top_p < 1 or p.presence_penalty for p in params)
        limits = sampling.Limits(
            temperature=jnp.asarray([p.temperature for p in params], jnp.float32),
            top_k=jnp.asarray([p.top_k for p in params], jnp.int32),
            top_p=jnp.asarray([p.top_p for p in params], jnp.float32),
            presence_penalty=jnp.asarray([p.presence_penalty for p in params], jnp.float32),
            max_new_tokens=jnp.asarray([row[1] for row in rows], jnp.int32),
            seed=jnp.asarray([row[2] % 2**32 for row in rows], jnp.uint32),
        )
        return limits, restricted

    def _take(self, chunk_ids: np.ndarray, chunk_logprobs: np.ndarray) -> int:
        """Add a chunk to the rows that are not done; returns the number of tokens added."""
        new = 0
        for row, request in enumerate(self.requests):
            if self.ends[row] is not None:
                continue
            ids, logprobs = self.token_ids[row], self.logprobs[row]
            before = len(ids)
            room = self._budget(request) - before
            for token, logprob in zip(chunk_ids[row], chunk_logprobs[row], strict=True):
                if room == 0 or (ids and ids[-1] in self.engine.eos_ids):
                    break
                ids.append(int(token))
                logprobs.append(float(logprob))
                room -= 1
            self.ends[row] = self._end(row, request, room)
            new += len(ids) - before
        return new

    def _end(self, row: int, request: Request, room: int) -> tuple[str, str] | None:
        """(text, finish reason) when the row is finished; cuts tokens past a stop string."""
        ids = self.token_ids[row]
        ended = bool(ids) and ids[-1] in self.engine.eos_ids
        text = tokens.decode(self.engine.tokenizer, ids[:-1] if ended else ids)
        found = [at for stop in request.sampling.stop if (at := text.find(stop)) >= 0]
        if found:
            self._cut(row, request.sampling.stop)
            return text[: min(found)], "stop"
        if ended:
            return text, "stop"
        return (text, "length") if room == 0 else None

    def _cut(self, row: int, stops: tuple[str, ...]) -> None:
        """Keep the fewest tokens whose text holds a stop string (bisection over prefixes)."""
        ids = self.token_ids[row]
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            text = tokens.decode(self.engine.tokenizer, ids[:middle])
            if any(stop in text for stop in stops):
                high = middle
            else:
                low = middle + 1
        del ids[low:], self.logprobs[row][low:]
