"""Mistral-7B (Jiang et al., arXiv 2310.06825): LLaMA's keys, grouped heads, in v0.1 a window."""

from typing import Any

from refine_af.models import llama2
from refine_af.models.config import ModelConfig
from refine_af.models.family import Family

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=llama2.KEYS,
    required={"hidden_act": "silu"},
)

_BASE: dict[str, Any] = {
    "family": "mistral",
    "embed_dim": 4096,
    "hidden_dim": 14_336,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_positions": 32_768,
    "norm_eps": 1e-5,
    "tie_embeddings": False,
}
PRESETS = {
    "mistral-7b-v0.1": ModelConfig(**_BASE, vocab_size=32_000, rope_theta=1e4, sliding_window=4096),
    "mistral-7b-v0.3": ModelConfig(**_BASE, vocab_size=32_768, rope_theta=1e6),
}
