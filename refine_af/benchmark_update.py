"""One PPO update of LoRA adapters: ours, and torch with peft, as users would write it.

16 prompts of 128 tokens with answers of 64. Before anything is timed both sides compute the loss
and the gradient's norm in float32, and the row is refused where these differ. Answers that fill
their rows leave packing nothing to gain.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from refine_af import base_model, benchmarks, flops, policy_update, rollout, training
from refine_af.base_model import BaseModel
from refine_af.benchmark_sampling import export
from refine_af.benchmarks import Limits, Measured, Row
from refine_af.config import Lora, Mesh, Model, Ppo, Sampling
from refine_af.mesh import shard_batch
from refine_af.models import lora as lora_lib
from refine_af.models.config import ModelConfig
from refine_af.policy import Policy
from refine_af.requests import Completion, Request
from refine_af.rollout import Layout, Reading, Rollout
from refine_af.training import TrainState

CASES = ("lora",)
_TOLERANCE = 1e-3  # largest relative difference of loss and norm, float32


@dataclasses.dataclass(frozen=True)
class Shape:
    """Answers of one length behind prompts of one length, a row each; an adapter of rank 16."""

    rows: int
    prompt: int
    answer: int
    microbatches: int
    remat: str

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return self.rows * (self.prompt + self.answer)

    @property
    def options(self) -> Ppo:
        """One epoch, one optimizer step."""
        return Ppo(
            num_steps=1,
            batch_size=self.rows,
            num_epochs=1,
            num_minibatches=1,
            num_microbatches=self.microbatches,
            remat=self.remat,
            learning_rate=1e-4,
            warmup_steps=0,
            checkpoint_every=1,
            lora=Lora(),
            sampling=Sampling(temperature=1.0, max_new_tokens=self.answer),
        )


_SHAPE = Shape(rows=16, prompt=128, answer=64, microbatches=4, remat="cheap")


def rows(model: Model, limits: Limits, repeats: int, names: list[str]) -> Iterator[Row]:
    """Lines of the table; each side in a process of its own.

    Raises:
        ValueError: the two sides' losses or gradients differ.
    """
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            config, _ = benchmarks.in_process(_make, model.source, folder)
            for side in (_ours, _theirs):
                benchmarks.isolated(side, model.source, folder, "float32", 0)
            found = [np.load(f"{folder}/{side}.npy") for side in ("_ours", "_theirs")]
            if not np.allclose(found[0], found[1], rtol=_TOLERANCE, atol=1e-6):
                raise ValueError(f"benchmark update: loss and norm are {found[0]}, not {found[1]}")
            ours = benchmarks.isolated(_ours, model.source, folder, model.dtype, repeats)
            theirs = benchmarks.isolated(_theirs, model.source, folder, model.dtype, repeats)
            limit = limit_seconds(config, _SHAPE, limits)
            yield benchmarks.row("update", name, "tokens/s", ours, theirs, "torch, peft", limit)


def limit_seconds(config: ModelConfig, shape: Shape, limits: Limits) -> float:
    """Least time: products of all tokens forward and of their gradients back through the layers,
    those of answers through the head; attention is left out.
    """
    return 2 * flops.forward(config, shape.num_tokens, shape.rows * shape.answer) / limits.flops


def updater(
    base: BaseModel, shape: Shape, ids: np.ndarray, reading: Reading
) -> Callable[[], tuple[float, policy_update.Metrics]]:
    """A function that takes a step on one rollout, and gives its tokens and its figures.

    Args:
        ids: [rows, prompt + answer].
        reading: what models say of the answers, [rows, answer].
    """
    options = shape.options
    batch, read = shard_batch(base.mesh, (_rollout(shape, ids), reading))
    state = new_state(base, options)
    update = policy_update.make_update(base.adapted(options.lora), options, base.mesh, state)

    def once() -> tuple[float, policy_update.Metrics]:
        nonlocal state
        state, metrics = update(base.params, state, batch, read, jax.random.key(0))
        return shape.num_tokens, jax.block_until_ready(metrics)

    return once


def random_reading(shape: Shape, rng: np.random.Generator) -> Reading:
    """Log-probabilities and values as models might give them."""
    numbers = rng.normal(0, 0.1, (3, shape.rows, shape.answer)).astype(np.float32)
    return Reading(numbers[0] - 15, numbers[1], numbers[2] - 15)


def _make(source: str, folder: str) -> ModelConfig:
    """Write model and adapter as transformers and peft read them, and what a rollout brings."""
    config = export(source, f"{folder}/model")
    base = base_model.load(Model(source=source, dtype="float32", param_dtype="float32"), Mesh())
    options = _SHAPE.options
    lora = base_model.lora_config(options.lora)
    adapter = Policy(base, options).new_params(0)["policy"]["adapter"]
    lora_lib.write_peft(adapter, lora, config, Path(folder, "adapter"), f"{folder}/model")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (_SHAPE.rows, _SHAPE.prompt + _SHAPE.answer))
    reading = random_reading(_SHAPE, rng)
    batch = _rollout(_SHAPE, ids)
    advantages, returns = policy_update.estimate(batch, reading, new_state(base, options), options)
    arrays: dict[str, Any] = {"ids": ids, "advantages": advantages, "returns": returns}
    np.savez(f"{folder}/rollout.npz", **arrays, **reading._asdict())
    return config


def new_state(base: BaseModel, options: Ppo) -> TrainState:
    """Before the first step."""
    params = Policy(base, options).new_params(0)
    fresh = training.new_state(params, policy_update.optimizer(options), options.kl_coef)
    placed: TrainState = base.place_state(fresh)
    return placed


def _rollout(shape: Shape, ids: np.ndarray) -> Rollout:
    sampling = shape.options.sampling
    asked = [Request(tuple(row[: shape.prompt].tolist()), sampling) for row in ids]
    given = [Completion("", row[shape.prompt :].tolist(), (), (), "length") for row in ids]
    layout = Layout(shape.prompt + shape.answer, shape.answer, shape.microbatches)
    return rollout.build(asked, given, [1.0] * shape.rows, layout)


def _ours(source: str, folder: str, dtype: str, repeats: int) -> Measured:
    data = np.load(f"{folder}/rollout.npz")
    base = base_model.load(Model(source=source, dtype=dtype, param_dtype=dtype), Mesh())
    reading = Reading(*(data[name] for name in Reading._fields))
    step = updater(base, _SHAPE, data["ids"], reading)
    found: list[float] = []

    def once() -> float:
        work, metrics = step()
        found.extend(float(metrics[f"ppo/{name}"]) for name in ("loss", "grad_norm"))
        return work

    measured = benchmarks.measure(once, repeats)
    np.save(f"{folder}/_ours", found[:2])
    return measured


def _theirs(source: str, folder: str, dtype: str, repeats: int) -> Measured:
    import peft
    import torch
    import transformers

    kind, options = getattr(torch, dtype), _SHAPE.options
    prompt, answer = _SHAPE.prompt, _SHAPE.answer
    data = np.load(f"{folder}/rollout.npz")
    trunk = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=kind)
    policy = peft.PeftModel.from_pretrained(trunk, f"{folder}/adapter", is_trainable=True)
    head = torch.nn.Linear(trunk.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    trained = [p for p in policy.parameters() if p.requires_grad] + list(head.parameters())
    adam = torch.optim.Adam(trained, lr=options.learning_rate, eps=options.adam_eps)
    ids = torch.tensor(data["ids"])
    names = ("logprobs", "values", "advantages", "returns")
    old, values, advantages, returns = (torch.tensor(data[name]) for name in names)
    eps, value_eps = options.clip_eps, options.value_clip_eps
    found: list[float] = []

    def once() -> float:
        out = policy(input_ids=ids, output_hidden_states=True, logits_to_keep=answer + 1)
        logprobs = torch.log_softmax(out.logits[:, :-1].float(), -1)
        chosen = logprobs.gather(-1, ids[:, prompt:, None])[..., 0]
        ratio = (chosen - old).exp()
        surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - eps, 1 + eps))
        predicted = head(out.hidden_states[-1][:, prompt - 1 : -1].float())[..., 0]
        near = values + (predicted - values).clamp(-value_eps, value_eps)
        critic = 0.5 * torch.maximum((predicted - returns) ** 2, (near - returns) ** 2)
        loss = surrogate.mean() + options.value_coef * critic.mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
        adam.step()
        adam.zero_grad()
        found.extend([loss.item(), norm.item()])
        return _SHAPE.num_tokens

    measured = benchmarks.measure(once, repeats)
    np.save(f"{folder}/_theirs", found[:2])
    return measured
