"""Benchmarks: a case in a process of its own, rows of figures, and the machine's limits."""

import dataclasses
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp

from refine_af import flops

_PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a process measured.

    Attributes:
        rate: of useful work, in the case's unit; the median over its runs.
        first_seconds: of the first run, compilation included.
        seconds: of a later run.
        peak_mib: largest memory taken: of the device where it counts it, or of the process.
    """

    rate: float
    first_seconds: float
    seconds: float
    peak_mib: float = 0.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: ours against a reference in the same run."""

    suite: str
    case: str
    unit: str
    ours: float
    reference: float | None
    reference_name: str
    ratio: float | None
    limit_share: float | None  # time that the machine's limits allow over the time that it took
    compile_seconds: float
    peak_mib: float
    reference_peak_mib: float | None


def row(
    suite: str,
    case: str,
    unit: str,
    ours: Measured,
    reference: Measured | None,
    reference_name: str,
    limit_seconds: float | None,
) -> Row:
    """A line of the table."""
    theirs = reference.rate if reference else None
    return Row(
        suite=suite,
        case=case,
        unit=unit,
        ours=round(ours.rate, 2),
        reference=theirs and round(theirs, 2),
        reference_name=reference_name,
        ratio=theirs and round(ours.rate / theirs, 2),
        limit_share=None if limit_seconds is None else round(limit_seconds / ours.seconds, 3),
        compile_seconds=round(max(ours.first_seconds - ours.seconds, 0.0), 1),
        peak_mib=round(ours.peak_mib),
        reference_peak_mib=round(reference.peak_mib) if reference else None,
    )


def measure(run: Callable[[], float], repeats: int) -> Measured:
    """Time `run`, which returns the amount of useful work: a first time, then `repeats` times."""
    times, work = [], 0.0
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work = run()
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[1:]) if repeats else times[0]
    return Measured(work / seconds, times[0], seconds)


def isolated(function: Callable[..., Measured], *arguments: Any) -> Measured:
    """`function(*arguments)` in a new process: its memory is its own, and no other's threads spin.

    Raises:
        ValueError: the process needs a package that is not installed.
    """
    measured, peak = in_process(function, *arguments)
    return dataclasses.replace(measured, peak_mib=measured.peak_mib or peak)


def in_process(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """(`function(*arguments)` in a new process, largest resident memory of that in MiB).

    A small memory of this process hides behind the new one's: keep it small.

    Raises:
        ValueError: the process needs a package that is not installed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_with_peak, function, arguments).result()
        except ModuleNotFoundError as error:
            raise ValueError(f"{error}; pip install -e '.[test]' brings the references") from None


def _with_peak(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float]:
    result = function(*arguments)
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def device_peak() -> float:
    """Largest memory that JAX has taken on a device, in MiB; 0 where that is not counted."""
    taken = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(stats.get("peak_bytes_in_use", 0) for stats in taken) / 2**20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the device does at best: bytes read a second, operations a second."""

    bandwidth: float
    flops: float


def measure_limits(dtype: str) -> Limits:
    """Largest measured rate of reading an array, and of a product of two square matrices.

    1 GiB and 4096 x 4096 on CPUs; 8 GiB and 8192 x 8192 on accelerators, which else wait for the
    host most of the time.
    """
    large = jax.default_backend() != "cpu"
    data = jnp.ones((1 << (31 if large else 28),), jnp.float32)
    total = jax.jit(jnp.sum)
    return Limits(
        bandwidth=data.nbytes / flops.fastest(lambda: total(data)),
        flops=flops.product_rate(jnp.dtype(dtype), 8192 if large else 4096),
    )


def environment(dtype: str) -> tuple[Limits, dict[str, Any]]:
    """What the machine does at best, and where the figures come from."""
    limits = measure_limits(dtype)
    device = jax.devices()[0]
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return limits, {
        "backend": jax.default_backend(),
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
        "gigabytes_per_second": round(limits.bandwidth / 1e9, 1),
        "gigaflops": round(limits.flops / 1e9),
    }


def processor() -> str:
    """Name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
