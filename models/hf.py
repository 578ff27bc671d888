"""Weights of Hugging Face directories: safetensors files read and written tensor by tensor.

Conversion is a table (`Family.keys`): our path <-> their key <-> whether theirs is transposed.
"""

import contextlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from refine_af.models.config import ModelConfig
from refine_af.models.hf_config import read_json
from refine_af.models.registry import FAMILIES
from refine_af.models.weights import Index, Shape, Weights, expected_shapes, misfits, refuse

# Buffers that old checkpoints carry and that are recomputed here.
_DROPPED_SUFFIXES = ("rotary_emb.inv_freq",)
# Names of the safetensors format, https://github.com/huggingface/safetensors#format.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SHARD_BYTES = 5_000_000_000  # largest file, unless a single tensor is larger
_WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

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


def tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor that a Hugging Face directory of this model has, by key."""
    shapes, table = expected_shapes(config), {}
    for path, (key, transposed) in FAMILIES[config.family].keys.items():
        if path not in shapes:
            continue  # the head of a model that has tied it to the embedding
        stacked = "{}" in key
        for i in range(config.num_layers) if stacked else [None]:
            ours = shapes[path][1:] if stacked else shapes[path]
            theirs = ours[::-1] if transposed else ours
            table[key.format(i)] = Tensor(path, i, transposed, theirs)
    return table


class HfWeights(Weights):
    """Those `*.safetensors` of a directory that its index names, or else model.safetensors, or all.

    Raises:
        ValueError: a file cannot be read; or tensors are missing, unexpected, in two files,
            misshapen or not of a supported dtype, all of which are listed.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self._owner: dict[str, Path] = {}
        found: dict[str, tuple[Shape, str]] = {}
        faults: list[str] = []
        for file in _weight_files(directory):
            with _open(file) as handle:
                for key in handle.keys():  # noqa: SIM118 - not a dictionary
                    if key in found:
                        faults.append(f"{key} is in {self._owner[key].name} and {file.name}")
                    part = handle.get_slice(key)
                    found[key] = tuple(part.get_shape()), part.get_dtype()
                    self._owner[key] = file
        table = tensors(config)
        refuse(faults + _misfits(found, table, config.tie_embeddings), str(directory))
        self._keys: dict[str, list[str]] = {}
        for key, tensor in table.items():
            self._keys.setdefault(tensor.path, []).append(key)
        self._table = table
        shapes = expected_shapes(config)
        self._arrays = {
            path: jax.ShapeDtypeStruct(
                shapes[path], jnp.result_type(*(_DTYPES[found[key][1]] for key in keys))
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
        if self._table[keys[0]].layer is None:
            return self._read_tensor(keys[0], index).astype(dtype, copy=False)
        first, *rest = index
        parts = zip(index, self._arrays[path].shape, strict=True)
        array = np.empty([len(range(*part.indices(n))) for part, n in parts], dtype)
        for row, key in zip(array, keys[first], strict=True):
            row[...] = self._read_tensor(key, tuple(rest))
        return array

    def _read_tensor(self, key: str, index: Index) -> np.ndarray:
        # Opened for each tensor: pages of a file that stays mapped would count as our memory.
        with _open(self._owner[key]) as handle:
            if self._table[key].transposed:
                return handle.get_slice(key)[index[::-1]].T
            return handle.get_slice(key)[index]


def _weight_files(directory: Path) -> list[Path]:
    """Files that the index names; without one the whole model's, or all where there is none."""
    index = directory / INDEX
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ValueError(f"{index}: expected a 'weight_map' of tensors to files")
        return sorted({directory / Path(name).name for name in names.values()})
    if (directory / _WHOLE).exists():
        return [directory / _WHOLE]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory}: no *.safetensors file; expected a Hugging Face directory")
    return files


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from None


def _misfits(
    found: Mapping[str, tuple[Shape, str]], table: Mapping[str, Tensor], tied: bool
) -> list[str]:
    read = {
        key: header
        for key, header in found.items()
        if not key.endswith(_DROPPED_SUFFIXES) and not (tied and key == "lm_head.weight")
    }
    return [
        *misfits(
            {key: shape for key, (shape, _) in read.items()},
            {key: tensor.shape for key, tensor in table.items()},
        ),
        *(
            f"{key} has dtype {dtype}, expected one of {', '.join(_DTYPES)}"
            for key, (_, dtype) in read.items()
            if key in table and dtype not in _DTYPES
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
        return (array.T if tensor.transposed else array).astype(stored(tensor), copy=False)

    for name, keys in split.filename_to_tensors.items():
        layout = {key: (stored(table[key]), table[key].shape) for key in keys}
        _write_file(directory / name, layout, tensor_of, progress)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(
    path: Path,
    layout: Mapping[str, tuple[np.dtype, Shape]],
    tensor_of: Callable[[str], np.ndarray],
    progress: Progress | None,
) -> None:
    """One safetensors file; the library's own writer wants all tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype.name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in layout:
            array = np.ascontiguousarray(tensor_of(key))
            file.write(array.view(np.uint8).data)
            if progress:
                progress(array.nbytes)
        file.flush()
        os.fsync(file.fileno())
