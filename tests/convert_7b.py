"""Measure the conversion of a 7B-shaped bfloat16 checkpoint, there and back; not a test.

    python tests/convert_7b.py /a/directory/with/45/GB/free

Writes random bits of LLaMA-2-7B's shape (13.5 GB) as Hugging Face does, converts them to Orbax and
back with the real program, each in a process of its own, and compares every byte of every tensor.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open

from refine_af.models import hf, hf_config
from refine_af.models.config import ModelConfig
from refine_af.models.registry import PRESETS
from refine_af.models.weights import Index, Weights, expected_shapes


class RandomBits(Weights):
    """Every bfloat16 there is, infinities and NaNs too."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @property
    def arrays(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        shapes = expected_shapes(self.config).items()
        return {path: jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16) for path, shape in shapes}

    def read(self, path: str, index: Index) -> np.ndarray:
        shape = self.arrays[path].shape
        layer = index[0].start if len(index) > 1 and path.startswith("layers/") else None
        part = shape if layer is None else (1, *shape[1:])
        rng = np.random.default_rng([*path.encode(), layer or 0])
        return np.frombuffer(rng.bytes(2 * int(np.prod(part))), ml_dtypes.bfloat16).reshape(part)


def write_random(config: ModelConfig, directory: Path) -> None:
    """A Hugging Face directory of a model in bfloat16, without a tokenizer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf_config.to_raw(config, eos_ids=(2,))))
    hf.write(RandomBits(config), config, directory)


def convert(source: Path, target: Path) -> float:
    """Peak resident GiB of the program."""
    began = time.monotonic()
    program = [sys.executable, "-m", "refine_af.launch.convert"]
    process = subprocess.Popen([*program, f"--source={source}", f"--target={target}"])
    _, status, usage = os.wait4(process.pid, 0)
    peak = usage.ru_maxrss / 2**20
    seconds = time.monotonic() - began
    print(f"{source.name} -> {target.name}: {seconds:.0f} s, peak {peak:.2f} GiB", flush=True)
    if status:
        raise ValueError(f"{source} -> {target}: exit status {os.waitstatus_to_exitcode(status)}")
    return peak


def tensors(directory: Path) -> dict[str, Path]:
    """File of every tensor."""
    files = directory.glob("*.safetensors")
    return {key: file for file in files for key in safe_open(file, "numpy").keys()}  # noqa: SIM118


def assert_bit_equal(first: Path, second: Path) -> int:
    """Number of tensors, when all their bytes are equal."""
    ours, theirs = tensors(first), tensors(second)
    assert ours.keys() == theirs.keys()
    for key in ours:
        with safe_open(ours[key], "numpy") as a, safe_open(theirs[key], "numpy") as b:
            left, right = a.get_tensor(key), b.get_tensor(key)
            assert left.dtype == right.dtype and left.shape == right.shape, key
            np.testing.assert_array_equal(left.view(np.uint16), right.view(np.uint16), key)
    return len(ours)


def main() -> None:
    """Write, convert twice, compare."""
    source, middle, back = (Path(sys.argv[1]) / name for name in ("hf", "orbax", "hf-again"))
    write_random(dataclasses.replace(PRESETS["llama2-7b"], param_dtype="bfloat16"), source)
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
    print(f"{sum(sizes) / 1e9:.2f} GB in {len(sizes)} files", flush=True)
    convert(source, middle)
    convert(middle, back)
    print(f"{assert_bit_equal(source, back)} tensors are bit-equal")


if __name__ == "__main__":
    main()
