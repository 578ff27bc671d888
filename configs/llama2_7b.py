"""The paper's smallest setting: LLaMA-2-7B, 5,000 instructions, on 8 or 16 chips.

Paper: REFINE-AF, arXiv 2505.06548; Self-Instruct's decoding (arXiv 2212.10560) and Alpaca's
fine-tuning. What the paper does not say is ours [U]: all of PPO, the prompts of stages 2 and 3.
Command: python -m refine_af.launch.pipeline --config=llama2_7b --workdir=runs/llama2_7b
Hardware: 16 TPU v5e, or 8 larger ones; docs/sharding.md has what was compiled. Needs access to the
model on the hub, and both oracles as docs/accelerators.md says.
"""

from refine_af.config import (
    DataSet,
    Evaluation,
    Experiment,
    Instances,
    Instructions,
    Lora,
    Mesh,
    Model,
    Ppo,
    Prompts,
    Reward,
    Sampling,
    Sft,
)


def get_config() -> Experiment:
    """Numbers of the method where they are known."""
    return Experiment(
        seed=0,
        model=Model(source="meta-llama/Llama-2-7b-hf", dtype="bfloat16", param_dtype="bfloat16"),
        mesh=Mesh(),  # weights and batches over all devices there are
        instructions=Instructions(
            num_instructions=5_000,
            max_batches=200,
            batch_size=128,
            sampling=Sampling(
                temperature=0.7,
                top_p=0.5,
                presence_penalty=2.0,
                max_new_tokens=1024,
                stop=("\n\n", "\n16", "16.", "16 ."),
            ),
        ),
        prompts=Prompts(
            format="raw", num_demos=3, max_demo_chars=600, accept_unmarked_output=False
        ),
        reward=Reward(oracle="oasst:oracles/oasst-rm,unieval:oracles/unieval-dialog"),
        ppo=Ppo(
            num_steps=150,
            batch_size=64,
            num_epochs=4,
            num_minibatches=4,
            num_microbatches=1,
            remat="cheap",
            learning_rate=1e-5,
            warmup_steps=20,
            checkpoint_every=10,
            num_eval_prompts=128,
            eval_every=25,
            lora=Lora(),
            sampling=Sampling(temperature=1.0, max_new_tokens=512, stop=("\nTask:",)),
        ),
        instances=Instances(
            batch_size=128,
            answers_per_instruction=1,
            sampling=Sampling(temperature=0.0, max_new_tokens=350, stop=("\nTask:",)),
        ),
        sft=Sft(
            format="alpaca",
            trained="full",
            num_epochs=3,
            batch_size=128,
            num_microbatches=4,
            learning_rate=2e-5,
            max_length=512,
            checkpoint_every=25,
            lora=Lora(),
        ),
        evaluation=Evaluation(num_examples=0, format="raw", batch_size=128),
        dataset=DataSet(license="llama2"),
    )
