"""All stages on random weights over bytes, in minutes; what most tests use.

The text is noise, so every filter and every reward is as in a real run but nothing is learnt.
Command: python -m refine_af.launch.pipeline --config=tiny --workdir=runs/tiny
Hardware: any CPU.
"""

from refine_af.config import (
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
    """Smallest run that goes through every stage."""
    return Experiment(
        seed=0,
        model=Model(source="random:tiny", dtype="float32", param_dtype="float32"),
        mesh=Mesh(),
        instructions=Instructions(
            num_instructions=12,
            max_batches=20,
            batch_size=16,
            # Noise gives a usable instruction once in a while; "~" ends one in good time.
            sampling=Sampling(temperature=1.0, max_new_tokens=256, stop=("\n\n", "~")),
        ),
        prompts=Prompts(format="raw", num_demos=1, max_demo_chars=150, accept_unmarked_output=True),
        reward=Reward(),
        ppo=Ppo(
            num_steps=3,
            batch_size=8,
            group_size=2,
            num_epochs=2,
            num_minibatches=2,
            num_microbatches=2,
            learning_rate=1e-3,
            warmup_steps=1,
            checkpoint_every=1,
            num_eval_prompts=2,
            num_eval_samples=2,
            eval_every=2,
            lora=Lora(rank=2, alpha=4.0),
            sampling=Sampling(temperature=1.0, max_new_tokens=32),
        ),
        instances=Instances(
            batch_size=4,
            answers_per_instruction=4,
            sampling=Sampling(temperature=1.0, max_new_tokens=160),
        ),
        sft=Sft(
            format="alpaca",
            num_epochs=2,
            batch_size=4,
            num_microbatches=2,
            learning_rate=1e-3,
            max_length=1024,
            eval_share=0.2,
            checkpoint_every=2,
            lora=Lora(rank=2, alpha=4.0),
        ),
        evaluation=Evaluation(
            num_examples=0, max_instances=2, format="raw", batch_size=24, max_new_tokens=16
        ),
    )
