"""Automated feedback: oracles give named components, a formula makes one reward of them.

An oracle is a function from a batch of examples to named arrays `[B]`. The paper's components are
`rew` (preference score), `nat`, `und` and `coh` (text quality in [0, 1]); an oracle may give
others, and one named `reward` is the reward itself. `refine_af.oracles` makes the one that a config
names.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from refine_af.config import PAPER_COMPONENTS, Reward

WHOLE = "reward"  # a component of this name takes the formula's place
_LEAST_DEVIATION = 1e-6


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


class OracleError(ValueError):
    """A fault of an oracle whose message says all; asking one by one would tell no more."""


class Oracle(Protocol):
    """Scores examples; the order of a batch and its other rows must not matter."""

    def __call__(self, examples: Sequence[Example]) -> Mapping[str, np.ndarray]:
        """Components by name, each float [B]."""
        ...


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Reward of one answer; `components` as the oracle gave them, None where it is the floor."""

    reward: float
    components: dict[str, float] | None


def judge(
    oracle: Oracle,
    examples: Sequence[Example | None],
    ended: Sequence[bool],
    options: Reward,
) -> list[Judgement]:
    """Rewards of a batch of answers.

    Args:
        examples: None for an answer that gets the floor reward, `options.unparsable`.
        ended: whether the answer came to its end; otherwise `missing_end_penalty` is subtracted.

    Raises:
        ValueError: the oracle failed, or gave something that is not a finite number, or not one an
            example.
    """
    usable = [example for example in examples if example is not None]
    table = components(oracle, usable) if usable else {}
    rewards = combine(table, options) if usable else np.zeros(0)
    rows = iter(range(len(usable)))
    judgements = []
    for example, complete in zip(examples, ended, strict=True):
        penalty = 0.0 if complete else options.missing_end_penalty
        if example is None:
            judgements.append(Judgement(options.unparsable - penalty, None))
            continue
        row = next(rows)
        parts = {name: float(column[row]) for name, column in table.items()}
        judgements.append(Judgement(float(rewards[row]) - penalty, parts))
    return judgements


def absolute(options: Reward) -> Reward:
    """The reward for comparing batches: normalised over its own answers, each has one mean."""
    return dataclasses.replace(options, normalise="none")


def components(oracle: Oracle, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Components of examples, float64 [B], checked.

    Raises:
        ValueError: as in `judge`; the example is named.
    """
    return checked(_asked(oracle, examples), examples)


def checked(given: Mapping[str, Any], examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Components as float64 [B].

    Raises:
        OracleError: there is none, or one is not a finite number for every example.
    """
    if not given:
        raise OracleError("reward oracle gave no component")
    table = {name: np.asarray(column, np.float64) for name, column in given.items()}
    for name, column in table.items():
        if column.shape != (len(examples),):
            raise OracleError(
                f"reward oracle gave {name!r} of shape {column.shape} for {len(examples)} examples"
            )
    for row, example in enumerate(examples):
        bad = {n: float(column[row]) for n, column in table.items() if not np.isfinite(column[row])}
        if bad:
            raise OracleError(f"reward oracle gave {bad} (not finite) for {_named(example)}")
    return table


def _asked(oracle: Oracle, examples: Sequence[Example]) -> Mapping[str, Any]:
    """What the oracle says; when it fails, it is asked again one by one, to name the example."""
    try:
        return oracle(examples)
    except OracleError:
        raise
    except Exception as error:
        where, fault = f"a batch of {len(examples)} from {_named(examples[0])} on", error
        for example in examples:
            try:
                oracle([example])
            except Exception as alone:
                where, fault = _named(example), alone
                break
        what = fault if isinstance(fault, ValueError) else f"{type(fault).__name__}: {fault}"
        raise ValueError(f"reward oracle failed on {where}: {what}") from error


def _named(example: Example) -> str:
    return f"the instruction {example.instruction[:80]!r} with the output {example.output[:80]!r}"


def combine(table: Mapping[str, np.ndarray], options: Reward) -> np.ndarray:
    """Rewards of a batch, float64 [B]: the negated InstructMining rule (arXiv 2307.06290, eq. 5).

    `r = .0078 Rew - .4421 Und + .3212 Nat + .1520 Coh - .0274` with the default coefficients. A
    component without a coefficient counts for nothing; one named `reward` is taken as it is.

    Args:
        table: components, each [B].

    Raises:
        ValueError: a component that has a coefficient is missing.
    """
    shaped = {name: _shaped(np.asarray(column), options) for name, column in table.items()}
    if WHOLE in shaped:
        if options.others:
            raise ValueError(
                f"reward oracle gave {WHOLE!r}, which is the reward itself, so that reward.others "
                "would count for nothing; leave it empty, or give the component another name"
            )
        total = shaped[WHOLE]
    else:
        coefficients = _coefficients(table, options)
        parts = [factor * shaped[name] for name, factor in coefficients.items()]
        total = np.sum(parts, axis=0) + options.bias
    return np.asarray(_clipped(total, options.clip_reward))


def _coefficients(table: Mapping[str, np.ndarray], options: Reward) -> dict[str, float]:
    """Of all components that count; the paper's are left out when only others are given."""
    paper = {"rew": options.rew, "und": options.und, "nat": options.nat, "coh": options.coh}
    pairs = (item.partition("=") for item in options.others)
    others = {name: float(number) for name, _, number in pairs}
    if others and not any(name in table for name in PAPER_COMPONENTS):
        paper = {}
    factors = {name: factor for name, factor in (paper | others).items() if factor}
    if not factors:
        raise ValueError(f"reward: no component has a coefficient; the oracle gave {sorted(table)}")
    missing = [name for name in factors if name not in table]
    if missing:
        remedy = (
            f"take {missing} out of reward.others"
            if set(missing) <= others.keys()
            else "set it to 0, or give a component named 'reward'"
        )
        remedy += "" if others else ", or name what counts in reward.others"
        raise ValueError(
            f"reward oracle gave {sorted(table)}, but {missing} (missing) have a coefficient; "
            f"{remedy}"
        )
    return factors


def _shaped(column: np.ndarray, options: Reward) -> np.ndarray:
    if options.normalise == "batch":
        column = (column - column.mean()) / max(column.std(), _LEAST_DEVIATION)
    return _clipped(column, options.clip_components)


def _clipped(x: np.ndarray, most: float) -> np.ndarray:
    return np.clip(x, -most, most) if most else x
