"""Does PPO help? Both arms on SmolLM2-135M-Instruct, 500 instructions; see docs/experiment.md.

Paper: REFINE-AF, arXiv 2505.06548, table of 5K, 10K and 15K instructions (there with 7B and 13B
models).
Command: python -m refine_af.launch.pipeline --config=experiment --workdir=runs/experiment0
    --arms=refine_af,self_instruct; docs/experiment.md has the three seeds
Hardware: 2 CPU cores, 8 GiB; half an hour a seed.
"""

import dataclasses

from refine_af.config import Experiment
from refine_af.configs import smollm2_135m


def get_config() -> Experiment:
    """The demonstration with more of everything."""
    demo = smollm2_135m.get_config()
    return dataclasses.replace(
        demo,
        instructions=dataclasses.replace(
            demo.instructions, num_instructions=500, max_batches=60, batch_size=32
        ),
        ppo=dataclasses.replace(demo.ppo, num_eval_prompts=32, remat="full"),
        instances=dataclasses.replace(demo.instances, batch_size=48, answers_per_instruction=1),
        sft=dataclasses.replace(demo.sft, num_epochs=1),
        evaluation=dataclasses.replace(demo.evaluation, max_instances=100, max_new_tokens=64),
    )
