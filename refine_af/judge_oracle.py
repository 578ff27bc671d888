"""A language model as the oracle: how likely it finds an answer, and yes/no questions to it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from refine_af import logprobs, scoring, tokens
from refine_af.base_model import BaseModel
from refine_af.rewards import Example

_MAX_TOKENS = 512  # of a scored text; longer ones lose their beginning
_QUESTIONS = {
    "nat": "Is this a natural response to the task?",
    "und": "Is this an understandable response?",
    "coh": "Is this a coherent response to the task?",
}


@dataclasses.dataclass(frozen=True)
class JudgeOracle:
    """Any model as a judge, the base model itself when no reward model is at hand.

    `rew` is the mean log-probability of the output given the task, in nats (<= 0); `nat`, `und`
    and `coh` are P(Yes) / (P(Yes) + P(No)) after a yes/no question, the manner of UniEval (arXiv
    2210.07197), in the model's chat format where it has one. A small judge is a weak one: it
    prefers text that it would write itself.
    """

    model: BaseModel

    def __call__(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Components of any number of examples."""
        texts = [
            f"Task: {e.context}\nResponse: {e.output}\n\n{question} Answer Yes or No."
            for question in _QUESTIONS.values()
            for e in examples
        ]
        answers = self._yes(texts).reshape(len(_QUESTIONS), len(examples))
        return {"rew": self._likelihood(examples), **dict(zip(_QUESTIONS, answers, strict=True))}

    def _likelihood(self, examples: Sequence[Example]) -> np.ndarray:
        tokenizer, rows, firsts = self.model.tokenizer, [], []
        for example in examples:
            context = tokenizer(f"Task: {example.context}\nResponse:").input_ids
            output = tokenizer(f" {example.output}", add_special_tokens=False).input_ids
            row = [*context, *output][-_MAX_TOKENS:]
            rows.append(row)
            firsts.append(max(len(row) - len(output), 1))

        def score(padded: jax.Array, lengths: jax.Array, first: jax.Array) -> jax.Array:
            model = self.model
            return logprobs.mean_of_span(model.definition, model.params, padded, first, lengths)

        return scoring.by_length(score, rows, self.model.mesh, np.asarray(firsts, np.int32))

    def _yes(self, texts: Sequence[str]) -> np.ndarray:
        tokenizer = self.model.tokenizer
        chat = bool(tokenizer.chat_template)
        words = ("Yes", "No") if chat else (" Yes", " No")
        candidates = jnp.asarray(
            [tokenizer(word, add_special_tokens=False).input_ids[-1] for word in words], jnp.int32
        )
        rows = [
            tokens.encode_prompt(tokenizer, text, "chat")
            if chat
            else tokenizer(f"{text}\nAnswer:").input_ids
            for text in texts
        ]

        def score(padded: jax.Array, lengths: jax.Array, _: jax.Array) -> jax.Array:
            model = self.model
            logps = logprobs.next_token(model.definition, model.params, padded, lengths, candidates)
            return jax.nn.softmax(logps, axis=-1)[:, 0]

        return scoring.by_length(score, [row[-_MAX_TOKENS:] for row in rows], self.model.mesh)
