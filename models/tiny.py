"""A decoder of a few thousand weights over bytes, for tests and dry runs."""

from refine_af.models.config import ModelConfig

PRESETS = {
    "tiny": ModelConfig(
        vocab_size=260,
        embed_dim=32,
        hidden_dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=4096,
        rope_theta=1e4,
        norm_eps=1e-5,
        tie_embeddings=True,
    ),
}
