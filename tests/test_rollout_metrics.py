"""Figures of a rollout: every number worked by hand."""

import pytest

from refine_af import rollout_metrics
from refine_af.requests import Completion
from refine_af.rewards import Judgement


def answer(*token_ids: int, reason: str = "stop") -> Completion:
    return Completion("", token_ids, (), (), reason)


def test_figures_of_three_answers_by_hand() -> None:
    """Lengths 2, 4 and 9: mean 5, squared distances 9, 1, 16; rewards 1, 2, 6: mean 3, 4 + 1 + 9.

    Nine equal tokens have six 4-grams, five of which repeat the first.
    """
    completions = [answer(1, 2), answer(1, 2, 3, 4), answer(*[7] * 9, reason="length")]
    judgements = [
        Judgement(1.0, {"nat": 0.25, "coh": 1.0}),
        Judgement(2.0, None),
        Judgement(6.0, {"nat": 0.75, "coh": 4.0}),
    ]
    assert rollout_metrics.of(completions, judgements) == {
        "reward/nat": 0.5,
        "reward/coh": 2.5,
        "reward/mean": 3.0,
        "reward/std": pytest.approx((14 / 3) ** 0.5),
        "reward/usable_share": pytest.approx(2 / 3),
        "length/mean": 5.0,
        "length/std": pytest.approx((26 / 3) ** 0.5),
        "length/max": 9.0,
        "length/eos_rate": pytest.approx(2 / 3),
        "repetition": pytest.approx(5 / 6 / 3),
    }


def test_a_rollout_without_a_usable_answer_has_no_components() -> None:
    figures = rollout_metrics.of([answer(1)] * 2, [Judgement(-1.0, None)] * 2)
    assert figures["reward/usable_share"] == 0
    assert [name for name in figures if name.startswith("reward/")] == [
        "reward/mean",
        "reward/std",
        "reward/usable_share",
    ]
    assert all(type(value) is float for value in figures.values())


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ((), 0),
        ((5, 5, 5), 0),  # no 4-gram
        ((5, 5, 5, 5), 0),  # one
        ((5, 5, 5, 5, 5), 1 / 2),
        ((1, 2, 3, 1, 2, 3, 1), 1 / 4),  # 1231 2312 3123 1231
        ((1, 2, 3, 4, 9, 1, 2, 3, 4), 1 / 6),  # the first once more, at the end
        ((1, 2, 3, 4, 5, 6, 7, 8), 0),
    ],
)
def test_repetition_is_the_share_of_repeated_4_grams(ids: tuple[int, ...], share: float) -> None:
    figures = rollout_metrics.of([answer(*ids)], [Judgement(0.0, None)])
    assert figures["repetition"] == pytest.approx(share)


def test_repetition_is_a_mean_over_answers_however_long() -> None:
    """1/2 of 2 and 0 of 97 4-grams: 1/4, not 1/99."""
    completions = [answer(5, 5, 5, 5, 5), answer(*range(100))]
    figures = rollout_metrics.of(completions, [Judgement(0.0, None)] * 2)
    assert figures["repetition"] == 0.25


def test_the_peak_of_memory_never_falls() -> None:
    before = rollout_metrics.peak_memory()
    assert 0.05 < before <= rollout_metrics.peak_memory() < 1000
