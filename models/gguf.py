"""GGUF files: config, weights dequantised some rows at a time, and tokenizer, through `gguf`.

llama.cpp permutes the rows of q and k of LLaMA-shaped models so that rotary pairs stand next to
each other; Hugging Face and this project rotate halves, so the permutation is undone on reading.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gguf
import jax
import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from refine_af.models import rotary
from refine_af.models.config import MOST, LinearRope, Llama3Rope, ModelConfig
from refine_af.models.hf import tensors
from refine_af.models.one_line import one_line
from refine_af.models.registry import FAMILIES
from refine_af.models.weights import Index, Shape, Weights, expected_shapes, refuse

T = TypeVar("T")

_FAMILIES = {family.gguf: family for family in FAMILIES.values() if family.gguf is not None}
# llama.cpp stores LLaMA-3's scaling as the factor by which each frequency is divided.
_ROPE_FACTORS = "rope_freqs.weight"
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_PLAIN = ("F32", "F16")
_CHUNK = 1 << 22  # numbers dequantised at a time, unless a single row has more
_MOST_ENTRIES = 1 << 22  # of a list in the metadata; the largest vocabularies have 300,000
_TOKENIZER = "tokenizer.ggml."
_SPACE = "\u2581"  # how SentencePiece writes it


class _Reader(gguf.GGUFReader):
    """Ends where the file ends: the library's slices are empty there, and its loops go on."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if not 0 <= int(offset) + int(count) * np.dtype(dtype).itemsize <= len(self.data):
            raise ValueError(f"ends before {count} numbers at byte {offset}")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY:
            size = self._get(orig_offs + 4, np.uint64)[0]
            if size > _MOST_ENTRIES:  # the library makes an object of each
                raise ValueError(f"a list of {size} entries")
        return super()._get_field_parts(orig_offs, raw_type)


def open_file(path: Path) -> gguf.GGUFReader:
    """Memory-mapped reader.

    Raises:
        ValueError: not a whole GGUF file, or not of an architecture that is supported.
    """
    try:
        reader = _Reader(path)
    except Exception as error:  # of many kinds, all of them about the file
        raise ValueError(f"{path}: not a readable GGUF file ({one_line(error)})") from None
    if reader.byte_order != "I":
        raise ValueError(f"{path}: a GGUF file of the other byte order is not supported")
    architecture = _field(reader, "general.architecture", str)
    if architecture not in _FAMILIES:
        raise ValueError(
            f"{path}: architecture {architecture!r} is not supported; "
            f"expected one of {sorted(_FAMILIES)}"
        )
    return reader


def read_config(reader: gguf.GGUFReader, *, dtype: str, param_dtype: str) -> ModelConfig:
    """Model config from the file's metadata; what is absent has llama.cpp's default.

    Raises:
        ValueError: a field is missing, or an option is not supported.
    """
    name = _field(reader, "general.architecture", str)
    for option in ("expert_count", "attention.sliding_window"):
        if value := _field(reader, f"{name}.{option}", int, 0):
            raise ValueError(f"{_where(reader)}: {option}={value} is not supported")
    heads = _field(reader, f"{name}.attention.head_count", int)
    embed_dim = _field(reader, f"{name}.embedding_length", int)
    head_dim = _field(reader, f"{name}.attention.key_length", int, embed_dim // max(heads, 1))
    theta = _field(reader, f"{name}.rope.freq_base", float, 1e4)
    scaling = _rope_scaling(reader, name, head_dim, theta)
    shapes = _shapes(reader)
    with _about(_where(reader)):
        return ModelConfig(
            family=_FAMILIES[name].model_type,
            # Of the tensors: padded vocabularies have more rows than the tokenizer has tokens.
            # Where both are missing, `GgufWeights` says so.
            vocab_size=(shapes.get(_EMBEDDING) or shapes.get(_HEAD) or (1,))[0],
            embed_dim=embed_dim,
            hidden_dim=_field(reader, f"{name}.feed_forward_length", int),
            num_layers=_field(reader, f"{name}.block_count", int),
            num_heads=heads,
            num_kv_heads=_field(reader, f"{name}.attention.head_count_kv", int, heads),
            head_dim=head_dim,
            max_positions=_field(reader, f"{name}.context_length", int),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=_as_written(_field(reader, f"{name}.attention.layer_norm_rms_epsilon", float)),
            tie_embeddings=_HEAD not in shapes,
            **_FAMILIES[name].structure,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@contextlib.contextmanager
def _about(where: str) -> Iterator[None]:
    """Puts the file before what a config finds wrong with its numbers."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None


def _as_written(value: float) -> float:
    """Six digits of a float32 give back the decimal number that it was rounded from."""
    return float(f"{value:.6g}")


def _rope_scaling(
    reader: gguf.GGUFReader, name: str, head_dim: int, theta: float
) -> LinearRope | Llama3Rope | None:
    rotated = _field(reader, f"{name}.rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        raise ValueError(
            f"{_where(reader)}: rope.dimension_count={rotated} is not supported; "
            f"expected the whole head, {head_dim}"
        )
    kind = _field(reader, f"{name}.rope.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{_where(reader)}: rope scaling {kind!r} is not supported; expected none or linear"
        )
    older = _field(reader, f"{name}.rope.scale_linear", float, 0.0)
    factor = _as_written(_field(reader, f"{name}.rope.scaling.factor", float, older))
    with _about(_where(reader)):
        linear = LinearRope(factor) if kind == "linear" and factor not in (0.0, 1.0) else None
    stored = [tensor for tensor in reader.tensors if tensor.name == _ROPE_FACTORS]
    if not stored:
        return linear
    if linear is not None:
        raise ValueError(f"{_where(reader)}: {_ROPE_FACTORS} and linear scaling exclude each other")
    return _llama3_rope(stored[0], head_dim, theta, _where(reader))


def _llama3_rope(stored: gguf.ReaderTensor, head_dim: int, theta: float, where: str) -> Llama3Rope:
    """LLaMA-3's scaling whose factors are stored; the slowest frequency has it in full."""
    kind, shape = stored.tensor_type.name, tuple(stored.shape.tolist())
    if (kind, shape) != ("F32", (head_dim // 2,)):
        raise ValueError(
            f"{where}: {_ROPE_FACTORS} is {kind} of shape {shape}, expected F32 of shape "
            f"{(head_dim // 2,)}"
        )
    with _about(where):
        scaling = Llama3Rope(
            factor=_as_written(float(stored.data.max())),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_positions=8192,
        )
    plain, scaled = (rotary.frequencies(head_dim, theta, s) for s in (None, scaling))
    if not np.allclose(stored.data, plain / scaled, rtol=1e-4):
        raise ValueError(f"{where}: {_ROPE_FACTORS} does not hold the scaling of LLaMA-3")
    return scaling


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
        self._path = _where(reader)
        heads = {".q_proj.": config.num_heads, ".k_proj.": config.num_kv_heads}
        self._permuted = heads if family.gguf_permutes else {}
        self._shapes = expected_shapes(config)
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

    def _check(self, shapes: Mapping[str, Shape]) -> None:
        wanted = {self._names[key]: tensor.shape for key, tensor in self._table.items()}
        faults = [f"missing {name}" for name in wanted if name not in shapes]
        surplus = shapes.keys() - wanted.keys() - {_ROPE_FACTORS}
        faults += [f"unexpected {name}" for name in sorted(surplus)]
        for name, shape in wanted.items():
            if shapes.get(name, shape) != shape:
                faults.append(f"{name} has shape {shapes[name]}, expected {shape}")
        kinds = {name: self._stored[name].tensor_type.name for name in wanted if name in shapes}
        for name, kind in kinds.items():
            if kind not in _PLAIN and not hasattr(gguf.quants, kind):
                faults.append(f"{name} is of type {kind}, which gguf does not dequantise")
        refuse(faults, self._path)

    @property
    def arrays(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """All in float32."""
        shapes = self._shapes.items()
        return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes}

    def read(self, path: str, index: Index) -> np.ndarray:
        """Part of an array; no more is dequantised than the blocks and heads in which it lies."""
        sizes = zip(self._shapes[path], index, strict=True)
        part = np.empty([len(range(size)[cut]) for size, cut in sizes], np.float32)
        keys = self._keys[path]
        if self._table[keys[0]].layer is None:
            self._fill(part, keys[0], index)
        else:
            for layer, key in zip(part, keys[index[0]], strict=True):
                self._fill(layer, key, index[1:])
        return part

    def _fill(self, part: np.ndarray, key: str, index: Index) -> None:
        """Write a part of a tensor of theirs into an array of our layout."""
        shape = self._table[key].shape
        if self._table[key].transposed:
            part, index = part.T, index[::-1]
        if len(shape) == 1:  # a vector is one row
            part, index, shape = part[None], (slice(1), *index), (1, *shape)
        height, width = shape
        rows = np.arange(height)
        for name, num_heads in self._permuted.items():
            rows = _unpermute(rows, num_heads) if name in key else rows
        rows, columns = rows[index[0]], range(width)[index[1]]
        step = max(_CHUNK // width, 1)
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            first = int(some.min())
            values = self._dequantise(key, range(first, int(some.max()) + 1), columns)
            part[start : start + step] = values[some - first]

    def _dequantise(self, key: str, rows: range, columns: range) -> np.ndarray:
        stored = self._stored[self._names[key]]
        block, size = gguf.GGML_QUANT_SIZES[stored.tensor_type]
        row_bytes = self._table[key].shape[-1] // block * size
        # Not through the reader's map: pages that were touched would count as our memory.
        offset = stored.data_offset + rows.start * row_bytes
        data = np.fromfile(self._path, np.uint8, len(rows) * row_bytes, offset=offset)
        if len(data) != len(rows) * row_bytes:
            raise ValueError(f"{self._path}: ends within {stored.name}; it has changed")
        first, last = columns.start // block, -(-columns.stop // block)
        blocks = data.reshape(len(rows), row_bytes)[:, first * size : last * size]
        values = gguf.quants.dequantize(blocks, stored.tensor_type)
        start = first * block
        return values[:, columns.start - start : columns.stop - start : columns.step]


def _shapes(reader: gguf.GGUFReader) -> dict[str, Shape]:
    return {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in reader.tensors}


def _unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """[N*H, ...] with pairs (2i, 2i+1) together -> halves (i, i + H/2)."""
    pairs = rows.reshape(num_heads, len(rows) // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def end_ids(reader: gguf.GGUFReader) -> tuple[int, ...]:
    """Ids of the tokens that end a text, a turn or a message, without repetition."""
    names = (f"{_TOKENIZER}{kind}_token_id" for kind in ("eos", "eot", "eom"))
    ids = (_field(reader, name, int, -1) for name in names)
    return tuple(dict.fromkeys(i for i in ids if 0 <= i <= MOST))


class _Words(NamedTuple):
    """How byte-level BPE cuts a text into words before it merges."""

    split: pre_tokenizers.PreTokenizer
    gpt2: bool = False  # then cut as GPT-2 does
    nfc: bool = False  # normalise first
    ignore_merges: bool = False  # a word that is a token is not merged from its bytes
    add_bos: bool = False  # where the file does not say


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _Words(
    pre_tokenizers.Split(Regex(_LLAMA3.replace("{1,3}", "")), behavior="isolated"), nfc=True
)
# By tokenizer.ggml.pre; each as in the tokenizer.json of the model that llama.cpp named it after.
_WORDS = {
    "smollm": _Words(pre_tokenizers.Digits(individual_digits=True), gpt2=True),
    "llama-bpe": _Words(
        pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated"), ignore_merges=True, add_bos=True
    ),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def read_tokenizer(reader: gguf.GGUFReader) -> PreTrainedTokenizerBase | None:
    """Tokenizer of the file; None where it has none.

    Raises:
        ValueError: it is of a kind that is not supported, or damaged.
    """
    if f"{_TOKENIZER}tokens" not in reader.fields:
        return None
    kind = _field(reader, f"{_TOKENIZER}model", str, "")
    words = _field(reader, f"{_TOKENIZER}pre", str, "")
    if kind != "llama" and (kind != "gpt2" or words not in _WORDS):
        raise ValueError(
            f"{_where(reader)}: tokenizer {kind!r} with pre-tokenizer {words!r} is not supported; "
            f"expected 'llama', or 'gpt2' with one of {sorted(_WORDS)}"
        )
    try:
        return _tokenizer(reader, None if kind == "llama" else _WORDS[words])
    except Exception as error:  # of many kinds, all of them about the file
        raise ValueError(
            f"{_where(reader)}: the tokenizer cannot be read ({one_line(error)})"
        ) from None


def _tokenizer(reader: gguf.GGUFReader, words: _Words | None) -> PreTrainedTokenizerFast:
    """SentencePiece's where it is not byte-level."""
    tokens = _field(reader, f"{_TOKENIZER}tokens", list)
    normal = [gguf.TokenType.NORMAL] * len(tokens)
    types = _field(reader, f"{_TOKENIZER}token_type", list, normal)
    by_type: dict[int, list[str]] = {kind: [] for kind in gguf.TokenType}
    for token, kind in zip(tokens, types, strict=True):
        by_type[kind].append(token)
    named = _named(reader, tokens)
    if words is None:
        usable = set(by_type[gguf.TokenType.NORMAL])
        tokenizer = _sentencepiece(reader, tokens, usable, named.get("unk_token"))
    else:
        tokenizer = _byte_level(reader, tokens, words)
    for kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
        special = kind == gguf.TokenType.CONTROL
        added = [AddedToken(t, special=special, normalized=False) for t in by_type[kind]]
        tokenizer.add_tokens(added)
    single = ["$A"]
    if _adds(reader, "bos", words is None or words.add_bos) and "bos_token" in named:
        single.insert(0, named["bos_token"])
    if _adds(reader, "eos", False) and "eos_token" in named:
        single.append(named["eos_token"])
    ends = [(token, tokens.index(token)) for token in single if token != "$A"]
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        chat_template=_field(reader, "tokenizer.chat_template", str, "") or None,
        clean_up_tokenization_spaces=False,
    )


def _adds(reader: gguf.GGUFReader, end: str, default: bool) -> bool:
    return _field(reader, f"{_TOKENIZER}add_{end}_token", bool, default)


def _named(reader: gguf.GGUFReader, tokens: list[str]) -> dict[str, str]:
    """Tokens that have a role, by transformers' name of it."""
    theirs = {
        "bos_token": "bos",
        "eos_token": "eos",
        "unk_token": "unknown",
        "pad_token": "padding",
    }
    ids = {role: _field(reader, f"{_TOKENIZER}{t}_token_id", int, -1) for role, t in theirs.items()}
    return {role: tokens[i] for role, i in ids.items() if i >= 0}


def _byte_level(reader: gguf.GGUFReader, tokens: list[str], words: _Words) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in _field(reader, f"{_TOKENIZER}merges", list)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=words.ignore_merges))
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words.split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.gpt2)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    reader: gguf.GGUFReader, tokens: list[str], usable: set[str], unknown: str | None
) -> tokenizers.Tokenizer:
    """Any two neighbours that make a token are merged, best score first."""
    scores = dict(zip(tokens, _field(reader, f"{_TOKENIZER}scores", list), strict=True))
    merges = [
        (token[:i], token[i:])
        for token in usable
        for i in range(1, len(token))
        if token[:i] in usable and token[i:] in usable
    ]
    merges.sort(key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]), pair))
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    prefix = _field(reader, f"{_TOKENIZER}add_space_prefix", bool, True)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE)] * prefix + [normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prefix
    )
    return tokenizer


def _where(reader: gguf.GGUFReader) -> str:
    return str(reader.data.filename)


def _field(reader: gguf.GGUFReader, name: str, kind: type[T], default: T | None = None) -> T:
    """Value of a metadata field, or the default where there is none.

    Raises:
        ValueError: there is neither, or the value is not of this kind.
    """
    field = reader.fields.get(name)
    if field is None:
        if default is None:
            raise ValueError(f"{_where(reader)}: no field {name!r}")
        return default
    try:
        value: Any = field.contents()
    except (ValueError, IndexError):  # not UTF-8, or cut off
        value = None
    if not isinstance(value, kind):
        found = type(value).__name__
        raise ValueError(f"{_where(reader)}: field {name!r} is {found}, expected {kind.__name__}")
    return value
