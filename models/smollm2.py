"""SmolLM2 (Allal et al., arXiv 2502.02737): small LLaMA-shaped models with a tied head."""

from typing import Any

from refine_af.models.config import ModelConfig

_BASE: dict[str, Any] = {
    "vocab_size": 49_152,
    "head_dim": 64,
    "max_positions": 8192,
    "norm_eps": 1e-5,
    "tie_embeddings": True,
}
PRESETS = {
    "smollm2-135m": ModelConfig(
        **_BASE,
        embed_dim=576,
        hidden_dim=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        rope_theta=1e5,
    ),
    "smollm2-360m": ModelConfig(
        **_BASE,
        embed_dim=960,
        hidden_dim=2560,
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        rope_theta=1e5,
    ),
    "smollm2-1.7b": ModelConfig(
        **_BASE,
        embed_dim=2048,
        hidden_dim=8192,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        rope_theta=1.3e5,
    ),
}
