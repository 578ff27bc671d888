"""The base model on the mesh: its sharded parameters, adapters for it, and its sampling layout."""

import dataclasses
import functools
from typing import Any

import jax
from absl import logging
from jax.sharding import NamedSharding
from jaxtyping import Array
from transformers import PreTrainedTokenizerBase

from refine_af import config as config_lib
from refine_af import drafting
from refine_af import mesh as mesh_lib
from refine_af.engine import Engine
from refine_af.models import attention, processes, sources, transformer
from refine_af.models import lora as lora_lib
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
    draft_tokens: int = 0  # of an `Engine`

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
        layout = mesh_lib.attention_layout(self.mesh)
        return transformer.define(self.config, lora_config(options), layout=layout)

    def new_adapter(self, options: config_lib.Lora, key: Array) -> Params:
        """Fresh adapter, float32: it changes nothing until it is trained."""
        config = lora_config(options)
        shardings = mesh_lib.param_shardings(self.config, config, self.mesh)[1]

        def draw(key: Array) -> Params:
            return transformer.init(self.config, config, key=key)[1]

        return jax.jit(draw, out_shardings=shardings)(key)

    def replicate(self, tree: Any) -> Any:
        """Copy of small arrays on every device."""
        where = mesh_lib.replicated(self.mesh)
        return jax.tree.map(lambda x: processes.to_devices(x, where), tree)

    def place_state(self, state: Any) -> Any:
        """State whose scalars and fresh statistics, too, live on the whole mesh."""

        def place(x: Array) -> Array:
            placed = isinstance(getattr(x, "sharding", None), NamedSharding)
            return x if x.ndim and placed else self.replicate(x)

        return jax.tree.map(place, state)

    def engine(
        self,
        num_slots: int,
        *,
        int8_weights: bool = False,
        int8_cache: bool = False,
        longest_text: int = 0,
    ) -> Engine:
        """Sampler for this model, with or without an adapter merged into its parameters.

        Args:
            int8_weights: its parameters are those of `for_sampling(int8_weights=True)`.
            int8_cache: keep keys and values as int8.
            longest_text: see `Engine`.
        """
        source = self.source
        config = dataclasses.replace(self.config, int8_weights=int8_weights, int8_cache=int8_cache)
        return Engine(
            config,
            source.tokenizer,
            self.mesh,
            source.eos_ids,
            num_slots,
            longest_text=longest_text,
            draft_tokens=self.draft_tokens,
        )

    def for_sampling(
        self,
        adapter: Params | None = None,
        options: config_lib.Lora | None = None,
        *,
        int8_weights: bool = False,
    ) -> Params:
        """Unstacked parameters for an `engine`: a copy, with the adapter merged into its kernels.

        They are laid out for decoding (`mesh.SAMPLING_RULES`). In bfloat16 the merged kernels round
        most of a small adapter away, but to an effect below that of bfloat16 arithmetic itself
        (docs/sampling.md).
        """
        config = dataclasses.replace(self.config, int8_weights=int8_weights)
        shardings = _sampling_shardings(config, self.mesh)
        lora = lora_config(options) if options and adapter else None
        return _relay(self.params, adapter or {}, lora, int8_weights, shardings)


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


@functools.cache  # a model is traced for them, which takes the host a second
def _sampling_shardings(config: ModelConfig, mesh: jax.sharding.Mesh) -> _Frozen:
    rules = mesh_lib.SAMPLING_RULES
    return _Frozen(mesh_lib.param_shardings(config, None, mesh, stacked=False, rules=rules)[0])


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _relay(
    base: Params, adapter: Params, lora: LoraConfig | None, int8_weights: bool, shardings: _Frozen
) -> Params:
    merged = base if lora is None else lora_lib.merge(base, adapter, lora)
    if int8_weights:
        merged = transformer.int8_kernels(merged)
    return jax.lax.with_sharding_constraint(transformer.unstack_layers(merged), shardings.tree)


def lora_config(options: config_lib.Lora) -> LoraConfig:
    """Adapter shape of a run's options."""
    return LoraConfig(rank=options.rank, alpha=options.alpha, pattern=options.pattern)


def open_source(options: config_lib.Model, mesh: jax.sharding.Mesh) -> Source:
    """The model that a run names, with nothing of it read but its description.

    Raises:
        ValueError: there is none, or its decode kernel cannot compute its attention on the mesh,
            or guesses cannot be read.
    """
    source = sources.open_model(
        options.source, dtype=options.dtype, param_dtype=options.param_dtype
    )
    config = dataclasses.replace(source.config, decode_kernel=options.decode_kernel)
    attention.check_decode_kernel(config, list(mesh.devices.flat))
    drafting.check(options.draft_tokens, config)
    return dataclasses.replace(source, config=config)


def load(
    options: config_lib.Model, mesh_options: config_lib.Mesh, *, check: bool = False
) -> BaseModel:
    """Load the base model and lay it out on the mesh.

    Args:
        check: refuse a mesh that does not divide the model, before any weight is read.
    """
    mesh = mesh_lib.make_mesh(mesh_options)
    source = open_source(options, mesh)
    if check:
        mesh_lib.check(source.config, mesh)
        if advice := mesh_lib.whole_heads(source.config, mesh):
            logging.warning(advice)
    shardings = mesh_lib.param_shardings(source.config, None, mesh)[0]
    return BaseModel(
        source=source,
        definition=transformer.define(source.config, layout=mesh_lib.attention_layout(mesh)),
        params=source.load(shardings),
        mesh=mesh,
        draft_tokens=options.draft_tokens,
    )
