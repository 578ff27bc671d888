"""Qwen-2.5 (Qwen Team, arXiv 2412.15115): LLaMA's shape with biases on q, k and v."""

from typing import Any

from refine_af.models import llama2
from refine_af.models.config import ModelConfig
from refine_af.models.family import Family

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys={
        **llama2.KEYS,
        "layers/attention/q/bias": ("model.layers.{}.self_attn.q_proj.bias", False),
        "layers/attention/k/bias": ("model.layers.{}.self_attn.k_proj.bias", False),
        "layers/attention/v/bias": ("model.layers.{}.self_attn.v_proj.bias", False),
    },
    structure={"qkv_bias": True},
    required={"hidden_act": "silu"},
    gguf="qwen2",
)
_BASE: dict[str, Any] = {"family": "qwen2", "qkv_bias": True, "rope_theta": 1e6}


def _preset(size: str) -> ModelConfig:
    embed_dim, hidden_dim, num_layers, num_heads, num_kv_heads = _SIZES[size]
    small = size in ("0.5b", "1.5b", "3b")
    return ModelConfig(
        **_BASE,
        vocab_size=151_936 if small else 152_064,
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=embed_dim // num_heads,
        max_positions=32_768 if size in ("0.5b", "3b") else 131_072,
        norm_eps=1e-6 if small or size == "7b" else 1e-5,
        tie_embeddings=small,
    )


# embed_dim, hidden_dim, num_layers, num_heads, num_kv_heads
_SIZES = {
    "0.5b": (896, 4864, 24, 14, 2),
    "1.5b": (1536, 8960, 28, 12, 2),
    "3b": (2048, 11_008, 36, 16, 2),
    "7b": (3584, 18_944, 28, 28, 4),
    "14b": (5120, 13_824, 48, 40, 8),
    "32b": (5120, 27_648, 64, 40, 8),
    "72b": (8192, 29_568, 80, 64, 8),
}
PRESETS = {f"qwen2.5-{size}": _preset(size) for size in _SIZES}
