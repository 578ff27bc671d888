"""What a sampler is asked for and what it answers, and an answer while it is being written."""

import dataclasses

import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_af import tokens
from refine_af.config import Sampling
from refine_af.randomness import seed_of

TokenIds = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it; `seed` fixes its random numbers."""

    prompt_ids: TokenIds
    sampling: Sampling
    seed: int = 0

    def samples(self, count: int) -> list["Request"]:
        """`count` requests for the same prompt with different random numbers; the first is this."""
        seeds = [seed_of(self.seed, "sampling/sample", i) for i in range(1, count)]
        return [self, *(dataclasses.replace(self, seed=seed) for seed in seeds)]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a request got.

    Attributes:
        text: up to, and without, the stop token or stop string; special tokens are left out, so
            that no stop string finds them (`stop_token_ids` does).
        token_ids: the drawn tokens, the fewest whose text holds `text` and what ended it: with the
            stop token, or the tokens of the stop string (the last of them may say more).
        logprobs: of each of them, in the distribution that it was drawn from.
        full_logprobs: the same in the policy distribution (see `sampling`).
        finish_reason: `stop` for a stop token or a stop string, `length`, or `error`.
        error: what was wrong with the request; "" where nothing was.
    """

    text: str
    token_ids: TokenIds
    logprobs: tuple[float, ...]
    full_logprobs: tuple[float, ...]
    finish_reason: str
    error: str = ""


class Answer:
    """A completion in the making.

    Attributes:
        number: of the request among those of a call.
        budget: tokens that may be drawn.
        own: the prompt after the shared prefix. offset: length of that prefix.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        budget: int,
        eos_ids: TokenIds,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.number = number
        self.request = request
        self.budget = budget
        self.stop_ids = (*eos_ids, *request.sampling.stop_token_ids)
        self.tokenizer = tokenizer
        self.own: TokenIds = request.prompt_ids
        self.offset = 0
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.full_logprobs: list[float] = []

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        return self.budget - len(self.ids)

    @property
    def columns(self) -> int:
        """Columns of the cache that it fills: the token drawn last is not there yet."""
        return len(self.own) + max(len(self.ids) - 1, 0)

    def take(self, ids: np.ndarray, logprobs: np.ndarray, full_logprobs: np.ndarray) -> None:
        """Add tokens; none may come after the one that ends the text."""
        self.ids += ids.tolist()
        self.logprobs += logprobs.tolist()
        self.full_logprobs += full_logprobs.tolist()

    def completion(self) -> Completion | None:
        """What came out, when the text has ended; cuts tokens past a stop string."""
        stopped = self.ids[-1] in self.stop_ids
        ended = stopped or not self.left
        stops = self.request.sampling.stop
        if not ended and not stops:
            return None
        text = tokens.decode(self.tokenizer, self.ids[:-1] if stopped else self.ids)
        found = any(stop in text for stop in stops)
        if found:
            # Searched again: what stands in the tokens that were cut must not count.
            self._cut(stops)
            text = tokens.decode(self.tokenizer, self.ids)
            text = text[: min(at for stop in stops if (at := text.find(stop)) >= 0)]
        elif not ended:
            return None
        numbers = tuple(self.ids), tuple(self.logprobs), tuple(self.full_logprobs)
        return Completion(text, *numbers, "stop" if stopped or found else "length")

    def _cut(self, stops: tuple[str, ...]) -> None:
        """Keep the fewest tokens whose text holds a stop string (bisection over beginnings)."""
        low, high = 1, len(self.ids)
        while low < high:
            middle = (low + high) // 2
            text = tokens.decode(self.tokenizer, self.ids[:middle])
            if any(stop in text for stop in stops):
                high = middle
            else:
                low = middle + 1
        for numbers in (self.ids, self.logprobs, self.full_logprobs):
            del numbers[low:]
