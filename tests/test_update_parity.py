"""The PPO update against torch: whole logits, one answer at a time, no padding, float64."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch
from torch_decoder import Torch, gradient, leaf
from updates import (
    FULL,
    GRADIENT,
    OPTIONS,
    SEPARATE,
    TINY,
    answers,
    asked,
    assert_close,
    base,
    distance,
    new_state,
    read,
    slow,
    update,
)

from refine_af.config import Ppo
from refine_af.models.transformer import Params
from refine_af.rollout import Reading, Rollout
from refine_af.training import TrainState


class Models:
    """Policy and critic in torch; a critic of its own is an adapter on the same frozen weights."""

    def __init__(self, folder: Path, state: TrainState) -> None:
        self.trunks = {
            name: Torch(folder / name, TINY, base().params, trained, OPTIONS.lora)
            for name, trained in state.params.items()
            if name != "value_head"
        }
        self.head = jax.tree.map(leaf, state.params["value_head"])

    @property
    def leaves(self) -> list[torch.Tensor]:
        trunks = [x for trunk in self.trunks.values() for x in trunk.leaves]
        return [*trunks, *jax.tree.leaves(self.head)]

    def tree(self, folder: Path, of: Callable[[torch.Tensor], torch.Tensor]) -> Params:
        """Something of all that is trained, as our tree."""
        trunks = {name: trunk.tree(folder / name, of) for name, trunk in self.trunks.items()}
        return trunks | {"value_head": jax.tree.map(lambda x: of(x).detach().numpy(), self.head)}

    def __call__(
        self, prompt: list[int], answer: list[int], heat: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probability and value of each answer token, and entropy before it."""
        before = slice(len(prompt) - 1, -1)
        policy = self.trunks["policy"]([*prompt, *answer])
        critic = self.trunks["critic"]([*prompt, *answer]) if "critic" in self.trunks else policy
        logprobs = torch.log_softmax(policy.logits[0, before] / heat, -1)
        values = critic.hidden_states[-1][0, before] @ self.head["kernel"] + self.head["bias"]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs[range(len(answer)), answer], values, entropy


def plain_losses(
    model: Models, rows: Rollout, old: Reading, options: Ppo
) -> dict[str, torch.Tensor]:
    """Losses of the first step as the papers write them, token by token; `loss` is their sum."""
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
        prompt, heat = list(asked()[row].prompt_ids), options.sampling.temperature
        answer = list(answers()[1][row].token_ids)
        assert len(answer) == n
        logprobs, values, entropy = model(prompt, answer, heat)
        span = slice(sum(lengths[:row]), sum(lengths[: row + 1]))
        ratio = (logprobs - torch.tensor(old.logprobs[row, :n])).exp()
        near = ratio.clamp(1 - options.clip_eps, 1 + options.clip_eps)
        policy.append(-torch.minimum(ratio * advantages[span], near * advantages[span]))
        before, target = torch.tensor(old.values[row, :n]), torch.tensor(returns[span])
        step = (values - before).clamp(-options.value_clip_eps, options.value_clip_eps)
        errors = (values - target) ** 2, (before + step - target) ** 2
        critic.append(0.5 * torch.maximum(*errors))
        entropies.append(entropy)
    parts = {"policy_loss": policy, "value_loss": critic, "entropy": entropies}
    means = {name: torch.cat(part).mean() for name, part in parts.items()}
    total = means["policy_loss"] + options.value_coef * means["value_loss"]
    return means | {"loss": total - options.entropy_coef * means["entropy"]}


@pytest.mark.parametrize("drawn_by", [slow(1), 2], ids=["same-weights", "other-weights"])
@pytest.mark.parametrize(
    "options", [GRADIENT, slow(FULL), slow(SEPARATE)], ids=["lora", "full", "separate"]
)
def test_the_gradient_is_that_of_a_plain_transcription(
    options: Ppo, drawn_by: int, tmp_path: Path
) -> None:
    """With other weights for the reading, ratios leave the clipping range in both directions."""
    rows, _ = answers()
    model = Models(tmp_path / "models", new_state(1, options=options))
    reading = read(new_state(drawn_by, options=options), rows, options=options)
    losses = plain_losses(model, rows, jax.tree.map(np.asarray, reading), options)
    losses["loss"].backward()
    state, metrics = update(options, reading=reading)
    assert (metrics["ppo/clip_fraction"] > 0.1) == (drawn_by == 2)
    for name, loss in losses.items():
        assert metrics[f"ppo/{name}"] == pytest.approx(loss.item(), abs=1e-5), name
    expected = model.tree(tmp_path / "gradients", gradient)
    assert optax.tree.norm(expected["policy"]) > 0.1
    assert_close(state.opt_state, expected, 1e-5)


@pytest.mark.slow
def test_the_step_is_that_of_a_plain_transcription(tmp_path: Path) -> None:
    """Clipping by the gradient's norm, Adam, and the first learning rate of the warm-up."""
    options = dataclasses.replace(GRADIENT, max_grad_norm=0.3)
    rows, _ = answers()
    model = Models(tmp_path, new_state(1))
    reading = read(new_state(1), rows)
    plain_losses(model, rows, jax.tree.map(np.asarray, reading), options)["loss"].backward()
    norm = torch.nn.utils.clip_grad_norm_(model.leaves, options.max_grad_norm)
    rate = options.learning_rate / (options.warmup_steps + 1)
    torch.optim.Adam(model.leaves, lr=rate, eps=options.adam_eps).step()
    state, metrics = update(options, reading=reading)
    assert metrics["ppo/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert norm > options.max_grad_norm
    assert_close(state.params, model.tree(tmp_path / "step", lambda x: x), 1e-5)
    assert distance(state, new_state(1)) > 1e-3
