"""Any mix of requests in slots says what each request says alone; prefixes, pieces, memory."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import LLAMA, noise
from test_engine import TOKENIZER, engine

from refine_af import config as config_lib
from refine_af import drafting, mesh, packing, sampling
from refine_af import engine as engine_module
from refine_af.config import Sampling
from refine_af.engine import Engine
from refine_af.models import cache, decode_kernel, transformer
from refine_af.models.block import Block
from refine_af.models.config import ModelConfig
from refine_af.models.transformer import Params
from refine_af.requests import Completion, Request

WINDOW = 12
COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(")
VOCAB = len(TOKENIZER)
EOS = TOKENIZER.eos_token_id
MODELS = {
    "global": dataclasses.replace(LLAMA, vocab_size=VOCAB),
    "window": dataclasses.replace(LLAMA, vocab_size=VOCAB, sliding_window=WINDOW),
    "alternating": dataclasses.replace(
        LLAMA, vocab_size=VOCAB, num_layers=3, sliding_window=WINDOW, global_layers=(1,)
    ),
}


@functools.cache
def params_of(name: str, *, int8: bool = False) -> Params:
    shapes = jax.eval_shape(lambda: transformer.init(MODELS[name], key=jax.random.key(0)))[0]
    params = noise(shapes, seed=3)
    return transformer.unstack_layers(transformer.int8_kernels(params) if int8 else params)


def engine_of(name: str, num_slots: int, **changes: Any) -> Engine:
    return engine(num_slots, config=MODELS[name], **changes)


def random_requests(seed: int, count: int, prefix: int) -> list[Request]:
    """Prompts of all lengths, some alike, most after a common beginning; every kind of sampling."""
    rng = np.random.default_rng(seed)
    shared = tuple(rng.integers(4, VOCAB, prefix).tolist())
    requests: list[Request] = []
    for number in range(count):
        own = tuple(rng.integers(4, VOCAB, int(rng.choice([1, 3, 20, 30, 40, 75]))).tolist())
        prompt = shared + own if rng.random() < 0.8 else own
        if requests and rng.random() < 0.2:
            prompt = requests[-1].prompt_ids
        options = Sampling(
            temperature=float(rng.choice([0.0, 0.7, 1.3])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1.0, 0.8])),
            min_p=float(rng.choice([0.0, 0.05])),
            presence_penalty=float(rng.choice([0.0, 1.0])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            max_new_tokens=int(rng.choice([1, 2, 15, 16, 17, 33, 60])),
            stop=tuple(rng.choice(["a", "e", "zz"], int(rng.integers(0, 3)))),
            stop_token_ids=tuple(rng.integers(4, VOCAB, int(rng.integers(0, 4))).tolist()),
        )
        requests.append(Request(prompt, options, seed=number))
    return requests


def alone(name: str, requests: list[Request]) -> list[Completion]:
    """One call for each request: no neighbour, no shared beginning, no pieces, nothing grows."""
    one = engine_of(name, 1, max_read=512)
    with pytest.MonkeyPatch.context() as patch:  # one program for all
        patch.setattr(engine_module, "_needs", lambda _: sampling.Needs(*[True] * 5))
        patch.setattr(packing, "bucket", lambda size, least=0: 512)
        return [one.generate(params_of(name), [request])[0] for request in requests]


def assert_same(actual: list[Completion], expected: list[Completion]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert dataclasses.replace(ours, logprobs=(), full_logprobs=()) == dataclasses.replace(
            theirs, logprobs=(), full_logprobs=()
        )
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=0)
        np.testing.assert_allclose(ours.full_logprobs, theirs.full_logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model", "num_slots", "max_read", "prefix", "seed"),
    [
        pytest.param("global", 8, 32, 70, 1, marks=pytest.mark.slow),
        pytest.param("window", 2, 64, 0, 3, marks=pytest.mark.slow),
        ("alternating", 4, 32, 70, 5),
        *(
            pytest.param(model, num_slots, max_read, prefix, seed, marks=pytest.mark.slow)
            for seed, (model, num_slots, max_read, prefix) in enumerate(
                (
                    ("global", 3, 128, 130),
                    ("alternating", 2, 16, 0),
                    ("window", 16, 32, 64),
                    ("window", 5, 128, 70),
                ),
                start=10,
            )
        ),
    ],
)
def test_a_mix_says_what_each_request_says_alone(
    model: str, num_slots: int, max_read: int, prefix: int, seed: int
) -> None:
    requests = random_requests(seed, 20, prefix)
    mixed = engine_of(model, num_slots, max_read=max_read)
    assert_same(mixed.generate(params_of(model), requests), alone(model, requests))


@pytest.mark.parametrize(
    ("model", "num_slots", "max_read", "prefix", "seed", "draft_tokens"),
    [
        ("alternating", 4, 32, 70, 5, 3),
        *(
            pytest.param(model, num_slots, 32, prefix, seed, count, marks=pytest.mark.slow)
            for seed, (model, num_slots, prefix, count) in enumerate(
                (("global", 8, 70, 1), ("window", 3, 0, 7), ("global", 1, 0, 15)), start=20
            )
        ),
    ],
)
def test_guesses_change_no_text(
    model: str, num_slots: int, max_read: int, prefix: int, seed: int, draft_tokens: int
) -> None:
    requests = random_requests(seed, 20, prefix)
    guessing = engine_of(model, num_slots, max_read=max_read, draft_tokens=draft_tokens)
    assert_same(guessing.generate(params_of(model), requests), alone(model, requests))


def test_right_guesses_save_passes() -> None:
    """A greedy text that repeats itself: more tokens come from a loop than it has passes."""
    request = Request((5, 6, 7), Sampling(temperature=0.0, max_new_tokens=200))
    params, loops = params_of("global"), []
    guessing = engine_of("global", 1, eos_ids=(), draft_tokens=3)
    found = guessing.generate(params, [request], progress=loops.append)
    plain = engine_of("global", 1, eos_ids=()).generate(params, [request])
    assert_same(found, plain)
    assert sum(loops) == 200 and max(loops) > 2 * 64 // 4


@pytest.mark.slow
def test_guesses_with_an_int8_cache_change_no_text() -> None:
    """Log-probabilities differ where an entry of the cache is rounded the other way."""
    config = dataclasses.replace(MODELS["alternating"], int8_cache=True)
    requests, params = random_requests(6, 12, 70), params_of("alternating")
    plain, guessing = (
        engine(4, config=config, draft_tokens=count).generate(params, requests) for count in (0, 3)
    )
    for ours, theirs in zip(guessing, plain, strict=True):
        assert (ours.token_ids, ours.text) == (theirs.token_ids, theirs.text)
        np.testing.assert_allclose(ours.full_logprobs, theirs.full_logprobs, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_guesses_on_a_mesh_change_no_text() -> None:
    devices = mesh.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
    requests = random_requests(5, 12, 70)
    many = engine_of("alternating", 8, mesh=devices, max_read=32, draft_tokens=3)
    assert_same(
        many.generate(on_mesh("alternating", devices), requests), alone("alternating", requests)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_tokens": 16}, "draft_tokens=16: expected 0 to 15"),
        ({"draft_tokens": 2, "decode_kernel": "pallas"}, "draft_tokens=2: decode_kernel='pallas'"),
    ],
)
def test_guesses_that_cannot_be_read_are_refused(changes: dict[str, Any], message: str) -> None:
    count = changes.pop("draft_tokens")
    with pytest.raises(ValueError, match=message):
        engine(1, config=dataclasses.replace(MODELS["global"], **changes), draft_tokens=count)


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ([1, 2, 3, 4, 9, 2, 3, 8, 1, 2, 3], [4, 9, 2]),  # the last three; not the latest of two
        ([7, 2, 3, 4, 9, 2, 3, 8, 1, 2, 3], [8, 1, 2]),  # the last two, their latest place
        ([7, 3, 4, 5, 1, 2, 3], [4, 5, 1]),  # the last one
        ([5, 1, 2, 1, 2], [1, 2, 1]),  # over the end it repeats itself
        ([4, 4], [4, 4, 4]),
        ([1, 2, 3], [3, 3, 3]),  # never seen before
        ([6], [6, 6, 6]),
    ],
)
def test_guesses_by_hand(text: list[int], guess: list[int]) -> None:
    for filler, rest in ((0, 0), (3, 2)):  # before the text; not yet written behind it
        row = jnp.asarray([[-1] * filler + text + [-1] * rest])
        found = drafting.propose(row, jnp.asarray([filler + len(text)]), 3)
        assert found[0].tolist() == guess


def test_a_mix_has_every_kind_of_end() -> None:
    """Otherwise the test above would show little."""
    found = alone("global", random_requests(1, 20, 70))
    requests = random_requests(1, 20, 70)
    ends = set()
    for request, completion in zip(requests, found, strict=True):
        stops = (EOS, *request.sampling.stop_token_ids)
        by_token = completion.token_ids[-1] in stops
        ends.add((completion.finish_reason, by_token))
    assert ends >= {("length", False), ("stop", True)}, "stop strings: the test of a refill"
    assert max(len(c.token_ids) for c in found) > 32, "over more than one chunk"


def test_samples_of_one_prompt_differ_and_the_first_is_the_request_itself() -> None:
    request = Request((5, 6, 7), Sampling(temperature=1.0, max_new_tokens=12), seed=4)
    found = engine_of("global", 4).generate(params_of("global"), request.samples(4))
    assert len({c.token_ids for c in found}) == 4
    assert_same(found[:1], alone("global", [request]))


def on_mesh(name: str, devices: jax.sharding.Mesh) -> Params:
    """Parameters in the layout that sampling uses."""
    shardings, _ = mesh.param_shardings(
        MODELS[name], None, devices, stacked=False, rules=mesh.SAMPLING_RULES
    )
    return jax.device_put(params_of(name), shardings)


@pytest.mark.parametrize("num_slots", [3, 8])
@pytest.mark.slow
def test_a_mesh_says_what_one_device_says(num_slots: int) -> None:
    """Weights cut over fsdp and tensor, slots over data (3 do not divide); prefix and pieces."""
    devices = mesh.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
    requests = random_requests(5, 12, 70)
    many = engine_of("alternating", num_slots, mesh=devices, max_read=32)
    assert_same(
        many.generate(on_mesh("alternating", devices), requests), alone("alternating", requests)
    )


def test_decoding_adds_up_less_often_than_the_training_layout_would() -> None:
    """Twice a layer instead of five times, and never a weight: only rows of activations.

    A token's choice from a vocabulary in parts takes six more: its argmax is in two levels.
    """
    devices = mesh.make_mesh(config_lib.Mesh(data=1, fsdp=4, tensor=2))
    needs = sampling.Needs(*[False] * 5)
    config = dataclasses.replace(MODELS["global"], embed_dim=64, hidden_dim=128, num_kv_heads=4)
    definition = transformer.define(config, stacked=False)
    shapes = jax.eval_shape(
        lambda: transformer.unstack_layers(transformer.init(config, key=jax.random.key(0))[0])
    )
    counts = []
    for rules in (mesh.SAMPLING_RULES, mesh.RULES):
        shardings, _ = mesh.param_shardings(config, None, devices, stacked=False, rules=rules)
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        slots = sampling.jit_empty(definition, devices, 2, 64, 1, needs)
        lowered = sampling.jit_decode.lower(
            definition, params, slots, None, needs, np.int32(1), np.int32(2)
        )
        text = lowered.compile().as_text()
        moved = [line for line in text.splitlines() if COLLECTIVE.search(line)]
        sizes = re.findall(r"[fs]32\[([\d,]+)\]", " ".join(line.split("(%")[0] for line in moved))
        assert max(int(np.prod([int(n) for n in size.split(",")])) for size in sizes) <= 2 * VOCAB
        counts.append(len(moved))
    assert counts[0] <= 2 * config.num_layers + 6 < counts[1]


def test_a_text_stop_hands_its_slot_to_the_next_request() -> None:
    """In one slot: each next answer is that of a fresh one."""
    greedy = Sampling(temperature=0.0, max_new_tokens=40)
    first = alone("global", [Request((5, 6, 7), greedy)])[0]
    stopped = dataclasses.replace(greedy, stop=(first.text[2:4],))
    requests = [Request((5, 6, 7), stopped), *random_requests(2, 3, 0)]
    found = engine_of("global", 1).generate(params_of("global"), requests)
    assert found[0].finish_reason == "stop" and len(found[0].token_ids) < 40
    assert_same(found, alone("global", requests))


@pytest.mark.parametrize(("model", "kinds"), [("global", 1), ("alternating", 2)])
def test_layers_of_one_kind_are_traced_once(
    model: str, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[Any] = []
    call = Block.__call__

    def spy(self: Block, *rest: Any) -> Any:
        traced.append(self)
        return call(self, *rest)

    monkeypatch.setattr(Block, "__call__", spy)
    definition = transformer.define(MODELS[model], stacked=False)

    def decode(params: Params) -> Any:
        empty = cache.empty(MODELS[model], 2, 64)
        ids = jnp.zeros((2, 1), jnp.int32)
        return transformer.bind(definition, params)(ids, jnp.zeros(2, jnp.int32), cache=empty)[0]

    jax.eval_shape(decode, params_of(model))
    assert len(traced) == kinds < MODELS[model].num_layers


def test_programs_are_few_and_reused() -> None:
    """A second call with other lengths compiles nothing."""

    def compiled() -> list[int]:
        programs = (sampling.jit_read, sampling.jit_decode, sampling.jit_place)
        return [program._cache_size() for program in programs]

    def ask(lengths: tuple[int, ...]) -> None:
        options = Sampling(temperature=1.0, max_new_tokens=9)
        requests = [Request((5,) * n, options, seed=n) for n in lengths]
        engine_of("global", 4).generate(params_of("global"), requests)

    ask((20, 21, 30, 31))
    before = compiled()
    ask((17, 25, 29, 32))
    assert compiled() == before


# A shared beginning


def test_a_prompt_that_is_the_shared_beginning_is_read_on_its_own() -> None:
    head = tuple(range(4, 134))
    greedy = Sampling(temperature=0.0, max_new_tokens=4)
    prompts = [*((*head, 140 + i) for i in range(6)), head[:128]]
    requests = [Request(prompt, greedy) for prompt in prompts]
    found = engine_of("global", 8).generate(params_of("global"), requests)
    assert_same(found, alone("global", requests))


# Memory


def test_a_windowed_layer_never_holds_more_than_its_window() -> None:
    made = cache.empty(MODELS["alternating"], 2, 96)
    assert [s.keys.shape[2] for s in made.layers] == [WINDOW, 96, WINDOW]
    moved = cache.resize(MODELS["alternating"], made, 192)
    assert [s.keys.shape[2] for s in moved.layers] == [WINDOW, 192, WINDOW]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("places", [8, 32])  # less than a window, and more
@pytest.mark.parametrize("name", MODELS)
def test_columns_written_apart_are_those_written_in_place(
    name: str, places: int, int8: bool
) -> None:
    """Six tokens after 59, in a ring of 64: the last of them stands where the first one stood."""
    config = dataclasses.replace(MODELS[name], int8_cache=int8)
    model = transformer.bind(transformer.define(config, stacked=False), params_of(name))
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 65))
    start, offset = jnp.asarray([3, 1]), jnp.zeros(2, jnp.int32)
    _, read = model(ids[:, :59], start)
    plain = cache.resize(config, read, 64)
    tail = model.tail(plain, start, offset, places)
    rotaries = model.rotaries_of(plain.end, start, offset, 6)
    for column in range(59, 65):
        token = ids[:, column, None]
        one = jax.tree.map(lambda x, at=column - 59: x[:, :, at : at + 1], rotaries)
        wanted, plain = model(token, start, cache=plain, rotaries=one)
        found, tail = model(token, start, cache=tail)
        tail = tail.keep(1, jnp.ones(2, jnp.int32))
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
    joined, moved = cache.aligned(tail)
    np.testing.assert_array_equal(moved, [0, 0])
    assert int(joined.end) == int(plain.end) == 65
    for ours, theirs in zip(joined.layers, plain.layers, strict=True):
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            rounding = 1 if one.dtype == jnp.int8 else 1e-5
            np.testing.assert_allclose(one, other, atol=rounding, rtol=0)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode kernel runs without a GPU."""
    attend = functools.partial(decode_kernel.attend, interpret=True)
    monkeypatch.setattr(decode_kernel, "attend", attend)


def sixteen(name: str) -> tuple[ModelConfig, Params]:
    """A model that the decode kernel can read, in the 16 bits that round less, and its weights."""
    window = MODELS[name].sliding_window and 16
    config = dataclasses.replace(MODELS[name], head_dim=16, dtype="float16", sliding_window=window)
    shapes = jax.eval_shape(lambda: transformer.init(config, key=jax.random.key(0)))[0]
    return config, transformer.unstack_layers(noise(shapes, seed=3))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", MODELS)
def test_the_decode_kernel_serves_the_whole_decoder(name: str) -> None:
    """Six tokens after 59, in a ring of 64 that comes round, behind a shared prefix of one row."""
    config, params = sixteen(name)
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 65))
    start, offset = jnp.asarray([3, 1]), jnp.asarray([20, 0])
    found = {}
    for kernel in ("xla", "pallas"):
        chosen = dataclasses.replace(config, decode_kernel=kernel)
        model = transformer.bind(transformer.define(chosen, stacked=False), params)
        prefix = cache.prefix_of(config, model(ids[:1, :20], jnp.zeros(1, jnp.int32))[1], 20)
        _, read = model(ids[:, :59], start, prefix=prefix, offset=offset)
        ring, hidden = cache.resize(config, read, 64), []
        for column in range(59, 65):
            token = ids[:, column, None]
            out, ring = model(token, start, cache=ring, prefix=prefix, offset=offset)
            hidden.append(out)
        found[kernel] = np.concatenate(hidden, axis=1, dtype=np.float32)
    # Of entries of order 1, rounded to float16 in every layer.
    np.testing.assert_allclose(found["pallas"], found["xla"], atol=0.01, rtol=0)


@pytest.mark.usefixtures("interpreted")
def test_with_a_decode_kernel_a_loop_writes_to_the_cache() -> None:
    """Texts of which some begin before column 0: while two answers are the same, so is what the
    model thinks of them."""
    config, params = sixteen("alternating")
    rng = np.random.default_rng(0)
    requests = [
        Request(
            tuple(rng.integers(4, 64, n).tolist()), Sampling(temperature=0.0, max_new_tokens=90 - n)
        )
        for n in (1, 30, 60)
    ]
    plain, fused = (
        engine(
            2, config=dataclasses.replace(config, decode_kernel=kernel), tokenizer=None, eos_ids=()
        ).generate(params, requests)
        for kernel in ("xla", "pallas")
    )
    for ours, theirs in zip(fused, plain, strict=True):
        pairs = zip(ours.token_ids, theirs.token_ids, strict=True)
        alike = next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours.token_ids))
        assert alike > 16
        np.testing.assert_allclose(ours.logprobs[:alike], theirs.logprobs[:alike], atol=0.01)


# int8


@pytest.mark.parametrize("name", ["int8_cache", "int8_weights"])
def test_int8_drifts_little(name: str) -> None:
    """Log-probabilities of the same tokens, by a model whose cache or weights are int8."""
    config = dataclasses.replace(MODELS["alternating"], **{name: True})
    params = params_of("alternating", int8=name == "int8_weights")
    exact = step_logits(MODELS["alternating"], params_of("alternating"))
    assert 0 < np.abs(step_logits(config, params) - exact).max() < 0.1


@pytest.mark.slow
def test_an_int8_cache_serves_prefixes_pieces_and_rings() -> None:
    """Most log-probabilities of first tokens stay near; a few texts part ways later."""
    config = dataclasses.replace(MODELS["alternating"], int8_cache=True)
    requests = [r for r in random_requests(5, 12, 70)]
    made = engine(4, config=config, max_read=32).generate(params_of("alternating"), requests)
    for ours, exact in zip(made, alone("alternating", requests), strict=True):
        if ours.token_ids[0] == exact.token_ids[0]:
            np.testing.assert_allclose(ours.full_logprobs[0], exact.full_logprobs[0], atol=0.1)
    same = [
        a.token_ids[0] == b.token_ids[0]
        for a, b in zip(made, alone("alternating", requests), strict=True)
    ]
    assert np.mean(same) > 0.7


def step_logits(config: ModelConfig, params: Params) -> np.ndarray:
    """Log-probabilities after 30 tokens, and one more from the cache."""
    model = transformer.bind(transformer.define(config, stacked=False), params)
    ids, start = jnp.arange(60).reshape(2, 30) + 4, jnp.zeros(2, jnp.int32)
    _, read = model(ids, start)
    hidden, _ = model(ids[:, :1], start, cache=cache.resize(config, read, 64))
    return np.asarray(jax.nn.log_softmax(model.logits(hidden[:, 0])))
