"""GGUF files: config, weights dequantised tensor by tensor, and tokenizer, through `gguf`.

llama.cpp permutes the rows of q and k of LLaMA-shaped models so that rotary pairs stand next to
each other; Hugging Face and this project rotate halves, so the permutation is undone on reading.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from refine_af.models import rotary
from refine_af.models.config import Llama3Rope, ModelConfig
from refine_af.models.hf import tensors
from refine_af.models.registry import FAMILIES
from refine_af.models.weights import Index, Weights, expected_shapes, refuse

_FAMILIES = {family.gguf: family for family in FAMILIES.values() if family.gguf is not None}
# llama.cpp stores LLaMA-3's scaling as the factor by which each frequency is divided.
_ROPE_FACTORS = "rope_freqs.weight"
_ROPE_SCALINGS = [
    Llama3Rope(factor=f, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
    for f in (8.0, 32.0)
]
_DIGITS_APART = "smollm"  # pre-tokenizer: single digits, then ByteLevel
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def open_file(path: Path) -> gguf.GGUFReader:
    """Memory-mapped reader.

    Raises:
        ValueError: not a whole GGUF file, or not of an architecture that is supported.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: not a readable GGUF file ({error})") from None
    architecture = _field(reader, "general.architecture")
    if architecture not in _FAMILIES:
        raise ValueError(
            f"{path}: architecture {architecture!r} is not supported; "
            f"expected one of {sorted(_FAMILIES)}"
        )
    return reader


def read_config(reader: gguf.GGUFReader, *, dtype: str, param_dtype: str) -> ModelConfig:
    """Model config from the file's metadata.

    Raises:
        ValueError: a field is missing, or an option is not supported.
    """
    name = _field(reader, "general.architecture")
    _refuse_options(reader, name)
    heads = _field(reader, f"{name}.attention.head_count")
    embed_dim = _field(reader, f"{name}.embedding_length")
    head_dim = _optional(reader, f"{name}.attention.key_length", embed_dim // heads)
    theta = float(_field(reader, f"{name}.rope.freq_base"))
    shapes = _shapes(reader)
    # Padded vocabularies have more rows than the tokenizer has tokens.
    vocabulary = shapes.get("token_embd.weight", (len(_field(reader, _TOKENS)),))
    return ModelConfig(
        family=_FAMILIES[name].model_type,
        vocab_size=vocabulary[0],
        embed_dim=embed_dim,
        hidden_dim=_field(reader, f"{name}.feed_forward_length"),
        num_layers=_field(reader, f"{name}.block_count"),
        num_heads=heads,
        num_kv_heads=_optional(reader, f"{name}.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_positions=_field(reader, f"{name}.context_length"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(reader, head_dim, theta),
        # Stored as float32; seven digits give back the value that was written.
        norm_eps=float(f"{_field(reader, f'{name}.attention.layer_norm_rms_epsilon'):.6g}"),
        tie_embeddings="output.weight" not in shapes,
        **_FAMILIES[name].structure,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def _refuse_options(reader: gguf.GGUFReader, name: str) -> None:
    scaling = _optional(reader, f"{name}.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"GGUF file: rope scaling {scaling!r} is not supported")
    for option in ("expert_count", "attention.sliding_window"):
        value = _optional(reader, f"{name}.{option}", 0)
        if value:
            raise ValueError(f"GGUF file: {option}={value} is not supported")


def _rope_scaling(reader: gguf.GGUFReader, head_dim: int, theta: float) -> Llama3Rope | None:
    """Scaling whose factors the file holds."""
    stored = [tensor for tensor in reader.tensors if tensor.name == _ROPE_FACTORS]
    if not stored:
        return None
    plain = rotary.frequencies(head_dim, theta, None)
    for scaling in _ROPE_SCALINGS:
        factors = plain / rotary.frequencies(head_dim, theta, scaling)
        if np.allclose(stored[0].data, factors, rtol=1e-4):
            return scaling
    raise ValueError(f"GGUF file: the scaling of positions in {_ROPE_FACTORS} is not supported")


class GgufWeights(Weights):
    """Dequantised tensors of a file, float32 whatever it stores.

    Raises:
        ValueError: tensors are missing, unexpected, misshapen or of a type that the `gguf` package
            does not dequantise; all of them are listed.
    """

    def __init__(self, reader: gguf.GGUFReader, config: ModelConfig) -> None:
        family = FAMILIES[config.family]
        assert family.gguf is not None
        architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf)
        names = gguf.get_tensor_name_map(architecture, config.num_layers)
        self._config = config
        self._table = tensors(config)
        self._names = {
            key: f"{names.get_name(key.rpartition('.')[0])}.{key.rpartition('.')[2]}"
            for key in self._table
        }
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        self._check(_shapes(reader))
        self._keys: dict[str, list[str]] = {}
        for key, tensor in self._table.items():
            self._keys.setdefault(tensor.path, []).append(key)

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        wanted = {self._names[key]: tensor.shape for key, tensor in self._table.items()}
        faults = [f"missing {name}" for name in wanted if name not in shapes]
        surplus = shapes.keys() - wanted.keys() - {_ROPE_FACTORS}
        faults += [f"unexpected {name}" for name in sorted(surplus)]
        for name, shape in wanted.items():
            if shapes.get(name, shape) != shape:
                faults.append(f"{name} has shape {shapes[name]}, expected {shape}")
        for name in wanted.keys() & self._stored.keys():
            kind = self._stored[name].tensor_type
            if kind.name not in _PLAIN and not hasattr(gguf.quants, kind.name):
                faults.append(f"{name} is of type {kind.name}, which gguf does not dequantise")
        refuse(faults, "GGUF file")

    @property
    def arrays(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """All in float32."""
        shapes = expected_shapes(self._config).items()
        return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes}

    def read(self, path: str, index: Index) -> np.ndarray:
        """Part of an array; whole tensors are dequantised for it, one at a time."""
        keys = self._keys[path]
        if self._table[keys[0]].layer is None:
            return self._read_tensor(keys[0])[index]
        first, *rest = index
        return np.stack([self._read_tensor(key)[tuple(rest)] for key in keys[first]])

    def _read_tensor(self, key: str) -> np.ndarray:
        tensor, stored = self._table[key], self._stored[self._names[key]]
        array = gguf.quants.dequantize(stored.data, stored.tensor_type).astype(np.float32)
        if FAMILIES[self._config.family].gguf_permutes:
            if ".q_proj." in key:
                array = _unpermute(array, self._config.num_heads)
            if ".k_proj." in key:
                array = _unpermute(array, self._config.num_kv_heads)
        return array.T if tensor.transposed else array


_PLAIN = ("F32", "F16")
_TOKENS = "tokenizer.ggml.tokens"


def _shapes(reader: gguf.GGUFReader) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors}


def _unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """[N*H, D] with pairs (2i, 2i+1) together -> halves (i, i + H/2)."""
    out, width = rows.shape
    pairs = rows.reshape(num_heads, out // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(out, width)


def end_ids(reader: gguf.GGUFReader) -> tuple[int, ...]:
    """Id of the token that ends a text."""
    end = _optional(reader, "tokenizer.ggml.eos_token_id", None)
    return () if end is None else (int(end),)


def read_tokenizer(reader: gguf.GGUFReader, path: Path) -> PreTrainedTokenizerBase | None:
    """Tokenizer of the file; None where transformers cannot make one of it."""
    if _optional(reader, "tokenizer.ggml.pre", None) == _DIGITS_APART:
        return _digits_apart(reader)
    try:
        return AutoTokenizer.from_pretrained(path.absolute().parent, gguf_file=path.name)
    except Exception:  # of many kinds: unknown tokenizers, missing fields
        return None


def _digits_apart(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, which transformers does not read from a GGUF file."""
    tokens: list[str] = _field(reader, _TOKENS)
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        additional_special_tokens=special,
        chat_template=_field(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.fields.get(name)
    if field is None:
        raise ValueError(f"GGUF file has no field {name!r}")
    return field.contents()


def _optional(reader: gguf.GGUFReader, name: str, default: Any) -> Any:
    field = reader.fields.get(name)
    return default if field is None else field.contents()
