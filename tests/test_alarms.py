"""Alarms: each when its trouble begins, once, with its figures; none in a sound run."""

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
import pytest

from refine_af import alarms, config, records
from refine_af.config import Lora, Ppo, Sampling

SOUND = {
    "kl/k1": 5.0,
    "kl/k3": 5.0,
    "ppo/entropy": 2.0,
    "ppo/grad_norm": 3.0,
    "reward/std": 0.5,
    "reward/usable_share": 0.9,
    "length/mean": 40.0,
    "length/eos_rate": 0.9,
    "drift/logprob_max": 0.1,
    "repetition": 0.01,
}
OPTIONS = Ppo(
    num_steps=1,
    batch_size=32,
    num_epochs=1,
    num_minibatches=1,
    num_microbatches=1,
    learning_rate=1e-4,
    warmup_steps=0,
    kl_target=6.0,
    checkpoint_every=1,
    lora=Lora(),
    sampling=Sampling(temperature=1.0, max_new_tokens=64),
)


def history(**columns: list[float]) -> list[dict[str, float]]:
    """Rows of a run that is sound but for the columns; `kl_k1` stands for `kl/k1`."""
    names = {name.replace("/", "_"): name for name in SOUND}
    (length,) = {len(column) for column in columns.values()}
    return [SOUND | {names[n]: x[i] for n, x in columns.items()} for i in range(length)]


def spoken(rows: list[dict[str, float]]) -> dict[int, list[str]]:
    """The alarms of each step that has any, as a run gets them."""
    said = {i: alarms.check(rows[: i + 1], OPTIONS) for i in range(len(rows))}
    return {i: lines for i, lines in said.items() if lines}


@pytest.mark.parametrize(
    ("columns", "step", "name", "figures", "advice"),
    [
        (
            {"kl_k1": [5, 20, 5, 13, 14, 15, 16]},  # above 2 * 6; step 1 was a lone peak
            4,
            "KL explosion",
            "kl/k1 is 13, then 14 nats, both above 12",
            "raise ppo.kl_coef or lower ppo.learning_rate",
        ),
        (
            # 3 sqrt(2 * 4 / 32) = 1.5
            {"kl_k1": [4, -1.4, -1.6, -2.0], "kl_k3": [4.0] * 4},
            2,
            "negative KL",
            "kl/k1 is -1.6, further below 0 than noise of 1.5 (kl/k3 4)",
            "ppo.sampling.top_p to 1, top_k to 0",
        ),
        (
            {"ppo_grad_norm": [3, 999, 1001, 4e6]},
            2,
            "exploding gradient",
            "ppo/grad_norm is 1e+03, above 1000",
            "lower ppo.learning_rate",
        ),
        (
            {"ppo_entropy": [1, 2, 3, 1, 0.21, 0.19, 0.1]},  # a tenth of the mean, 2
            5,
            "entropy collapse",
            "ppo/entropy is 0.19, at first 2",
            "raise ppo.entropy_coef",
        ),
        (
            {"reward_std": [0.4, 0.5, 0.6, 0.0051, 0.0049, 0.0]},  # a hundredth of .5
            4,
            "nothing to learn",
            "reward/std is 0.0049, at first 0.5",
            "raise ppo.sampling.temperature",
        ),
        (
            {"reward_std": [1e-17, 0.0]},  # from the start
            0,
            "nothing to learn",
            "reward/std is 1e-17, at first 1e-17",
            "reward.clip_reward",
        ),
        (
            {"repetition": [0.01, 0.3, 0.31, 0.5]},
            2,
            "repetition",
            "repetition is 0.31, above 0.3",
            "raise ppo.kl_coef",
        ),
        (
            {"length_mean": [30, 40, 50, 60, 80, 100, 120, 200]},  # at first 40; then 60, 80, 100
            6,
            "length drift",
            "length/mean is 100 lately, at first 40",
            "raise ppo.kl_coef",
        ),
        (
            {"length_mean": [40, 40, 40, 20, 20, 20, 17, 10]},  # half is 20; then 19
            6,
            "length drift",
            "length/mean is 19 lately, at first 40",
            "raise ppo.kl_coef",
        ),
        (
            {"length_eos_rate": [0.9, 0.5, 0.45, 0.1]},
            2,
            "missing ends",
            "length/eos_rate is 0.45, below 0.5",
            "raise ppo.sampling.max_new_tokens",
        ),
        (
            {"reward_usable_share": [0.25, 0.25]},  # from the start
            0,
            "useless answers",
            "reward/usable_share is 0.25, below 0.5",
            "raise prompts.num_demos",
        ),
        (
            {"drift_logprob_max": [0.1, 1.0, 1.25, 2.0]},
            2,
            "drift",
            "drift/logprob_max is 1.25, above 1",
            "model.dtype to float32, ppo.int8_weights",
        ),
    ],
)
def test_an_alarm_is_given_once_when_its_trouble_begins(
    columns: dict[str, list[float]], step: int, name: str, figures: str, advice: str
) -> None:
    said = spoken(history(**columns))
    assert list(said) == [step]
    (line,) = said[step]
    assert line.startswith(f"{name}: {figures}; ")
    assert advice in line
    assert "\n" not in line


def test_a_sound_run_is_quiet() -> None:
    """From no KL to the target, an entropy that halves, noise in the rest."""
    steps = range(40)
    rows = history(
        kl_k1=[6.0 * i / 39 - 0.1 * (i % 2) for i in steps],
        kl_k3=[6.0 * i / 39 for i in steps],
        ppo_entropy=[3.0 - 1.5 * i / 39 for i in steps],
        reward_std=[0.5 + 0.1 * (i % 3) for i in steps],
        length_mean=[40.0 + 10 * math.sin(i) for i in steps],
        length_eos_rate=[0.8 + 0.1 * (i % 2) for i in steps],
    )
    assert spoken(rows) == {}


def test_a_negative_estimate_of_next_to_no_kl_is_no_alarm() -> None:
    """Noise of 3 sqrt(2 * .01 / 32) = .075 is exceeded, but the policy has hardly moved."""
    assert spoken(history(kl_k1=[-0.08], kl_k3=[0.01])) == {}


def test_noise_falls_with_the_number_of_answers() -> None:
    """3 sqrt(2 * 4 / 128) = .75."""
    rows = history(kl_k1=[-1.0], kl_k3=[4.0])
    assert alarms.check(rows, OPTIONS) == []
    many = dataclasses.replace(OPTIONS, batch_size=128)
    assert len(alarms.check(rows, many)) == 1


def test_a_trouble_that_ends_and_comes_back_is_told_again() -> None:
    said = spoken(history(length_eos_rate=[0.4, 0.4, 0.6, 0.4, 0.4]))
    assert list(said) == [0, 3]


def test_troubles_of_one_step_are_all_told() -> None:
    (lines,) = spoken(history(length_eos_rate=[0.9, 0.1], repetition=[0.0, 0.9])).values()
    assert [line.partition(":")[0] for line in lines] == ["repetition", "missing ends"]


@pytest.mark.parametrize("missing", SOUND)
def test_older_rows_may_lack_a_metric(missing: str) -> None:
    old = {name: value for name, value in SOUND.items() if name != missing}
    for rows in ([{}, old, SOUND], [SOUND, old], [old, {}]):
        assert spoken(rows) == {}


def test_a_step_without_the_figure_neither_ends_nor_repeats_an_alarm() -> None:
    said = spoken(history(repetition=[0.0, 0.9, math.nan, 0.9, math.inf, 0.9]))
    assert list(said) == [1]


def test_no_rows_no_alarms() -> None:
    assert alarms.check([], OPTIONS) == []


def test_a_resumed_run_says_what_an_undisturbed_one_says() -> None:
    """Its rows come from the file of metrics, where NaN and infinity are null."""
    rows = history(
        kl_k1=[1.0, math.inf, 13.0, 14.0, 15.0],
        ppo_entropy=[math.nan, 2.0, 2.0, 0.1, 0.1],
        drift_logprob_max=[0.1, 1.7, math.nan, 1.7, 0.1],
    )
    read: list[Any] = [json.loads(records.to_line(row)) for row in rows]
    assert read[1]["kl/k1"] is None
    assert spoken(rows) == spoken(read)
    assert list(spoken(rows)) == [1, 3]


def test_advice_names_fields_that_exist() -> None:
    """Every dotted name of a section in a message is a field of that section."""
    bad = {"kl/k1": 99.0, "kl/k3": 99.0, "ppo/entropy": 0.0, "reward/std": 0.0, "repetition": 1.0}
    bad |= {"length/mean": 9e3, "length/eos_rate": 0.0, "reward/usable_share": 0.0}
    bad |= {"drift/logprob_max": 9.0}
    lines = [line for said in spoken([SOUND] * 3 + [bad] * 3).values() for line in said]
    lines += alarms.check(history(kl_k1=[-9.0]), OPTIONS)
    assert len({line.partition(":")[0] for line in lines}) == 9
    sections: dict[str, Any] = {"ppo": Ppo, "model": config.Model, "reward": config.Reward}
    sections |= {"prompts": config.Prompts, "ppo.sampling": Sampling}
    names = re.findall(r"\b((?:ppo\.sampling|ppo|model|reward|prompts)\.\w+)", "\n".join(lines))
    assert len(set(names)) > 8
    for name in names:
        section, _, field = name.rpartition(".")
        assert field in {f.name for f in dataclasses.fields(sections[section])}, name


@pytest.mark.parametrize("seed", range(5))
def test_a_window_of_the_history_is_as_good_as_all_of_it(seed: int) -> None:
    """Also where rows lack metrics; and it does not grow."""
    rng = np.random.default_rng(seed)
    rows, kept = [], []
    for _ in range(300):
        row = {name: x * 10.0 ** rng.normal(scale=0.7) for name, x in SOUND.items()}
        row = {name: x for name, x in row.items() if rng.random() < 0.8}
        rows.append(row)
        kept = alarms.window([*kept, row])
        assert alarms.check(kept, OPTIONS) == alarms.check(rows, OPTIONS)
    assert any(alarms.check(rows[:i], OPTIONS) for i in range(300))
    assert len(kept) < 40
