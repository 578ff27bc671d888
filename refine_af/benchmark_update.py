"""One PPO update of LoRA adapters: ours, and torch with peft, as users would write it.

16 prompts of 128 tokens with answers of 64, one epoch, one optimizer step. Before anything is
timed both sides compute the loss and the gradient's norm in float32, and the row is refused where
these differ. Answers that fill their rows leave packing nothing to gain.
"""

import tempfile
from collections.abc import Iterator
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
_ROWS, _PROMPT, _ANSWER = 16, 128, 64
_TOLERANCE = 1e-3  # largest relative difference of loss and norm, float32
OPTIONS = Ppo(
    num_steps=1,
    batch_size=_ROWS,
    num_epochs=1,
    num_minibatches=1,
    num_microbatches=4,
    remat="cheap",
    learning_rate=1e-4,
    warmup_steps=0,
    checkpoint_every=1,
    lora=Lora(),
    sampling=Sampling(temperature=1.0, max_new_tokens=_ANSWER),
)


def rows(model: Model, limits: Limits, repeats: int, names: list[str]) -> Iterator[Row]:
    """Lines of the table; each side in a process of its own.

    Raises:
        ValueError: the two sides' losses or gradients differ.
    """
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            shape, _ = benchmarks.in_process(_make, model.source, folder)
            for side in (_ours, _theirs):
                benchmarks.isolated(side, model.source, folder, "float32", 0)
            found = [np.load(f"{folder}/{side}.npy") for side in ("_ours", "_theirs")]
            if not np.allclose(found[0], found[1], rtol=_TOLERANCE, atol=1e-6):
                raise ValueError(f"benchmark update: loss and norm are {found[0]}, not {found[1]}")
            ours = benchmarks.isolated(_ours, model.source, folder, model.dtype, repeats)
            theirs = benchmarks.isolated(_theirs, model.source, folder, model.dtype, repeats)
            limit = limit_seconds(shape, limits)
            yield benchmarks.row("update", name, "tokens/s", ours, theirs, "torch, peft", limit)


def limit_seconds(shape: ModelConfig, limits: Limits) -> float:
    """Least time: products of all tokens forward and of their gradients back through the layers,
    those of answers through the head; attention is left out.
    """
    forward = flops.forward(shape, _ROWS * (_PROMPT + _ANSWER), _ROWS * _ANSWER)
    return 2 * forward / limits.flops


def _make(source: str, folder: str) -> ModelConfig:
    """Write model and adapter as transformers and peft read them, and what a rollout brings."""
    shape = export(source, f"{folder}/model")
    base = base_model.load(Model(source=source, dtype="float32", param_dtype="float32"), Mesh())
    lora = base_model.lora_config(OPTIONS.lora)
    adapter = Policy(base, OPTIONS).new_params(0)["policy"]["adapter"]
    lora_lib.write_peft(adapter, lora, shape, Path(folder, "adapter"), f"{folder}/model")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, shape.vocab_size, (_ROWS, _PROMPT + _ANSWER))
    numbers = rng.normal(0, 0.1, (3, _ROWS, _ANSWER)).astype(np.float32)
    reading = Reading(numbers[0] - 15, numbers[1], numbers[2] - 15)
    batch = _rollout(ids)
    advantages, returns = policy_update.estimate(batch, reading, _state(base), OPTIONS)
    arrays: dict[str, Any] = {"ids": ids, "advantages": advantages, "returns": returns}
    np.savez(f"{folder}/rollout.npz", **arrays, **reading._asdict())
    return shape


def _state(base: BaseModel) -> TrainState:
    optimizer = policy_update.optimizer(OPTIONS)
    return base.place_state(
        training.new_state(Policy(base, OPTIONS).new_params(0), optimizer, OPTIONS.kl_coef)
    )


def _rollout(ids: np.ndarray) -> Rollout:
    asked = [Request(tuple(row[:_PROMPT].tolist()), OPTIONS.sampling) for row in ids]
    given = [Completion("", row[_PROMPT:].tolist(), (), (), "length") for row in ids]
    layout = Layout(_PROMPT + _ANSWER, _ANSWER, OPTIONS.num_microbatches)
    return rollout.build(asked, given, [1.0] * _ROWS, layout)


def _ours(source: str, folder: str, dtype: str, repeats: int) -> Measured:
    data = np.load(f"{folder}/rollout.npz")
    base = base_model.load(Model(source=source, dtype=dtype, param_dtype=dtype), Mesh())
    batch = shard_batch(base.mesh, _rollout(data["ids"]))
    reading = shard_batch(base.mesh, Reading(*(data[name] for name in Reading._fields)))
    update = policy_update.make_update(base.adapted(OPTIONS.lora), OPTIONS, base.mesh)
    state = _state(base)
    found: list[float] = []

    def once() -> float:
        nonlocal state
        state, metrics = update(base.params, state, batch, reading, jax.random.key(0))
        found.extend(float(metrics[f"ppo/{name}"]) for name in ("loss", "grad_norm"))
        return _ROWS * (_PROMPT + _ANSWER)

    measured = benchmarks.measure(once, repeats)
    np.save(f"{folder}/_ours", found[:2])
    return measured


def _theirs(source: str, folder: str, dtype: str, repeats: int) -> Measured:
    import peft
    import torch
    import transformers

    kind = getattr(torch, dtype)
    data = np.load(f"{folder}/rollout.npz")
    trunk = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=kind)
    policy = peft.PeftModel.from_pretrained(trunk, f"{folder}/adapter", is_trainable=True)
    head = torch.nn.Linear(trunk.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    trained = [p for p in policy.parameters() if p.requires_grad] + list(head.parameters())
    adam = torch.optim.Adam(trained, lr=OPTIONS.learning_rate, eps=OPTIONS.adam_eps)
    ids = torch.tensor(data["ids"])
    names = ("logprobs", "values", "advantages", "returns")
    old, values, advantages, returns = (torch.tensor(data[name]) for name in names)
    eps, value_eps = OPTIONS.clip_eps, OPTIONS.value_clip_eps
    found: list[float] = []

    def once() -> float:
        out = policy(input_ids=ids, output_hidden_states=True, logits_to_keep=_ANSWER + 1)
        logprobs = torch.log_softmax(out.logits[:, :-1].float(), -1)
        chosen = logprobs.gather(-1, ids[:, _PROMPT:, None])[..., 0]
        ratio = (chosen - old).exp()
        surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - eps, 1 + eps))
        predicted = head(out.hidden_states[-1][:, _PROMPT - 1 : -1].float())[..., 0]
        near = values + (predicted - values).clamp(-value_eps, value_eps)
        critic = 0.5 * torch.maximum((predicted - returns) ** 2, (near - returns) ** 2)
        loss = surrogate.mean() + OPTIONS.value_coef * critic.mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, OPTIONS.max_grad_norm)
        adam.step()
        adam.zero_grad()
        found.extend([loss.item(), norm.item()])
        return _ROWS * (_PROMPT + _ANSWER)

    measured = benchmarks.measure(once, repeats)
    np.save(f"{folder}/_theirs", found[:2])
    return measured
