"""Qwen-3 (Qwen Team, arXiv 2505.09388): LLaMA's shape with norms of queries and keys."""

from typing import Any

from refine_af.models import llama2
from refine_af.models.config import ModelConfig
from refine_af.models.family import Family

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys={
        **llama2.KEYS,
        "layers/attention/q_norm/scale": ("model.layers.{}.self_attn.q_norm.weight", False),
        "layers/attention/k_norm/scale": ("model.layers.{}.self_attn.k_norm.weight", False),
    },
    structure={"qk_norm": True},
    required={"hidden_act": "silu", "attention_bias": False},
    gguf="qwen3",
)
_BASE: dict[str, Any] = {
    "family": "qwen3",
    "qk_norm": True,
    "vocab_size": 151_936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_positions": 40_960,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
}
# embed_dim, hidden_dim, num_layers, num_heads, tie_embeddings
_SIZES = {
    "0.6b": (1024, 3072, 28, 16, True),
    "1.7b": (2048, 6144, 28, 16, True),
    "4b": (2560, 9728, 36, 32, True),
    "8b": (4096, 12_288, 36, 32, False),
    "14b": (5120, 17_408, 40, 40, False),
    "32b": (5120, 25_600, 64, 64, False),
}
PRESETS = {
    f"qwen3-{size}": ModelConfig(
        **_BASE,
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        tie_embeddings=tied,
    )
    for size, (embed_dim, hidden_dim, num_layers, num_heads, tied) in _SIZES.items()
}
