"""Sampling, ours and transformers' on torch: batches, mixed lengths, a shared beginning."""

import copy
import dataclasses
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from refine_af import base_model, benchmarks, flops
from refine_af.benchmarks import Limits, Measured, Row
from refine_af.config import Mesh, Model, Sampling
from refine_af.engine import Engine
from refine_af.models import convert, sources
from refine_af.models.config import ModelConfig
from refine_af.requests import Request, TokenIds

_PROMPT, _NEW = 128, 64  # tokens of the plain cases
_PREFIX, _SUFFIX, _AFTER_PREFIX = 900, 32, 48


@dataclasses.dataclass(frozen=True)
class Case:
    """Greedy requests that never end before their length.

    Attributes:
        lengths: new tokens of each request.
        prefix: tokens of a beginning that all share.
    """

    name: str
    num_slots: int
    prompt: int
    lengths: tuple[int, ...]
    prefix: int = 0

    def prompts(self, vocab: int) -> list[TokenIds]:
        """Random ids."""
        rng = np.random.default_rng(0)
        shared = tuple(rng.integers(0, vocab, self.prefix).tolist())
        return [shared + tuple(rng.integers(0, vocab, self.prompt).tolist()) for _ in self.lengths]


def mixed_lengths() -> tuple[int, ...]:
    """64 lengths from 8 to 256 with a heavy tail, 64 on average (log-normal, median 40)."""
    drawn = np.random.default_rng(0).lognormal(math.log(40), 1.0, 64)
    return tuple(np.clip(np.round(drawn), 8, 256).astype(int).tolist())


CASES = {
    case.name: case
    for case in (
        *(Case(f"batch{n}", n, _PROMPT, (_NEW,) * n) for n in (1, 16, 32)),
        Case("mixed", 16, _PROMPT, mixed_lengths()),
        Case("static", 16, _PROMPT, mixed_lengths()),  # the same, against ours without refilling
        Case("prefix", 32, _SUFFIX, (_AFTER_PREFIX,) * 32, prefix=_PREFIX),
    )
}
SHORT = ["batch1", "batch16", "mixed", "prefix"]


def rows(model: Model, limits: Limits, repeats: int, names: list[str]) -> Iterator[Row]:
    """Lines of the table, as they are measured; each side of a case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        config, _ = benchmarks.in_process(export, model.source, f"{folder}/model")
        yield from _rows(model, limits, repeats, names, config, f"{folder}/model")


def export(source: str, folder: str) -> ModelConfig:
    """Write the model as transformers reads it."""
    opened = sources.open_model(source)
    convert.export(opened, opened.weights, Path(folder))
    return opened.config


def _rows(
    model: Model, limits: Limits, repeats: int, names: list[str], config: ModelConfig, folder: str
) -> Iterator[Row]:
    for name in names:
        case = CASES[name]
        ours = benchmarks.isolated(measure_ours, model, name, repeats, False)
        compare: list[tuple[str, Callable[..., Measured], tuple[Any, ...]]] = [
            (
                "transformers generate",
                measure_transformers,
                (folder, model.dtype, name, repeats, False),
            )
        ]
        if name == "static":
            static = (model, name, repeats, True)
            compare = [("ours in static batches", measure_ours, static)]
        if case.prefix:
            cached = (folder, model.dtype, name, repeats, True)
            compare.append(("transformers, prefix cached", measure_transformers, cached))
        for reference_name, function, arguments in compare:
            reference = benchmarks.isolated(function, *arguments)
            limit = limit_seconds(case, config, model.dtype, limits)
            yield benchmarks.row("sample", name, "tokens/s", ours, reference, reference_name, limit)


def limit_seconds(case: Case, config: ModelConfig, dtype: str, limits: Limits) -> float:
    """Least time for a case: products of all prompts, then of steps that read all weights.

    A step takes the longer of reading the weights and multiplying with them; attention is left
    out, and slots are taken to be always full. A prompt meets the head at its end only.
    """
    weights = flops.forward(config, 1, 1) / 2
    prompt_tokens = case.prefix + case.prompt * len(case.lengths)
    steps = sum(case.lengths) / case.num_slots
    step = max(
        weights * jax.numpy.dtype(dtype).itemsize / limits.bandwidth,
        2 * weights * case.num_slots / limits.flops,
    )
    reading = flops.forward(config, prompt_tokens, len(case.lengths))
    return reading / limits.flops + steps * step


def measure_ours(model: Model, name: str, repeats: int, static: bool) -> Measured:
    """Useful tokens a second; `static`: batches of `num_slots` without refilling."""
    case, base = CASES[name], base_model.load(model, Mesh())
    engine: Engine = dataclasses.replace(base.engine(case.num_slots), eos_ids=())
    params = base.for_sampling()
    requests = [
        Request(ids, Sampling(temperature=0.0, max_new_tokens=length))
        for ids, length in zip(case.prompts(base.config.vocab_size), case.lengths, strict=True)
    ]
    size = case.num_slots if static else len(requests)

    def run() -> float:
        for first in range(0, len(requests), size):
            engine.generate(params, requests[first : first + size])
        return sum(case.lengths)

    return benchmarks.measure(run, repeats)


def measure_transformers(
    folder: str, dtype: str, name: str, repeats: int, cached: bool
) -> Measured:
    """Useful tokens a second of `generate` in static batches; `cached`: the prefix is read once.

    Args:
        folder: Hugging Face directory of the model.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # `past_key_values` until 6.0
    case = CASES[name]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    ).eval()
    theirs.generation_config.eos_token_id = None
    ids = torch.tensor(case.prompts(theirs.config.vocab_size))

    @torch.no_grad()
    def run(ids: torch.Tensor = ids, most: int = max(case.lengths)) -> float:
        before: Any = None
        if cached:
            before = theirs(ids[:1, : case.prefix], use_cache=True).past_key_values
        for first in range(0, len(ids), case.num_slots):
            batch = ids[first : first + case.num_slots]
            past = copy.deepcopy(before)
            if past is not None:
                past.batch_repeat_interleave(len(batch))
            theirs.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=min(max(case.lengths[first : first + case.num_slots]), most),
                do_sample=False,
                pad_token_id=0,
                past_key_values=past,
            )
        return sum(case.lengths)

    run(ids[:1], 2)  # nothing is compiled there: this warms up, and long cases are timed once
    long = (case.prefix + case.prompt + max(case.lengths)) * len(case.lengths) > 1 << 13
    return benchmarks.measure(run, 0 if long else repeats)
