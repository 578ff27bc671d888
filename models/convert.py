"""Conversion of model directories: a source in, a directory of the other kind out."""

import contextlib
import fcntl
import glob
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from refine_af.models import hf, orbax_directory, processes, tensor_files
from refine_af.models.hf import Progress
from refine_af.models.sources import Source
from refine_af.models.weights import Weights
from refine_af.models.writing import check_space, writing

# Beside the weights: tokenizers, chat templates, licences. Never code.
_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*")
_WEIGHTS = ("*.safetensors", "*.bin")
_LOCK = "lock"  # of a private directory
_NOT_COPIED = {"config.json", hf.INDEX, tensor_files.TORCH_INDEX}


def convert(
    source: Source,
    target: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> str:
    """Write `target`: a Hugging Face directory from an Orbax one, an Orbax one from all others.

    It is written aside and appears when it is complete. One layer of one array is in memory at a
    time.

    Args:
        dtype: of the stored weights; None keeps those of the source.
        progress: called with the number of bytes that were written.

    Returns:
        What `target` is now.

    Raises:
        ValueError: `target` exists and is not to be replaced, or the source is damaged.
        OSError: the disk is full, or cannot be written.
    """
    weights = source.weights
    check_space(target, num_bytes(weights, dtype))
    with staged(target, overwrite=overwrite) as new, writing(target):
        _write_companions(source, new, dtype)
        if source.kind == "orbax":
            hf.write(weights, source.config, new, dtype=dtype, progress=progress)
        else:
            orbax_directory.write(weights, new, dtype=dtype, progress=progress)
    return "a Hugging Face directory" if source.kind == "orbax" else "an Orbax directory"


def export(source: Source, weights: Weights, target: Path) -> None:
    """Write a Hugging Face directory of `source` with other weights, in their own dtype.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    dtypes = {str(array.dtype) for array in weights.arrays.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    with staged(target, overwrite=True) as new, writing(target):
        processes.by_writer(lambda: _write_companions(source, new, dtype))
        hf.write(weights, source.config, new)


def num_bytes(weights: Weights, dtype: str | None = None) -> int:
    """Size of all arrays as they will be stored."""
    arrays = weights.arrays.values()
    return sum(math.prod(a.shape) * np.dtype(dtype or a.dtype).itemsize for a in arrays)


@contextlib.contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new directory that becomes `target` when the block ends well, and vanishes otherwise.

    Of several processes one makes and moves it; all get its name.
    It lies in a private one beside `target`, `.NAME.RANDOM`, into which an old target moves before
    it is removed. Where a kill between the two renames, or a disk that takes neither, leaves no
    `target`, both stay there until the next start, which puts the old one back.

    Raises:
        ValueError: `target` exists, and is not to be replaced or is not a model's directory.
    """

    def make() -> str:
        _remove_abandoned(target)
        _check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        private = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
        with contextlib.suppress(OSError):  # a file system without locks: what is left then stays
            locks.callback(os.close, _lock(Path(private, _LOCK), os.O_CREAT))
        Path(private, "new").mkdir()
        return private

    def move() -> None:
        _check_target(target, overwrite)  # again: another program may have been faster
        if target.exists():
            target.rename(old)
        new.rename(target)

    def remove() -> None:
        with locks:
            if os.path.lexists(old) and not os.path.lexists(target):
                old.rename(target)
            shutil.rmtree(private, ignore_errors=True)

    locks = contextlib.ExitStack()
    private = Path(processes.once(make))
    new, old = private / "new", private / "old"
    try:
        yield new
        processes.once(move)
    finally:
        processes.by_writer(remove)


def _remove_abandoned(target: Path) -> None:
    """Clear away what killed writers of `target` have left: their lock is not held any more."""
    for private in target.parent.glob(f".{glob.escape(target.name)}.*"):
        if "." in private.name.removeprefix(f".{target.name}."):
            continue  # of a target whose name goes on: NAME.v2
        try:
            lock = _lock(private / _LOCK)
        except OSError:  # not one of ours, or at work
            continue
        if os.path.lexists(private / "old") and not os.path.lexists(target):
            (private / "old").rename(target)
        shutil.rmtree(private, ignore_errors=True)
        os.close(lock)


def _lock(path: Path, flags: int = 0) -> int:
    """Descriptor of a file that is locked until it is closed, by the end of the process say.

    Raises:
        OSError: there is no such file, or it is locked.
    """
    lock = os.open(path, os.O_RDWR | flags)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target}: exists; give another target, or --overwrite to replace it")
    if not (target / "config.json").is_file():
        raise ValueError(f"{target}: not a model's directory; --overwrite does not replace it")
    for path in sorted(target.iterdir()):
        parts = (orbax_directory.PARAMS,) if path.is_dir() else (*_COMPANIONS, *_WEIGHTS)
        if not any(map(path.match, parts)):
            raise ValueError(
                f"{target}: has {path.name}, which is no part of a model; --overwrite does not "
                "replace it"
            )


def _write_companions(source: Source, directory: Path, dtype: str | None) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    raw = source.raw
    if dtype is not None:
        raw = {key: value for key, value in raw.items() if key != "torch_dtype"} | {"dtype": dtype}
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    if source.directory is None:
        generation = json.dumps({"eos_token_id": list(source.eos_ids)}, indent=2)
        (directory / "generation_config.json").write_text(generation + "\n")
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(str(directory))
        return
    for pattern in _COMPANIONS:
        for file in source.directory.glob(pattern):
            if file.name not in _NOT_COPIED and not file.is_dir():
                (directory / file.name).write_bytes(_read(file))


def _read(file: Path) -> bytes:
    """Content of a file beside the weights; a link may not bring in one from elsewhere.

    The hub's cache links `snapshots/REVISION/NAME` to `../../blobs/HASH`.
    """
    try:
        folder = file.parent.resolve()
        home = folder.parent.parent if folder.parent.name == "snapshots" else folder
        if not file.resolve(strict=True).is_relative_to(home):
            raise ValueError(f"{file}: links out of its directory; put a copy in its place")
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from None
