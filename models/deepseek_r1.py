"""DeepSeek-R1-Distill (DeepSeek-AI, arXiv 2501.12948): the shapes of LLaMA-3 and Qwen-2.5."""

import dataclasses
from typing import Any

from refine_af.models import llama3, qwen2

# Tuned from Qwen2.5-Math, whose rotary base is that of a shorter context.
_MATH: dict[str, Any] = {"rope_theta": 1e4, "tie_embeddings": False}

PRESETS = {
    "deepseek-r1-distill-qwen-1.5b": dataclasses.replace(qwen2.PRESETS["qwen2.5-1.5b"], **_MATH),
    "deepseek-r1-distill-qwen-7b": dataclasses.replace(qwen2.PRESETS["qwen2.5-7b"], **_MATH),
    "deepseek-r1-distill-qwen-14b": qwen2.PRESETS["qwen2.5-14b"],
    "deepseek-r1-distill-qwen-32b": qwen2.PRESETS["qwen2.5-32b"],
    "deepseek-r1-distill-llama-8b": llama3.PRESETS["llama3.1-8b"],
    "deepseek-r1-distill-llama-70b": llama3.PRESETS["llama3.1-70b"],
}
