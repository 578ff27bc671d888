"""Weights of Hugging Face directories: files read and written tensor by tensor.

Conversion is a table (`Family.keys`): our path <-> their key <-> whether theirs is transposed.
"""

import itertools
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from refine_af.models import processes
from refine_af.models.config import ModelConfig
from refine_af.models.family import Keys
from refine_af.models.registry import FAMILIES
from refine_af.models.tensor_files import INDEX, SafetensorFiles, TensorFiles, open_safetensors
from refine_af.models.weights import Index, Shape, Weights, expected_shapes, misfits, refuse

# Left out on purpose: buffers that old checkpoints carry and that are recomputed here.
_DROPPED = (r".*rotary_emb\.inv_freq",)
_TIED_HEAD = (r"lm_head\.weight",)  # a copy of the embedding
_NAMES = {dtype: name for name, dtype in SafetensorFiles.dtypes.items()}
_SHARD_BYTES = 5_000_000_000  # largest file, unless a single tensor is larger
_BLOCK = 256  # rows and columns that are transposed together

Progress = Callable[[int], object]  # called with the number of bytes that are done


class Tensor(NamedTuple):
    """One tensor of theirs, as part of an array of ours."""

    path: str
    layer: int | None  # None: the array is not stacked
    transposed: bool
    shape: Shape  # theirs

    def slices(self) -> Index:
        """Where it stands in our array."""
        rest = (slice(None),) * len(self.shape)
        return rest if self.layer is None else (slice(self.layer, self.layer + 1), *rest)


def table_of(keys: Keys, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Every tensor of a model, by their key.

    Args:
        keys: our paths; those that the model lacks, the head of a tied one say, are left out.
        shapes: of every array of ours, by path.
    """
    table = {}
    for path, (key, transposed) in keys.items():
        if path not in shapes:
            continue
        stacked = "{}" in key
        for i in range(shapes[path][0]) if stacked else [None]:
            ours = shapes[path][1:] if stacked else shapes[path]
            theirs = ours[::-1] if transposed else ours
            table[key.format(i)] = Tensor(path, i, transposed, theirs)
    return table


def tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor that a Hugging Face directory of this decoder has, by key."""
    return table_of(FAMILIES[config.family].keys, expected_shapes(config))


def transpose(matrix: np.ndarray) -> np.ndarray:
    """The transpose, contiguous; in blocks, since numpy fetches a cache line for each element."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    rows, columns = (range(0, size, _BLOCK) for size in matrix.shape)
    for i, j in itertools.product(rows, columns):
        result[j : j + _BLOCK, i : i + _BLOCK] = matrix[i : i + _BLOCK, j : j + _BLOCK].T
    return result


class TableWeights(Weights):
    """Tensor files of theirs as our arrays, by a table.

    Args:
        shapes: of every array of ours, by path.
        dropped: regular expressions of keys (in full) that are left out on purpose.
        where: what an error names.

    Attributes:
        table: every tensor that is read, by their key.

    Raises:
        ValueError: tensors are missing, unexpected, in two files, misshapen or not of a supported
            dtype, all of which are listed.
    """

    def __init__(
        self,
        files: TensorFiles,
        keys: Keys,
        shapes: Mapping[str, Shape],
        *,
        dropped: Iterable[str],
        where: str,
    ) -> None:
        self._files = files
        self.table = table_of(keys, shapes)
        refuse(files.faults + _misfits(files, self.table, tuple(dropped)), where)
        self._keys: dict[str, list[str]] = {}
        for key, tensor in self.table.items():
            self._keys.setdefault(tensor.path, []).append(key)
        self._arrays = {
            path: jax.ShapeDtypeStruct(
                shapes[path],
                jnp.result_type(*(files.dtypes[files.headers[key][1]] for key in keys)),
            )
            for path, keys in self._keys.items()
        }

    @property
    def arrays(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """As the files' headers say; layers of unlike dtypes are widened."""
        return self._arrays

    def read(self, path: str, index: Index) -> np.ndarray:
        """Slices of one tensor, or of one a layer."""
        keys, dtype = self._keys[path], self._arrays[path].dtype
        if self.table[keys[0]].layer is None:
            return self._read_tensor(keys[0], index).astype(dtype, copy=False)
        first, *rest = index
        parts = zip(index, self._arrays[path].shape, strict=True)
        array = np.empty([len(range(*part.indices(n))) for part, n in parts], dtype)
        for row, key in zip(array, keys[first], strict=True):
            row[...] = self._read_tensor(key, tuple(rest))
        return array

    def _read_tensor(self, key: str, index: Index) -> np.ndarray:
        if self.table[key].transposed:
            return transpose(self._files.read(key, index[::-1]))
        return self._files.read(key, index)


class HfWeights(TableWeights):
    """A decoder's weights in the safetensors of its directory (`open_safetensors`).

    Raises:
        ValueError: as `TableWeights`, or a file cannot be read.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        super().__init__(
            open_safetensors(directory),
            FAMILIES[config.family].keys,
            expected_shapes(config),
            dropped=_DROPPED + (_TIED_HEAD if config.tie_embeddings else ()),
            where=str(directory),
        )


def _misfits(
    files: TensorFiles, table: Mapping[str, Tensor], dropped: tuple[str, ...]
) -> list[str]:
    read = {
        key: header
        for key, header in files.headers.items()
        if not any(re.fullmatch(pattern, key) for pattern in dropped)
    }
    return [
        *misfits(
            {key: shape for key, (shape, _) in read.items()},
            {key: tensor.shape for key, tensor in table.items()},
        ),
        *(
            f"{key} has dtype {dtype}, expected one of {', '.join(files.dtypes)}"
            for key, (_, dtype) in read.items()
            if key in table and dtype not in files.dtypes
        ),
    ]


def write(
    weights: Weights,
    config: ModelConfig,
    directory: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = _SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write `model.safetensors`, or numbered parts and their index, one tensor in memory at a time.

    Args:
        dtype: cast to it; None: as stored.
        shard_bytes: largest file, unless a single tensor is larger.
    """
    table = tensors(config)

    def stored(tensor: Tensor) -> np.dtype:
        return np.dtype(dtype or weights.arrays[tensor.path].dtype)

    split = split_state_dict_into_shards_factory(
        table,
        get_storage_size=lambda tensor: math.prod(tensor.shape) * stored(tensor).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )

    def tensor_of(key: str) -> np.ndarray:
        tensor = table[key]
        array = weights.read(tensor.path, tensor.slices()).reshape(
            tensor.shape[::-1] if tensor.transposed else tensor.shape
        )
        return (transpose(array) if tensor.transposed else array).astype(stored(tensor), copy=False)

    for name, keys in split.filename_to_tensors.items():
        layout = {key: (stored(table[key]), table[key].shape) for key in keys}
        _write_file(directory / name, layout, tensor_of, progress)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        processes.by_writer(lambda: (directory / INDEX).write_text(text))


def _write_file(
    path: Path,
    layout: Mapping[str, tuple[np.dtype, Shape]],
    tensor_of: Callable[[str], np.ndarray],
    progress: Progress | None,
) -> None:
    """One safetensors file; the library's own writer wants all tensors in memory.

    Of several processes all read, since a tensor may be in parts on all of them, and one writes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype.name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writes = processes.is_writer()
    with (path if writes else Path(os.devnull)).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in layout:
            array = np.ascontiguousarray(tensor_of(key))
            file.write(array.view(np.uint8).data)
            if progress:
                progress(array.nbytes)
        file.flush()
        if writes:
            os.fsync(file.fileno())
