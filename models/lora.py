"""Low-rank adapters as trees of their own: `{..., "q": {"lora_a": [L, in, R], "lora_b": ...}}`.

In PEFT's file format they are a directory with adapter_config.json and adapter_model.safetensors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from refine_af.models import processes
from refine_af.models.config import LoraConfig, ModelConfig
from refine_af.models.hf_config import read_json
from refine_af.models.one_line import one_line
from refine_af.models.registry import FAMILIES
from refine_af.models.transformer import Params, logical_axes
from refine_af.models.weights import (
    Index,
    Shape,
    TreeWeights,
    Weights,
    flat,
    get,
    misfits,
    put,
    refuse,
)
from refine_af.models.writing import writing

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# Options of PEFT that would change the numbers, and the one value that means they do not.
_REQUIRED = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
}
_REFUSED = ("layer_replication", "alora_invocation_tokens")
# Ways to initialise that leave the base weights alone; PiSSA, OLoRA, CorDA and LoftQ change them.
_INITS = (True, "gaussian", "eva", "orthogonal")


def merge(base: Params, adapter: Params, config: LoraConfig) -> Params:
    """Base parameters with `scale * A @ B` added to every adapted kernel (sum in float32).

    For stacked layers; `base` itself stays as it is. A bfloat16 kernel is too coarse for a small
    adapter: most of it is rounded away.
    """
    return _add(base, adapter, config.scale)


def unmerge(merged: Params, adapter: Params, config: LoraConfig) -> Params:
    """What `merge` made its result of, up to rounding in the kernels' dtype; stacked layers."""
    return _add(merged, adapter, -config.scale)


def _add(node: Any, adapted: Any, scale: float) -> Any:
    if not isinstance(node, dict):
        return node
    if "lora_a" in adapted:
        a, b = adapted["lora_a"], adapted["lora_b"]
        delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * scale
        kernel = node["kernel"]
        return {**node, "kernel": (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)}
    return {key: _add(child, adapted.get(key, {}), scale) for key, child in node.items()}


class MergedWeights(Weights):
    """Merged parameters in float32, each part computed when it is read.

    In float32, because a bfloat16 kernel would round most of the adapter away.
    """

    def __init__(self, base: Params, adapter: Params, config: LoraConfig) -> None:
        self._base = TreeWeights(base)
        self._adapter = dict(flat(processes.to_host(adapter)))
        self._scale = config.scale

    @property
    def arrays(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Those of the base, in float32."""
        arrays = self._base.arrays.items()
        return {path: jax.ShapeDtypeStruct(a.shape, jnp.float32) for path, a in arrays}

    def read(self, path: str, index: Index) -> np.ndarray:
        """Part of the sum."""
        part = self._base.read(path, index).astype(np.float32)
        module = path.removesuffix("kernel")
        if not path.endswith("/kernel") or f"{module}lora_a" not in self._adapter:
            return part
        *layers, rows, columns = index
        a = self._adapter[f"{module}lora_a"][(*layers, rows)]
        b = self._adapter[f"{module}lora_b"][(*layers, slice(None), columns)]
        return part + a @ b * np.float32(self._scale)


def write_peft(
    adapter: Params, config: LoraConfig, model: ModelConfig, directory: Path, base_name: str
) -> None:
    """Write an adapter so that `peft` loads it.

    Args:
        adapter: stacked layout.
        base_name: where the base model lies, for `adapter_config.json`.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    adapter = processes.to_host(adapter)
    processes.by_writer(lambda: _write_peft(adapter, config, model, directory, base_name))


def _write_peft(
    adapter: Params, config: LoraConfig, model: ModelConfig, directory: Path, base_name: str
) -> None:
    table = _table(model)
    linears = sorted({path.rpartition("/")[0] for path, _ in flat(adapter)})
    tensors: dict[str, np.ndarray] = {}
    for linear in linears:
        for i in range(model.num_layers):
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                factor = get(adapter, f"{linear}/{ours}")[i]
                key = f"{_PREFIX}{table[linear].format(i)}.{theirs}.weight"
                tensors[key] = np.ascontiguousarray(factor.T)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": [table[linear].rpartition(".")[2] for linear in linears],
        "inference_mode": True,
        **_REQUIRED,
    }
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
        (directory / _CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def read_peft(directory: Path, model: ModelConfig) -> tuple[LoraConfig, Params]:
    """Shape and (stacked, float32) factors of an adapter that `peft` wrote.

    Raises:
        ValueError: an option is not supported, or the tensors are not those of every layer.
    """
    if not (directory / _CONFIG).is_file():
        raise ValueError(f"{directory}: no {_CONFIG} there; expected an adapter that peft wrote")
    raw = read_json(directory / _CONFIG)
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{directory / _CONFIG}: peft_type={raw.get('peft_type')!r} is no LoRA")
    odd = {key: raw[key] for key, value in _REQUIRED.items() if (raw.get(key) or value) != value}
    odd |= {key: raw[key] for key in _REFUSED if raw.get(key)}
    if (raw.get("init_lora_weights") or True) not in _INITS:
        odd["init_lora_weights"] = raw["init_lora_weights"]
    if odd:
        raise ValueError(f"{directory / _CONFIG}: not supported: {odd}")
    try:
        tensors = load_file(directory / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{directory / _WEIGHTS}: not readable ({one_line(error)})") from None
    table = {f"{_PREFIX}{module}": linear for linear, module in _table(model).items()}
    named = {
        linear: module
        for module, linear in table.items()
        if f"{module.format(0)}.lora_A.weight" in tensors
    }
    names = sorted(linear.rpartition("/")[2] for linear in named)
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ValueError(
            f"{directory / _CONFIG}: r={rank!r}, lora_alpha={alpha!r}: expected numbers"
        )
    config = LoraConfig(rank=rank, alpha=float(alpha), pattern="|".join(names) or "none")
    return config, _stack(tensors, named, config, model, str(directory))


def _stack(
    tensors: Mapping[str, np.ndarray],
    named: Mapping[str, str],
    config: LoraConfig,
    model: ModelConfig,
    where: str,
) -> Params:
    """Tree of the factors of the linears `named`, layers stacked."""
    shapes: dict[str, Shape] = {
        path: leaf[0].shape
        for path, leaf in flat(
            logical_axes(model, config)[1], is_leaf=lambda node: isinstance(node, tuple)
        )
    }
    keys = {
        path: [
            f"{named[linear].format(i)}.lora_{factor[-1].upper()}.weight"
            for i in range(model.num_layers)
        ]
        for path in shapes
        for linear, _, factor in [path.rpartition("/")]
    }
    wanted = {key: shapes[path][1:][::-1] for path, group in keys.items() for key in group}
    refuse(misfits({key: tensor.shape for key, tensor in tensors.items()}, wanted), where)
    adapter: Params = {}
    for path, group in keys.items():
        put(adapter, path, jnp.stack([jnp.asarray(tensors[k].T, jnp.float32) for k in group]))
    return adapter


def _table(model: ModelConfig) -> dict[str, str]:
    """Our linear, `layers/attention/q`, -> their module, with {} for the layer."""
    return {
        path.removesuffix("/kernel"): key.removesuffix(".weight")
        for path, (key, _) in FAMILIES[model.family].keys.items()
        if path.endswith("/kernel")
    }
