"""Tiny models of every family, with random weights, made and saved by transformers."""

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

WINDOW = 8
VOCAB_SIZE = 97
# None of these is a default of transformers: one that gets lost shows.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-4,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _rope(theta: float, kind: str = "default", **numbers: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **numbers}


# 64 original positions: the scaling of LLaMA-3 shows within a short text.
_LLAMA3 = _rope(
    5e3,
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_GEMMA3 = {
    "sliding_attention": _rope(2e2),
    "full_attention": _rope(5e3, "linear", factor=8.0),
}
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama2": lambda: LlamaConfig(
        **_SIZES | {"num_key_value_heads": 4}, head_dim=6, rope_parameters=_rope(1e3)
    ),
    "llama2-70b-shape": lambda: LlamaConfig(
        **_SIZES | {"num_key_value_heads": 1}, head_dim=16, rope_parameters=_rope(1e3)
    ),
    "llama3": lambda: LlamaConfig(**_SIZES, head_dim=8, rope_parameters=_rope(5e3)),
    "llama3.1": lambda: LlamaConfig(**_SIZES, head_dim=8, rope_parameters=_LLAMA3),
    "llama3.2": lambda: LlamaConfig(
        **_SIZES, head_dim=8, rope_parameters=_LLAMA3, tie_word_embeddings=True
    ),
    "llama-linear-rope": lambda: LlamaConfig(
        **_SIZES, head_dim=8, rope_parameters=_rope(1e3, "linear", factor=4.0)
    ),
    "smollm2": lambda: LlamaConfig(
        **_SIZES, head_dim=6, rope_parameters=_rope(1e4), tie_word_embeddings=True
    ),
    "mistral-v0.1": lambda: MistralConfig(
        **_SIZES, head_dim=8, rope_parameters=_rope(1e3), sliding_window=WINDOW
    ),
    "mistral-v0.3": lambda: MistralConfig(
        **_SIZES, head_dim=8, rope_parameters=_rope(1e6), sliding_window=None
    ),
    "qwen2.5": lambda: Qwen2Config(**_SIZES, rope_parameters=_rope(1e3)),
    "qwen2.5-window": lambda: Qwen2Config(
        **_SIZES,
        rope_parameters=_rope(1e3),
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16, rope_parameters=_rope(1e3)),
    "gemma2": lambda: Gemma2Config(
        **_SIZES,
        head_dim=8,
        rope_parameters=_rope(1e3),
        query_pre_attn_scalar=5,
        sliding_window=WINDOW,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES,
        head_dim=8,
        rope_parameters=_GEMMA3,
        query_pre_attn_scalar=5,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "deepseek-r1-distill-llama": lambda: LlamaConfig(
        **_SIZES | {"num_attention_heads": 6}, head_dim=8, rope_parameters=_LLAMA3
    ),
    "deepseek-r1-distill-qwen": lambda: Qwen2Config(
        **_SIZES | {"num_attention_heads": 6, "rms_norm_eps": 1e-3}, rope_parameters=_rope(1e4)
    ),
}

# Unlike one above in numbers only; the other differences are all in the rest.
_ALIKE = ("llama3", "mistral-v0.3", "deepseek-r1-distill-llama", "deepseek-r1-distill-qwen")
# `test-slow` has all of them.
PARAMS = [pytest.param(name, marks=pytest.mark.slow if name in _ALIKE else ()) for name in CONFIGS]


def build(name: str) -> PreTrainedModel:
    """A model whose every parameter is random, and so large that logits are of order 1."""
    torch.set_num_threads(1)  # its threads and XLA's, spinning on the same cores: 30 times slower
    generator = torch.Generator().manual_seed(0)
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            plain_norm = "norm" in parameter_name and "gemma" not in config.model_type
            mean = 1.0 if plain_norm else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(mean + 0.2 * noise)
    return model


@functools.cache
def saved(name: str) -> Path:
    """Directory of a model as transformers saves it; it lasts as long as this process."""
    folder = Path(_scratch().name) / name
    build(name).save_pretrained(folder)
    return folder


@functools.cache
def _scratch() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory()


def copy(name: str, target: Path) -> Path:
    """A copy of `saved(name)` that may be changed."""
    return Path(shutil.copytree(saved(name), target))
