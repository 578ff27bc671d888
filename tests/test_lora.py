"""Adapters: what they change, merging, and PEFT's files in both directions."""

import functools
import json
from pathlib import Path
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from decoders import LLAMA, noise, random_params
from jax.tree_util import keystr, tree_leaves_with_path
from safetensors.numpy import load_file, save_file

from refine_af.models import lora, sources, transformer
from refine_af.models.config import LoraConfig
from refine_af.models.transformer import Definition, Params, define
from refine_af.models.weights import get

LORA = LoraConfig(rank=3, alpha=6.0, pattern="q|v|down")


def random_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(4, LLAMA.vocab_size, (batch, length), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(
    definition: Definition, base: Params, ids: Any, adapter: Params | None = None
) -> jax.Array:
    model = transformer.bind(definition, base, adapter)
    return model.logits(model(ids, jnp.zeros(ids.shape[:1], jnp.int32))[0])


@functools.cache
def adapted() -> tuple[Params, Params]:
    """Random base weights and a fresh adapter."""
    # Under jit, so that the base weights that are not asked for are not drawn.
    draw = jax.jit(lambda key: transformer.init(LLAMA, LORA, key=key)[1])
    return random_params(LLAMA), draw(jax.random.key(2))


def trained() -> tuple[Params, Params]:
    """Base weights, and an adapter that changes them."""
    base, adapter = adapted()
    return base, noise(adapter, seed=1)


def test_only_the_linears_that_the_pattern_names_are_adapted() -> None:
    _, adapter = adapted()
    found = {keystr(path, simple=True, separator="/") for path, _ in tree_leaves_with_path(adapter)}
    expected = ("attention/q", "attention/v", "feed_forward/down")
    assert found == {f"layers/{name}/lora_{ab}" for name in expected for ab in "ab"}


def test_a_new_adapter_changes_nothing() -> None:
    base, adapter = adapted()
    ids = random_tokens(1, 8)
    np.testing.assert_array_equal(
        logits_of(define(LLAMA, LORA), base, ids, adapter), logits_of(define(LLAMA), base, ids)
    )


def test_a_merged_adapter_is_the_applied_adapter() -> None:
    (base, adapter), ids = trained(), random_tokens(1, 8)
    applied = logits_of(define(LLAMA, LORA), base, ids, adapter)
    merged = logits_of(define(LLAMA), lora.merge(base, adapter, LORA), ids)
    assert jnp.abs(applied - logits_of(define(LLAMA), base, ids)).max() > 0.1
    np.testing.assert_allclose(merged, applied, atol=1e-5, rtol=0)


def test_merge_is_the_scaled_product_of_the_factors() -> None:
    """By hand: alpha / rank = 2, and A B = [[1 * 3, 1 * 4], [2 * 3, 2 * 4]]."""
    base = {"q": {"kernel": jnp.ones((2, 2))}, "k": {"kernel": jnp.ones((2, 2))}}
    adapter = {"q": {"lora_a": jnp.asarray([[1.0], [2.0]]), "lora_b": jnp.asarray([[3.0, 4.0]])}}
    config = LoraConfig(rank=1, alpha=2.0, pattern="q")
    merged = lora.merge(base, adapter, config)
    np.testing.assert_array_equal(merged["q"]["kernel"], [[7, 9], [13, 17]])
    np.testing.assert_array_equal(merged["k"]["kernel"], [[1, 1], [1, 1]])
    np.testing.assert_array_equal(lora.unmerge(merged, adapter, config)["q"]["kernel"], 1)


def test_unmerge_undoes_merge_up_to_rounding() -> None:
    base, adapter = trained()
    back = lora.unmerge(lora.merge(base, adapter, LORA), adapter, LORA)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=0), back, base)


def test_merged_weights_are_merged_part_by_part() -> None:
    base, adapter = trained()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    whole = lora.merge(jax.tree.map(lambda x: x.astype(jnp.float32), half), adapter, LORA)
    lazy = lora.MergedWeights(half, adapter, LORA)
    for path, array in lazy.arrays.items():
        assert array.dtype == jnp.float32
        index = tuple(slice(n // 3, n) for n in array.shape)
        expected = np.asarray(get(whole, path))[index]
        np.testing.assert_allclose(lazy.read(path, index), expected, atol=1e-6, rtol=0)


def test_merged_weights_say_what_the_adapter_says() -> None:
    base, adapter = trained()
    ids = random_tokens(2, 12)
    applied, merged = (
        transformer.bind(transformer.define(LLAMA, config), params, factors)
        for config, params, factors in (
            (LORA, base, adapter),
            (None, lora.merge(base, adapter, LORA), None),
        )
    )
    start = jnp.zeros(2, jnp.int32)
    expected = applied.logits(applied(ids, start)[0])
    np.testing.assert_allclose(merged.logits(merged(ids, start)[0]), expected, atol=1e-4, rtol=0)


# PEFT's files

FAMILIES = ["llama3.2", "mistral-v0.1", "qwen2.5", "qwen3", "gemma2", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_we_write(family: str, tmp_path: Path) -> None:
    source = sources.open_model(str(families.saved(family)))
    base = source.load()
    shapes = jax.eval_shape(lambda: transformer.init(source.config, LORA, key=jax.random.key(0))[1])
    adapter = noise(shapes, seed=3)
    lora.write_peft(adapter, LORA, source.config, tmp_path, str(families.saved(family)))
    ids = random_tokens(2, 12)
    model = peft.PeftModel.from_pretrained(families.build(family), tmp_path).eval()
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    actual = logits_of(define(source.config, LORA), base, ids, adapter)
    assert np.abs(actual - logits_of(define(source.config), base, ids)).max() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    config, again = lora.read_peft(tmp_path, source.config)
    assert (config.rank, config.alpha) == (LORA.rank, LORA.alpha)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_what_peft_writes(family: str, tmp_path: Path) -> None:
    options = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["o_proj", "k_proj", "gate_proj"],
        bias="none",
        init_lora_weights="gaussian",
    )
    model = peft.get_peft_model(families.build(family), options).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    ids = random_tokens(2, 12)
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    source = sources.open_model(str(families.saved(family)))
    config, adapter = lora.read_peft(tmp_path, source.config)
    assert (config.rank, config.alpha, config.pattern) == (4, 12.0, "gate|k|o")
    actual = logits_of(define(source.config, config), source.load(), ids, adapter)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    _, adapter = trained()
    lora.write_peft(adapter, LORA, LLAMA, tmp_path, "base")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is no LoRA"),
        ({"use_dora": True}, "not supported: {'use_dora': True}"),
        ({"rank_pattern": {"q_proj": 2}}, "not supported: {'rank_pattern'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "not supported: {'layer_replication'"),
        ({"alora_invocation_tokens": [7]}, "not supported: {'alora_invocation_tokens': [7]}"),
        *(
            ({"init_lora_weights": name}, f"not supported: {{'init_lora_weights': '{name}'}}")
            for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
        ),
        ({"r": 2}, "lora_A.weight has shape (3, 24), expected (2, 24)"),
        ({"r": "many"}, "adapter_config.json: r='many', lora_alpha=6.0: expected numbers"),
    ],
)
def test_an_adapter_that_would_mean_something_else_is_refused(
    change: dict[str, Any], message: str, written: Path
) -> None:
    path = written / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as error:
        lora.read_peft(written, LLAMA)
    assert message in str(error.value)


def test_a_directory_without_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter_config.json there; expected an adapter that"):
        lora.read_peft(tmp_path, LLAMA)


def test_missing_and_unexpected_factors_are_named_together(written: Path) -> None:
    path = written / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    save_file(tensors | {"odd": np.zeros(1, np.float32)}, path)
    with pytest.raises(ValueError) as error:
        lora.read_peft(written, LLAMA)
    text = str(error.value)
    assert "missing base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in text
    assert "unexpected odd" in text


def test_a_torn_adapter_file_is_named(written: Path) -> None:
    path = written / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not readable"):
        lora.read_peft(written, LLAMA)
