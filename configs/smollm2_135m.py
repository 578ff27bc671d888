"""The whole method on SmolLM2-135M-Instruct, on a laptop's CPU.

Paper: REFINE-AF, arXiv 2505.06548 (there with 7B and 13B models).
Command: make demo, or python -m refine_af.launch.pipeline --config=smollm2_135m --workdir=runs/demo
Hardware: 2 CPU cores, 4 GiB. See the README for the measured time and scores.
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
    """A demonstration: every number is small, nothing is left out."""
    return Experiment(
        seed=0,
        model=Model(source="smollm2-135m-instruct", dtype="bfloat16", param_dtype="bfloat16"),
        mesh=Mesh(),
        instructions=Instructions(
            num_instructions=80,
            max_batches=12,
            batch_size=16,
            # Self-Instruct's top-p .5 was tuned for GPT-3; this model repeats itself with it.
            sampling=Sampling(
                temperature=0.7,
                top_p=0.8,
                presence_penalty=1.0,
                max_new_tokens=128,
                stop=("\n\n", "\n16", "16.", "16 ."),
            ),
        ),
        prompts=Prompts(
            format="raw", num_demos=1, max_demo_chars=160, accept_unmarked_output=False
        ),
        # Our oracle's own scale; InstructMining's sign of `und` would teach unclear text.
        reward=Reward(
            oracle="trained:smollm2-135m-instruct", rew=0.2, und=0.3, nat=0.3, coh=0.5, bias=0.0
        ),
        ppo=Ppo(
            num_steps=16,
            batch_size=32,
            num_epochs=1,
            num_minibatches=4,
            num_microbatches=1,
            remat="cheap",
            learning_rate=3e-4,
            warmup_steps=2,
            kl_coef=0.02,
            checkpoint_every=4,
            num_eval_prompts=16,
            eval_every=8,
            lora=Lora(),
            sampling=Sampling(temperature=1.0, max_new_tokens=64, stop=("\n\n", "\nTask:")),
        ),
        instances=Instances(
            batch_size=16,
            answers_per_instruction=2,
            sampling=Sampling(
                temperature=0.7, top_p=0.9, max_new_tokens=96, stop=("\n\n", "\nTask:")
            ),
        ),
        dataset=DataSet(license="apache-2.0"),  # the model's
        sft=Sft(
            format="chat",
            num_epochs=2,
            batch_size=16,
            num_microbatches=2,
            learning_rate=2e-4,
            max_length=256,
            checkpoint_every=4,
            lora=Lora(),
        ),
        evaluation=Evaluation(
            num_examples=0, max_instances=20, format="chat", batch_size=48, max_new_tokens=32
        ),
    )
