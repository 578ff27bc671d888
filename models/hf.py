"""Hugging Face directories: read config.json and safetensors into our tree, and write them back.

Conversion is a table (`KEYS` of a family): our path <-> their key <-> whether theirs is transposed.
Missing, unexpected and misshapen tensors are reported together.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from refine_af.models import transformer
from refine_af.models.config import ModelConfig
from refine_af.models.registry import FAMILIES
from refine_af.models.transformer import Params

# Buffers that old checkpoints carry and that are recomputed here.
_DROPPED_SUFFIXES = ("rotary_emb.inv_freq",)

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_MISTRAL_WINDOW = 4096  # what transformers takes when a config.json does not name one

ReadTensor = Callable[[str], np.ndarray]


def read_config(directory: Path, *, dtype: str, param_dtype: str) -> ModelConfig:
    """Our config of `directory/config.json`.

    Raises:
        ValueError: the architecture, or an option that would change the numbers, is not supported.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; expected a Hugging Face model directory") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: model_type={family!r} is not supported; expected one of {sorted(FAMILIES)}"
        )
    absent = [key for key in _REQUIRED if key not in raw]
    if absent:
        raise ValueError(f"{path}: lacks {', '.join(absent)}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    _refuse_options(path, raw, rope)
    heads = raw["num_attention_heads"]
    return ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        max_positions=raw["max_position_embeddings"],
        rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta", 1e4)),
        norm_eps=raw["rms_norm_eps"],
        tie_embeddings=raw.get("tie_word_embeddings", False),
        sliding_window=raw.get("sliding_window", _MISTRAL_WINDOW) if family == "mistral" else None,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def _refuse_options(path: Path, raw: dict[str, Any], rope: dict[str, Any]) -> None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        "rope type": rope_type if rope_type != "default" else None,
        "hidden_act": raw.get("hidden_act") if raw.get("hidden_act", "silu") != "silu" else None,
        "attention_bias": raw.get("attention_bias") or None,
        "mlp_bias": raw.get("mlp_bias") or None,
    }
    for option, value in unsupported.items():
        if value is not None:
            raise ValueError(f"{path}: {option} {value!r} is not supported")


def write_config(config: ModelConfig, directory: Path, *, eos_ids: Iterable[int]) -> None:
    """Write the config.json and generation_config.json that transformers reads."""
    family = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[config.family]
    raw: dict[str, Any] = {
        "architectures": [family],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "dtype": config.param_dtype,
        "eos_token_id": list(eos_ids),
    }
    if config.family == "mistral":
        raw["sliding_window"] = config.sliding_window
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    generation = {"eos_token_id": list(eos_ids), "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def assemble(
    config: ModelConfig, read: ReadTensor, available: dict[str, tuple[int, ...]], where: str
) -> Params:
    """Build our (stacked) tree from tensors that `read` gives by Hugging Face key.

    Args:
        available: shape of every tensor there is, by key.
        where: what to name in an error.

    Raises:
        ValueError: keys are missing, unexpected or have the wrong shape; all are listed.
    """
    shapes, _ = transformer.logical_axes(config)
    table = {
        path: (key, transposed)
        for path, (key, transposed) in FAMILIES[config.family].KEYS.items()
        if not (path == "head" and config.tie_embeddings)
    }
    _check_keys(config, table, shapes, available, where)
    params: Params = {}
    for path, (key, transposed) in table.items():
        keys = [key.format(i) for i in range(config.num_layers)] if "{}" in key else [key]
        parts = [read(k).T if transposed else read(k) for k in keys]
        array = np.stack(parts) if "{}" in key else parts[0]
        _put(params, path, jnp.asarray(array, config.param_dtype))
    return params


def _check_keys(
    config: ModelConfig,
    table: dict[str, tuple[str, bool]],
    shapes: Params,
    available: dict[str, tuple[int, ...]],
    where: str,
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for path, (key, transposed) in table.items():
        shape = _get(shapes, path)[0].shape
        for i in range(config.num_layers if "{}" in key else 1):
            one = shape[1:] if "{}" in key else shape
            expected[key.format(i)] = one[::-1] if transposed else one
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    surplus = {k for k in available if not k.endswith(_DROPPED_SUFFIXES)} - tied - expected.keys()
    faults = [f"missing {k}" for k in expected if k not in available]
    faults += [f"unexpected {k}" for k in sorted(surplus)]
    faults += [
        f"{k} has shape {available[k]}, expected {shape}"
        for k, shape in expected.items()
        if k in available and tuple(available[k]) != shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"{where}: tensors do not fit config.json: {'; '.join(faults[:8])}{more}")


def read_params(config: ModelConfig, directory: Path) -> Params:
    """Parameters of all `*.safetensors` files in `directory`, stacked layout."""
    handles = [_open(file) for file in _weight_files(directory)]
    owner = {key: handle for handle in handles for key in handle.keys()}  # noqa: SIM118
    available = {key: tuple(h.get_slice(key).get_shape()) for key, h in owner.items()}
    return assemble(
        config, lambda key: np.asarray(owner[key].get_tensor(key)), available, str(directory)
    )


def _weight_files(directory: Path) -> list[Path]:
    """Files that the index names, or all where there is none."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text())["weight_map"].values()
        return sorted({directory / Path(name).name for name in names})
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory}: no *.safetensors file; expected a Hugging Face directory")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="flax")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from None


def write_params(config: ModelConfig, params: Params, directory: Path) -> None:
    """Write `model.safetensors` with Hugging Face keys, in the parameters' own dtype."""
    tensors: dict[str, Any] = {}
    for path, (key, transposed) in FAMILIES[config.family].KEYS.items():
        if path == "head" and config.tie_embeddings:
            continue
        array = _get(params, path)
        layers = array if "{}" in key else array[None]
        for i, layer in enumerate(layers):
            tensors[key.format(i)] = layer.T if transposed else layer
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def with_dtypes(config: ModelConfig, dtype: str, param_dtype: str) -> ModelConfig:
    """The same model computed in, and stored as, other dtypes."""
    return dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype)


def _get(tree: Params, path: str) -> Any:
    node: Any = tree
    for part in path.split("/"):
        node = node[part]
    return node


def _put(tree: Params, path: str, leaf: Any) -> None:
    *parents, name = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[name] = leaf
