"""What fine-tuning learns from: triplets as tokens, a batch of them packed into rows."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_af import config as config_lib
from refine_af import packing, tokens
from refine_af.packing import Answered
from refine_af.randomness import generator
from refine_af.records import Row

Pair = tuple[list[int], list[int]]  # ids of the prompt and of the response

# Stanford Alpaca's templates, https://github.com/tatsu-lab/stanford_alpaca.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, fmt: str, eos: int) -> Pair:
    """(prompt ids, response ids with the end token) of one triplet.

    Raises:
        ValueError: the chat template makes nothing of the prompt, so that no token of it could
            predict the response's first.
    """
    if fmt == "chat":
        text = f"{row['instruction']}\n{row['input']}".strip()
        prompt = tokens.encode_prompt(tokenizer, text, "chat")
    else:
        template = _ALPACA_WITH_INPUT if row["input"] else _ALPACA
        text = template.format(instruction=row["instruction"], input=row["input"])
        prompt = tokens.encode_prompt(tokenizer, text, "raw")
    if not prompt:
        raise ValueError(f"sft.format={fmt}: the tokenizer makes no token of {text[:80]!r}")
    response = tokenizer(row["output"], add_special_tokens=False).input_ids
    return prompt, [*response, eos]


class Layout(NamedTuple):
    """Shape of all batches of a run."""

    num_rows: int  # B
    row_length: int  # T
    num_predictions: int  # K, of a row at most
    num_pieces: int  # microbatches; B is a multiple


def num_tokens(pairs: Sequence[Pair]) -> int:
    """Of prompts and responses."""
    return sum(map(_size, pairs))


def pack(pairs: Sequence[Pair], layout: Layout) -> Answered:
    """The examples in rows that are filled alike, each seeing no other; rows may be empty.

    Args:
        layout: its rows must be enough.
    """
    rows = packing.spread(list(map(_size, pairs)), layout.row_length, layout.num_rows)
    return packing.lay(pairs, rows, layout[:3])[0]


def _size(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


@dataclasses.dataclass(frozen=True)
class Batches:
    """The examples of every step.

    The order within an epoch is a function of its number and the seed.

    Attributes:
        parts: devices that a batch is split over; rows are a multiple.
    """

    options: config_lib.Sft
    seed: int
    train: Sequence[Pair]  # at least one
    held_out: Sequence[Pair]
    parts: int = 1

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch; the last one may have fewer examples."""
        return -(-len(self.train) // self.options.batch_size)

    @property
    def num_steps(self) -> int:
        """Of all epochs."""
        return self.per_epoch * self.options.num_epochs

    def of_step(self, step: int) -> list[Pair]:
        """Examples to train on."""
        epoch, index = divmod(step, self.per_epoch)
        order = _order(self.seed, epoch, len(self.train))
        first = index * self.options.batch_size
        return [self.train[i] for i in order[first : first + self.options.batch_size]]

    def of_held_out(self) -> Iterator[Sequence[Pair]]:
        """The others, a batch at a time."""
        size = self.options.batch_size
        return (self.held_out[i : i + size] for i in range(0, len(self.held_out), size))

    @functools.cached_property
    def layout(self) -> Layout:
        """The smallest that all batches fit into: a run compiles one program.

        A microbatch has no more rows than if each example had one of its own, or one a device.
        """
        batches = [*map(self.of_step, range(self.num_steps)), *self.of_held_out()]
        sizes = [list(map(_size, pairs)) for pairs in batches]
        length = tokens.bucket(max(max(batch) for batch in sizes))
        needed = max(-(-sum(batch) // length) for batch in sizes)
        rows, pieces = self._rounded(needed)
        while True:
            packed = [packing.spread(batch, length, rows) for batch in sizes]
            needed = max(map(len, packed))
            if needed == rows:
                break
            rows, pieces = self._rounded(needed)
        most = max(
            sum(len(pairs[number][1]) for number in numbers)
            for pairs, rows in zip(batches, packed, strict=True)
            for numbers in rows
        )
        return Layout(rows, length, most, pieces)

    def _rounded(self, num_rows: int) -> tuple[int, int]:
        """(at least so many rows, the microbatches that they are cut into)."""
        at_once = self.options.batch_size // self.options.num_microbatches
        pieces = -(-num_rows // (max(at_once // self.parts, 1) * self.parts))
        multiple = pieces * self.parts
        return -(-num_rows // multiple) * multiple, pieces


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, total: int) -> np.ndarray:
    """Of the examples in an epoch."""
    return generator(seed, "sft/order", epoch).permutation(total)
