"""The PPO update against torch: whole logits, one answer at a time, no padding, float64."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch
import transformers
from decoders import write_directory
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
from refine_af.models import sources
from refine_af.models.transformer import Params
from refine_af.rollout import Reading, Rollout
from refine_af.training import TrainState


class Torch:
    """Policy and critic in torch; what is trained are leaves with gradients.

    A critic of its own is an adapter on the same frozen weights.
    """

    def __init__(self, folder: Path, state: TrainState) -> None:
        torch.set_num_threads(1)  # its threads and XLA's, spinning on the same cores
        trunk = state.params["policy"]
        write_directory(TINY, trunk.get("model", base().params), folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=torch.float64, attn_implementation="eager")
        self.trainable = jax.tree.map(
            lambda x: torch.tensor(np.asarray(x, np.float64), requires_grad=True), state.params
        )

    def weights(self, trunk: str) -> dict[str, torch.Tensor]:
        """Of policy or critic: with alpha / rank * A B added, where there are adapters."""
        weights = dict(self.model.named_parameters())
        if "adapter" not in self.trainable[trunk]:
            return weights
        scale = OPTIONS.lora.alpha / OPTIONS.lora.rank
        blocks = {"attention": "self_attn", "feed_forward": "mlp"}
        for block, linears in self.trainable[trunk]["adapter"]["layers"].items():
            for name, pair in linears.items():
                for i, (a, b) in enumerate(zip(pair["lora_a"], pair["lora_b"], strict=True)):
                    key = f"model.layers.{i}.{blocks[block]}.{name}_proj.weight"
                    weights[key] = weights[key] + scale * (a @ b).T
        return weights

    def gradients(self, folder: Path) -> Params:
        """Of all that is trained, as our tree: those of a whole model go through its file."""
        found = {
            name: jax.tree.map(lambda leaf: leaf.grad.numpy(), self.trainable[name])
            for name, trunk in self.trainable.items()
            if name == "value_head" or "adapter" in trunk
        }
        if "policy" not in found:
            grads = {name: p.grad for name, p in self.model.named_parameters()}
            self.model.load_state_dict(grads, strict=False)  # a tied head has none of its own
            self.model.float().save_pretrained(folder)
            model = sources.open_model(str(folder), param_dtype="float32").load()
            found["policy"] = {"model": model}
        return found

    def __call__(
        self, prompt: list[int], answer: list[int], heat: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probability and value of each answer token, and entropy before it."""
        ids = torch.tensor([[*prompt, *answer]])
        call = {"input_ids": ids, "output_hidden_states": True}
        before = slice(len(prompt) - 1, -1)
        trunks = ("policy", "critic" if "critic" in self.trainable else "policy")
        policy, critic = (
            torch.func.functional_call(self.model, self.weights(trunk), (), call)
            for trunk in trunks
        )
        logprobs = torch.log_softmax(policy.logits[0, before] / heat, -1)
        head = self.trainable["value_head"]
        values = critic.hidden_states[-1][0, before] @ head["kernel"] + head["bias"]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs[range(len(answer)), answer], values, entropy


def plain_losses(
    model: Torch, rows: Rollout, old: Reading, options: Ppo
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
    model = Torch(tmp_path / "policy", new_state(1, options=options))
    reading = read(new_state(drawn_by, options=options), rows, options=options)
    losses = plain_losses(model, rows, jax.tree.map(np.asarray, reading), options)
    losses["loss"].backward()
    state, metrics = update(options, reading=reading)
    assert (metrics["ppo/clip_fraction"] > 0.1) == (drawn_by == 2)
    for name, loss in losses.items():
        assert metrics[f"ppo/{name}"] == pytest.approx(loss.item(), abs=1e-5), name
    expected = model.gradients(tmp_path / "gradients")
    assert optax.tree.norm(expected["policy"]) > 0.1
    assert_close(state.opt_state, expected, 1e-5)


@pytest.mark.slow
def test_the_step_is_that_of_a_plain_transcription(tmp_path: Path) -> None:
    """Clipping by the gradient's norm, Adam, and the first learning rate of the warm-up."""
    options = dataclasses.replace(GRADIENT, max_grad_norm=0.3)
    rows, _ = answers()
    model = Torch(tmp_path, new_state(1))
    reading = read(new_state(1), rows)
    plain_losses(model, rows, jax.tree.map(np.asarray, reading), options)["loss"].backward()
    leaves, structure = jax.tree.flatten(model.trainable)
    norm = torch.nn.utils.clip_grad_norm_(leaves, options.max_grad_norm)
    rate = options.learning_rate / (options.warmup_steps + 1)
    torch.optim.Adam(leaves, lr=rate, eps=options.adam_eps).step()
    state, metrics = update(options, reading=reading)
    assert metrics["ppo/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert norm > options.max_grad_norm
    expected = jax.tree.unflatten(structure, [leaf.detach().numpy() for leaf in leaves])
    assert_close(state.params, expected, 1e-5)
    assert distance(state, new_state(1)) > 1e-3
