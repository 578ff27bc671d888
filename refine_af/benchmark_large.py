"""Large models on an accelerator: decoding behind long contexts, updates, whole PPO steps.

The weights are random (`--model=random:llama2-7b`). Decoding is timed apart from the reading of
prompts: as the difference between writing few and many tokens. `transformers` decodes the same
lengths; updates and steps have no reference here, only the limit of the machine.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import jax
import numpy as np

from refine_af import base_model, benchmark_update, benchmarks, flops, policy_update, rollout
from refine_af.benchmark_sampling import Case
from refine_af.benchmark_update import Shape
from refine_af.benchmarks import Limits, Measured, Row
from refine_af.config import Mesh, Model, Sampling
from refine_af.engine import Engine
from refine_af.mesh import shard_batch
from refine_af.models import cache, sources
from refine_af.models.config import ModelConfig
from refine_af.policy import Policy
from refine_af.requests import Request
from refine_af.rollout import Layout

_PROMPT, _FEW, _MANY = 928, 32, 160  # 1,024 columns are filled on average between the two
DECODE = {"decode1": 1, "decode64": 64}  # slots
UPDATE = {"update2k": Shape(rows=16, prompt=1024, answer=1024, microbatches=4, remat="cheap")}
STEP = {"ppo": Shape(rows=64, prompt=512, answer=512, microbatches=16, remat="cheap")}
CASES = (*DECODE, *UPDATE, *STEP)


def rows(model: Model, limits: Limits, repeats: int, names: list[str]) -> Iterator[Row]:
    """Lines of the table, as they are measured; each side of a case in a process of its own.

    Raises:
        ValueError: the model's context is too short.
    """
    config = sources.open_model(model.source).config
    shapes = {name: shape.prompt + shape.answer for name, shape in (UPDATE | STEP).items()}
    wanted = max((shapes.get(name, _PROMPT + _MANY) for name in names), default=0)
    if config.max_positions < wanted:
        raise ValueError(
            f"--model={model.source}: suite large needs a context of {wanted} tokens, this model's "
            f"is {config.max_positions}; take random:llama2-7b, or other --cases"
        )
    for name in names:
        if name not in DECODE:
            shape, measure = (
                (UPDATE[name], measure_update) if name in UPDATE else (STEP[name], measure_ppo)
            )
            ours = benchmarks.isolated(measure, model, shape, repeats)
            limit = benchmark_update.limit_seconds(config, shape, limits)
            if name in STEP:  # the rollout is also read by policy and reference, and written
                limit *= 2
                limit += shape.answer * step_seconds(
                    config, shape.rows, shape.prompt + shape.answer // 2, model.dtype, limits
                )
            yield benchmarks.row("large", name, "tokens/s", ours, None, "", limit)
            continue
        ours = benchmarks.isolated(measure_ours, model, DECODE[name], repeats)
        theirs = benchmarks.isolated(measure_transformers, model, DECODE[name], repeats)
        limit = limit_seconds(config, DECODE[name], model.dtype, limits)
        yield benchmarks.row(
            "large", name, "tokens/s", ours, theirs, "transformers generate", limit
        )


def limit_seconds(config: ModelConfig, slots: int, dtype: str, limits: Limits) -> float:
    """Least time of the steps from `_FEW` to `_MANY` tokens."""
    context = _PROMPT + (_FEW + _MANY) // 2
    return (_MANY - _FEW) * step_seconds(config, slots, context, dtype, limits)


def step_seconds(
    config: ModelConfig, slots: int, context: int, dtype: str, limits: Limits
) -> float:
    """Least time of a token for every slot: all weights and caches are read."""
    weights = flops.forward(config, 1, 1) / 2
    read = weights * jax.numpy.dtype(dtype).itemsize
    read += cache.num_bytes(dataclasses.replace(config, dtype=dtype), slots, context)
    return max(read / limits.bandwidth, 2 * weights * slots / limits.flops)


def measure_ours(model: Model, slots: int, repeats: int) -> Measured:
    """Tokens a second of the engine, all slots filled."""
    base = base_model.load(model, Mesh())
    engine: Engine = dataclasses.replace(base.engine(slots), eos_ids=())
    params = base.for_sampling()
    prompts = Case("", slots, _PROMPT, (0,) * slots).prompts(base.config.vocab_size)
    del base

    def run(length: int) -> None:
        sampling = Sampling(temperature=0.0, max_new_tokens=length)
        engine.generate(params, [Request(ids, sampling) for ids in prompts])

    return dataclasses.replace(_decoding(run, slots, repeats), peak_mib=benchmarks.device_peak())


def measure_transformers(model: Model, slots: int, repeats: int) -> Measured:
    """Tokens a second of `generate`, on a GPU where there is one."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = sources.open_model(model.source)
    kind = getattr(torch, model.dtype)
    with torch.device(device):
        raw: dict[str, Any] = {**shape.raw}
        given = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
        theirs = transformers.AutoModelForCausalLM.from_config(given, dtype=kind).eval()
    theirs.generation_config.eos_token_id = None
    prompts = Case("", slots, _PROMPT, (0,) * slots).prompts(shape.config.vocab_size)
    ids = torch.tensor(prompts, device=device)

    @torch.no_grad()
    def run(length: int) -> None:
        theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        ).cpu()

    found = _decoding(run, slots, repeats)
    if device == "cpu":
        return found
    return dataclasses.replace(found, peak_mib=torch.cuda.max_memory_allocated() / 2**20)


def _decoding(run: Callable[[int], None], slots: int, repeats: int) -> Measured:
    """`run(length)` answers all prompts; medians of `repeats` runs of each length."""

    def seconds(length: int) -> float:
        began = time.perf_counter()
        run(length)
        return time.perf_counter() - began

    first = seconds(_MANY) + seconds(_FEW)  # compiles
    few, many = (median(seconds(n) for _ in range(repeats)) for n in (_FEW, _MANY))
    steps = many - few
    if steps <= 0:
        raise ValueError(f"{_MANY} tokens took no longer than {_FEW}: something else is running")
    return Measured(slots * (_MANY - _FEW) / steps, max(first - few - many, 0.0) + steps, steps)


def measure_update(model: Model, shape: Shape, repeats: int) -> Measured:
    """Tokens a second of a LoRA update."""
    base = base_model.load(model, Mesh())
    rng = np.random.default_rng(0)
    ids = rng.integers(0, base.config.vocab_size, (shape.rows, shape.prompt + shape.answer))
    step = benchmark_update.updater(base, shape, ids, benchmark_update.random_reading(shape, rng))
    measured = benchmarks.measure(lambda: step()[0], repeats)
    return dataclasses.replace(measured, peak_mib=benchmarks.device_peak())


def measure_ppo(model: Model, shape: Shape, repeats: int) -> Measured:
    """New tokens a second of whole PPO steps: sample, read, update. Scoring is left out."""
    base, options = base_model.load(model, Mesh()), shape.options
    policy = Policy(base, options)
    engine: Engine = dataclasses.replace(base.engine(shape.rows), eos_ids=())
    state = benchmark_update.new_state(base, options)
    update = policy_update.make_update(policy.definition, options, base.mesh, state)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, base.config.vocab_size, (shape.rows, shape.prompt)).tolist()
    requests = [Request(tuple(ids), options.sampling, seed=i) for i, ids in enumerate(prompts)]
    layout = Layout(shape.prompt + shape.answer, shape.answer, shape.microbatches)

    def once() -> float:
        nonlocal state
        weights = policy.for_sampling(state.params)
        answers = engine.generate(weights, requests)
        del weights
        scores = rng.normal(size=shape.rows).tolist()
        rows = shard_batch(base.mesh, rollout.build(requests, answers, scores, layout))
        definitions, params = (policy.definition, base.definition), (base.params, state.params)
        reading = rollout.jit_read(*definitions, *params, rows, 1.0, shape.microbatches)
        state, metrics = update(base.params, state, rows, reading, jax.random.key(0))
        jax.block_until_ready(metrics)
        return shape.rows * shape.answer

    measured = benchmarks.measure(once, repeats)
    return dataclasses.replace(measured, peak_mib=benchmarks.device_peak())
