"""Continue prompts with any model: one text, or a JSONL file of rows with their own parameters."""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from refine_af import base_model, records, tokens
from refine_af.base_model import BaseModel
from refine_af.config import Lora, Mesh, Model, Sampling, from_dict
from refine_af.engine import Request
from refine_af.launch import flags
from refine_af.models import lora
from refine_af.progress import bar

_MODEL = absl_flags.DEFINE_string(
    "model",
    None,
    "Hugging Face or Orbax directory, .gguf file, hub id, random:PRESET, or a bundled name.",
)
_ADAPTER = absl_flags.DEFINE_string(
    "adapter", None, "LoRA adapter of the model, a directory in PEFT's format."
)
_PROMPT = absl_flags.DEFINE_string("prompt", None, "One prompt; its continuation is printed.")
_PROMPTS = absl_flags.DEFINE_string(
    "prompts",
    None,
    'JSONL rows {"prompt": ...} or {"prompt_token_ids": [...]}, with own parameters.',
)
_OUTPUT = absl_flags.DEFINE_string("output", None, "JSONL file to write, with --prompts.")
_FORMAT = absl_flags.DEFINE_enum("format", "raw", ["raw", "chat"], "How prompts are framed.")
_TEMPERATURE = absl_flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
_TOP_P = absl_flags.DEFINE_float("top_p", 1.0, "Nucleus; 1 is no limit.")
_TOP_K = absl_flags.DEFINE_integer("top_k", 0, "Most likely tokens; 0 is no limit.", lower_bound=0)
_MAX_NEW_TOKENS = absl_flags.DEFINE_integer("max_new_tokens", 128, "Tokens to draw at most.")
_SEED = absl_flags.DEFINE_integer("seed", 0, "Row i draws with seed + i.")
_DTYPE = absl_flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the arithmetic.")
_BATCH_SIZE = absl_flags.DEFINE_integer("batch_size", 16, "Rows at a time.", lower_bound=1)

_OWN = {"temperature", "top_p", "top_k", "presence_penalty", "max_new_tokens", "stop"}


def request_of(row: dict[str, Any], number: int, default: Sampling, base: BaseModel) -> Request:
    """Request of a row: its prompt, and its own sampling parameters over the default ones.

    Raises:
        ValueError: the row has no prompt, or a parameter is not usable.
    """
    ids = row.get("prompt_token_ids")
    if ids is None:
        if not isinstance(row.get("prompt"), str):
            raise ValueError(f"row {number}: expected a string 'prompt' or 'prompt_token_ids'")
        ids = tokens.encode_prompt(base.source.tokenizer, row["prompt"], _FORMAT.value)
    vocab = base.config.vocab_size
    usable = isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab for i in ids)
    if not usable:
        raise ValueError(f"row {number}: prompt_token_ids must be integers from 0 to {vocab - 1}")
    own = {name: row[name] for name in _OWN & row.keys()}
    if isinstance(own.get("stop"), str):
        own["stop"] = (own["stop"],)
    try:
        sampling = from_dict(Sampling, dataclasses.asdict(default) | own)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None
    seed = row.get("seed", _SEED.value + number)
    if type(seed) is not int:
        raise ValueError(f"row {number}: seed={seed!r}: expected int")
    return Request(tuple(ids), sampling, seed)


def main() -> None:
    """Read prompts, sample, write rows in the order of the prompts."""
    if (_PROMPT.value is None) == (_PROMPTS.value is None):
        raise ValueError("give either --prompt TEXT or --prompts FILE.jsonl")
    if _PROMPTS.value is None:
        rows: list[dict[str, Any]] = [{"prompt": _PROMPT.value}]
        target = None
    else:
        rows = flags.read_input(Path(_PROMPTS.value), ())
        target = Path(flags.require(_OUTPUT))
    default = Sampling(
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        top_k=_TOP_K.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
    )
    model = Model(source=flags.require(_MODEL), dtype=_DTYPE.value, param_dtype=_DTYPE.value)
    base = base_model.load(model, Mesh())
    requests = [request_of(row, i, default, base) for i, row in enumerate(rows)]
    size = min(_BATCH_SIZE.value, len(requests))
    options, adapter = None, None
    if _ADAPTER.value is not None:
        shape, adapter = lora.read_peft(Path(_ADAPTER.value), base.config)
        options = Lora(**dataclasses.asdict(shape))
    engine = base.engine(size, options)
    budget = sum(r.sampling.max_new_tokens for r in requests)
    with bar("generate", total=budget, unit="token") as progress:

        def count(new: int) -> None:
            progress.update(new)

        completions = engine.generate(base.for_sampling(adapter, options), requests, count)
    if target is None:
        print(completions[0].text)
        return
    written = [
        {
            "prompt": row.get("prompt", ""),
            "completion": completion.text,
            "prompt_token_ids": list(request.prompt_ids),
            "token_ids": list(completion.token_ids),
            "logprobs": list(completion.logprobs),
            "finish_reason": completion.finish_reason,
        }
        for row, request, completion in zip(rows, requests, completions, strict=True)
    ]
    records.write_text(target, "".join(map(records.to_line, written)))


if __name__ == "__main__":
    flags.start(main, resumes=False)
