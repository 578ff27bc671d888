"""Prompts in rows, and the beginning that they share."""

import pytest

from refine_af import packing


def test_equal_prompts_share_their_columns() -> None:
    rows, _, count = packing.pack([((1, 2), 0), ((1, 2), 0), ((1, 2), 64), ((3,), 0)], 512)
    ids, start, offset = rows.arrays(1)
    assert (count, rows.length, ids.shape) == (4, 64, (1, 64))
    assert sorted(rows.places.values()) == [(0, 0), (0, 2), (0, 4)]
    assert start[0, :5].tolist() == [0, 0, 2, 2, 4] and sorted(offset[0, :5]) == [0, 0, 0, 64, 64]


def test_a_pack_takes_what_fits_in_order() -> None:
    texts = [((number,) * length, 0) for number, length in enumerate((60, 4, 60, 64, 1))]
    rows, num_rows, count = packing.pack(texts, 128)
    assert (count, rows.length, num_rows) == (3, 64, 2)
    assert packing.pack(texts, 64)[1:] == (1, 2)


@pytest.mark.parametrize(
    ("lengths", "length", "num_rows", "count"),
    [
        ((60,), 64, 1, 1),
        ((60, 60), 64, 1, 1),
        ((60,) * 3, 64, 4, 3),
        ((60,) * 5, 64, 4, 4),
        ((40, 40, 100), 128, 2, 3),
        ((100, 40, 40), 128, 2, 3),
        ((30, 30, 100), 128, 2, 3),
        ((30, 30, 60), 64, 1, 2),
        ((256, 9), 256, 1, 1),
    ],
)
def test_a_pack_has_one_row_or_most_of_what_fits(
    lengths: tuple[int, ...], length: int, num_rows: int, count: int
) -> None:
    texts = [((number,) * size, 0) for number, size in enumerate(lengths)]
    rows, found, taken = packing.pack(texts, 256)
    assert (rows.length, found, taken) == (length, num_rows, count)
    assert len(rows.used) <= num_rows


def test_rows_are_no_longer_than_what_may_be_read() -> None:
    rows, num_rows, count = packing.pack([((1,) * 40, 0), ((2,) * 9, 0)], 48)
    assert (rows.length, num_rows, count) == (48, 1, 1)


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 64), (64, 64), (65, 96), (97, 128), (129, 192), (385, 512)]
)
def test_buckets(size: int, expected: int) -> None:
    assert packing.bucket(size, 64) == expected


def test_a_beginning_is_shared_when_it_saves_much() -> None:
    head = tuple(range(130))
    prompts = [(*head, 1000 + i) for i in range(6)]
    assert packing.shared_prefix(prompts) == head[:128]
    assert packing.shared_prefix([*prompts, (1,), (2,)]) == head[:128]
    assert packing.shared_prefix([*prompts[:4], *[(i,) for i in range(4)]]) == (), "not most"
    assert packing.shared_prefix(prompts[:3]) == (), "256 tokens saved: not worth a program"
    assert packing.shared_prefix([head[:64]] * 20) == (), "nothing would be left of the prompt"
