"""Orbax directories of models: arrays of the stacked layout, read and written layer by layer.

Beside the arrays in `params/` lie config.json, generation_config.json and the tokenizer's files, as
in a Hugging Face directory.
"""

import asyncio
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from refine_af.models.config import ModelConfig
from refine_af.models.hf import Progress
from refine_af.models.one_line import one_line
from refine_af.models.transformer import Params
from refine_af.models.weights import Index, Shape, Weights, check_shapes, flat, put

PARAMS = "params"
_CHUNK_BYTES = 1 << 24  # stored, and so read, as one
_PIECE_BYTES = 1 << 24  # in memory at a time, unless a single row of chunks is larger


class OrbaxWeights(Weights):
    """Arrays of `directory/params`.

    Raises:
        ValueError: it is damaged, or its arrays are not those of `config`.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self._directory = (directory / PARAMS).absolute()
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                tree = checkpointer.metadata(self._directory).item_metadata.tree
            self._stores = {path: self._open(path) for path, _ in flat(tree, _is_array)}
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise ValueError(
                f"{self._directory}: not a readable checkpoint ({one_line(error)})"
            ) from None
        check_shapes({p: tuple(s.shape) for p, s in self._stores.items()}, config, str(directory))

    def _open(self, path: str) -> tensorstore.TensorStore:
        store = {
            "driver": "ocdbt",
            "base": self._directory.as_uri() + "/",
            "path": path.replace("/", ".") + "/",
        }
        spec = {"driver": "zarr3", "kvstore": store}
        return tensorstore.open(spec, read=True, open=True).result()

    @property
    def arrays(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """As the checkpoint says."""
        return {
            path: jax.ShapeDtypeStruct(tuple(store.shape), store.dtype.numpy_dtype)
            for path, store in self._stores.items()
        }

    def read(self, path: str, index: Index) -> np.ndarray:
        """Part of an array.

        Raises:
            ValueError: that part is damaged.
        """
        try:
            return self._stores[path][index].read().result()
        except Exception as error:
            raise ValueError(f"{self._directory}: {path} is damaged ({one_line(error)})") from None


def _is_array(node: Any) -> bool:
    return not isinstance(node, dict)


class _Streamed:
    """A leaf that Orbax saves without ever holding it: some rows of its first axis at a time."""

    def __init__(
        self, weights: Weights, path: str, dtype: str | None, progress: Progress | None
    ) -> None:
        array = weights.arrays[path]
        self.weights, self.path, self.progress = weights, path, progress
        self.shape: Shape = array.shape
        self.dtype = np.dtype(dtype or array.dtype)
        self.size = math.prod(self.shape)

    def pieces(self, chunk_rows: int) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, their values) from first to last, whole chunks at a time."""
        chunk_bytes = self.size * self.dtype.itemsize * chunk_rows // self.shape[0]
        step = chunk_rows * max(_PIECE_BYTES // chunk_bytes, 1)
        rest = (slice(None),) * (len(self.shape) - 1)
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            yield rows, self.weights.read(self.path, (rows, *rest)).astype(self.dtype, copy=False)

    def save_args(self) -> ocp.SaveArgs:
        """Chunks of one layer, or of a part of one: a shard is read with little around it."""
        stacked = self.path.startswith("layers/")
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked else ())


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Saves like an array of numpy, but one piece of one leaf at a time.

    Errors are kept for `write` to raise: Orbax would print them, with tracebacks of its threads.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.error: Exception | None = None
        self.stopped = False
        self._turn = asyncio.Semaphore(1)

    async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any) -> None:
        async with self._turn:
            try:
                spec = tensorstore.Spec(_checked(tspec))
                store = await tensorstore.open(spec, create=True, open=True, context=ts_context)
                (chunk_rows, *_) = store.chunk_layout.write_chunk.shape or (1,)
                for rows, piece in value.pieces(chunk_rows):
                    if self.stopped or self.error:
                        return
                    await _write(store[rows], piece)
                    if value.progress:
                        value.progress(piece.nbytes)
            except Exception as error:
                self.error = self.error or error


def _checked(tspec: dict[str, Any]) -> dict[str, Any]:
    """With a checksum of each chunk: what is not compressed would be read however damaged."""
    metadata = tspec["metadata"]
    (sharding,) = metadata["codecs"]
    inner = sharding["configuration"]
    inner = inner | {"codecs": [*inner["codecs"], {"name": "crc32c"}]}
    return tspec | {"metadata": metadata | {"codecs": [sharding | {"configuration": inner}]}}


async def _write(store: tensorstore.TensorStore, piece: np.ndarray) -> None:
    try:
        await store.write(piece)
    except Exception as error:  # of one kind for all causes
        raise OSError(one_line(error)) from None


def write(
    weights: Weights,
    directory: Path,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write `directory/params`; `dtype` None keeps each array's own.

    Raises:
        OSError: the disk is full, or cannot be written.
        ValueError: a part of `weights` cannot be read.
    """
    tree: Params = {}
    for path in weights.arrays:
        put(tree, path, _Streamed(weights, path, dtype, progress))
    streamed = _StreamedHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Streamed, streamed),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # there are none; Orbax warns without
    )
    # Nobody else takes part, wherever it is that this process is one of several.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="directory",
    )
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry,
        use_zarr3=True,
        use_compression=False,
        multiprocessing_options=alone,
    )
    args = ocp.args.PyTreeSave(tree, save_args=jax.tree.map(_Streamed.save_args, tree))
    # Orbax in the middle of its threads is no place for Ctrl-C: it stops between two pieces.
    with (
        ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer,
        ThreadPoolExecutor(1) as thread,
    ):
        try:
            thread.submit(checkpointer.save, (directory / PARAMS).absolute(), args=args).result()
        except ValueError as error:  # TensorStore's, of what Orbax writes itself
            raise OSError(one_line(error)) from None
        finally:
            streamed.stopped = True
    if streamed.error:
        raise streamed.error
