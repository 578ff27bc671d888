"""LLaMA-2-13B: as llama2_7b, with Alpaca's rate and epochs for 13B.

Paper: REFINE-AF, arXiv 2505.06548.
Command: python -m refine_af.launch.pipeline --config=llama2_13b --workdir=runs/llama2_13b
Hardware: 8 TPU v5p; with sft.trained=lora also 16 TPU v5e or 8 TPU v6e. See docs/sharding.md.
"""

import dataclasses

from refine_af.config import Experiment, Mesh
from refine_af.configs import llama2_7b


def get_config() -> Experiment:
    """The same numbers but for the model's size."""
    small = llama2_7b.get_config()
    return dataclasses.replace(
        small,
        model=dataclasses.replace(small.model, source="meta-llama/Llama-2-13b-hf"),
        mesh=Mesh(data=-1, fsdp=8),  # 16 do not divide 40 heads, and would hold the cache whole
        sft=dataclasses.replace(small.sft, learning_rate=1e-5, num_epochs=5),
    )
