"""The base model on the mesh: its sharded parameters, adapters for it, and its sampling layout."""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array
from transformers import PreTrainedTokenizerBase

from refine_af import config as config_lib
from refine_af import mesh as mesh_lib
from refine_af.engine import Engine
from refine_af.models import sources, transformer
from refine_af.models.config import LoraConfig, ModelConfig
from refine_af.models.sources import Source
from refine_af.models.transformer import Definition, Params


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """Frozen weights of stacked layout, sharded, with all that is needed to use them."""

    source: Source
    definition: Definition
    params: Params
    mesh: jax.sharding.Mesh

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.source.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            ValueError: it has none.
        """
        if self.source.tokenizer is None:
            raise ValueError(f"model {self.source.name!r} has no tokenizer")
        return self.source.tokenizer

    @property
    def end_id(self) -> int:
        """Token that ends a text which the model is to learn.

        Raises:
            ValueError: the model names none.
        """
        if not self.source.eos_ids:
            raise ValueError(f"model {self.source.name!r} names no end token")
        return self.source.eos_ids[0]

    def adapted(self, options: config_lib.Lora) -> Definition:
        """Definition of this model with adapters."""
        return transformer.define(self.config, lora_config(options))

    def new_adapter(self, options: config_lib.Lora, key: Array) -> Params:
        """Fresh adapter, float32: it changes nothing until it is trained."""
        config = lora_config(options)
        shardings = mesh_lib.param_shardings(self.config, config, self.mesh)[1]

        def draw(key: Array) -> Params:
            return transformer.init(self.config, config, key=key)[1]

        return jax.jit(draw, out_shardings=shardings)(key)

    def replicate(self, tree: Any) -> Any:
        """Copy of small arrays on every device."""
        return jax.device_put(tree, mesh_lib.replicated(self.mesh))

    def place_state(self, state: Any) -> Any:
        """State whose scalars, too, live on the whole mesh."""

        def place(x: Array) -> Array:
            return x if x.ndim else self.replicate(x)

        return jax.tree.map(place, state)

    def engine(self, batch_size: int, options: config_lib.Lora | None = None) -> Engine:
        """Sampler for this model, with adapters of the given shape or without."""
        lora = lora_config(options) if options else None
        source = self.source
        return Engine(self.config, source.tokenizer, self.mesh, source.eos_ids, batch_size, lora)

    def for_sampling(
        self, adapter: Params | None = None, options: config_lib.Lora | None = None
    ) -> Params:
        """Unstacked parameters, the adapter's among them, for an `engine` of the same options.

        The adapter is not merged into the kernels: a bfloat16 kernel is too coarse to hold it (of
        an update a hundredth of the kernel's size about nine tenths would be rounded away).
        """
        lora = lora_config(options) if options else None
        shardings = mesh_lib.param_shardings(self.config, lora, self.mesh, stacked=False)
        return _relay(self.params, adapter or {}, _Frozen(_joined(*shardings)))


class _Frozen:
    """A tree of shardings as a static argument: hashed by content."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        leaves, structure = jax.tree.flatten(tree)
        self._key = (tuple(leaves), structure)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self._key == other._key


@functools.partial(jax.jit, static_argnums=2)
def _relay(base: Params, adapter: Params, shardings: _Frozen) -> Params:
    unstacked = transformer.unstack_layers(base)
    if adapter:
        unstacked = _joined(unstacked, transformer.unstack_layers(adapter))
    return jax.lax.with_sharding_constraint(unstacked, shardings.tree)


def _joined(first: Any, second: Any) -> Any:
    """Two nested dictionaries without a leaf in common as one."""
    both = {
        key: _joined(first[key], second[key]) if key in first and key in second else tree[key]
        for tree in (first, second)
        for key in tree
    }
    return both


def lora_config(options: config_lib.Lora) -> LoraConfig:
    """Adapter shape of a run's options."""
    return LoraConfig(rank=options.rank, alpha=options.alpha, pattern=options.pattern)


def load(options: config_lib.Model, mesh_options: config_lib.Mesh) -> BaseModel:
    """Load the base model and lay it out on the mesh."""
    mesh = mesh_lib.make_mesh(mesh_options)
    source = sources.open_model(
        options.source, dtype=options.dtype, param_dtype=options.param_dtype
    )
    shardings = mesh_lib.param_shardings(source.config, None, mesh)[0]
    return BaseModel(
        source=source,
        definition=transformer.define(source.config),
        params=source.load(shardings),
        mesh=mesh,
    )
