"""Signs of trouble in a PPO run, read from its metrics; each comes with advice.

Pure functions of the rows so far, so a resumed run says what an undisturbed one says.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from refine_af.config import Ppo

Row = TypeVar("Row", bound=Mapping[str, Any])
History = Sequence[Mapping[str, float]]  # a row a step, the newest last
Look = Callable[[History, Ppo], str]  # what is wrong, with figures; "" where nothing is

# Rules of thumb but where a source is named: loose, so that a sound run is quiet.
_WINDOW = 3  # steps that "at first" and "lately" are means of
_MAX_KL = 2.0  # in targets; the adaptive controller pushes with all its force from 1.2 on
_MAX_FREE_KL = 30.0  # nats an answer, where there is no controller
_LEAST_K3 = 0.1  # nats; below, the policy has hardly moved and a negative k1 does no harm
_NOISE = 3.0  # standard errors
_LEAST_ENTROPY = 0.1  # of that at first
_LEAST_SPREAD = 0.01  # of that at first
_NO_SPREAD = 1e-6  # as `rewards` takes a deviation for none
_MAX_REPETITION = 0.3  # answers of SmolLM2-135M, before and after PPO: below .03, by words
_MAX_GROWTH = 2.0
_LEAST_SHARE = 0.5
_MAX_DRIFT = 1.0  # nats; the demo in bfloat16 has .3 to .55 over some thousand tokens a step
_MAX_GRADIENT = 1e3  # norm before clipping
# What alarms look at.
_METRICS = (
    *("kl/k1", "kl/k3", "ppo/entropy", "ppo/grad_norm", "drift/logprob_max", "repetition"),
    *("reward/std", "reward/usable_share", "length/mean", "length/eos_rate"),
)


class _Alarm(NamedTuple):
    name: str
    look: Look
    advice: str


def check(history: History, options: Ppo) -> list[str]:
    """One line for each trouble that began with the newest row: what, its figures, advice.

    A figure that a row lacks, or that is not finite, counts as not taken at that step.
    """
    seen = [(alarm, alarm.look(history, options)) for alarm in _ALARMS]
    return [
        f"{alarm.name}: {what}; {alarm.advice}"
        for alarm, what in seen
        if what and not alarm.look(history[:-1], options)
    ]


def window(history: Sequence[Row]) -> list[Row]:
    """The rows that `check` looks at, now or with more rows behind them: a bounded number.

    Those are, for each metric, the first and the newest ones that have it.
    """
    kept: set[int] = set()
    for metric in _METRICS:
        having = [i for i, row in enumerate(history) if _has(row, metric)]
        kept |= {*having[:_WINDOW], *having[-_WINDOW - 1 :]}
    return [row for i, row in enumerate(history) if i in kept or i == len(history) - 1]


def _has(row: Mapping[str, float], metric: str) -> bool:
    """What was not finite is None after a round trip through JSON."""
    value = row.get(metric)
    return value is not None and math.isfinite(value)


def _known(history: History, metric: str) -> list[float]:
    """The metric at the steps that have it."""
    assert metric in _METRICS
    return [row[metric] for row in history if _has(row, metric)]


def _is(word: str, metric: str, limit: float) -> Look:
    beyond = {"above": operator.gt, "below": operator.lt}[word]

    def look(history: History, options: Ppo) -> str:
        x = _known(history, metric)
        found = bool(x) and beyond(x[-1], limit)
        return f"{metric} is {x[-1]:.3g}, {word} {limit:g}" if found else ""

    return look


def _fallen(metric: str, share: float, least: float = 0.0) -> Look:
    """At most `share` of the metric at first, plus `least`."""

    def look(history: History, options: Ppo) -> str:
        x = _known(history, metric)
        fallen = bool(x) and x[-1] <= share * fmean(x[:_WINDOW]) + least
        return f"{metric} is {x[-1]:.3g}, at first {fmean(x[:_WINDOW]):.3g}" if fallen else ""

    return look


def _kl_explosion(history: History, options: Ppo) -> str:
    adaptive = options.kl_controller == "adaptive"
    limit = _MAX_KL * options.kl_target if adaptive else _MAX_FREE_KL
    x = _known(history, "kl/k1")[-2:]
    if len(x) < 2 or min(x) <= limit:
        return ""
    return f"kl/k1 is {x[0]:.3g}, then {x[1]:.3g} nats, both above {limit:g}"


def _negative_kl(history: History, options: Ppo) -> str:
    """An answer's k1 has a variance of about 2 KL, which k3 estimates without a sign.

    `log pi - log ref` of small steps has the second moment 2 KL (Schulman, "Approximating KL
    divergence"), so the standard error over a rollout is `sqrt(2 k3 / batch_size)`.
    """
    k1, k3 = (_known(history, f"kl/{name}")[-1:] for name in ("k1", "k3"))
    if not k1 or not k3 or k3[0] <= _LEAST_K3:
        return ""
    noise = _NOISE * math.sqrt(2 * k3[0] / options.batch_size)
    what = f"kl/k1 is {k1[0]:.3g}, further below 0 than noise of {noise:.3g} (kl/k3 {k3[0]:.3g})"
    return what if k1[0] < -noise else ""


def _length_drift(history: History, options: Ppo) -> str:
    x = _known(history, "length/mean")
    if not x:
        return ""
    first, last = fmean(x[:_WINDOW]), fmean(x[-_WINDOW:])
    sound = first / _MAX_GROWTH <= last <= first * _MAX_GROWTH
    return "" if sound else f"length/mean is {last:.3g} lately, at first {first:.3g}"


_ALARMS = (
    _Alarm("KL explosion", _kl_explosion, "raise ppo.kl_coef or lower ppo.learning_rate"),
    _Alarm(
        "negative KL",
        _negative_kl,
        "sampler and trainer disagree: set ppo.sampling.top_p to 1, top_k to 0, no penalties",
    ),
    _Alarm(
        "exploding gradient",
        _is("above", "ppo/grad_norm", _MAX_GRADIENT),
        "lower ppo.learning_rate in another workdir; set ppo.scale_scores for large rewards",
    ),
    _Alarm(
        "entropy collapse",
        _fallen("ppo/entropy", _LEAST_ENTROPY),
        "raise ppo.entropy_coef or ppo.kl_coef, or lower ppo.learning_rate",
    ),
    _Alarm(
        "nothing to learn",
        _fallen("reward/std", _LEAST_SPREAD, _NO_SPREAD),
        "raise ppo.sampling.temperature; raise reward.clip_reward or set it to 0",
    ),
    _Alarm(
        "repetition",
        _is("above", "repetition", _MAX_REPETITION),
        "raise ppo.kl_coef or lower ppo.learning_rate; the oracle may not see it",
    ),
    _Alarm("length drift", _length_drift, "raise ppo.kl_coef; the oracle may pay for length"),
    _Alarm(
        "missing ends",
        _is("below", "length/eos_rate", _LEAST_SHARE),
        "raise ppo.sampling.max_new_tokens or reward.missing_end_penalty",
    ),
    _Alarm(
        "useless answers",
        _is("below", "reward/usable_share", _LEAST_SHARE),
        "see `fault` in ppo/rollouts.jsonl; raise prompts.num_demos, lower reward.unparsable, or "
        "set prompts.accept_unmarked_output",
    ),
    _Alarm(
        "drift",
        _is("above", "drift/logprob_max", _MAX_DRIFT),
        "set model.dtype to float32, ppo.int8_weights and ppo.int8_cache to False",
    ),
)
