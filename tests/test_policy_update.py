"""The PPO update as a whole: against torch, over meshes and cuts, and when numbers go bad."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from decoders import source_of, write_directory
from jax.tree_util import keystr, tree_leaves_with_path

from refine_af import config as config_lib
from refine_af import mesh as mesh_lib
from refine_af import policy_update, rewards, rlaf, rollout, training
from refine_af.base_model import BaseModel
from refine_af.config import Ppo, Sampling
from refine_af.configs import tiny
from refine_af.mesh import shard_batch
from refine_af.models import transformer
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.registry import PRESETS
from refine_af.requests import Completion, Request
from refine_af.rollout import Reading, Rollout
from refine_af.training import TrainState

CONFIG = tiny.get_config()
TINY = PRESETS["tiny"]
ROWS, PROMPT, ANSWER = 8, 24, 16
COLD = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=ANSWER)
HOT = Sampling(temperature=1.7, top_k=12, max_new_tokens=ANSWER)
# 2 epochs of 2 minibatches: steps that follow other steps; ratios soon leave 1 +- eps.
OPTIONS = dataclasses.replace(CONFIG.ppo, num_microbatches=1, clip_eps=0.02, sampling=COLD)
ONE_STEP = dataclasses.replace(OPTIONS, num_epochs=1, num_minibatches=1, sampling=HOT)
# With an optimizer that changes nothing and keeps the gradient as its state.
GRADIENT = dataclasses.replace(
    ONE_STEP, num_microbatches=2, gamma=0.98, entropy_coef=0.01, kl_coef=0.2, sampling=COLD
)
EOS = tuple(range(4, 34))  # so many that random text ends now and then

Sizes = tuple[int, int, int]  # of a mesh
ONE_DEVICE: Sizes = (1, 1, 1)


@functools.cache
def base(sizes: Sizes = ONE_DEVICE) -> BaseModel:
    """Random weights with logits of order 1."""
    axes = config_lib.Mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    mesh = mesh_lib.make_mesh(axes, jax.devices()[: int(np.prod(sizes))])
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.12 * rng.standard_normal(shape.shape)).astype(np.float32)

    shapes = jax.eval_shape(lambda: transformer.init(TINY, key=jax.random.key(0)))[0]
    params = jax.device_put(
        jax.tree_util.tree_map_with_path(draw, shapes),
        mesh_lib.param_shardings(TINY, None, mesh)[0],
    )
    source = source_of(TINY, params, EOS, byte_tokenizer())
    return BaseModel(source, transformer.define(TINY), params, mesh)


@functools.cache
def fresh_state(sizes: Sizes) -> TrainState:
    return rlaf.new_state(CONFIG, base(sizes))


def new_state(noise: int | None = None, sizes: Sizes = ONE_DEVICE) -> TrainState:
    """State before the first step; `noise` seeds weights as if after some training."""
    rng = np.random.default_rng(noise)

    def copy(x: jax.Array) -> jax.Array:
        return jax.device_put(np.array(x), x.sharding)  # updates eat the state they are given

    def draw(x: jax.Array) -> jax.Array:
        return jax.device_put(0.1 * rng.standard_normal(x.shape, np.float32), x.sharding)

    state = jax.tree.map(copy, fresh_state(sizes))
    return state if noise is None else state._replace(params=jax.tree.map(draw, state.params))


@functools.cache
def answers(
    noise: int | None = 1, sampling: Sampling = COLD
) -> tuple[Rollout, tuple[Completion, ...]]:
    """Host arrays of prompts of different lengths, and what the policy wrote to them."""
    rng = np.random.default_rng(0)
    requests = [
        Request(tuple(rng.integers(4, 260, 5 + 2 * row).tolist()), sampling, seed=row)
        for row in range(ROWS)
    ]
    params = base().for_sampling(new_state(noise).params["adapter"], OPTIONS.lora)
    completions = base().engine(ROWS).generate(params, requests)
    rows = rollout.build(requests, completions, rng.normal(size=ROWS).tolist(), PROMPT, ANSWER)
    return jax.tree.map(np.asarray, rows), tuple(completions)


def read(
    state: TrainState,
    rows: Rollout,
    temperature: float = COLD.temperature,
    sizes: Sizes = ONE_DEVICE,
) -> Reading:
    home = base(sizes)
    policy = home.adapted(OPTIONS.lora)
    return rollout.jit_read(
        policy, home.definition, home.params, state.params, rows, temperature, 2
    )


@functools.cache
def make_update(options: Ppo, sizes: Sizes = ONE_DEVICE) -> Any:
    keep = optax.GradientTransformation(
        lambda params: optax.tree.zeros_like(params),
        lambda grads, _, params: (optax.tree.zeros_like(params), grads),
    )
    with pytest.MonkeyPatch.context() as patch:
        if options == GRADIENT:
            patch.setattr(policy_update, "optimizer", lambda _: keep)
        home = base(sizes)
        return policy_update.make_update(home.adapted(options.lora), options, home.mesh)


def update(
    options: Ppo = OPTIONS,
    noise: int | None = 1,
    *,
    sizes: Sizes = ONE_DEVICE,
    key: int = 0,
    reading: Reading | None = None,
    **rows: Any,
) -> tuple[TrainState, dict[str, float]]:
    """One update of a state on answers that its policy drew; `rows` replaces arrays of these."""
    batch = answers(noise, options.sampling)[0]._replace(**rows)
    batch = shard_batch(base(sizes).mesh, batch)
    state = new_state(noise, sizes)._replace(kl_coef=jnp.asarray(options.kl_coef))
    reading = reading or read(state, batch, options.sampling.temperature, sizes)
    if options == GRADIENT:
        state = state._replace(opt_state=optax.tree.zeros_like(state.params))
    run = make_update(options, sizes)
    state, metrics = run(base(sizes).params, state, batch, reading, jax.random.key(key))
    return state, {name: float(value) for name, value in metrics.items()}


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    left, right = tree_leaves_with_path(actual), tree_leaves_with_path(expected)
    for (path, a), (_, b) in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=keystr(path))


def assert_equal(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, 0)


def distance(first: TrainState, second: TrainState) -> float:
    return float(optax.tree.norm(optax.tree.sub(first.params, second.params)))


# Before anything is learnt


@pytest.mark.parametrize("options", [GRADIENT, ONE_STEP], ids=["cold, top-p", "hot, top-k"])
def test_identical_weights_have_no_kl_and_ratio_1(options: Ppo) -> None:
    """Whatever the temperature, and whatever top-k and top-p kept from being drawn."""
    _, metrics = update(options, noise=None)
    assert (metrics["kl/k1"], metrics["kl/k3"], metrics["ppo/clip_fraction"]) == (0, 0, 0)
    assert metrics["ppo/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert metrics["ppo/approx_kl"] < 1e-10
    assert metrics["ppo/grad_norm"] > 0.01, "there was something to learn"


@pytest.mark.parametrize("noise", [None, 1])
@pytest.mark.parametrize("sampling", [COLD, HOT], ids=["cold, top-p", "hot, top-k"])
def test_sampler_and_trainer_agree_on_log_probabilities(
    noise: int | None, sampling: Sampling
) -> None:
    rows, completions = answers(noise, sampling)
    heat = sampling.temperature
    assert rollout.drift(completions, read(new_state(noise), rows, heat)) < 1e-4
    other = rollout.drift(completions, read(new_state(2), rows, heat))
    assert other > 0.1, "drift would not notice other weights"


def test_the_critic_starts_at_zero() -> None:
    assert not new_state().params["value_head"]["kernel"].any()
    assert not read(new_state(), answers(None)[0]).values.any()


def test_an_answer_cut_by_length_is_not_rewarded_as_ended() -> None:
    _, completions = answers()
    ended = [c.finish_reason == "stop" for c in completions]
    assert ended == [c.token_ids[-1] in EOS for c in completions]
    assert 0 < sum(ended) < ROWS, "both kinds are needed"
    assert all(len(c.token_ids) == ANSWER for c, e in zip(completions, ended, strict=True) if not e)

    def oracle(examples: Any) -> dict[str, np.ndarray]:
        return {name: np.zeros(len(examples)) for name in config_lib.PAPER_COMPONENTS}

    examples = [rewards.Example("do", "", c.text) for c in completions]
    judged = rewards.judge(oracle, examples, ended, CONFIG.reward)
    lost = [CONFIG.reward.bias - judgement.reward for judgement in judged]
    assert lost == pytest.approx([0.0 if e else CONFIG.reward.missing_end_penalty for e in ended])


# How the batch is cut, and where it lies


@pytest.mark.parametrize("pieces", [2, 4])
def test_microbatches_change_nothing(pieces: int) -> None:
    options = dataclasses.replace(OPTIONS, num_microbatches=pieces)
    assert_close(update(options), update(), 1e-6)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2)], ids=["data8", "fsdp4-tensor2"])
def test_a_mesh_changes_nothing(sizes: Sizes) -> None:
    state, metrics = update(sizes=sizes)
    expected_state, expected_metrics = update()
    assert_close(metrics, expected_metrics, 1e-5)
    assert_close(state, expected_state, 1e-5)


# What the options do


def steps_taken(state: TrainState) -> set[int]:
    counts = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
    return {int(count) for _, count in counts}


def test_epochs_and_minibatches_are_steps_of_the_optimizer() -> None:
    once, twice = update(ONE_STEP)[0], update()[0]
    assert (steps_taken(once), steps_taken(twice)) == ({1}, {4})
    assert (int(once.step), int(twice.step)) == (1, 1)
    assert distance(once, twice) > 1e-3


def test_the_ratio_is_to_the_policy_that_drew_the_answers() -> None:
    """Were old log-probabilities computed with the new weights, nothing would ever be clipped."""
    assert update(ONE_STEP)[1]["ppo/clip_fraction"] == 0
    assert update()[1]["ppo/clip_fraction"] > 0.01


def test_the_key_decides_which_rows_form_a_minibatch() -> None:
    first, same, other = (update(key=key)[0] for key in (0, 0, 1))
    assert_equal(first, same)
    assert distance(first, other) > 1e-4


@pytest.mark.parametrize("noise", [None, 1])
def test_the_kl_coefficient_is_used_then_adapted(noise: int | None) -> None:
    options = ONE_STEP
    state, metrics = update(options, noise)
    assert metrics["kl/coef"] == pytest.approx(options.kl_coef)
    error = np.clip(metrics["kl/k1"] / options.kl_target - 1, -0.2, 0.2)
    expected = options.kl_coef * (1 + error * ROWS / options.kl_horizon)
    assert float(state.kl_coef) == pytest.approx(expected, rel=1e-6)
    assert expected != options.kl_coef


def test_the_base_never_changes() -> None:
    before = jax.tree.map(np.array, base().params)
    update()
    assert_equal(base().params, before)


# Numbers that are not finite


def test_a_nan_reward_is_skipped_and_counted() -> None:
    """Whitening spreads it over the batch, so that no step can be taken."""
    score = np.array(answers()[0].score)
    score[3] = np.nan
    before = new_state(1)
    state, metrics = update(score=score)
    assert np.isnan(metrics["ppo/grad_norm"])
    assert (int(state.skipped), int(state.step)) == (4, 1)
    assert_equal(state.params, before.params)
    assert_equal(state.opt_state, before.opt_state)
    assert np.isfinite(state.kl_coef)


def test_a_reading_that_is_not_finite_leaves_the_controller_alone() -> None:
    reading = read(new_state(1), answers()[0])
    broken = reading._replace(logprobs=reading.logprobs.at[0, 0].set(jnp.nan))
    state, _ = update(reading=broken)
    assert (int(state.skipped), float(state.kl_coef)) == (4, pytest.approx(OPTIONS.kl_coef))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_costs_one_step_and_the_next_is_taken(bad: float) -> None:
    optimizer = optax.adam(0.1)
    start = training.new_state({"a": jnp.ones(2), "b": jnp.ones(())}, optimizer, 0.0)
    good = {"a": jnp.ones(2), "b": jnp.ones(())}
    skipped, norm = training.guarded_step(optimizer, start, good | {"b": jnp.asarray(bad)})
    assert (int(skipped.skipped), bool(jnp.isfinite(norm))) == (1, False)
    assert_equal(skipped._replace(skipped=start.skipped), start)
    after, norm = training.guarded_step(optimizer, skipped, good)
    assert_equal(after, training.guarded_step(optimizer, start, good)[0])
    assert (int(after.skipped), float(norm)) == (0, pytest.approx(3**0.5)), "none in a row"
    assert distance(after, start) > 0.1


def test_too_many_skipped_steps_stop_the_run() -> None:
    state = new_state()._replace(skipped=jnp.asarray(3, jnp.int32))
    training.check_skipped(state, 3, "ppo step 7")
    with pytest.raises(
        ValueError, match=r"ppo step 7: 3 steps in a row had a gradient that is not finite"
    ):
        training.check_skipped(state, 2, "ppo step 7")


# Against torch: whole logits, one answer at a time, no padding, float64


class Torch:
    """Policy, critic and reference in torch; `adapter` and `head` are leaves with gradients."""

    def __init__(self, folder: Path, state: TrainState) -> None:
        torch.set_num_threads(1)  # its threads and XLA's, spinning on the same cores
        write_directory(TINY, base().params, folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=torch.float64, attn_implementation="eager")
        self.trainable = jax.tree.map(
            lambda x: torch.tensor(np.asarray(x, np.float64), requires_grad=True), state.params
        )

    def adapted(self) -> dict[str, torch.Tensor]:
        """Weights with alpha / rank * A B added."""
        weights = dict(self.model.named_parameters())
        scale = OPTIONS.lora.alpha / OPTIONS.lora.rank
        blocks = {"attention": "self_attn", "feed_forward": "mlp"}
        for block, linears in self.trainable["adapter"]["layers"].items():
            for name, pair in linears.items():
                for i, (a, b) in enumerate(zip(pair["lora_a"], pair["lora_b"], strict=True)):
                    key = f"model.layers.{i}.{blocks[block]}.{name}_proj.weight"
                    weights[key] = weights[key] + scale * (a @ b).T
        return weights

    def __call__(
        self, weights: dict[str, torch.Tensor], prompt: list[int], answer: list[int], heat: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probability and value of each answer token, and entropy before it."""
        ids = torch.tensor([[*prompt, *answer]])
        call = {"input_ids": ids, "output_hidden_states": True}
        out = torch.func.functional_call(self.model, weights, (), call)
        before = slice(len(prompt) - 1, -1)
        logprobs = torch.log_softmax(out.logits[0, before] / heat, -1)
        head = self.trainable["value_head"]
        values = out.hidden_states[-1][0, before] @ head["kernel"] + head["bias"]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs[range(len(answer)), answer], values, entropy


def plain_loss(model: Torch, rows: Rollout, old: Reading, options: Ppo) -> torch.Tensor:
    """The loss of the first step as the papers write it, token by token."""
    lengths = rows.mask.sum(1).astype(int)
    estimates = []
    for row, n in enumerate(lengths):
        kl = old.logprobs[row, :n] - old.ref_logprobs[row, :n]
        reward = -options.kl_coef * kl.astype(np.float64)
        reward[-1] += rows.score[row]
        advantage, following = 0.0, 0.0
        for t in reversed(range(n)):
            value = float(old.values[row, t])
            delta = reward[t] + options.gamma * following - value
            advantage = delta + options.gamma * options.gae_lambda * advantage
            following = value
            estimates.insert(sum(lengths[:row]), (advantage, advantage + value))
    advantages, returns = np.asarray(estimates).T
    advantages = torch.tensor((advantages - advantages.mean()) / advantages.std())
    policy, critic, entropies = [], [], []
    for row, n in enumerate(lengths):
        prompt, answer = rows.tokens[row, rows.start[row] : PROMPT], rows.tokens[row, PROMPT:][:n]
        heat = options.sampling.temperature
        logprobs, values, entropy = model(model.adapted(), prompt.tolist(), answer.tolist(), heat)
        span = slice(sum(lengths[:row]), sum(lengths[: row + 1]))
        ratio = (logprobs - torch.tensor(old.logprobs[row, :n])).exp()
        near = ratio.clamp(1 - options.clip_eps, 1 + options.clip_eps)
        policy.append(-torch.minimum(ratio * advantages[span], near * advantages[span]))
        before, target = torch.tensor(old.values[row, :n]), torch.tensor(returns[span])
        step = (values - before).clamp(-options.value_clip_eps, options.value_clip_eps)
        errors = (values - target) ** 2, (before + step - target) ** 2
        critic.append(0.5 * torch.maximum(*errors))
        entropies.append(entropy)
    mean = [torch.cat(parts).mean() for parts in (policy, critic, entropies)]
    return mean[0] + options.value_coef * mean[1] - options.entropy_coef * mean[2]


@pytest.mark.parametrize("drawn_by", [1, 2], ids=["same-weights", "other-weights"])
def test_the_gradient_is_that_of_a_plain_transcription(drawn_by: int, tmp_path: Path) -> None:
    """With other weights for the reading, ratios leave the clipping range in both directions."""
    rows, _ = answers()
    model = Torch(tmp_path, new_state(1))
    reading = read(new_state(drawn_by), rows)
    loss = plain_loss(model, rows, jax.tree.map(np.asarray, reading), GRADIENT)
    loss.backward()
    state, metrics = update(GRADIENT, reading=reading)
    assert (metrics["ppo/clip_fraction"] > 0.2) == (drawn_by == 2)
    assert metrics["ppo/loss"] == pytest.approx(loss.item(), abs=1e-5)
    expected = jax.tree.map(lambda leaf: leaf.grad.numpy(), model.trainable)
    assert optax.tree.norm(expected["adapter"]) > 0.1
    assert_close(state.opt_state, expected, 1e-5)
