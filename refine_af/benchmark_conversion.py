"""Conversion of a model's directories: ours, and transformers that loads one and saves it.

Which moves as many bytes. The limit is a copy of the files. Weights that come back changed are
refused.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from refine_af import benchmarks
from refine_af.benchmark_sampling import export
from refine_af.benchmarks import Limits, Measured, Row
from refine_af.config import Model
from refine_af.models import convert, sources

CASES = {"to_orbax": ("hf", "orbax"), "to_hf": ("orbax", "back")}  # directories read and written


def rows(model: Model, _: Limits, repeats: int, names: list[str]) -> Iterator[Row]:
    """Lines of the table; each side in a process of its own.

    Raises:
        ValueError: the weights are not those of before.
    """
    with tempfile.TemporaryDirectory() as folder:
        benchmarks.in_process(export, model.source, f"{folder}/hf")
        copying = copy_seconds(Path(folder, "hf"), Path(folder, "copy"))
        ours = {case: benchmarks.isolated(_ours, case, folder, repeats) for case in CASES}
        benchmarks.in_process(check_equal, f"{folder}/hf", f"{folder}/back")
        theirs = benchmarks.isolated(_theirs, folder, repeats)
        title = "transformers, load and save"
        for name in names:
            yield benchmarks.row("convert", name, "MB/s", ours[name], theirs, title, copying)


def copy_seconds(source: Path, target: Path) -> float:
    """Of a copy of a directory's files, until the disk has it."""
    began = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        with open(shutil.copyfile(file, target / file.name), "rb") as copied:
            os.fsync(copied.fileno())
    return time.perf_counter() - began


def check_equal(before: str, after: str) -> None:
    """Compare two models bit by bit.

    Raises:
        ValueError: an array differs.
    """
    one, other = (sources.open_model(path, param_dtype=None).weights for path in (before, after))
    for path, array in one.arrays.items():
        whole = tuple(slice(0, size) for size in array.shape)
        if one.read(path, whole).tobytes() != other.read(path, whole).tobytes():
            raise ValueError(f"benchmark convert: {path} has come back changed")


def _ours(case: str, folder: str, repeats: int) -> Measured:
    source, target = CASES[case]

    def run() -> float:
        opened = sources.open_model(f"{folder}/{source}", param_dtype=None)
        convert.convert(opened, Path(folder, target), overwrite=True)
        return convert.num_bytes(opened.weights) / 1e6

    return benchmarks.measure(run, repeats)


def _theirs(folder: str, repeats: int) -> Measured:
    import transformers

    def run() -> float:
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/hf", dtype="auto")
        model.save_pretrained(f"{folder}/theirs")
        return sum(x.nbytes for x in model.parameters()) / 1e6

    return benchmarks.measure(run, repeats)
