"""Measure speed against what users would pick instead, in the same run: a table, and JSON.

Every side of every case runs in a process of its own. Leave the machine alone meanwhile.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator

from absl import flags as absl_flags

from refine_af import (
    benchmark_conversion,
    benchmark_large,
    benchmark_novelty,
    benchmark_sampling,
    benchmark_scoring,
    benchmark_update,
    benchmarks,
    records,
)
from refine_af.benchmarks import Limits, Row
from refine_af.config import Model
from refine_af.launch import _files, flags
from refine_af.models.config import DECODE_KERNELS
from refine_af.progress import bar

_SUITE = absl_flags.DEFINE_list(
    "suite",
    ["sample"],
    "Suites to run: sample, score, update, novelty, convert; large, for accelerators; or all: the "
    "shorter cases of those that suit the device.",
)
_CASES = absl_flags.DEFINE_list("cases", None, "Only these cases; default: all of the suites.")
_MODEL = absl_flags.DEFINE_string(
    "model",
    None,
    f"{flags.MODEL_HELP} Default: smollm2-135m-instruct, for suite large random:llama2-7b.",
)
_DTYPE = absl_flags.DEFINE_enum(
    "dtype", "bfloat16", ["float32", "bfloat16"], "Number type of both sides."
)
_DECODE_KERNEL = absl_flags.DEFINE_enum(
    "decode_kernel", "xla", DECODE_KERNELS, "Of attention to a cache: xla, or pallas on a GPU."
)
_DRAFT_TOKENS = flags.draft_tokens_flag()
_REPEATS = absl_flags.DEFINE_integer("repeats", 3, "Timed runs of a case; their median counts.", 1)
_OUTPUT = absl_flags.DEFINE_string("output", None, "JSON file to write besides the table.")

_ALL, _LARGE = "all", "large"
SUITES: dict[str, tuple[list[str], Callable[[Model, Limits, int, list[str]], Iterator[Row]]]] = {
    "sample": (list(benchmark_sampling.CASES), benchmark_sampling.rows),
    "score": (list(benchmark_scoring.CASES), benchmark_scoring.rows),
    "update": (list(benchmark_update.CASES), benchmark_update.rows),
    "novelty": (list(benchmark_novelty.CASES), benchmark_novelty.rows),
    "convert": (list(benchmark_conversion.CASES), benchmark_conversion.rows),
    _LARGE: (list(benchmark_large.CASES), benchmark_large.rows),
}
_AGAINST_TORCH = ("sample", "score", "update")  # on the CPU
_SMALL_MODEL, _LARGE_MODEL = "smollm2-135m-instruct", "random:llama2-7b"
_SHORT = {
    "sample": benchmark_sampling.SHORT,
    "score": benchmark_scoring.SHORT,
    "novelty": benchmark_novelty.SHORT,
}
_COLUMNS = (
    "suite",
    "case",
    "unit",
    "ours",
    "reference",
    "ratio",
    "limit_share",
    "compile_seconds",
    "peak_mib",
    "reference_peak_mib",
    "reference_name",
)


def selected() -> list[str]:
    """Suites to run, `all` among them.

    Raises:
        ValueError: a suite or a case is not known.
    """
    chosen = SUITES if _ALL in _SUITE.value else [s for s in SUITES if s in _SUITE.value]
    known = [case for suite in chosen for case in SUITES[suite][0]]
    for flag, wanted, options in (
        ("suite", _SUITE.value, [*SUITES, _ALL]),
        ("cases", _CASES.value or [], known),
    ):
        odd = [name for name in wanted if name not in options]
        if odd:
            raise ValueError(f"--{flag}={odd[0]}: expected some of {options}")
    return list(_SUITE.value)


def cases_of(suites: list[str], only: list[str], backend: str) -> dict[str, list[str]]:
    """Cases to run, by suite; `all` are the shorter ones of those that suit the device.

    Raises:
        ValueError: there are none, or they compare with torch on another device.
    """
    odd = [suite for suite in _AGAINST_TORCH if suite in suites and backend != "cpu"]
    if odd:
        raise ValueError(
            f"--suite={odd[0]}: torch would run on the CPU; here take --suite={_LARGE}"
        )
    cases = {suite: SUITES[suite][0] for suite in suites if suite != _ALL}
    if _ALL in suites:
        fitting = [suite for suite in SUITES if (suite == _LARGE) == (backend != "cpu")]
        cases = {suite: _SHORT.get(suite, SUITES[suite][0]) for suite in fitting} | cases
    if only:
        cases = {suite: [x for x in SUITES[suite][0] if x in only] for suite in cases}
    if not any(cases.values()):
        raise ValueError(f"--cases={','.join(only)}: none of them is in suites {list(cases)}")
    return cases


def line(row: Row) -> str:
    """A row as a line of the table."""
    cells = ["" if (value := getattr(row, name)) is None else str(value) for name in _COLUMNS]
    return "  ".join(cell.rjust(len(name)) for cell, name in zip(cells, _COLUMNS, strict=True))


def main() -> None:
    """Measure, print, write."""
    suites, target = selected(), _files.output_file(_OUTPUT) if _OUTPUT.value else None
    model = Model(
        source=_SMALL_MODEL,
        dtype=_DTYPE.value,
        param_dtype=_DTYPE.value,
        decode_kernel=_DECODE_KERNEL.value,
        draft_tokens=_DRAFT_TOKENS.value,
    )
    (limits, environment), _ = benchmarks.in_process(benchmarks.environment, _DTYPE.value)
    environment["decode_kernel"] = model.decode_kernel
    environment["draft_tokens"] = model.draft_tokens
    cases = cases_of(suites, _CASES.value or [], environment["backend"])
    if cases.get(_LARGE) and environment["backend"] == "cpu" and not _MODEL.value:
        needs = f"{_LARGE_MODEL} needs a GPU or a TPU, and this is a CPU; name a smaller --model"
        raise ValueError(f"--suite={_LARGE}: {needs}")
    print(json.dumps(environment, indent=1))
    print("  ".join(_COLUMNS), flush=True)
    found: list[Row] = []
    with bar("benchmark", total=sum(map(len, cases.values())), unit="case") as progress:
        for suite, names in cases.items():
            source = _MODEL.value or (_LARGE_MODEL if suite == _LARGE else _SMALL_MODEL)
            model = dataclasses.replace(model, source=source)
            for row in SUITES[suite][1](model, limits, _REPEATS.value, names):
                found.append(row)
                progress.update(len({r.case for r in found}) - progress.n)
                progress.write(line(row))
                if target:
                    content = {
                        "environment": environment,
                        "rows": list(map(dataclasses.asdict, found)),
                    }
                    records.write_text(target, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    # Each side of a case is a process of its own, and takes what it needs of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    flags.start(main, resumes=False, one_process=True)
