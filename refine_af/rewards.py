"""Automated feedback: oracles give named components, a formula makes one reward of them.

An oracle is a function from a batch of examples to named arrays `[B]`. The paper's components are
`rew` (preference score), `nat`, `und` and `coh` (text quality in [0, 1]).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_af import config as config_lib
from refine_af import logprobs, scoring
from refine_af.models.transformer import Definition, Params

COMPONENTS = ("rew", "nat", "und", "coh")
_MAX_TOKENS = 512  # of a scored text; longer ones lose their beginning


@dataclasses.dataclass(frozen=True)
class Example:
    """A triplet to score; `input` may be empty."""

    instruction: str
    input: str
    output: str

    @property
    def context(self) -> str:
        """Instruction and input, as the oracles read them."""
        return f"{self.instruction}\n{self.input}".strip()


class Oracle(Protocol):
    """Scores examples; the order of a batch and its other rows must not matter."""

    def __call__(self, examples: Sequence[Example]) -> Mapping[str, np.ndarray]:
        """Components by name, each float [B]."""
        ...


def combine(components: Mapping[str, float], options: config_lib.Reward) -> float:
    """Reward of one example: the negated InstructMining rule (arXiv 2307.06290, eq. 5).

    `r = .0078 Rew - .4421 Und + .3212 Nat + .1520 Coh - .0274` with the default coefficients.
    """
    return (
        options.rew * components["rew"]
        + options.und * components["und"]
        + options.nat * components["nat"]
        + options.coh * components["coh"]
        + options.bias
    )


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Reward of one answer; `components` is None when the answer could not be read."""

    reward: float
    components: dict[str, float] | None


def judge(
    oracle: Oracle,
    examples: Sequence[Example | None],
    ended: Sequence[bool],
    options: config_lib.Reward,
) -> list[Judgement]:
    """Rewards of a batch of answers.

    Args:
        examples: None for an answer without a usable output, which gets `options.unparsable`.
        ended: whether the answer came to its end; otherwise `missing_end_penalty` is subtracted.

    Raises:
        ValueError: the oracle gave something that is not a finite number, or not one an example.
    """
    usable = [example for example in examples if example is not None]
    table = oracle(usable) if usable else {}
    for name, column in table.items():
        if len(column) != len(usable):
            raise ValueError(
                f"reward oracle gave {len(column)} values of {name!r} for {len(usable)} examples"
            )
    rows = iter(range(len(usable)))
    judgements = []
    for example, complete in zip(examples, ended, strict=True):
        penalty = 0.0 if complete else options.missing_end_penalty
        if example is None:
            judgements.append(Judgement(options.unparsable - penalty, None))
            continue
        row = next(rows)
        components = {name: float(column[row]) for name, column in table.items()}
        _check(components, example)
        judgements.append(Judgement(combine(components, options) - penalty, components))
    return judgements


def _check(components: Mapping[str, float], example: Example) -> None:
    bad = {name: value for name, value in components.items() if not math.isfinite(value)}
    missing = [name for name in COMPONENTS if name not in components]
    if bad or missing:
        raise ValueError(
            f"reward oracle gave {bad or missing} ({'not finite' if bad else 'missing'}) for the "
            f"instruction {example.instruction[:80]!r}"
        )


_QUESTIONS = {
    "nat": "Is this a natural response to the task?",
    "und": "Is this an understandable response?",
    "coh": "Is this a coherent response to the task?",
}


@dataclasses.dataclass(frozen=True)
class BaseModelJudge:
    """The base model as its own oracle, for when no reward model is at hand.

    `rew` is the mean log-probability of the output given the task, in nats (<= 0); `nat`, `und`
    and `coh` are P(Yes) / (P(Yes) + P(No)) after a yes/no question, the manner of UniEval (arXiv
    2210.07197). A weak judge: it prefers text that it would write itself.
    """

    definition: Definition
    params: Params  # base, stacked layout
    tokenizer: PreTrainedTokenizerBase
    mesh: jax.sharding.Mesh

    def __call__(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Components of any number of examples."""
        columns = {"rew": self._likelihood(examples)}
        texts = [
            f"Task: {e.context}\nResponse: {e.output}\n\n{question} Answer Yes or No.\nAnswer:"
            for question in _QUESTIONS.values()
            for e in examples
        ]
        answers = self._yes(texts).reshape(len(_QUESTIONS), len(examples))
        return columns | dict(zip(_QUESTIONS, answers, strict=True))

    def _likelihood(self, examples: Sequence[Example]) -> np.ndarray:
        rows, firsts = [], []
        for example in examples:
            context = self.tokenizer(f"Task: {example.context}\nResponse:").input_ids
            output = self.tokenizer(f" {example.output}", add_special_tokens=False).input_ids
            row = [*context, *output][-_MAX_TOKENS:]
            rows.append(row)
            firsts.append(max(len(row) - len(output), 1))

        def score(padded: jax.Array, lengths: jax.Array, first: jax.Array) -> jax.Array:
            return logprobs.mean_of_span(self.definition, self.params, padded, first, lengths)

        return scoring.by_length(score, rows, self.mesh, np.asarray(firsts, np.int32))

    def _yes(self, texts: Sequence[str]) -> np.ndarray:
        rows = [self.tokenizer(text).input_ids[-_MAX_TOKENS:] for text in texts]
        answers = [
            self.tokenizer(answer, add_special_tokens=False).input_ids[-1]
            for answer in (" Yes", " No")
        ]
        candidates = jnp.asarray(answers, jnp.int32)

        def score(padded: jax.Array, lengths: jax.Array, _: jax.Array) -> jax.Array:
            logps = logprobs.next_token(self.definition, self.params, padded, lengths, candidates)
            return jax.nn.softmax(logps, axis=-1)[:, 0]

        return scoring.by_length(score, rows, self.mesh)
