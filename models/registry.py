"""Families (key tables and `config.json` readers) and presets, as plain dictionaries."""

from refine_af.models import llama2, mistral, smollm2, tiny
from refine_af.models.config import ModelConfig

PRESETS: dict[str, ModelConfig] = {
    **llama2.PRESETS,
    **mistral.PRESETS,
    **smollm2.PRESETS,
    **tiny.PRESETS,
}

# `model_type` of a Hugging Face config.json -> our family; all share one key table so far.
FAMILIES = {"llama": llama2, "mistral": mistral}
