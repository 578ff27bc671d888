"""Sizes of caches: as computed beforehand, few of them, grown and shrunk without a trace."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from test_batching import (
    MODELS,
    assert_same,
    engine_of,
    on_mesh,
    params_of,
    random_requests,
)
from test_engine import one_device

from refine_af import config as config_lib
from refine_af import memory, mesh, sampling
from refine_af.config import Sampling
from refine_af.engine import Engine
from refine_af.models import transformer
from refine_af.requests import Completion, Request

Sizes = list[tuple[int, int]]


def decoded(engine: Engine, requests: list[Request]) -> tuple[Sizes, list[Completion]]:
    """((slots, places of the cache) of each loop of decoding, completions)."""
    sizes: Sizes = []
    decode = sampling.jit_decode

    def spy(definition: Any, params: Any, slots: sampling.Slots, *rest: Any) -> Any:
        sizes.append((slots.token.shape[0], slots.cache.layers[0].keys.shape[2]))
        return decode(definition, params, slots, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "jit_decode", spy)
        return sizes, engine.generate(params_of("global"), requests)


@pytest.mark.slow
def test_a_grown_cache_and_a_smaller_batch_change_no_token() -> None:
    """One answer goes on alone for long after the others, past several sizes of the cache."""
    lengths = (400, 5, 6, 7, 8, 9, 10, 11)
    requests = [
        Request(r.prompt_ids, Sampling(temperature=1.0, max_new_tokens=n), seed=i)
        for i, (r, n) in enumerate(zip(random_requests(0, 8, 0), lengths, strict=True))
    ]
    sizes, mixed = decoded(engine_of("global", 8, eos_ids=()), requests)
    one = engine_of("global", 1, eos_ids=())
    assert_same(mixed, [one.generate(params_of("global"), [r])[0] for r in requests])
    assert [rows for rows, _ in itertools.groupby(size for size, _ in sizes)] == [8, 2]
    assert len({places for _, places in sizes}) >= 3


def test_many_slots_wait_for_several_to_be_free_before_prompts_are_read() -> None:
    """Of 32 slots two, as long as requests wait."""
    free = []
    read = sampling.jit_read

    def spy(definition: Any, params: Any, pack: sampling.Pack, *rest: Any) -> Any:
        free.append(int(pack.num_prompts))
        return read(definition, params, pack, *rest)

    requests = until(*((3 + i % 5, 2 + i) for i in range(40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "jit_read", spy)
        engine_of("global", 32, eos_ids=()).generate(params_of("global"), requests)
    assert sum(free) == 40 and free[-4:] == [2, 2, 2, 2]


def until(*ends: tuple[int, int]) -> list[Request]:
    """Requests of so many prompt tokens and new ones."""
    options = [(size, Sampling(temperature=1.0, max_new_tokens=count)) for size, count in ends]
    return [Request((5,) * size, each, seed=size) for size, each in options]


def test_a_cache_has_room_for_the_end_where_that_is_near() -> None:
    """One size of it, where it would have grown twice; and no change when an answer stops early."""
    sizes, _ = decoded(engine_of("global", 2, eos_ids=()), until((40, 150), (60, 33)))
    assert set(sizes) == {(2, 192)}


def test_calls_that_know_the_longest_text_share_a_cache_size() -> None:
    """But not where it is more than twice what they need."""
    short, longer = until((20, 30), (30, 20)), until((60, 60), (90, 20))
    found = {}
    for longest in (0, 100, 129):
        engine = engine_of("global", 2, eos_ids=(), longest_text=longest)
        found[longest] = [decoded(engine, requests) for requests in (short, longer)]
    places = {n: [{n for _, n in sizes} for sizes, _ in each] for n, each in found.items()}
    assert places == {0: [{64}, {128}], 100: [{128}, {128}], 129: [{64}, {192}]}
    for others in (found[100], found[129]):
        for (_, ours), (_, plain) in zip(others, found[0], strict=True):
            assert_same(ours, plain)


def test_a_cache_that_holds_all_to_the_end_does_not_grow() -> None:
    """Though one of the size that calls share would by then be at most twice what is needed."""
    engine = engine_of("global", 1, eos_ids=(), longest_text=260)
    sizes, _ = decoded(engine, until((60, 100)))
    assert set(sizes) == {(1, 192)}


def on_first_device(tree: Any) -> int:
    """Bytes that its first device holds of a tree of arrays."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    first = min(shard.device.id for shard in shards)
    return sum(shard.data.nbytes for shard in shards if shard.device.id == first)


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("int8", [False, True])
def test_the_cache_takes_the_memory_that_was_computed(int8: bool, sizes: dict[str, int]) -> None:
    """When it is made, when it has grown and after decoding."""
    config = dataclasses.replace(MODELS["alternating"], int8_cache=int8)
    devices = mesh.make_mesh(config_lib.Mesh(**sizes)) if len(sizes) > 1 else one_device()
    params = on_mesh("alternating", devices)
    definition, needs = transformer.define(config, stacked=False), sampling.Needs(*[False] * 5)
    slots = sampling.jit_empty(definition, devices, 8, 64, 1, needs)
    assert on_first_device(slots.cache.layers) == memory.cache_bytes(config, devices, 8, 64)
    computed = memory.cache_bytes(config, devices, 8, 96)
    slots = sampling.jit_resize(definition, slots, 96)
    assert on_first_device(slots.cache.layers) == computed
    slots, _ = sampling.jit_decode(definition, params, slots, None, needs, np.int32(3), np.int32(9))
    assert on_first_device(slots.cache.layers) == computed


def requests_of_100_tokens() -> list[Request]:
    options = Sampling(temperature=1.0, max_new_tokens=100)
    return [Request((7,) * 20, options, seed) for seed in range(8)]


def needed_by_a_slot() -> int:
    """The cache for 128 tokens, and the one of 96 that it may grow from."""
    lengths = 128, 96
    return sum(memory.cache_bytes(MODELS["global"], one_device(), 1, n) for n in lengths)


def test_what_cannot_fit_is_refused_with_the_figures_before_anything_is_made() -> None:
    one = needed_by_a_slot()
    small = engine_of("global", 8, cache_budget=one - 1)
    with pytest.raises(ValueError) as error:
        small.generate({}, requests_of_100_tokens())
    assert str(error.value) == (
        f"the caches of 1 slots of 128 tokens take {one / 2**20:.1f} MiB on each device, and "
        f"{(one - 1) / 2**20:.1f} MiB are free; shorten prompts or max_new_tokens, or use more "
        "devices"
    )
    for longest, places in ((150, 192), (300, 128)):  # as a call would have it
        small = engine_of("global", 8, cache_budget=one - 1, longest_text=longest)
        with pytest.raises(ValueError, match=f"of 1 slots of {places} tokens"):
            small.generate({}, requests_of_100_tokens())


@pytest.mark.slow
def test_fewer_slots_are_taken_where_memory_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    small = engine_of("global", 8, cache_budget=3 * needed_by_a_slot())
    assert_same(
        small.generate(params_of("global"), requests_of_100_tokens()),
        engine_of("global", 8).generate(params_of("global"), requests_of_100_tokens()),
    )
    assert "notice: 2 slots instead of 8: the caches of 2 slots of 128" in capsys.readouterr().err
