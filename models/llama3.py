"""LLaMA-3, 3.1 and 3.2 (LLaMA Team, arXiv 2407.21783): presets; keys as in LLaMA-2."""

from typing import Any

from refine_af.models.config import Llama3Rope, ModelConfig

_BASE: dict[str, Any] = {
    "vocab_size": 128_256,
    "num_kv_heads": 8,
    "rope_theta": 5e5,
    "norm_eps": 1e-5,
}
_8B: dict[str, Any] = {
    **_BASE,
    "embed_dim": 4096,
    "hidden_dim": 14_336,
    "num_layers": 32,
    "num_heads": 32,
    "head_dim": 128,
    "tie_embeddings": False,
}
_70B: dict[str, Any] = {
    **_BASE,
    "embed_dim": 8192,
    "hidden_dim": 28_672,
    "num_layers": 80,
    "num_heads": 64,
    "head_dim": 128,
    "tie_embeddings": False,
}


def _long(factor: float) -> dict[str, Any]:
    """A context of 131,072 tokens, reached from 8,192 by scaling the positions."""
    scaling = Llama3Rope(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192
    )
    return {"max_positions": 131_072, "rope_scaling": scaling}


PRESETS = {
    "llama3-8b": ModelConfig(**_8B, max_positions=8192),
    "llama3-70b": ModelConfig(**_70B, max_positions=8192),
    "llama3.1-8b": ModelConfig(**_8B, **_long(8.0)),
    "llama3.1-70b": ModelConfig(**_70B, **_long(8.0)),  # LLaMA-3.3 has the same shape
    "llama3.2-1b": ModelConfig(
        **_BASE,
        **_long(32.0),
        embed_dim=2048,
        hidden_dim=8192,
        num_layers=16,
        num_heads=32,
        head_dim=64,
        tie_embeddings=True,
    ),
    "llama3.2-3b": ModelConfig(
        **_BASE,
        **_long(32.0),
        embed_dim=3072,
        hidden_dim=8192,
        num_layers=28,
        num_heads=24,
        head_dim=128,
        tie_embeddings=True,
    ),
}
