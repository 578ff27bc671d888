"""From requests to completions: independence of the batch, stops, log-probabilities, meshes."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refine_af import config as config_lib
from refine_af import logprobs, mesh, tokens
from refine_af.config import Sampling
from refine_af.engine import Engine
from refine_af.models import transformer
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.config import LoraConfig, ModelConfig
from refine_af.models.registry import PRESETS
from refine_af.models.transformer import Params, define
from refine_af.requests import Completion, Request

TINY = PRESETS["tiny"]
TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
SAMPLING = Sampling(temperature=0.8, max_new_tokens=40)


@functools.cache
def one_device() -> jax.sharding.Mesh:
    return mesh.make_mesh(config_lib.Mesh(), jax.devices()[:1])


def engine(num_slots: int = 3, **changes: Any) -> Engine:
    made = Engine(TINY, TOKENIZER, one_device(), eos_ids=(EOS,), num_slots=num_slots)
    return dataclasses.replace(made, **changes)


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text).input_ids)


def shapes_of(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: transformer.init(config, key=jax.random.key(0)))[0]


@functools.cache
def tiny_params() -> Params:
    """Unstacked random weights with logits of order 1."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), shapes_of(TINY)
    )
    params["final_norm"] = {"scale": jnp.ones(TINY.embed_dim)}
    return transformer.unstack_layers(params)


@functools.cache
def varied_requests() -> tuple[Request, ...]:
    """Rows of different prompts, prompt lengths (in two buckets), samplings and seeds."""
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    nucleus = dataclasses.replace(SAMPLING, top_p=0.7, presence_penalty=1.0)
    top_k = dataclasses.replace(SAMPLING, top_k=20, max_new_tokens=33)
    rows = ((4, SAMPLING), (20, greedy), (36, nucleus), (52, top_k), (70, SAMPLING), (120, greedy))
    rng = np.random.default_rng(1)
    return tuple(
        Request(tuple(rng.integers(4, TINY.vocab_size, length).tolist()), sampling, seed=length)
        for length, sampling in rows
    )


@functools.cache
def varied_completions() -> tuple[Completion, ...]:
    """Those of `varied_requests`, all at once with two idle slots, on one device."""
    return tuple(engine(8).generate(tiny_params(), varied_requests()))


# What a completion depends on


def ids_of(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("num_slots", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_tokens_do_not_depend_on_slots_neighbours_or_order(num_slots: int) -> None:
    for turn in (1, -1):
        completions = engine(num_slots).generate(tiny_params(), varied_requests()[::turn])
        assert ids_of(completions[::turn]) == ids_of(varied_completions())


def test_completions_differ_so_that_equality_means_something() -> None:
    assert len(set(ids_of(varied_completions()))) == 6


def test_rows_of_a_batch_have_their_own_max_new_tokens() -> None:
    assert [len(ids) for ids in ids_of(varied_completions())] == [40, 40, 40, 33, 40, 40]


def test_a_seed_fixes_the_text_and_another_seed_changes_it() -> None:
    seeds = (1, 2, 1 + 2**16, 1, 1 + 2**32)  # a seed counts modulo 2^32
    nucleus = dataclasses.replace(SAMPLING, top_p=0.9)
    requests = [Request(encode("same"), nucleus, seed) for seed in seeds]
    first, *others, again, wrapped = ids_of(engine().generate(tiny_params(), requests))
    assert first not in others
    assert again == wrapped == first


def test_the_n_th_token_is_drawn_with_the_n_th_random_number_of_its_seed() -> None:
    """All weights zero: each of V tokens has probability 1/V, so number u draws token floor(uV)."""
    zeros = jax.tree.map(jnp.zeros_like, tiny_params())
    request = Request(encode("?"), SAMPLING, seed=7)
    (completion,) = engine(1).generate(zeros, [request])
    key, vocab = jax.random.key(7), TINY.vocab_size
    uniform = jax.vmap(lambda n: jax.random.uniform(jax.random.fold_in(key, n)))(jnp.arange(40))
    assert completion.token_ids == tuple((uniform * vocab).astype(int).tolist())
    np.testing.assert_allclose(completion.logprobs, -np.log(vocab), atol=1e-5)


def test_no_requests_give_no_completions() -> None:
    assert engine().generate(tiny_params(), []) == []


def test_progress_adds_up_to_the_number_of_tokens() -> None:
    calls: list[int] = []
    completions = engine().generate(tiny_params(), varied_requests(), calls.append)
    assert sum(calls) == sum(len(completion.token_ids) for completion in completions)
    assert len(calls) > 4, "the bar moves all the time"


# A model of one layer of zeros knows the last token only: it can be made to say any text.


def says(text: str, ends: bool = True) -> tuple[ModelConfig, Params]:
    """A model that greedily goes on with what follows the last token in `text`, then `<eos>`.

    Every byte of `text` may stand in it once. Without `ends` the last byte is said for ever.
    """
    ids = encode(text)
    assert len(set(ids)) == len(ids)
    vocab = TINY.vocab_size
    config = dataclasses.replace(TINY, embed_dim=vocab, num_layers=1, tie_embeddings=False)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes_of(config))
    head = np.zeros((vocab, vocab), np.float32)
    head[ids, (*ids[1:], EOS if ends else ids[-1])] = 1
    params |= {
        "embedding": jnp.eye(vocab),
        "head": jnp.asarray(head),
        "final_norm": {"scale": jnp.ones(vocab)},
    }
    return config, transformer.unstack_layers(params)


LETTERS = "".join(map(chr, range(ord("!"), ord("~") + 1)))  # 94 printable bytes


def listen(text: str, *, eos_ids: tuple[int, ...] = (EOS,), **sampling: Any) -> Completion:
    """What a model that says `text` answers to the first character of it."""
    config, params = says(text)
    request = Request(
        encode(text[0]), Sampling(temperature=0.0, **({"max_new_tokens": 96} | sampling))
    )
    return engine(config=config, eos_ids=eos_ids).generate(params, [request])[0]


def test_text_ends_before_the_end_token_which_is_counted() -> None:
    completion = listen("abcd")
    assert (completion.text, completion.finish_reason) == ("bcd", "stop")
    assert completion.token_ids == (*encode("bcd"), EOS)
    assert len(completion.logprobs) == 4


def test_an_end_token_that_is_an_ordinary_one_is_no_text_either() -> None:
    completion = listen("abcd", eos_ids=encode("d"))
    assert (completion.text, completion.finish_reason) == ("bc", "stop")
    assert completion.token_ids == encode("bcd")


@pytest.mark.parametrize("length", [1, 32, 33, 64, 90])
def test_length_stops_after_exactly_so_many_tokens(length: int) -> None:
    """On both sides of a chunk of 32."""
    completion = listen(LETTERS, max_new_tokens=length)
    assert (completion.text, completion.finish_reason) == (LETTERS[1 : length + 1], "length")
    assert completion.token_ids == encode(completion.text)


def test_an_end_token_on_the_last_allowed_place_is_a_stop() -> None:
    """93 letters follow the first one."""
    assert listen(LETTERS, max_new_tokens=94).finish_reason == "stop"
    assert listen(LETTERS, max_new_tokens=93).finish_reason == "length"


@pytest.mark.parametrize("end", [1, 31, 32, 33, 63, 64, 65, 93])
@pytest.mark.parametrize("size", [1, 3])
def test_a_stop_string_is_cut_off_and_its_tokens_are_kept(end: int, size: int) -> None:
    """Stop strings that end on, before and after the last token of a chunk."""
    stop = LETTERS[1:][max(end - size, 0) : end]
    completion = listen(LETTERS, stop=(stop,))
    assert completion.finish_reason == "stop"
    assert completion.text + stop == LETTERS[1 : end + 1]
    assert completion.token_ids == encode(completion.text + stop), "not one token more or less"
    assert len(completion.logprobs) == len(completion.token_ids)


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (("de", "bc"), ""),
        (("cd", "bcd"), ""),
        (("z", "de"), "bc"),
        (("no",), "bcdefg"),
        (("bcdefg", "de"), "bc"),  # the long one is whole only in tokens that are cut
    ],
    ids=str,
)
def test_the_earliest_of_several_stop_strings_counts(stops: tuple[str, ...], text: str) -> None:
    assert listen("abcdefg", stop=stops).text == text


def test_a_stop_string_before_the_end_token_takes_that_token_away() -> None:
    assert listen("abcd", stop=("c",)).token_ids == encode("bc")


def test_a_stop_string_of_several_bytes_needs_them_all() -> None:
    """`\u00e9` is two tokens; half of it decodes to a replacement character."""
    completion = listen("ab\u00e9c", stop=("\u00e9",))
    assert (completion.text, completion.finish_reason) == ("b", "stop")
    assert completion.token_ids == encode("b\u00e9")


def test_a_request_has_stop_tokens_of_its_own() -> None:
    completion = listen("abcdefg", stop_token_ids=encode("xe"))
    assert (completion.text, completion.finish_reason) == ("bcd", "stop")
    assert completion.token_ids == encode("bcde")


def test_rows_stop_each_in_its_own_way() -> None:
    """One batch: an end token, a stop string, a length."""
    config, params = says(LETTERS)
    long = Sampling(temperature=0.0, max_new_tokens=90)
    rows = (
        ("y", long, "z{|}~", "stop"),
        ("0", dataclasses.replace(long, stop=("78",)), "123456", "stop"),
        ("A", dataclasses.replace(long, max_new_tokens=40), LETTERS[33:73], "length"),
    )
    requests = [Request(encode(row[0]), row[1]) for row in rows]
    completions = engine(config=config).generate(params, requests)
    assert [(c.text, c.finish_reason) for c in completions] == [row[2:] for row in rows]


def test_the_context_bounds_the_answer() -> None:
    """A prompt of 6 tokens in a context of 10 leaves 4, whatever is asked for."""
    config, params = says(LETTERS, ends=False)
    config = dataclasses.replace(config, max_positions=10)
    request = Request(encode("zzzzzA"), Sampling(temperature=0.0, max_new_tokens=99))
    (completion,) = engine(config=config).generate(params, [request])
    assert (completion.text, completion.finish_reason) == ("BCDE", "length")


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "request 1: the prompt is empty"),
        (10, "request 1: the prompt has 10 tokens, and the model's context is 10; shorten it"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(length: int, message: str) -> None:
    config = dataclasses.replace(TINY, max_positions=10)
    requests = [Request((5,) * n, SAMPLING) for n in (9, length)]
    with pytest.raises(ValueError) as error:
        engine(config=config).generate({}, requests)
    assert str(error.value) == message


def test_a_stream_answers_what_can_be_answered() -> None:
    """Rows with a fault come back with it, the others as if they were alone."""
    good = varied_requests()[0]
    odd = Request((5, TINY.vocab_size), SAMPLING)
    found = dict(engine().stream(tiny_params(), [Request((), SAMPLING), good, odd]))
    assert found[1].token_ids == varied_completions()[0].token_ids
    assert (found[0].finish_reason, found[0].error) == ("error", "the prompt is empty")
    assert found[2].error == "token id 260 in the prompt: expected 0 to 259"


def test_stop_strings_without_a_tokenizer_are_a_fault() -> None:
    request = Request((5,), dataclasses.replace(SAMPLING, stop=("a",)))
    assert engine(tokenizer=None).fault(request).startswith("stop strings need a tokenizer")


def test_a_stream_gives_completions_as_they_finish() -> None:
    """Two slots: the first one is taken over as soon as its short answer is whole."""
    lengths = (100, 1, 2, 3)
    asked = [
        Request(r.prompt_ids, dataclasses.replace(SAMPLING, max_new_tokens=n))
        for r, n in zip(varied_requests(), lengths, strict=False)
    ]
    order = [number for number, _ in engine(2, eos_ids=()).stream(tiny_params(), asked)]
    assert order == [3, 2, 1, 0]


# Log-probabilities


def test_full_logprobs_are_those_of_scoring_the_text_afterwards() -> None:
    """Sampler (packed prompts, cache, top-p) and trainer (padded rows) see one distribution."""
    completions = varied_completions()
    for request, completion in zip(varied_requests(), completions, strict=True):
        row = np.asarray([request.prompt_ids + completion.token_ids])
        first = len(request.prompt_ids)
        temperature = request.sampling.temperature or 1.0
        scored = score(tiny_params(), tokens.pad_right(row.tolist(), 256), temperature)
        np.testing.assert_allclose(
            completion.full_logprobs, scored[0, first - 1 : row.size - 1], atol=1e-4, rtol=0
        )
        plain = request.sampling.top_p == 1 and not request.sampling.top_k
        assert np.allclose(completion.logprobs, completion.full_logprobs, atol=1e-5) == plain


def test_logprobs_are_those_of_the_distribution_drawn_from() -> None:
    """The scorer's logits, narrowed by a sort in numpy."""
    request, completion = varied_requests()[3], varied_completions()[3]
    assert request.sampling.top_k == 20
    row = np.asarray([request.prompt_ids + completion.token_ids])
    logits = np.asarray(logits_of(tiny_params(), row))[0, len(request.prompt_ids) - 1 : -1] / 0.8
    kept = np.sort(logits, axis=-1)[:, -20:]
    ids = np.asarray(completion.token_ids)
    expected = logits[np.arange(len(ids)), ids] - np.log(np.exp(kept).sum(-1))
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4, rtol=0)


@jax.jit
def logits_of(params: Params, row: jax.Array) -> jax.Array:
    model = transformer.bind(define(TINY, stacked=False), params)
    return model.logits(model(row, jnp.zeros(1, jnp.int32))[0])


@jax.jit
def score(params: Params, row: jax.Array, temperature: float) -> jax.Array:
    """Log-probability of each token after the first."""
    model = transformer.bind(define(TINY, stacked=False), params)
    hidden, _ = model(row, jnp.zeros(1, jnp.int32))
    return logprobs.of_targets(model, hidden[:, :-1], row[:, 1:], temperature)[0]


# Meshes


@pytest.mark.parametrize(
    "sizes",
    [config_lib.Mesh(data=8, fsdp=1), config_lib.Mesh(data=1, fsdp=4, tensor=2)],
    ids=["data8", "fsdp4-tensor2"],
)
def test_eight_devices_say_the_same_as_one(sizes: config_lib.Mesh) -> None:
    devices = mesh.make_mesh(sizes)
    shardings, _ = mesh.param_shardings(TINY, None, devices, stacked=False)
    params = jax.device_put(tiny_params(), shardings)
    completions = engine(8, mesh=devices).generate(params, varied_requests())
    assert ids_of(completions) == ids_of(varied_completions())
    for many, one in zip(completions, varied_completions(), strict=True):
        np.testing.assert_allclose(many.logprobs, one.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=2.0, pattern=".*")])
@pytest.mark.parametrize("stacked", [True, False])
def test_weights_are_cut_along_embed_and_heads(lora: LoraConfig | None, stacked: bool) -> None:
    """fsdp 4 x tensor 2: a device holds an eighth of a kernel, a quarter of its LoRA factor A.

    Kernels are [in, out] where layers are stacked, and [out, in] where they are not.
    """
    devices = mesh.make_mesh(config_lib.Mesh(fsdp=4, tensor=2))
    base, adapter = mesh.param_shardings(TINY, lora, devices, stacked=stacked)
    layer = (lambda tree: tree["layers"]) if stacked else (lambda tree: tree["layers"][0])
    lead = (TINY.num_layers,) if stacked else ()
    kernel = layer(base)["attention"]["k"]["kernel"]
    shape = (*lead, 32, 16) if stacked else (16, 32)
    assert kernel.shard_shape(shape) == (*lead, 8, 8)
    if lora:
        factor = layer(adapter)["attention"]["k"]["lora_a"]
        assert factor.shard_shape((*lead, 32, 2)) == (*lead, 8, 2)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_axis_of_every_preset_has_a_rule(preset: str) -> None:
    devices = mesh.make_mesh(config_lib.Mesh(fsdp=4, tensor=2))
    every_linear = LoraConfig(rank=2, alpha=2.0, pattern=".*")
    shardings = mesh.param_shardings(PRESETS[preset], every_linear, devices)
    assert all(jax.tree.leaves(tree) for tree in shardings)


def test_an_axis_that_does_not_divide_stays_whole() -> None:
    devices = mesh.make_mesh(config_lib.Mesh(fsdp=4, tensor=2))
    assert mesh.spec(("embed", "vocab"), (8, 9), devices) == jax.P("fsdp", None)
    assert mesh.spec(("embed", "vocab"), (6, 10), devices) == jax.P(None, "tensor")


def test_a_head_is_never_cut() -> None:
    """SmolLM2 has 9 heads and 3 kv heads of 64: 2 does not divide them, though it divides 192."""
    devices = mesh.make_mesh(config_lib.Mesh(fsdp=4, tensor=2))
    base, _ = mesh.param_shardings(PRESETS["smollm2-135m"], None, devices)
    layers = base["layers"]
    assert layers["attention"]["k"]["kernel"].spec == jax.P(None, "fsdp", None)
    assert layers["attention"]["o"]["kernel"].spec == jax.P(None, None, "fsdp")
    assert layers["feed_forward"]["up"]["kernel"].spec == jax.P(None, "fsdp", "tensor")


def test_an_axis_without_a_rule_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\['expert'\] of \('expert', 'embed'\) have no sharding"):
        mesh.spec(("expert", "embed"), (2, 2), one_device())


def test_two_claims_to_one_mesh_axis_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"same mesh axis twice: \['tensor', 'tensor'\]"):
        mesh.spec(("heads", "hidden"), (2, 2), one_device())


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 1, 2)),
        ({"data": -1, "fsdp": 2}, (4, 2, 1, 1)),
    ],
    ids=str,
)
def test_one_axis_of_a_mesh_may_take_the_rest(
    sizes: dict[str, int], shape: tuple[int, ...]
) -> None:
    assert tuple(mesh.make_mesh(config_lib.Mesh(**sizes)).shape.values()) == shape
