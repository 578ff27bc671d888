"""Prompts as arrays: the beginning that many share, the rows that short ones are packed into."""

import dataclasses
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from refine_af.requests import TokenIds

_PREFIX_STEP = 64  # lengths of a shared beginning, so that few programs are compiled
_LEAST_SAVED = 512  # prompt tokens that a shared beginning must save
_LEAST_ROW = 64  # columns of a row of packed prompts


def bucket(size: int, least: int = 16) -> int:
    """Smallest of `least` times 1, 1.5, 2, 3, 4, 6, 8, ... that is at least `size`."""
    power = least
    while power < size:
        if size <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


def power_of_two(size: int) -> int:
    """Smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def shared_prefix(prompts: Sequence[TokenIds]) -> TokenIds:
    """Longest beginning of most of the prompts, in steps of 64 tokens; () where it saves little.

    At least one token of each of those prompts comes after it.
    """
    found: TokenIds = ()
    sharing = list(prompts)
    while True:
        length = len(found) + _PREFIX_STEP
        counts = Counter(prompt[:length] for prompt in sharing if len(prompt) > length)
        beginning, count = counts.most_common(1)[0] if counts else ((), 0)
        if 2 * count <= len(prompts):
            break
        found = beginning
        sharing = [p for p in sharing if p[:length] == found and len(p) > length]
    saved = len(found) * (len(sharing) - 1)
    return found if saved >= _LEAST_SAVED else ()


@dataclasses.dataclass
class Rows:
    """Texts packed into rows of `length` columns; equal texts share their columns."""

    length: int
    used: list[int] = dataclasses.field(default_factory=list)  # columns of each row
    places: dict[tuple[TokenIds, int], tuple[int, int]] = dataclasses.field(default_factory=dict)

    def arrays(self, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, first column of each token's text, its offset), int32 [num_rows, length].

        There are at least as many rows as are used.
        Columns that no text uses belong to the last text of their row, and come after it.
        """
        shape = num_rows, self.length
        ids, start, offset = (np.zeros(shape, np.int32) for _ in range(3))
        for (text, before), (row, first) in sorted(self.places.items(), key=lambda x: x[1]):
            ids[row, first : first + len(text)] = text
            start[row, first:] = first
            offset[row, first:] = before
        return ids, start, offset


def pack(texts: Sequence[tuple[TokenIds, int]], max_tokens: int) -> tuple[Rows, int, int]:
    """Rows of as many of the first texts as `max_tokens` columns hold.

    So that few programs are compiled, rows have a power of two of columns (or `max_tokens`), and
    as many are read as these allow, or one: where less than half of them would be filled, only
    the texts that fit into one are taken.

    Args:
        texts: (ids, tokens of a shared prefix before them); none is longer than `max_tokens`.

    Returns:
        The rows, how many are to be read, and the number of texts in them.
    """

    def packed(count: int) -> Rows:
        longest = power_of_two(max(len(ids) for ids, _ in texts[:count]))
        return first_fit(texts[:count], min(max(longest, _LEAST_ROW), max_tokens))

    best, count, in_one = packed(1), 1, 1
    while count < len(texts):
        rows = packed(count + 1)
        if len(rows.used) * rows.length > max_tokens:
            break
        best, count = rows, count + 1
        in_one = count if len(rows.used) == 1 else in_one
    most = max_tokens // best.length
    if len(best.used) > max(most // 2, 1):
        return best, most, count
    return packed(in_one), 1, in_one


def first_fit(texts: Iterable[tuple[TokenIds, int]], length: int) -> Rows:
    """(ids, tokens before them) in rows of `length` columns, longest text first."""
    rows = Rows(length)
    for text in sorted(set(texts), key=lambda text: (-len(text[0]), text)):
        size = len(text[0])
        row = next((r for r, used in enumerate(rows.used) if used + size <= length), None)
        if row is None:
            row = len(rows.used)
            rows.used.append(0)
        rows.places[text] = row, rows.used[row]
        rows.used[row] += size
    return rows


def spread(sizes: Sequence[int], room: int, count: int) -> list[list[int]]:
    """Items of each of `count` rows of so much room, or of more rows where they do not fit.

    Largest first, each into the emptiest row, so that rows are filled alike.
    """
    rows: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(-room, row) for row in range(count)]  # a heap
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        left, row = emptiest[0]
        if sizes[item] <= -left:
            heapq.heapreplace(emptiest, (left + sizes[item], row))
        else:
            row = len(rows)
            rows.append([])
            heapq.heappush(emptiest, (sizes[item] - room, row))
        rows[row].append(item)
    return rows


class Answered(NamedTuple):
    """Prompts and answers in B rows of T columns, at most K predictions a row."""

    tokens: Int[Array, "B T"]
    start: Int[Array, "B T"]  # first column of the text that a token belongs to
    columns: Int[Array, "B K"]  # predictions: the next column's token is one of an answer
    predicts: Float[Array, "B K"]  # 1; 0 where a row has fewer


def lay(
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    rows: Sequence[Sequence[int]],
    shape: tuple[int, int, int],
) -> tuple[Answered, list[tuple[int, int]]]:
    """(texts in rows, on the host; (row, place among its predictions) of each text's first one).

    Args:
        texts: (prompt, answer); no prompt is empty.
        rows: numbers of the texts of each, from left to right.
        shape: B, at least so many rows; T; K.
    """
    (num_rows, length, most), firsts = shape, [(0, 0)] * len(texts)
    ids, start = (np.zeros((num_rows, length), np.int32) for _ in range(2))
    columns = np.zeros((num_rows, most), np.int32)
    predicts = np.zeros((num_rows, most), np.float32)
    for row, numbers in enumerate(rows):
        first = known = 0
        for number in numbers:
            prompt, answer = texts[number]
            size, count = len(prompt) + len(answer), len(answer)
            ids[row, first : first + size] = [*prompt, *answer]
            start[row, first:] = first
            columns[row, known : known + count] = np.arange(count) + first + len(prompt) - 1
            predicts[row, known : known + count] = 1.0
            firsts[number] = row, known
            first, known = first + size, known + count
    arrays: list[Any] = [ids, start, columns, predicts]
    return Answered(*arrays), firsts
