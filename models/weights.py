"""Parameters that lie somewhere, read piece by piece: nothing here holds a whole model.

A path names an array of the stacked layout, such as `layers/attention/q/kernel` [L, in, out].
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from refine_af.models import processes, transformer
from refine_af.models.config import ModelConfig
from refine_af.models.transformer import Params

Index = tuple[slice, ...]
Shape = tuple[int, ...]

# What can be wrong with a tensor, in the order in which `refuse` reports it, and how often.
_KINDS = ("missing ", "unexpected ", " is in ", " has shape ", " has dtype ", " is of type ")
_NAMED = 8


class Weights(abc.ABC):
    """All parameters of a model, by path."""

    @property
    @abc.abstractmethod
    def arrays(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and stored dtype of every array."""

    @abc.abstractmethod
    def read(self, path: str, index: Index) -> np.ndarray:
        """Part of an array, in its stored dtype; reads little more than that part."""

    def load(self, dtype: str, shardings: Params | None = None) -> Params:
        """The tree of all arrays, cast to `dtype`; each device reads its own shards only.

        Args:
            shardings: a tree like the result; None puts everything on this host's first device.
        """
        tree: Params = {}
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        for path, array in self.arrays.items():
            sharding = first if shardings is None else get(shardings, path)
            put(tree, path, self._load_array(path, array.shape, dtype, sharding))
        return tree

    def _load_array(
        self, path: str, shape: Shape, dtype: str, sharding: jax.sharding.Sharding
    ) -> jax.Array:
        read: dict[Any, np.ndarray] = {}  # devices that hold the same shard share one reading

        def piece(index: Index | None) -> np.ndarray:
            assert index is not None
            key = tuple(part.indices(n) for part, n in zip(index, shape, strict=True))
            if key not in read:
                read[key] = self.read(path, index).astype(dtype, copy=False)
            return read[key]

        return jax.make_array_from_callback(shape, sharding, piece)


class TreeWeights(Weights):
    """Arrays in memory."""

    def __init__(self, tree: Params) -> None:
        self.tree = tree

    @property
    def arrays(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Those of the tree."""
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat(self.tree)
        }

    def read(self, path: str, index: Index) -> np.ndarray:
        """Part of one of them, on the host."""
        return processes.to_host(get(self.tree, path)[index])


class RandomWeights(Weights):
    """Weights of a new model, the same for every reading."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @property
    def arrays(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Those of the config, in its `param_dtype`."""
        shapes = expected_shapes(self.config).items()
        return {p: jax.ShapeDtypeStruct(s, self.config.param_dtype) for p, s in shapes}

    def load(self, dtype: str, shardings: Params | None = None) -> Params:
        """Drawn on the devices that hold them."""
        config = dataclasses.replace(self.config, param_dtype=dtype)
        draw = jax.jit(lambda key: transformer.init(config, key=key)[0], out_shardings=shardings)
        return draw(jax.random.key(0))

    def read(self, path: str, index: Index) -> np.ndarray:
        """Part of an array; all of them are drawn for it."""
        return self._drawn.read(path, index)

    @functools.cached_property
    def _drawn(self) -> TreeWeights:
        return TreeWeights(self.load(self.config.param_dtype))


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every array that a model of this config has, by path."""
    return shapes_of(transformer.logical_axes(config)[0])


def shapes_of(axes: Params) -> dict[str, Shape]:
    """Shape of every array of a tree of `transformer.axes_of`, by path."""
    leaves = flat(axes, is_leaf=lambda node: isinstance(node, tuple))
    return {path: leaf[0].shape for path, leaf in leaves}


def refuse(faults: Iterable[str], where: str) -> None:
    """Report all that is wrong with a source's tensors at once: eight of each kind, and a count.

    Args:
        faults: one line a tensor, with the words of `_KINDS` that say what is wrong with it.

    Raises:
        ValueError: there are any.
    """
    kinds: dict[str, list[str]] = {kind: [] for kind in (*_KINDS, "")}
    for fault in sorted(faults):
        kinds[next(kind for kind in kinds if kind in fault)].append(fault)
    named: list[str] = []
    for group in kinds.values():
        named += group[:_NAMED]
        if len(group) > _NAMED:
            named[-1] += f" and {len(group) - _NAMED} more"
    if named:
        raise ValueError(f"{where}: tensors do not fit config.json: {'; '.join(named)}")


def misfits(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[str]:
    """What is missing, unexpected or misshapen, for `refuse`."""
    return [
        *(f"missing {name}" for name in wanted if name not in found),
        *(f"unexpected {name}" for name in found if name not in wanted),
        *(
            f"{name} has shape {found[name]}, expected {shape}"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ),
    ]


def check_shapes(found: Mapping[str, Shape], config: ModelConfig, where: str) -> None:
    """Refuse arrays that are missing, unexpected or misshapen.

    Raises:
        ValueError: with all of them.
    """
    refuse(misfits(found, expected_shapes(config)), where)


def flat(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of a nested dictionary."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def get(tree: Params, path: str) -> Any:
    """Leaf at a path."""
    node: Any = tree
    for part in path.split("/"):
        node = node[part]
    return node


def put(tree: Params, path: str, leaf: Any) -> None:
    """Set a leaf, making the dictionaries on the way."""
    *parents, name = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[name] = leaf
