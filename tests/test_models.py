"""The decoder against transformers on torch, its masks, layouts, caches and adapters."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from decoders import CONFIGS, LLAMA, MISTRAL, WINDOW, noise, random_params
from jax.tree_util import keystr, tree_leaves_with_path
from safetensors.numpy import load_file

from refine_af import sampling, tokens
from refine_af.config import Mesh, Sampling
from refine_af.engine import Engine, Request
from refine_af.mesh import make_mesh
from refine_af.models import attention, heads, hf, lora, transformer
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.config import LoraConfig, ModelConfig
from refine_af.models.registry import PRESETS
from refine_af.models.transformer import Definition, Params, define

SEQUENCE = 3 * WINDOW
LORA = LoraConfig(rank=3, alpha=6.0, pattern="q|v|down")


def random_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(4, LLAMA.vocab_size, (batch, length), np.int32)


@functools.partial(jax.jit, static_argnums=0, static_argnames="remat")
def logits_of(
    definition: Definition,
    base: Params,
    ids: jax.Array,
    start: jax.Array | None = None,
    adapter: Params | None = None,
    *,
    remat: bool = False,
) -> jax.Array:
    """Logits [B, T, V] of whole sequences, without a cache."""
    model = transformer.bind(definition, base, adapter)
    start = jnp.zeros(ids.shape[:1], jnp.int32) if start is None else start
    return model.logits(model(ids, start, remat=remat)[0])


# Parity with transformers


class Pair(NamedTuple):
    """One model, here and there."""

    config: ModelConfig
    params: Params
    reference: transformers.PreTrainedModel


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Random weights, written by us and loaded by transformers."""
    torch.set_num_threads(1)  # its threads and XLA's, spinning on the same cores: 30 times slower
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp("model")
    params = random_params(config)
    hf.write_config(config, folder, eos_ids=(2,))
    hf.write_params(config, params, folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return Pair(config, params, reference.eval())


def test_logits_agree_with_transformers(pair: Pair) -> None:
    ids = random_tokens(2, SEQUENCE)
    with torch.no_grad():
        expected = pair.reference(torch.tensor(ids)).logits.numpy()
    assert np.abs(expected).max() > 1, "logits this small would agree within any tolerance"
    actual = logits_of(define(pair.config), pair.params, ids)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


@functools.partial(jax.jit, static_argnums=(1, 3))
@jax.grad
def gradient(params: Params, config: ModelConfig, ids: jax.Array, remat: bool = False) -> jax.Array:
    """Of the mean cross-entropy with respect to all parameters."""
    logits = logits_of(define(config), params, ids, remat=remat)
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1).mean()


def test_gradients_agree_with_transformers(pair: Pair, tmp_path: Path) -> None:
    """Gradients go through the key table like weights, transposes included."""
    ids = random_tokens(2, SEQUENCE)
    pair.reference.zero_grad()
    pair.reference(torch.tensor(ids), labels=torch.tensor(ids).long()).loss.backward()
    expected = {name: p.grad.numpy() for name, p in pair.reference.named_parameters()}
    hf.write_params(pair.config, gradient(pair.params, pair.config, ids), tmp_path)
    actual = load_file(tmp_path / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, ours in actual.items():
        atol = 1e-3 * np.abs(expected[name]).max()
        np.testing.assert_allclose(ours, expected[name], atol=atol, rtol=0, err_msg=name)


def test_greedy_text_agrees_with_transformers(pair: Pair) -> None:
    """64 tokens, past every window, in one left-padded batch here and row by row there."""
    prompts = [random_tokens(1, length)[0] for length in (3, 7, SEQUENCE)]
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    engine = Engine(pair.config, byte_tokenizer(), mesh, eos_ids=(), batch_size=4)
    greedy = Sampling(temperature=0.0, max_new_tokens=64)
    requests = [Request(tuple(prompt.tolist()), greedy) for prompt in prompts]
    completions = engine.generate(transformer.unstack_layers(pair.params), requests)
    pair.reference.generation_config.eos_token_id = None
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor(prompt[None]).long()
        expected = pair.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
        )
        assert list(completion.token_ids) == expected[0, len(prompt) :].tolist()


# Masks, padding, layouts and caches


def test_visible_is_causal_and_skips_left_padding() -> None:
    mask = attention.visible(jnp.asarray([0, 1]), 0, 3, 3, None)
    np.testing.assert_array_equal(
        mask, [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[0, 0, 0], [0, 1, 0], [0, 1, 1]]]
    )


def test_visible_counts_the_query_itself_as_part_of_the_window() -> None:
    """Queries at columns 2 and 3 of a cache of 5."""
    mask = attention.visible(jnp.asarray([0]), 2, 2, 5, 2)
    np.testing.assert_array_equal(mask, [[[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]])


def test_a_window_changes_what_lies_past_it_and_nothing_before() -> None:
    ids, params = random_tokens(1, SEQUENCE), random_params(MISTRAL)
    windowed = logits_of(define(MISTRAL), params, ids)
    full = logits_of(define(dataclasses.replace(MISTRAL, sliding_window=None)), params, ids)
    np.testing.assert_allclose(windowed[:, :WINDOW], full[:, :WINDOW], atol=1e-5, rtol=0)
    assert jnp.abs(windowed - full)[:, WINDOW:].max(axis=(0, 2)).min() > 1e-2


@pytest.mark.parametrize("config", [LLAMA, MISTRAL], ids=lambda c: c.family)
@pytest.mark.parametrize("left", [0, 5, 13])
def test_padding_changes_no_logits(config: ModelConfig, left: int) -> None:
    """A row between `left` columns of junk and some more on the right equals the row alone."""
    ids, junk = random_tokens(1, SEQUENCE), random_tokens(1, 16)
    padded = np.concatenate([junk[:, :left], ids, junk[:, left:]], axis=1)
    alone = logits_of(define(config), random_params(config), ids)
    among = logits_of(define(config), random_params(config), padded, jnp.asarray([left]))
    np.testing.assert_allclose(among[:, left : left + SEQUENCE], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_stacked_and_unstacked_layers_agree(config: ModelConfig) -> None:
    ids, params = random_tokens(2, SEQUENCE), random_params(config)
    unstacked = transformer.unstack_layers(params)
    np.testing.assert_allclose(
        logits_of(define(config, stacked=False), unstacked, ids),
        logits_of(define(config), params, ids),
        atol=1e-5,
        rtol=0,
    )


def test_remat_recomputes_layers() -> None:
    """Otherwise the next test would compare a program with itself."""
    for remat in (False, True):
        forward = functools.partial(logits_of, define(LLAMA), remat=remat)
        program = jax.make_jaxpr(forward)(random_params(LLAMA), random_tokens(1, 4))
        assert ("checkpoint" in str(program) or "remat" in str(program)) == remat


def test_remat_changes_no_gradient() -> None:
    ids, params = random_tokens(2, SEQUENCE), random_params(LLAMA)
    plain, remat = (gradient(params, LLAMA, ids, remat) for remat in (False, True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-5), remat, plain)


@functools.partial(jax.jit, static_argnums=0)
def decode_step(
    definition: Definition, params: Params, ids: jax.Array, start: jax.Array, cache: Any
) -> tuple[jax.Array, Any]:
    model = transformer.bind(definition, params)
    hidden, cache = model(ids, start, cache=cache)
    return model.logits(hidden), cache


@pytest.mark.parametrize("config", [LLAMA, MISTRAL], ids=lambda c: c.family)
@pytest.mark.parametrize("prompt_length", [5, 63, 64, 65])
def test_cached_decode_is_the_full_forward(config: ModelConfig, prompt_length: int) -> None:
    """Lengths on both sides of a bucket's edge; the window slides in the prompt and after it."""
    ids, definition = random_tokens(1, 80), define(config, stacked=False)
    params = transformer.unstack_layers(random_params(config))
    full = logits_of(definition, params, ids)
    prompt, start = tokens.pad_left(ids[:, :prompt_length].tolist(), tokens.bucket(prompt_length))
    state = sampling.jit_prefill(definition, params, prompt, start, 256, 1)
    logits, cache, end = state.logits[:, None], state.cache, prompt_length
    for piece in (1, 3, 1, 1, 3, 3, 1):  # tokens at a time
        np.testing.assert_allclose(
            logits, full[:, end - logits.shape[1] : end], atol=1e-4, rtol=0, err_msg=f"{end=}"
        )
        new = ids[:, end : end + piece]
        logits, cache = decode_step(definition, params, new, start, cache)
        end += piece


def test_logits_are_float32_in_a_bfloat16_model() -> None:
    config = dataclasses.replace(LLAMA, dtype="bfloat16", param_dtype="bfloat16")
    params = random_params(config)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    assert logits_of(define(config), params, random_tokens(1, 4)).dtype == jnp.float32


# Configs and presets


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("mistral-7b-v0.1", 7_241_732_096),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, count: int) -> None:
    base, adapter = transformer.logical_axes(PRESETS[preset])
    leaves = jax.tree.leaves(base, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert sum(shape.size for shape, _ in leaves) == count
    assert adapter == {}


@pytest.mark.parametrize("lora_config", [None, LORA])
@pytest.mark.parametrize("stacked", [True, False])
def test_logical_axes_describe_the_tree_of_parameters(
    lora_config: LoraConfig | None, stacked: bool
) -> None:
    """Same paths and shapes as `init`'s, and one axis name for each dimension."""
    made = jax.eval_shape(lambda: transformer.init(LLAMA, lora_config, key=jax.random.key(0)))
    if not stacked:
        made = tuple(jax.eval_shape(transformer.unstack_layers, tree) for tree in made if tree)
    described = transformer.logical_axes(LLAMA, lora_config, stacked=stacked)
    for tree, named in zip(made, described, strict=False):  # no adapter without LoRA
        expected = [(keystr(path), leaf.shape) for path, leaf in tree_leaves_with_path(tree)]
        leaves = tree_leaves_with_path(named, is_leaf=lambda node: isinstance(node, tuple))
        assert [(keystr(path), shape.shape) for path, (shape, _) in leaves] == expected
        assert all(len(axes) == len(shape.shape) for _, (shape, axes) in leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7: rotary needs an even size"),
        ({"num_heads": 0}, "num_heads=0: expected at least 1"),
        ({"sliding_window": 0}, "sliding_window=0: expected >= 1"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)


# Adapters and heads


@functools.cache
def adapted() -> tuple[Params, Params]:
    """Random base weights and a fresh adapter."""
    # Under jit, so that the base weights that are not asked for are not drawn.
    draw = jax.jit(lambda key: transformer.init(LLAMA, LORA, key=key)[1])
    return random_params(LLAMA), draw(jax.random.key(2))


def test_only_the_linears_that_the_pattern_names_are_adapted() -> None:
    _, adapter = adapted()
    found = {keystr(path, simple=True, separator="/") for path, _ in tree_leaves_with_path(adapter)}
    expected = ("attention/q", "attention/v", "feed_forward/down")
    assert found == {f"layers/{name}/lora_{ab}" for name in expected for ab in "ab"}


def test_a_new_adapter_changes_nothing() -> None:
    base, adapter = adapted()
    ids = random_tokens(1, 8)
    np.testing.assert_array_equal(
        logits_of(define(LLAMA, LORA), base, ids, None, adapter),
        logits_of(define(LLAMA), base, ids),
    )


def test_a_merged_adapter_is_the_applied_adapter() -> None:
    base, adapter = adapted()
    adapter, ids = noise(adapter, seed=1), random_tokens(1, 8)
    applied = logits_of(define(LLAMA, LORA), base, ids, None, adapter)
    merged = logits_of(define(LLAMA), lora.merge(base, adapter, LORA), ids)
    assert jnp.abs(applied - logits_of(define(LLAMA), base, ids)).max() > 0.1
    np.testing.assert_allclose(merged, applied, atol=1e-5, rtol=0)


def test_merge_is_the_scaled_product_of_the_factors() -> None:
    """By hand: alpha / rank = 2, and A B = [[1 * 3, 1 * 4], [2 * 3, 2 * 4]]."""
    base = {"q": {"kernel": jnp.ones((2, 2))}, "k": {"kernel": jnp.ones((2, 2))}}
    adapter = {"q": {"lora_a": jnp.asarray([[1.0], [2.0]]), "lora_b": jnp.asarray([[3.0, 4.0]])}}
    merged = lora.merge(base, adapter, LoraConfig(rank=1, alpha=2.0, pattern="q"))
    np.testing.assert_array_equal(merged["q"]["kernel"], [[7, 9], [13, 17]])
    np.testing.assert_array_equal(merged["k"]["kernel"], [[1, 1], [1, 1]])


def test_a_new_value_head_says_zero() -> None:
    assert heads.value(heads.init_value_head(4), jnp.ones((2, 3, 4))).tolist() == [[0] * 3] * 2


def test_value_is_a_float32_dot_product_plus_bias() -> None:
    head = {"kernel": jnp.asarray([3.0, 4.0]), "bias": jnp.asarray(0.5)}
    value = heads.value(head, jnp.asarray([[1.0, 2.0]], jnp.bfloat16))
    assert (value.tolist(), value.dtype) == ([11.5], jnp.float32)
