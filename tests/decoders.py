"""Small decoders with random weights, shared by the tests of models."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_af.models import hf, hf_config, transformer
from refine_af.models.config import ModelConfig
from refine_af.models.sources import Source
from refine_af.models.transformer import Params
from refine_af.models.weights import TreeWeights

WINDOW = 8
# None of these is a default of transformers: one that gets lost shows.
_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "embed_dim": 24,
    "hidden_dim": 40,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "max_positions": 512,
    "rope_theta": 1e3,
    "norm_eps": 1e-4,
}
CONFIGS = {
    "llama-mha": ModelConfig(**_SIZES, num_kv_heads=4, tie_embeddings=True),
    "llama-gqa": ModelConfig(**_SIZES, num_kv_heads=2, tie_embeddings=True),
    "llama-untied": ModelConfig(**_SIZES, num_kv_heads=1, tie_embeddings=False),
    "mistral": ModelConfig(
        **_SIZES, num_kv_heads=2, tie_embeddings=False, family="mistral", sliding_window=WINDOW
    ),
}
LLAMA, MISTRAL = CONFIGS["llama-untied"], CONFIGS["mistral"]


def noise(shapes: Any, seed: int) -> Params:
    """Random numbers around 0, or 1 for norms, so large that logits are of order 1."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def random_params(config: ModelConfig) -> Params:
    return noise(jax.eval_shape(lambda: transformer.init(config, key=jax.random.key(0)))[0], seed=0)


def source_of(
    config: ModelConfig,
    params: Params,
    eos_ids: tuple[int, ...] = (2,),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Source:
    """These parameters as a source that never lay on a disk."""
    raw = hf_config.to_raw(config, eos_ids=eos_ids)
    return Source("memory", "random", config, raw, TreeWeights(params), eos_ids, tokenizer)


def write_directory(config: ModelConfig, params: Params, folder: Path) -> Path:
    """A Hugging Face directory without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = hf_config.to_raw(config, eos_ids=(2,))
    (folder / "config.json").write_text(json.dumps(raw))
    hf.write(TreeWeights(params), config, folder)
    return folder
