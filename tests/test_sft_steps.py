"""Steps of fine-tuning: against torch, and the same however their examples are cut up."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from torch_decoder import Torch, gradient
from updates import ONE_DEVICE, TINY, Sizes, assert_close, base

from refine_af import finetuning, sft_examples, training, trunk
from refine_af.config import Sft
from refine_af.configs import tiny
from refine_af.mesh import shard_batch
from refine_af.models.transformer import Params
from refine_af.sft_examples import Layout, Pair

LORA = dataclasses.replace(tiny.get_config().sft, remat="none")
FULL = dataclasses.replace(LORA, trained="full")
STEPS = 3
PACKED, ALONE = Layout(2, 48, 24, 1), Layout(6, 32, 12, 3)  # some examples a row; one, in pieces
SPLIT = Layout(16, 48, 24, 2)  # rows that 8 devices share in each of 2 pieces; most are empty
# Changes nothing and keeps the gradient.
RECORD = optax.GradientTransformation(
    lambda params: optax.tree.zeros_like(params), lambda grads, _, params: (grads, grads)
)


def pairs() -> list[Pair]:
    """Prompts and responses of different lengths, 84 tokens."""
    rng = np.random.default_rng(2)
    lengths = [(9, 5), (20, 12), (3, 1), (8, 9), (2, 4), (7, 4)]
    return [tuple(rng.integers(4, 260, n).tolist() for n in pair) for pair in lengths]


@functools.cache
def trained(options: Sft) -> Params:
    """Host arrays as if after some training: a fresh adapter has no gradient in A."""
    rng = np.random.default_rng(1)
    fresh = trunk.new(base(), options, jax.random.key(0))
    if options.trained == "full":
        return jax.tree.map(np.array, fresh)
    return jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), fresh)


def run(
    options: Sft, layout: Layout, sizes: Sizes = ONE_DEVICE
) -> tuple[training.TrainState, list[dict[str, float]]]:
    """State after three steps of the same batch, and the figures of each."""
    home, tx = base(sizes), optax.chain(RECORD, finetuning.optimizer(options, STEPS))
    step = finetuning.make_step(trunk.definition(home, options), options, tx, layout.num_pieces)
    fresh = trunk.new(home, options, jax.random.key(0))
    params = jax.tree.map(lambda x, y: jax.device_put(y, x.sharding), fresh, trained(options))
    state = home.place_state(training.new_state(params, tx, 0.0))
    step, places = training.in_place(step, state), jax.tree.map(lambda x: x.sharding, state)
    batch, history = shard_batch(home.mesh, sft_examples.pack(pairs(), layout)), []
    for _ in range(STEPS):
        state, figures = step(home.params, state, batch)
        history.append({name: float(value) for name, value in figures.items()})
    assert int(state.step) == STEPS
    assert jax.tree.map(lambda x: x.sharding, state) == places, "nothing is laid out anew"
    return state, history


plain_run = functools.cache(run)


@pytest.mark.parametrize("options", [LORA, FULL], ids=["lora", "full"])
def test_steps_are_those_of_a_plain_transcription(options: Sft, tmp_path: Path) -> None:
    """Clipped to norm 1, then AdamW; the rate is peak / 2, peak, and half of the peak by cosine."""
    state, figures = plain_run(options, PACKED)
    model = Torch(tmp_path / "base", TINY, base().params, trained(options), options.lora)
    adam = torch.optim.AdamW(model.leaves, lr=options.learning_rate, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(adam, [0.5, 1.0, 0.5, math.nan].__getitem__)
    for step in range(STEPS):
        losses = [plain_losses(model, *pair) for pair in pairs()]
        loss = torch.cat(losses).mean()
        adam.zero_grad()
        loss.backward()
        if step == STEPS - 1:
            grads = model.tree(tmp_path / "gradient", gradient)
            assert_close(state.opt_state[0], grads, 1e-5)
        norm = torch.nn.utils.clip_grad_norm_(model.leaves, options.max_grad_norm)
        assert figures[step]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert figures[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert norm > options.max_grad_norm, "clipping is at work"
        adam.step()
        rates.step()
    assert_close(state.params, model.tree(tmp_path / "tuned", lambda x: x), 1e-5)


def plain_losses(model: Torch, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Cross-entropy of each response token."""
    logits = model([*prompt, *response]).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none")


@pytest.mark.parametrize(
    ("options", "layout", "sizes"),
    [
        (LORA, ALONE, ONE_DEVICE),
        (LORA, SPLIT, (2, 2, 1, 2)),
        pytest.param(FULL, SPLIT, (1, 8, 1, 1), marks=pytest.mark.slow),
    ],
    ids=["alone", "mesh", "full-mesh"],
)
def test_packing_pieces_and_a_mesh_change_nothing(
    options: Sft, layout: Layout, sizes: Sizes
) -> None:
    actual: Any = run(options, layout, sizes)
    expected: Any = plain_run(options, PACKED)
    assert_close(actual, expected, 1e-5)
