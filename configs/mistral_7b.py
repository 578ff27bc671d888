"""Mistral-7B v0.1, with its sliding window: as llama2_7b but for the model and its licence.

Paper: REFINE-AF, arXiv 2505.06548.
Command: python -m refine_af.launch.pipeline --config=mistral_7b --workdir=runs/mistral_7b
Hardware: 8 TPU v6e or v5p; for 16 TPU v5e see docs/sharding.md.
"""

import dataclasses

from refine_af.config import DataSet, Experiment
from refine_af.configs import llama2_7b


def get_config() -> Experiment:
    """The same numbers."""
    llama = llama2_7b.get_config()
    return dataclasses.replace(
        llama,
        model=dataclasses.replace(llama.model, source="mistralai/Mistral-7B-v0.1"),
        dataset=DataSet(license="apache-2.0"),
    )
