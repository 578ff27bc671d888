"""What sets a family of models apart: its key table and its words in config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Our path (layers stacked) <-> Hugging Face key ({} is the layer), True where theirs is [out, in].
Keys = dict[str, tuple[str, bool]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of transformers, as options of our decoder."""

    model_type: str  # of config.json
    architecture: str  # class in transformers
    keys: Keys
    structure: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of ModelConfig
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)  # theirs <-> our field
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # only value supported
    gguf: str | None = None  # its name in GGUF files, where those can be read
    gguf_permutes: bool = False  # llama.cpp permutes the rows of q and k
