"""Mistral-7B (Jiang et al., arXiv 2310.06825): LLaMA's keys, grouped heads, a sliding window."""

from refine_af.models import llama2
from refine_af.models.config import ModelConfig

KEYS = llama2.KEYS

PRESETS = {
    "mistral-7b-v0.1": ModelConfig(
        family="mistral",
        vocab_size=32_000,
        embed_dim=4096,
        hidden_dim=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=32_768,
        rope_theta=1e4,
        norm_eps=1e-5,
        tie_embeddings=False,
        sliding_window=4096,
    ),
}
