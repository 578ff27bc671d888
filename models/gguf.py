"""GGUF files of LLaMA shape: config, dequantised weights and tokenizer, through the `gguf` package.

llama.cpp permutes the rows of q and k so that rotary pairs stand next to each other; Hugging Face
and this project rotate halves, so the permutation is undone on reading.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from refine_af.models import hf
from refine_af.models.config import ModelConfig
from refine_af.models.transformer import Params

# Name in the file <-> Hugging Face key; {} is the layer.
_LAYER_KEYS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_KEYS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PRE_TOKENIZER = "smollm"  # single digits, then ByteLevel; other names split text differently
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def open_file(path: Path) -> gguf.GGUFReader:
    """Memory-mapped reader.

    Raises:
        ValueError: not a GGUF file, or not of LLaMA architecture.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable GGUF file ({error})") from None
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: architecture {architecture!r} is not supported; expected llama")
    return reader


def read_config(reader: gguf.GGUFReader, *, dtype: str, param_dtype: str) -> ModelConfig:
    """Model config from the file's metadata.

    Raises:
        ValueError: a field is missing, or positions are scaled in a way that is not supported.
    """
    scaling = reader.fields.get("llama.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise ValueError(f"GGUF file: rope scaling {scaling.contents()!r} is not supported")
    heads = _field(reader, "llama.attention.head_count")
    embed_dim = _field(reader, "llama.embedding_length")
    return ModelConfig(
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        embed_dim=embed_dim,
        hidden_dim=_field(reader, "llama.feed_forward_length"),
        num_layers=_field(reader, "llama.block_count"),
        num_heads=heads,
        num_kv_heads=_field(reader, "llama.attention.head_count_kv"),
        head_dim=embed_dim // heads,
        max_positions=_field(reader, "llama.context_length"),
        rope_theta=float(_field(reader, "llama.rope.freq_base")),
        # Stored as float32; seven digits give back the value that was written.
        norm_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        tie_embeddings=all(t.name != "output.weight" for t in reader.tensors),
        dtype=dtype,
        param_dtype=param_dtype,
    )


def read_params(reader: gguf.GGUFReader, config: ModelConfig) -> Params:
    """Dequantised parameters, stacked layout; one tensor at a time is held in float32."""
    tensors = {_hf_key(t.name): t for t in reader.tensors}

    def read(key: str) -> np.ndarray:
        tensor = tensors[key]
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if key.endswith("q_proj.weight"):
            return _unpermute(array, config.num_heads)
        if key.endswith("k_proj.weight"):
            return _unpermute(array, config.num_kv_heads)
        return array

    available = {key: tuple(int(n) for n in t.shape[::-1]) for key, t in tensors.items()}
    return hf.assemble(config, read, available, "GGUF file")


def _hf_key(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER_KEYS.get(parts[2], parts[2])}.{parts[3]}"
    return f"{_KEYS.get(parts[0], parts[0])}.{parts[-1]}"


def _unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """[N*H, D] with pairs (2i, 2i+1) together -> halves (i, i + H/2)."""
    out, width = rows.shape
    pairs = rows.reshape(num_heads, out // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(out, width)


def read_tokenizer(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer of the file, with its special tokens and chat template.

    Raises:
        ValueError: the file's tokenizer is of another kind.
    """
    kind = _field(reader, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"GGUF tokenizer {kind!r} is not supported; expected gpt2 (byte-level BPE)"
        )
    pre = _field(reader, "tokenizer.ggml.pre")
    if pre != _PRE_TOKENIZER:
        raise ValueError(f"GGUF pre-tokenizer {pre!r} is not supported; expected {_PRE_TOKENIZER}")
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
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
