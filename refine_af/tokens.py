"""Text and token arrays: chat formatting, padding, length buckets."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_af.models.one_line import one_line

TokenIds = Sequence[int]
_STEP = 64  # lengths are rounded up to a multiple of this, so that few programs are compiled


def bucket(length: int) -> int:
    """Length to pad to: multiples of 64 up to 512, then of 256."""
    step = _STEP if length <= 512 else 4 * _STEP
    return max(-(-length // step), 1) * step


def encode_prompt(tokenizer: PreTrainedTokenizerBase | None, text: str, fmt: str) -> list[int]:
    """Token ids of a prompt: as it is (`raw`, with the tokenizer's own bos if it adds one), or as
    the user's turn of a chat.

    Raises:
        ValueError: there is no tokenizer, or `chat` is asked of one without a chat template or
            with one that fails.
    """
    if tokenizer is None:
        raise ValueError("this model has no tokenizer; give prompt_token_ids instead of a text")
    if fmt != "raw" and not tokenizer.chat_template:
        raise ValueError(
            "prompt format 'chat': this model's tokenizer has no chat template; use raw"
        )
    try:
        if fmt == "raw":
            return list(tokenizer(text).input_ids)
        turns = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(chat, add_special_tokens=False).input_ids)
    except Exception as error:  # of any kind: a chat template is a small program of the model's
        name = f"{tokenizer.name_or_path}: " if tokenizer.name_or_path else ""
        raise ValueError(
            f"{name}prompt format {fmt!r}: the tokenizer or its chat template "
            f"fails ({one_line(error)})"
        ) from None


def decode(tokenizer: PreTrainedTokenizerBase | None, ids: TokenIds) -> str:
    """Text of generated tokens without special ones; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def pad_right(rows: Sequence[TokenIds], length: int) -> np.ndarray:
    """[B, length] int32, padded with 0 on the right."""
    tokens = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens
