"""Scoring texts of unequal length, ours and transformers' on torch, with the paper's oracles.

The models have random weights and a size that a CPU can run; the work does not depend on either.
The reference goes through the texts in the order of their list, 16 at a time, each batch padded to
its longest. Both sides score the first ones in float32 before, and a row is refused where they
differ.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from refine_af import benchmarks, mesh, scoring
from refine_af.benchmarks import Limits, Measured, Row
from refine_af.config import Mesh, Model
from refine_af.models import gpt_neox, t5

CASES = ("reward_model", "text_quality")
SHORT = ["reward_model"]
_NUM_TEXTS, _MEDIAN, _SPREAD, _LONGEST = 192, 90, 0.8, 512  # log-normal lengths, tokens
_NUM_CHECKED = 48  # texts on which both sides have to agree, the first ones
_BATCH = 16  # of the reference
_YES, _NO = 7, 9
_TOLERANCE = 1e-4  # largest difference of a score, float32


_VOCAB = 32_128
_T5 = {
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}


def texts(vocab: int) -> list[list[int]]:
    """Random ids with a heavy tail of lengths."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(math.log(_MEDIAN), _SPREAD, _NUM_TEXTS)
    lengths = np.clip(np.round(drawn), 8, _LONGEST).astype(int)
    return [rng.integers(10, vocab, length).tolist() for length in lengths]


def rows(model: Model, limits: Limits, repeats: int, names: list[str]) -> Iterator[Row]:
    """Lines of the table; each side of a case in a process of its own.

    Raises:
        ValueError: the two sides' scores differ.
    """
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            weights, _ = benchmarks.in_process(_make, name, folder)
            for side in (_ours, _theirs):
                benchmarks.isolated(side, name, folder, "float32", _NUM_CHECKED, 0)
            found = [np.load(f"{folder}/{side}.npy") for side in ("ours", "theirs")]
            gap = float(np.abs(found[0] - found[1]).max())
            if gap > _TOLERANCE:
                raise ValueError(f"benchmark {name}: the two sides' scores differ by {gap:.2g}")
            timed = (name, folder, model.dtype, _NUM_TEXTS, repeats)
            ours, theirs = (benchmarks.isolated(side, *timed) for side in (_ours, _theirs))
        seconds = 2 * weights * sum(map(len, texts(_VOCAB))) / limits.flops
        yield benchmarks.row(
            "score", name, "examples/s", ours, theirs, "transformers, batches of 16", seconds
        )


def _make(name: str, folder: str) -> int:
    """Write a model of random weights; gives the number of those that every token meets."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape: Any
    layers: Any
    if name == "reward_model":  # the shape of Pythia-160M
        shape = transformers.GPTNeoXConfig(
            vocab_size=_VOCAB,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            max_position_embeddings=2048,
            use_cache=False,
        )
        made = torch.nn.Module()
        made.gpt_neox = transformers.GPTNeoXModel(shape)
        made.out_proj = torch.nn.Linear(shape.hidden_size, 1)
        layers = made.gpt_neox.layers
    else:  # that of T5 v1.1 small
        shape = transformers.T5Config.from_dict(_T5 | {"vocab_size": _VOCAB})
        made = transformers.T5ForConditionalGeneration(shape)
        layers = made.encoder.block
    import safetensors.torch

    state = {k: v.clone() for k, v in made.state_dict().items() if "embed_tokens" not in k}
    safetensors.torch.save_file(state, f"{folder}/model.safetensors")
    Path(folder, "config.json").write_text(json.dumps(shape.to_dict()))
    return sum(p.numel() for p in layers.parameters())


def _ours(name: str, folder: str, dtype: str, count: int, repeats: int) -> Measured:
    raw = json.loads(Path(folder, "config.json").read_text())
    devices = mesh.make_mesh(Mesh())
    package: Any = gpt_neox if name == "reward_model" else t5
    config = package.from_hf_config(raw, folder, dtype=dtype, param_dtype=dtype)
    axes = package.logical_axes(config)
    shardings = mesh.shardings_of(axes, devices, head_dim=config.head_dim)
    params = package.open_weights(Path(folder), config).load(dtype, shardings)
    asked = texts(_VOCAB)[:count]

    def score(tokens: jax.Array, lengths: jax.Array, _: jax.Array) -> jax.Array:
        if name == "reward_model":
            return gpt_neox.rewards(config, params, tokens, lengths)
        return t5.yes_probability(config, params, tokens, lengths, _YES, _NO)

    return _timed(lambda: scoring.by_length(score, asked, devices), f"{folder}/ours", repeats)


def _theirs(name: str, folder: str, dtype: str, count: int, repeats: int) -> Measured:
    import safetensors.torch
    import torch
    import transformers

    state = safetensors.torch.load_file(f"{folder}/model.safetensors")
    shape = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(torch, dtype)
    asked = texts(_VOCAB)[:count]
    if name == "reward_model":
        trunk = transformers.GPTNeoXModel(shape).to(kind).eval()
        trunk.load_state_dict(
            {k.removeprefix("gpt_neox."): v for k, v in state.items() if k[:3] == "gpt"}
        )
        head = torch.nn.Linear(shape.hidden_size, 1).to(kind)
        head.load_state_dict({k: state[f"out_proj.{k}"] for k in ("weight", "bias")})
    else:
        model = transformers.T5ForConditionalGeneration(shape).to(kind).eval()
        model.load_state_dict(state, strict=False)

    @torch.no_grad()
    def batch(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if name == "reward_model":
            hidden = trunk(input_ids=ids, attention_mask=mask).last_hidden_state
            last = hidden[torch.arange(len(ids)), mask.sum(1) - 1]
            return head(last)[:, 0]
        start = torch.zeros(len(ids), 1, dtype=torch.long)
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=start).logits[:, 0]
        return torch.softmax(logits[:, [_YES, _NO]].float(), dim=-1)[:, 0]

    def run() -> np.ndarray:
        found = []
        for first in range(0, len(asked), _BATCH):
            some = asked[first : first + _BATCH]
            longest = max(map(len, some))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in some])
            mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in some])
            found.append(batch(ids, mask).float().numpy())
        return np.concatenate(found)

    return _timed(run, f"{folder}/theirs", repeats)


def _timed(run: Callable[[], np.ndarray], path: str, repeats: int) -> Measured:
    """Measure, and keep the scores."""
    found = []

    def once() -> float:
        found.append(run())
        return len(found[-1])

    measured = benchmarks.measure(once, repeats)
    np.save(path, found[-1])
    return measured
