"""The benchmark program: what it refuses, the arithmetic of its rows, one case for real."""

import ast
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from decoders import LLAMA
from safetensors.numpy import load_file, save_file

from refine_af import (
    benchmark_conversion,
    benchmark_large,
    benchmark_novelty,
    benchmark_sampling,
    benchmarks,
)
from refine_af.benchmark_sampling import CASES
from refine_af.benchmark_update import Shape
from refine_af.benchmarks import Limits, Measured
from refine_af.config import Model
from refine_af.models.weights import expected_shapes


def test_a_row_by_hand() -> None:
    ours = Measured(rate=30.0, first_seconds=9.0, seconds=4.0, peak_mib=100.4)
    theirs = Measured(rate=12.0, first_seconds=5.0, seconds=5.0, peak_mib=300.0)
    row = benchmarks.row("sample", "batch1", "tokens/s", ours, theirs, "them", 1.0)
    assert (row.ratio, row.limit_share, row.compile_seconds) == (2.5, 0.25, 5.0)
    assert (row.peak_mib, row.reference_peak_mib) == (100, 300)


def test_measuring_takes_the_median_after_a_first_run() -> None:
    calls: list[int] = []

    def run() -> float:
        calls.append(1)
        return 6.0

    measured = benchmarks.measure(run, 3)
    assert len(calls) == 4
    assert measured.rate == pytest.approx(6.0 / measured.seconds)


def test_limits_of_a_case_by_hand() -> None:
    """Two slots, 3 + 1 tokens, prompts of 5 after 10 shared ones: 20 prompt tokens, 2 steps.

    One row of the embedding is read for a token, and the head meets the ends of two prompts.
    """
    case = benchmark_sampling.Case("case", 2, 5, (3, 1), prefix=10)
    head = LLAMA.vocab_size * LLAMA.embed_dim
    weights = sum(math.prod(shape) for shape in expected_shapes(LLAMA).values()) - head
    seconds = benchmark_sampling.limit_seconds(
        case, LLAMA, "float32", Limits(bandwidth=4.0 * weights, flops=2.0 * weights)
    )
    assert seconds == pytest.approx((20 * (weights - head) + 2 * head) / weights + 2 * 2.0)


def test_cases_are_those_that_were_promised() -> None:
    assert list(CASES) == ["batch1", "batch16", "batch32", "mixed", "static", "prefix"]
    lengths = CASES["mixed"].lengths
    assert len(lengths) == 64 and min(lengths) >= 8 and max(lengths) == 256
    assert 56 <= sum(lengths) / 64 <= 72
    prompts = CASES["prefix"].prompts(1000)
    assert len({prompt[:900] for prompt in prompts}) == 1 and len(set(prompts)) == 32


def test_large_cases_on_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "isolated", lambda function, *arguments: function(*arguments))
    for name, value in (("_PROMPT", 24), ("_FEW", 2), ("_MANY", 12)):
        monkeypatch.setattr(benchmark_large, name, value)
    shape = Shape(rows=8, prompt=8, answer=8, microbatches=1, remat="cheap")
    monkeypatch.setitem(benchmark_large.UPDATE, "update2k", shape)
    monkeypatch.setitem(benchmark_large.STEP, "ppo", shape)
    model = Model(source="random:tiny", dtype="float32", param_dtype="float32")
    timed = Measured(9.0, 2.0, 1.0)
    monkeypatch.setattr(benchmark_large, "_decoding", lambda run, *_: (run(2), timed)[1])
    names = ["decode1", "update2k", "ppo"]
    decode, update, step = benchmark_large.rows(model, Limits(1e9, 1e9), 1, names)
    assert decode.reference is not None and decode.ratio is not None
    assert (update.reference, update.ratio, update.reference_peak_mib) == (None, None, None)
    assert update.ours > 0 and update.limit_share is not None
    assert step.ours > 0 and step.limit_share is not None


def test_the_limit_of_decoding_by_hand() -> None:
    """Two slots at 1,024 columns: all weights and both caches, once for each of 128 steps."""
    weights = sum(math.prod(shape) for shape in expected_shapes(LLAMA).values())
    cache = 2 * 2 * LLAMA.num_layers * LLAMA.num_kv_heads * 1024 * LLAMA.head_dim
    if not LLAMA.tie_embeddings:
        weights -= LLAMA.vocab_size * LLAMA.embed_dim
    limits = Limits(bandwidth=4.0 * (weights + cache + 1), flops=1e30)  # and where it ends
    assert benchmark_large.limit_seconds(LLAMA, 2, "float32", limits) == pytest.approx(128)


def test_a_context_that_is_too_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_large, "_MANY", 4096)
    model = Model(source="random:tiny", dtype="float32", param_dtype="float32")
    with pytest.raises(ValueError, match="a context of 5024 tokens, this model's is 4096; take"):
        next(benchmark_large.rows(model, Limits(1e9, 1e9), 1, ["decode1"]))


def test_a_conversion_is_measured_and_has_to_come_back_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks, "isolated", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(benchmarks, "in_process", lambda function, *given: (function(*given), 0.0))
    model = Model(source="random:tiny", dtype="float32", param_dtype="float32")
    found = list(benchmark_conversion.rows(model, Limits(1.0, 1.0), 1, ["to_orbax", "to_hf"]))
    assert [row.case for row in found] == ["to_orbax", "to_hf"]
    assert all(row.ours > 0 and row.ratio and row.limit_share for row in found)
    for name in ("one", "other"):
        benchmark_sampling.export("random:tiny", str(tmp_path / name))
    file = tmp_path / "other/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, file)
    with pytest.raises(ValueError, match="final_norm/scale has come back changed"):
        benchmark_conversion.check_equal(str(tmp_path / "one"), str(tmp_path / "other"))


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "refine_af.launch.benchmark", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_FLAGS": ""},
    )


def test_all_suites_are_those_that_suit_the_device() -> None:
    """In a process of its own: programs define flags of the same names."""
    code = "from refine_af.launch.benchmark import cases_of as of; print([of(['all'], [], 'gpu'), "
    code += "of(['all', 'novelty'], [], 'cpu'), of(['all'], ['filter2000', 'lora'], 'cpu')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    on_gpu, on_cpu, only = ast.literal_eval(run.stdout)
    assert on_gpu == {"large": ["decode1", "decode64", "update2k", "ppo"]}
    assert list(on_cpu) == ["sample", "score", "update", "novelty", "convert"]
    assert on_cpu["sample"] == ["batch1", "batch16", "mixed", "prefix"]
    assert on_cpu["score"] == ["reward_model"]
    assert on_cpu["novelty"] == ["filter500", "filter2000", "filter15000"]
    none: dict[str, list[str]] = {"sample": [], "score": [], "convert": []}
    assert only == none | {"update": ["lora"], "novelty": ["filter2000"]}


def test_a_gpu_is_not_compared_with_torch_on_a_cpu() -> None:
    code = "from refine_af.launch.benchmark import cases_of; cases_of(['score'], [], 'gpu')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message = "ValueError: --suite=score: torch would run on the CPU; here take --suite=large\n"
    assert run.stderr.endswith(message)


def test_decoding_is_what_more_tokens_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes 2 s for the prompts and 10 ms a token."""
    now = [0.0]
    monkeypatch.setattr(benchmark_large.time, "perf_counter", lambda: now[0])

    def run(length: int) -> None:
        now[0] += 2 + length / 100

    found = benchmark_large._decoding(run, 3, 2)
    assert (found.rate, found.seconds) == (pytest.approx(300), pytest.approx(1.28))
    with pytest.raises(ValueError, match="160 tokens took no longer than 32: something else"):
        benchmark_large._decoding(lambda _: None, 3, 2)


@pytest.mark.parametrize("flag", ["suite", "cases"])
def test_an_unknown_name_is_refused(flag: str) -> None:
    run = program(f"--{flag}=nonsense")
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: --{flag}=nonsense: expected some of [")


def test_a_large_model_is_refused_on_a_cpu() -> None:
    run = program("--suite=large")
    assert run.returncode == 2
    assert run.stderr.endswith("needs a GPU or a TPU, and this is a CPU; name a smaller --model\n")


def test_the_novelty_benchmark_compares_equal_decisions() -> None:
    """Its instructions are of both kinds; the reference is rouge-score itself."""
    ours, decisions = benchmark_novelty.decisions(120, 0)
    theirs, expected = benchmark_novelty.reference(120)
    assert decisions == expected
    assert 60 < sum(decisions) < 119
    assert ours.rate * ours.seconds == pytest.approx(theirs.rate * theirs.seconds)  # the pairs
    texts = benchmark_novelty.first_candidates(120)
    assert texts == benchmark_novelty.first_candidates(120)
    assert len(set(texts)) == 120


def test_the_novelty_benchmark_counts_what_is_accepted() -> None:
    """Each candidate is compared with the 175 seeds and with all that were accepted before it."""
    decisions = benchmark_novelty.decisions(120, 0)[1]
    measured, pairs = benchmark_novelty.with_statistics(sum(decisions[:40]), 0)
    last = max(i for i, novel in enumerate(decisions[:40]) if novel)
    assert pairs == sum(175 + sum(decisions[:i]) for i in range(last + 1))
    assert measured.rate == pytest.approx(sum(decisions[:40]) / measured.seconds)


@pytest.mark.slow
def test_a_case_for_real(tmp_path: Path) -> None:
    """Random weights: what is looked at is the form, not the speed."""
    run = program(
        "--model=random:tiny", "--cases=batch1", "--repeats=1", f"--output={tmp_path / 'out.json'}"
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {"environment", "rows"} and found["environment"]["gigaflops"] > 0
    (row,) = found["rows"]
    assert row.keys() == {field.name for field in dataclasses.fields(benchmarks.Row)}
    assert (row["suite"], row["case"], row["unit"]) == ("sample", "batch1", "tokens/s")
    assert min(row["ours"], row["reference"], row["peak_mib"], row["limit_share"]) > 0
