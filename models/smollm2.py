"""SmolLM2 (Allal et al., arXiv 2502.02737): small LLaMA-shaped models with a tied head."""

from refine_af.models.config import ModelConfig

PRESETS = {
    "smollm2-135m": ModelConfig(
        vocab_size=49_152,
        embed_dim=576,
        hidden_dim=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_positions=8192,
        rope_theta=1e5,
        norm_eps=1e-5,
        tie_embeddings=True,
    ),
}
