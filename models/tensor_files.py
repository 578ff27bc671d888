"""Tensor files of Hugging Face directories, by their keys: safetensors, and torch's own format.

Neither runs code: a torch file is a pickle, and is read by torch's `weights_only` unpickler, which
knows tensors and plain containers and refuses everything else.
"""

import abc
import contextlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from packaging.version import Version
from safetensors import SafetensorError, safe_open

from refine_af.models.hf_config import read_json
from refine_af.models.one_line import one_line
from refine_af.models.weights import Index, Shape

INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
_LEAST_TORCH = Version("2.6")  # before, `weights_only` could be made to run code (CVE-2025-32434)
_WHOLE, _TORCH_WHOLE = "model.safetensors", "pytorch_model.bin"

Header = tuple[Shape, str]  # shape, dtype as the format spells it


class TensorFiles(abc.ABC):
    """Tensors of one or more files.

    Attributes:
        headers: shape and dtype of each tensor, by key.
        faults: what is wrong with the files taken together, for `weights.refuse`.
    """

    dtypes: ClassVar[Mapping[str, str]]  # the format's name of a supported dtype -> numpy's

    def __init__(self) -> None:
        """No tensors yet."""
        self.headers: dict[str, Header] = {}
        self.faults: list[str] = []
        self._owner: dict[str, Path] = {}

    def _add(self, key: str, file: Path, header: Header) -> None:
        if key in self._owner:
            self.faults.append(f"{key} is in {self._owner[key].name} and {file.name}")
        self.headers[key], self._owner[key] = header, file

    @abc.abstractmethod
    def read(self, key: str, index: Index) -> np.ndarray:
        """Part of a tensor, in its stored dtype."""


class SafetensorFiles(TensorFiles):
    """Safetensors, https://github.com/huggingface/safetensors#format.

    Raises:
        ValueError: a file cannot be read.
    """

    dtypes: ClassVar = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

    def __init__(self, files: list[Path]) -> None:
        """Read the headers of all files."""
        super().__init__()
        for file in files:
            with _open(file) as handle:
                for key in handle.keys():  # noqa: SIM118 - not a dictionary
                    part = handle.get_slice(key)
                    self._add(key, file, (tuple(part.get_shape()), part.get_dtype()))

    def read(self, key: str, index: Index) -> np.ndarray:
        """Part of a tensor."""
        # Opened for each tensor: pages of a file that stays mapped would count as our memory.
        with _open(self._owner[key]) as handle:
            return handle.get_slice(key)[index]


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({one_line(error)})") from None


class TorchFiles(TensorFiles):
    """State dicts that torch has saved (`pytorch_model.bin`).

    Files stay mapped while this object lives; the system takes their pages back when it needs
    memory. Those of torch before 1.6 cannot be mapped and are in memory as a whole.

    Raises:
        ValueError: torch is not installed; or a file cannot be read, or holds more than tensors.
    """

    dtypes: ClassVar = {name: name for name in ("float32", "bfloat16", "float16")}

    def __init__(self, files: list[Path]) -> None:
        """Map all files."""
        super().__init__()
        self._tensors: dict[str, Any] = {}
        for file in files:
            for key, tensor in _load_torch(file).items():
                if not hasattr(tensor, "untyped_storage"):
                    self.faults.append(f"{key} is of type {type(tensor).__name__}")
                    continue
                dtype = str(tensor.dtype).removeprefix("torch.")
                self._add(key, file, (tuple(tensor.shape), dtype))
                self._tensors[key] = tensor

    def read(self, key: str, index: Index) -> np.ndarray:
        """Part of a tensor, a view of the file where that is possible."""
        import torch

        part = self._tensors[key].detach()[index]
        if part.dtype == torch.bfloat16:
            return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()


def _load_torch(file: Path) -> Mapping[str, Any]:
    """State dict of a file."""
    try:
        import torch
    except ImportError:
        found = "none"
    else:
        found = torch.__version__
    if found == "none" or Version(found) < _LEAST_TORCH:
        raise ValueError(
            f"{file}: reading torch's format needs torch {_LEAST_TORCH} or later, found {found}: "
            'pip install -e ".[oracles]"; or convert the file to safetensors elsewhere'
        )
    try:
        state = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file}: refused, nothing of it was run: it is damaged or holds more than tensors "
            f"({one_line(error)})"
        ) from None
    except Exception as error:  # of many kinds, all of them about the file
        raise ValueError(f"{file}: not a readable torch file ({one_line(error)})") from None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{file}: holds a {type(state).__name__}, expected tensors by name")
    return state


def open_safetensors(directory: Path) -> SafetensorFiles:
    """Those `*.safetensors` that the index names, or else model.safetensors, or all.

    Raises:
        ValueError: there are none, or one cannot be read.
    """
    files = _indexed(directory, INDEX, _WHOLE) or sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory}: no *.safetensors file; expected a Hugging Face directory")
    return SafetensorFiles(files)


def open_any(directory: Path) -> TensorFiles:
    """Safetensors where the directory has them, else `pytorch_model.bin` or its numbered parts.

    Raises:
        ValueError: there is neither, or a file cannot be read.
    """
    if (directory / INDEX).exists() or any(directory.glob("*.safetensors")):
        return open_safetensors(directory)
    files = _indexed(directory, TORCH_INDEX, _TORCH_WHOLE)
    if not files:
        raise ValueError(
            f"{directory}: neither *.safetensors nor {_TORCH_WHOLE}; expected a Hugging Face "
            "directory"
        )
    return TorchFiles(files)


def _indexed(directory: Path, index_name: str, whole: str) -> list[Path]:
    """Files that the index names, or else the whole model's where it exists."""
    index = directory / index_name
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ValueError(f"{index}: expected a 'weight_map' of tensors to files")
        files = {Path(name).name for name in names.values()}  # nothing outside the directory
        odd = sorted(name for name in files if name in ("", "..") or not name.isprintable())
        if odd:
            raise ValueError(f"{index}: {odd[0]!r} in 'weight_map' names no file")
        return sorted(directory / name for name in files)
    return [directory / whole] if (directory / whole).exists() else []
