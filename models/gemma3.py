"""Gemma-3, text only (Gemma Team, arXiv 2503.19786): Gemma-2 with norms of queries and keys.

Five of six layers are local, with a rotary base of their own; the soft caps are gone.
"""

from typing import Any

from refine_af.models import gemma2
from refine_af.models.config import LinearRope, ModelConfig
from refine_af.models.family import Family

FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys={
        **gemma2.KEYS,
        "layers/attention/q_norm/scale": ("model.layers.{}.self_attn.q_norm.weight", False),
        "layers/attention/k_norm/scale": ("model.layers.{}.self_attn.k_norm.weight", False),
    },
    structure={**gemma2.STRUCTURE, "qk_norm": True},
    numbers={
        "query_pre_attn_scalar": "query_pre_attn_scalar",
        "final_logit_softcapping": "logit_softcap",
    },
    required={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,  # transformers would not apply it
        "use_bidirectional_attention": False,
    },
)
_BASE: dict[str, Any] = {
    **FAMILY.structure,
    "family": "gemma3_text",
    "rope_theta": 1e6,
    "local_rope_theta": 1e4,
    "norm_eps": 1e-6,
    "tie_embeddings": True,
}
_SMALL: dict[str, Any] = {"vocab_size": 262_144, "max_positions": 32_768, "sliding_window": 512}
_LARGE: dict[str, Any] = {  # the language model of a checkpoint that also reads images
    "vocab_size": 262_208,
    "max_positions": 131_072,
    "sliding_window": 1024,
    "rope_scaling": LinearRope(8.0),
}
# embed_dim, hidden_dim, num_layers, num_heads, num_kv_heads, head_dim, query_pre_attn_scalar
_SIZES = {
    "270m": (640, 2048, 18, 4, 1, 256, 256),
    "1b": (1152, 6912, 26, 4, 1, 256, 256),
    "4b": (2560, 10_240, 34, 8, 4, 256, 256),
    "12b": (3840, 15_360, 48, 16, 8, 256, 256),
    "27b": (5376, 21_504, 62, 32, 16, 128, 168),
}
PRESETS = {
    f"gemma3-{size}": ModelConfig(
        **_BASE,
        **(_SMALL if size in ("270m", "1b") else _LARGE),
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        global_layers=tuple(range(5, num_layers, 6)),
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
