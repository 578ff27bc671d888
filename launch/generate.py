"""Continue prompts with any model: one text, or a JSONL file of rows with their own parameters.

A row that cannot be used is answered with an `error` in its place; the other rows go on.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from refine_af import base_model, interruptions, records, tokens
from refine_af.base_model import BaseModel
from refine_af.config import Lora, Model, Sampling
from refine_af.config_reading import from_dict
from refine_af.launch import _files, flags
from refine_af.models import lora, processes
from refine_af.models.transformer import Params
from refine_af.models.writing import WriteError
from refine_af.progress import bar
from refine_af.requests import Completion, Request

_MODEL = absl_flags.DEFINE_string("model", None, flags.MODEL_HELP)
_ADAPTER = absl_flags.DEFINE_string(
    "adapter", None, "LoRA adapter of the model, a directory in PEFT's format."
)
_PROMPT = absl_flags.DEFINE_string("prompt", None, "One prompt; its continuation is printed.")
_PROMPTS = absl_flags.DEFINE_string(
    "prompts",
    None,
    'JSONL rows {"prompt": ...} or {"prompt_token_ids": [...]}, with own sampling parameters: '
    "those of the flags, presence_penalty, stop, stop_token_ids.",
)
_OUTPUT = absl_flags.DEFINE_string("output", None, "JSONL file to write, with --prompts.")
_AS_COMPLETED = absl_flags.DEFINE_bool(
    "as_completed",
    False,
    "Write rows as they finish, each with its `row` and `sample`; else in order.",
)
_FULL_LOGPROBS = absl_flags.DEFINE_bool(
    "full_logprobs", False, "Write also log-probabilities under softmax(logits / temperature)."
)
_FORMAT = flags.format_flag()
_TEMPERATURE = absl_flags.DEFINE_float(
    "temperature", 0.0, "Of sampling; 0 takes the likeliest token."
)
_TOP_P = absl_flags.DEFINE_float(
    "top_p", 1.0, "Draw from the likeliest tokens that hold this probability; 1: all."
)
_TOP_K = absl_flags.DEFINE_integer(
    "top_k", 0, "Draw from this many of the likeliest tokens; 0: all."
)
_MIN_P = absl_flags.DEFINE_float(
    "min_p", 0.0, "Draw from tokens with at least this share of the likeliest one's probability."
)
_REPETITION_PENALTY = absl_flags.DEFINE_float(
    "repetition_penalty", 1.0, "Above 1: makes tokens of prompt and answer less likely; 1: off."
)
_MAX_NEW_TOKENS = absl_flags.DEFINE_integer("max_new_tokens", 128, "Tokens of an answer at most.")
_NUM_SAMPLES = absl_flags.DEFINE_integer("num_samples", 1, "Answers to each prompt.", lower_bound=1)
_SEED = absl_flags.DEFINE_integer(
    "seed", 0, "Random seed; the i-th prompt, from 0, draws with seed + i."
)
_DTYPE = flags.dtype_flag("float32")
_BATCH_SIZE = absl_flags.DEFINE_integer(
    "batch_size", 16, "Answers written together.", lower_bound=1
)
_MESH = flags.mesh_flag()
_INT8_WEIGHTS = absl_flags.DEFINE_bool(
    "int8_weights",
    False,
    "Round the weights to int8: half of what bfloat16 takes; log-probabilities drift.",
)
_INT8_CACHE = absl_flags.DEFINE_bool(
    "int8_cache",
    False,
    "Keep keys and values as int8: half of what bfloat16 takes; log-probabilities drift.",
)
_DRAFT_TOKENS = flags.draft_tokens_flag()

_MOST_SAMPLES = 100_000  # of a row; each is a request in memory
_OWN = {field.name for field in dataclasses.fields(Sampling)}
_KEYS = _OWN | {"prompt", "prompt_token_ids", "seed", "num_samples"}

Row = dict[str, Any]


def request_of(row: Row, number: int, default: Row, base: BaseModel) -> Request:
    """Request of a row: its prompt, and its own sampling parameters over the default ones.

    Raises:
        ValueError: the row has no prompt, or a parameter is not usable.
    """
    for name in row.keys() - _KEYS:
        if near := difflib.get_close_matches(name, _KEYS, n=1, cutoff=0.8):
            raise ValueError(f"unknown {name!r}; did you mean {near[0]!r}?")
    ids = row.get("prompt_token_ids")
    if ids is None:
        if not isinstance(row.get("prompt"), str):
            raise ValueError("expected a string 'prompt' or 'prompt_token_ids'")
        try:
            row["prompt"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not a text: {error.reason}") from None
        ids = tokens.encode_prompt(base.source.tokenizer, row["prompt"], _FORMAT.value)
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError("prompt_token_ids must be a list of integers")
    own = {name: row[name] for name in _OWN & row.keys()}
    if isinstance(own.get("stop"), str):
        own["stop"] = (own["stop"],)
    sampling = from_dict(Sampling, default | own)
    count = row.get("num_samples", 1)
    if type(count) is not int or count < 1:
        raise ValueError(f"num_samples={count!r}: expected an int of at least 1")
    if count > _MOST_SAMPLES:
        raise ValueError(f"num_samples={count}: expected at most {_MOST_SAMPLES}")
    seed = row.get("seed", _SEED.value + number)
    if type(seed) is not int:
        raise ValueError(f"seed={seed!r}: expected int")
    return Request(tuple(ids), sampling, seed)


def read_rows(path: Path) -> Iterator[tuple[Row, str]]:
    """(row, what is wrong with its line) for every line that is not blank.

    Raises:
        ValueError: there is no such file.
    """
    _files.check_input(path)
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield {}, f"line {number} is not UTF-8 ({error.reason} at byte {error.start})"
        except (ValueError, RecursionError) as error:
            yield {}, f"line {number} is not valid JSON ({error})"
        else:
            usable = isinstance(row, dict)
            yield (row, "") if usable else ({}, f"line {number} is not a JSON object")


@dataclasses.dataclass(frozen=True)
class Asked:
    """One answer of the output: a row's request, or what is wrong with the row."""

    number: int  # of the row
    row: Row
    request: Request | None
    sample: int = 0  # of the row
    fault: str = ""


def asked_of(rows: Iterable[tuple[Row, str]], base: BaseModel) -> Iterator[Asked]:
    """All answers that are asked for, in order."""
    default = {
        "temperature": _TEMPERATURE.value,
        "top_p": _TOP_P.value,
        "top_k": _TOP_K.value,
        "min_p": _MIN_P.value,
        "presence_penalty": 0.0,
        "repetition_penalty": _REPETITION_PENALTY.value,
        "max_new_tokens": _MAX_NEW_TOKENS.value,
        "stop": (),
        "stop_token_ids": (),
    }
    for number, (row, fault) in enumerate(rows):
        try:
            if fault:
                raise ValueError(fault)
            request = request_of(row, number, default, base)
        except ValueError as error:
            yield Asked(number, row, None, fault=str(error))
        else:
            count = row.get("num_samples", _NUM_SAMPLES.value)
            for i, sample in enumerate(request.samples(count)):
                yield Asked(number, row, sample, i)


def read_adapter(base: BaseModel) -> tuple[Lora | None, Params | None]:
    """The adapter that is asked for.

    Raises:
        ValueError: it cannot be read, or is not one of this model.
    """
    if _ADAPTER.value is None:
        return None, None
    shape, adapter = lora.read_peft(Path(_ADAPTER.value), base.config)
    return Lora(**dataclasses.asdict(shape)), adapter


def completions(
    base: BaseModel, asked: Sequence[Asked], options: Lora | None, adapter: Params | None
) -> Iterator[tuple[int, Completion]]:
    """(place in `asked`, completion) as they finish, under a progress bar; faults come first."""
    usable = []
    for place, one in enumerate(asked):
        if one.request is None:
            yield place, Completion("", (), (), (), "error", one.fault)
        else:
            usable.append((place, one.request))
    if not usable:
        return
    int8 = _INT8_WEIGHTS.value
    engine = base.engine(_BATCH_SIZE.value, int8_weights=int8, int8_cache=_INT8_CACHE.value)
    params = base.for_sampling(adapter, options, int8_weights=int8)
    with bar("generate", total=len(usable), unit="completion") as progress:
        requests = [request for _, request in usable]
        for i, completion in engine.stream(params, requests, progress.count_tokens):
            progress.update()
            yield usable[i][0], completion


def in_order(finished: Iterable[tuple[int, Completion]]) -> Iterator[tuple[int, Completion]]:
    """The same, each as soon as all before it have come."""
    waiting: dict[int, Completion] = {}
    following = 0
    for place, completion in finished:
        waiting[place] = completion
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1


def output_row(asked: Asked, completion: Completion) -> Row:
    """What is written for a completion."""
    prompt = asked.row.get("prompt", "")
    if isinstance(prompt, str):
        prompt = prompt.encode(errors="replace").decode()
    made = {
        "prompt": prompt,
        "completion": completion.text,
        "prompt_token_ids": list(asked.request.prompt_ids) if asked.request else [],
        "token_ids": list(completion.token_ids),
        "logprobs": list(completion.logprobs),
        "finish_reason": completion.finish_reason,
    }
    if _FULL_LOGPROBS.value:
        made["full_logprobs"] = list(completion.full_logprobs)
    if completion.error:
        where = "" if _PROMPTS.value is None else f"row {asked.number}: "
        made["error"] = where + completion.error
    return {"row": asked.number, "sample": asked.sample, **made} if _AS_COMPLETED.value else made


def main() -> None:
    """Read prompts, sample, write rows as soon as they may be."""
    if (_PROMPT.value is None) == (_PROMPTS.value is None):
        raise ValueError("give either --prompt TEXT or --prompts FILE.jsonl")
    rows, target = [({"prompt": _PROMPT.value}, "")], None
    if _PROMPTS.value is not None:
        source = Path(_PROMPTS.value).expanduser()
        rows = processes.once(lambda: list(read_rows(source)))
        target = _files.output_file(_OUTPUT)
        if target.exists() and target.samefile(source):
            raise ValueError(f"--output={target}: is the file of --prompts; give another")
    else:
        flags.exclude([_OUTPUT, _AS_COMPLETED, _FULL_LOGPROBS], "--prompt", "its answer is printed")
    if not rows:
        raise ValueError(f"{_PROMPTS.value}: no rows; expected JSONL")
    model = Model(
        source=flags.require(_MODEL),
        dtype=_DTYPE.value,
        param_dtype=_DTYPE.value,
        draft_tokens=_DRAFT_TOKENS.value,
    )
    base = base_model.load(model, flags.mesh_of(_MESH), check=True)
    asked = list(asked_of(rows, base))
    finished = completions(base, asked, *read_adapter(base))
    made = (
        output_row(asked[place], completion)
        for place, completion in (finished if _AS_COMPLETED.value else in_order(finished))
    )
    errors = write(target, made)
    if errors:
        where = f"{target}: {len(errors)} of {len(asked)} rows hold an error, the first: "
        raise ValueError(("" if target is None else where) + errors[0])


def write(target: Path | None, rows: Iterable[Row]) -> list[str]:
    """Write rows to a file as they come, or print them; returns the errors among them.

    The first row replaces what was in the file.

    Raises:
        KeyboardInterrupt: a signal has come; says where the rows are.
    """
    if target is None:
        return [row["error"] for row in rows if not _is_printed(row)]
    errors, begun = [], False
    try:
        for row in rows:
            errors += [row["error"]] if "error" in row else []
            with interruptions.held():  # or what is said below might not be so
                if begun:
                    records.append_rows(target, [row])
                else:
                    records.write_text(target, records.to_line(row))
                begun = True
    except BaseException as error:
        if interruptions.received() and not isinstance(error, WriteError):
            where = f"the rows so far are in {target}" if begun else "no row was written"
            raise KeyboardInterrupt(where) from None
        raise
    return errors


def _is_printed(row: Row) -> bool:
    """Print a row's text, if it has one."""
    if "error" not in row:
        print(row["completion"])
    return "error" not in row


if __name__ == "__main__":
    flags.start(main, resumes=False)
