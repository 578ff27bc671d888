"""config.json and generation_config.json of Hugging Face directories <-> `ModelConfig`.

transformers' own configuration classes read the file: they know the defaults of every family and
the spellings of older releases. What they have understood is then translated, or refused by name.
"""

import copy
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from refine_af.models.config import MOST, MOST_LAYERS, LinearRope, Llama3Rope, ModelConfig
from refine_af.models.family import Family
from refine_af.models.one_line import one_line
from refine_af.models.registry import FAMILIES

Raw = dict[str, Any]  # content of a config.json

# Their key <-> our field, in every family.
_NUMBERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_REQUIRED = _NUMBERS.keys() - {"tie_word_embeddings"}
# Not LLaMA-shaped, or not plain numbers, whatever the architecture is called.
_REFUSED = ("quantization_config", "num_experts", "num_local_experts", "n_routed_experts")
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def read_json(path: Path) -> Raw:
    """Object in a JSON file.

    Raises:
        ValueError: the file is missing, or holds something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; expected a Hugging Face model directory") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return raw


def parse(raw: Raw, where: str, *, dtype: str, param_dtype: str) -> ModelConfig:
    """Our config of a config.json's content.

    Raises:
        ValueError: the architecture, or an option that would change the numbers, is not supported.
    """
    name = raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        note = " (with a text_config; only text models are read)" if "text_config" in raw else ""
        raise ValueError(
            f"{where}: model_type={name!r} is not supported{note}; "
            f"expected one of {sorted(FAMILIES)}"
        )
    absent = sorted(key for key in _REQUIRED if key not in raw)
    if absent:
        raise ValueError(f"{where}: lacks {', '.join(absent)}")
    count(raw, "num_hidden_layers", where)  # transformers makes a list as long as that
    theirs = _understood(raw, family, where)
    _refuse_options(raw, theirs, family, where)
    numbers = _NUMBERS | dict(family.numbers)
    heads = theirs.num_attention_heads
    try:
        return ModelConfig(
            family=family.model_type,
            **{ours: getattr(theirs, key) for key, ours in numbers.items()},
            num_kv_heads=theirs.num_key_value_heads or heads,
            head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
            **_positions(theirs),
            **_windows(theirs),
            **family.structure,
            dtype=dtype,
            param_dtype=param_dtype,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _understood(raw: Raw, family: Family, where: str) -> PreTrainedConfig:
    try:
        return CONFIG_MAPPING[family.model_type].from_dict(copy.deepcopy(raw))
    except Exception as error:  # of many kinds, all of them about the file
        raise ValueError(f"{where}: transformers does not accept it: {one_line(error)}") from None


def _refuse_options(raw: Raw, theirs: PreTrainedConfig, family: Family, where: str) -> None:
    found = {name: raw[name] for name in _REFUSED if raw.get(name)}
    for name, supported in family.required.items():
        value = getattr(theirs, name, supported)
        if value != supported:
            found[name] = value
    if found:
        named = ", ".join(f"{name}={value!r}"[:80] for name, value in found.items())
        raise ValueError(f"{where}: not supported: {named}")


def _positions(theirs: PreTrainedConfig) -> dict[str, Any]:
    """Rotary base and scaling, those of layers with a window apart where they differ."""
    rope = theirs.rope_parameters
    if _GLOBAL not in rope:
        theta, scaling = _rope(rope)
        return {"rope_theta": theta, "rope_scaling": scaling}
    theta, scaling = _rope(rope[_GLOBAL])
    local_theta, local_scaling = _rope(rope[_LOCAL])
    if local_scaling is not None:
        raise ValueError("scaled positions in layers with a window are not supported")
    return {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local_theta}


def _rope(parameters: Raw) -> tuple[float, LinearRope | Llama3Rope | None]:
    kind = parameters["rope_type"]

    def number(name: str) -> float:
        value: Any = parameters.get(name)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"rope type {kind!r}: {name}={value!r}: expected a number")
        return float(value)

    theta = number("rope_theta")
    if theta <= 0:
        raise ValueError(f"rope_theta={theta}: expected a number above 0")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRope(number("factor"))
    if kind == "llama3":
        return theta, Llama3Rope(
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_positions=int(number("original_max_position_embeddings")),
        )
    raise ValueError(f"rope type {kind!r} is not supported; expected default, linear or llama3")


def _windows(theirs: PreTrainedConfig) -> dict[str, Any]:
    """Sliding window, and the layers without; transformers ignores both in other families."""
    if not hasattr(type(theirs)(), "sliding_window"):
        return {}
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None) or [_LOCAL] * theirs.num_hidden_layers
    unknown = set(types) - {_LOCAL, _GLOBAL}
    if unknown:
        raise ValueError(f"layer types {sorted(unknown)} are not supported")
    if window is None or _LOCAL not in types:
        return {}
    return {
        "sliding_window": window,
        "global_layers": tuple(i for i, kind in enumerate(types) if kind == _GLOBAL),
    }


def number(raw: Raw, key: str, where: str, default: float | None = None) -> float:
    """A number above 0; `default` where the key is absent or null.

    Raises:
        ValueError: it is something else, or absent and without a default.
    """
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{where}: lacks {key}")
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{where}: {key}={value!r}: expected a number above 0")
    return float(value)


def count(raw: Raw, key: str, where: str, default: int | None = None) -> int:
    """A whole number above 0, and no absurd one; `default` where the key is absent or null.

    Raises:
        ValueError: it is something else, or absent and without a default.
    """
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{where}: lacks {key}")
    most = MOST_LAYERS if key.endswith("layers") else MOST
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{where}: {key}={value!r}: expected a whole number from 1 to {most}")
    return value


def only(raw: Raw, supported: Mapping[str, Any], where: str) -> None:
    """Refuse, all at once, options that have another value than the supported one.

    Args:
        supported: key -> its only supported value; an absent key has it, too.

    Raises:
        ValueError: there are any.
    """
    found = {key: raw[key] for key, value in supported.items() if raw.get(key, value) != value}
    found |= {key: raw[key] for key in _REFUSED if raw.get(key)}
    if found:
        named = ", ".join(f"{key}={value!r}"[:80] for key, value in found.items())
        raise ValueError(f"{where}: not supported: {named}")


def stored_dtype(raw: Raw) -> str | None:
    """Dtype that config.json names, if it does."""
    name = raw.get("dtype") or raw.get("torch_dtype")
    return name.removeprefix("torch.") if isinstance(name, str) else None


def end_ids(directory: Path, raw: Raw) -> tuple[int, ...]:
    """Ids of the tokens that end a text: generation_config.json's, or else config.json's."""
    generation = directory / "generation_config.json"
    named = read_json(generation).get("eos_token_id") if generation.exists() else None
    named = raw.get("eos_token_id") if named is None else named
    ids = named if isinstance(named, list) else [named]
    return tuple(i for i in ids if type(i) is int and 0 <= i <= MOST)


def to_raw(config: ModelConfig, *, eos_ids: Iterable[int]) -> Raw:
    """Content of the config.json that transformers reads, in the spelling all its releases know."""
    family = FAMILIES[config.family]
    raw: Raw = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        **family.required,
        **{key: getattr(config, ours) for key, ours in _NUMBERS.items()},
        **{key: getattr(config, ours) for key, ours in family.numbers.items()},
        "dtype": config.param_dtype,
        "eos_token_id": list(eos_ids),
    }
    scaling = config.rope_scaling
    if isinstance(scaling, LinearRope):
        raw["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3Rope):
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    if config.local_rope_theta is not None:
        raw["rope_local_base_freq"] = config.local_rope_theta
    return raw | _raw_windows(config)


def _raw_windows(config: ModelConfig) -> Raw:
    theirs = CONFIG_MAPPING[config.family]()
    raw: Raw = {}
    if hasattr(theirs, "sliding_window"):
        raw["sliding_window"] = config.sliding_window
    if hasattr(theirs, "use_sliding_window"):
        raw["use_sliding_window"] = config.sliding_window is not None
    if hasattr(theirs, "layer_types"):
        everywhere = config.sliding_window is None
        raw["layer_types"] = [
            _GLOBAL if everywhere or i in config.global_layers else _LOCAL
            for i in range(config.num_layers)
        ]
    return raw
