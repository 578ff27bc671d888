"""The decoder: masks, padding, layouts of layers, rematerialisation, presets, heads."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import CONFIGS, LLAMA, MISTRAL, WINDOW, random_params
from jax.tree_util import keystr, tree_leaves_with_path

from refine_af.models import attention, cache, contraction, heads, transformer
from refine_af.models.config import LoraConfig, ModelConfig
from refine_af.models.transformer import Definition, Params, define

SEQUENCE = 3 * WINDOW
WIDE = dataclasses.replace(LLAMA, embed_dim=64, hidden_dim=256, num_layers=4)
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
    remat: str = "none",
) -> jax.Array:
    """Logits [B, T, V] of whole sequences, without a cache."""
    model = transformer.bind(definition, base, adapter)
    start = jnp.zeros(ids.shape[:1], jnp.int32) if start is None else start
    return model.logits(model(ids, start, remat=remat)[0])


# Masks, padding, layouts and caches


def test_visible_is_causal_and_skips_left_padding() -> None:
    mask = attention.visible(jnp.asarray([[0], [1]]), jnp.arange(3), jnp.arange(3), None)
    np.testing.assert_array_equal(
        mask, [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[0, 0, 0], [0, 1, 0], [0, 1, 1]]]
    )


def test_visible_counts_the_query_itself_as_part_of_the_window() -> None:
    """Queries at columns 2 and 3 of a cache of 5."""
    mask = attention.visible(jnp.asarray([[0]]), jnp.asarray([2, 3]), jnp.arange(5), 2)
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


@functools.partial(jax.jit, static_argnums=(1, 3))
@jax.grad
def gradient(params: Params, config: ModelConfig, ids: jax.Array, remat: str = "none") -> jax.Array:
    """Of the mean cross-entropy with respect to all parameters."""
    logits = logits_of(define(config), params, ids, remat=remat)
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1).mean()


def test_remat_recomputes_layers() -> None:
    """Otherwise the next test would compare a program with itself."""
    remat: str
    for remat in ("none", "cheap", "full"):
        forward = functools.partial(logits_of, define(LLAMA), remat=remat)
        program = str(jax.make_jaxpr(forward)(random_params(LLAMA), random_tokens(1, 4)))
        assert ("checkpoint[" in program or "remat" in program) == (remat != "none")


def test_remat_keeps_less_and_computes_more() -> None:
    """The cheap one keeps the products, which are most of the operations."""

    def compiled(remat: str) -> Any:
        shapes = jax.eval_shape(lambda: transformer.init(WIDE, key=jax.random.key(0))[0])
        return gradient.lower(shapes, WIDE, random_tokens(4, 64), remat).compile()

    programs = [compiled(remat) for remat in ("none", "cheap", "full")]
    none, cheap, full = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert none > cheap > full
    of_none, of_cheap, of_full = (program.cost_analysis()["flops"] for program in programs)
    assert of_cheap - of_none < 0.3 * (of_full - of_none)


@pytest.mark.parametrize("remat", ["cheap", "full"])
def test_remat_changes_no_gradient(remat: str) -> None:
    ids, params = random_tokens(2, SEQUENCE), random_params(LLAMA)
    plain, again = (gradient(params, LLAMA, ids, kind) for kind in ("none", remat))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-5), again, plain)


def test_logits_are_float32_in_a_bfloat16_model() -> None:
    config = dataclasses.replace(LLAMA, dtype="bfloat16", param_dtype="bfloat16")
    params = random_params(config)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    assert logits_of(define(config), params, random_tokens(1, 4)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("count", [1, 2, 32, 33])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("amx", [True, False])
def test_a_kernel_may_lie_either_way(
    amx: bool, shape: tuple[int, int], count: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which operand a kernel [F, D] is depends on the rows, its shape and the processor."""
    monkeypatch.setattr(contraction, "_has_amx", lambda: amx)
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(count, shape[0])), dtype)
    kernel = jnp.asarray(rng.normal(size=shape), dtype)
    wanted = np.asarray(rows, np.float32) @ np.asarray(kernel, np.float32)
    for laid_out, axis in ((kernel, 0), (kernel.T, 1)):
        found = contraction.rows_times(rows, laid_out, axis)
        assert (found.dtype, found.shape) == (jnp.float32, (count, shape[1]))
        np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


# Caches


def test_rows_that_kept_other_columns_end_at_one_again() -> None:
    """Of two steps of three columns, one row keeps 1 and 2, the other 2 and 3."""
    past, kept = np.arange(5), np.asarray([[1, 2], [2, 3]])
    old = np.full((2, 8), -1.0)
    old[:, :5] = past + 100 * np.arange(2)[:, None]
    new = 1000 + np.arange(6) + 100 * np.arange(2)[:, None]
    both = [cache.Stored(x, -x) for x in (jnp.asarray(y)[:, None, :, None] for y in (old, new))]
    table = jnp.zeros((2, 1, 6, 1))
    tail = cache.Tail(
        cache.KVCache((both[0],), jnp.asarray(5)),
        cache.KVCache((both[1],), jnp.asarray(5)),
        ((table, table), (table, table)),
        jnp.full((2, 6), cache.NO_COLUMN, jnp.int32),
    )
    for step in range(2):
        tail = tail._replace(recent=tail.recent._replace(end=tail.end + 3))
        tail = tail.keep(3, jnp.asarray(kept[:, step]))
    np.testing.assert_array_equal(tail.own[0, :5], [5, cache.NO_COLUMN, cache.NO_COLUMN, 6, 7])
    whole, moved = cache.aligned(tail)
    np.testing.assert_array_equal(moved, [2, 0])
    assert int(whole.end) == 10
    columns = np.arange(2, 10)  # those that eight places hold
    for row, places in enumerate(([0, 3, 4], [0, 1, 3, 4, 5])):
        text = np.concatenate([np.full(moved[row], np.nan), old[row, :5], new[row, places]])[
            columns
        ]
        found = whole.layers[0]
        np.testing.assert_array_equal(found.keys[row, 0, columns % 8, 0], text)
        np.testing.assert_array_equal(found.values[row, 0, columns % 8, 0], -text)


# Configs and presets


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
        ({"num_heads": 0}, "num_heads=0: expected a whole number from 1"),
        ({"sliding_window": 0}, "sliding_window=0: expected >= 1"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)


# Heads


def test_a_new_value_head_says_zero() -> None:
    assert heads.value(heads.init_value_head(4), jnp.ones((2, 3, 4))).tolist() == [[0] * 3] * 2


def test_value_is_a_float32_dot_product_plus_bias() -> None:
    head = {"kernel": jnp.asarray([3.0, 4.0]), "bias": jnp.asarray(0.5)}
    value = heads.value(head, jnp.asarray([[1.0, 2.0]], jnp.bfloat16))
    assert (value.tolist(), value.dtype) == ([11.5], jnp.float32)
