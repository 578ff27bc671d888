"""Gemma-2 (Gemma Team, arXiv 2408.00118): four norms a layer, soft caps, half the layers local."""

from typing import Any

from refine_af.models import llama2
from refine_af.models.config import ModelConfig
from refine_af.models.family import Family, Keys

KEYS: Keys = {
    **llama2.KEYS,
    "layers/attention_post_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", False),
    "layers/feed_forward_norm/scale": ("model.layers.{}.pre_feedforward_layernorm.weight", False),
    "layers/feed_forward_post_norm/scale": (
        "model.layers.{}.post_feedforward_layernorm.weight",
        False,
    ),
}
STRUCTURE = {
    "norm_offset": 1.0,
    "post_norms": True,
    "activation": "gelu_tanh",
    "scale_embeddings": True,
}
FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    keys=KEYS,
    structure=STRUCTURE,
    numbers={
        "query_pre_attn_scalar": "query_pre_attn_scalar",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logit_softcap",
    },
    required={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
)
_BASE: dict[str, Any] = {
    **STRUCTURE,
    "family": "gemma2",
    "vocab_size": 256_000,
    "max_positions": 8192,
    "rope_theta": 1e4,
    "norm_eps": 1e-6,
    "tie_embeddings": True,
    "sliding_window": 4096,
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
}
# embed_dim, hidden_dim, num_layers, num_heads, num_kv_heads, head_dim, query_pre_attn_scalar
_SIZES = {
    "2b": (2304, 9216, 26, 8, 4, 256, 256),
    "9b": (3584, 14_336, 42, 16, 8, 256, 256),
    "27b": (4608, 36_864, 46, 32, 16, 128, 144),
}
PRESETS = {
    f"gemma2-{size}": ModelConfig(
        **_BASE,
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        global_layers=tuple(range(1, num_layers, 2)),
    )
    for size, (
        embed_dim,
        hidden_dim,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        scalar,
    ) in _SIZES.items()
}
