"""Families (key tables, words of `config.json`) and presets, as plain dictionaries."""

from refine_af.models import (
    deepseek_r1,
    gemma2,
    gemma3,
    llama2,
    llama3,
    mistral,
    qwen2,
    qwen3,
    smollm2,
    tiny,
)
from refine_af.models.config import ModelConfig
from refine_af.models.family import Family

PRESETS: dict[str, ModelConfig] = {
    **llama2.PRESETS,
    **llama3.PRESETS,
    **mistral.PRESETS,
    **qwen2.PRESETS,
    **qwen3.PRESETS,
    **gemma2.PRESETS,
    **gemma3.PRESETS,
    **deepseek_r1.PRESETS,
    **smollm2.PRESETS,
    **tiny.PRESETS,
}

# By `model_type` of a Hugging Face config.json.
FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (llama2, mistral, qwen2, qwen3, gemma2, gemma3)
}
