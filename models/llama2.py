"""LLaMA-2 (Touvron et al., arXiv 2307.09288): presets and the Hugging Face key table."""

from typing import Any

from refine_af.models.config import ModelConfig
from refine_af.models.family import Family, Keys

KEYS: Keys = {
    "embedding": ("model.embed_tokens.weight", False),
    "layers/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", False),
    "layers/attention/q/kernel": ("model.layers.{}.self_attn.q_proj.weight", True),
    "layers/attention/k/kernel": ("model.layers.{}.self_attn.k_proj.weight", True),
    "layers/attention/v/kernel": ("model.layers.{}.self_attn.v_proj.weight", True),
    "layers/attention/o/kernel": ("model.layers.{}.self_attn.o_proj.weight", True),
    "layers/feed_forward_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", False),
    "layers/feed_forward/gate/kernel": ("model.layers.{}.mlp.gate_proj.weight", True),
    "layers/feed_forward/up/kernel": ("model.layers.{}.mlp.up_proj.weight", True),
    "layers/feed_forward/down/kernel": ("model.layers.{}.mlp.down_proj.weight", True),
    "final_norm/scale": ("model.norm.weight", False),
    "head": ("lm_head.weight", True),
}
FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=KEYS,
    required={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    gguf="llama",
    gguf_permutes=True,
)

_BASE: dict[str, Any] = {
    "vocab_size": 32_000,
    "max_positions": 4096,
    "rope_theta": 1e4,
    "norm_eps": 1e-5,
    "tie_embeddings": False,
    "head_dim": 128,
}
PRESETS = {
    "llama2-7b": ModelConfig(
        **_BASE, embed_dim=4096, hidden_dim=11_008, num_layers=32, num_heads=32, num_kv_heads=32
    ),
    "llama2-13b": ModelConfig(
        **_BASE, embed_dim=5120, hidden_dim=13_824, num_layers=40, num_heads=40, num_kv_heads=40
    ),
    "llama2-70b": ModelConfig(
        **_BASE, embed_dim=8192, hidden_dim=28_672, num_layers=80, num_heads=64, num_kv_heads=8
    ),
}
