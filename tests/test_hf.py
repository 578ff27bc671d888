"""Hugging Face directories: what config.json means, which tensors belong, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import families
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from decoders import CONFIGS, LLAMA, random_params, write_directory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import CONFIG_MAPPING

from refine_af.launch import flags
from refine_af.models import hf, hf_config, registry, sources
from refine_af.models.config import LinearRope, Llama3Rope, ModelConfig
from refine_af.models.transformer import Params
from refine_af.models.weights import expected_shapes, flat

DTYPES = {"dtype": "float32", "param_dtype": "float32"}


def parse(raw: dict[str, Any]) -> ModelConfig:
    return hf_config.parse(raw, "config.json", **DTYPES)


def assert_same_trees(actual: Params, expected: Params) -> None:
    ours, theirs = dict(flat(actual)), dict(flat(expected))
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert array.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(np.asarray(array), np.asarray(theirs[path]), err_msg=path)


# config.json


@pytest.mark.parametrize("family", families.CONFIGS)
def test_what_we_write_means_what_transformers_wrote(family: str) -> None:
    theirs = json.loads((families.saved(family) / "config.json").read_text())
    config = parse(theirs)
    ours = hf_config.to_raw(config, eos_ids=(2,))
    assert parse(ours) == config
    read = [CONFIG_MAPPING[config.family].from_dict(dict(raw)) for raw in (theirs, ours)]
    for name in read[0].to_dict().keys() - {"eos_token_id", "bos_token_id", "pad_token_id"}:
        if name in ("dtype", "transformers_version", "architectures", "rope_parameters"):
            continue
        values = [getattr(config, name, None) for config in read]
        if name in ("max_window_layers", "_sliding_window_pattern"):
            continue  # layer_types says it
        assert values[0] == values[1], name


BASE = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-4,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama3_rope(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "original_max_position_embeddings": 64, **LLAMA3}
    return {"rope_scaling": rope | changes}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"model_type": "llama", "rope_theta": 5e5}, {"rope_theta": 5e5, "head_dim": 6}),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_scaling": LinearRope(4.0)},
        ),
        (
            {"model_type": "llama", **llama3_rope()},
            {"rope_scaling": Llama3Rope(**LLAMA3, original_positions=64)},
        ),
        ({"model_type": "llama", "num_key_value_heads": None}, {"num_kv_heads": 4}),
        (
            {"model_type": "llama", "sliding_window": 4, "layer_types": ["full_attention"] * 6},
            {"sliding_window": None, "global_layers": ()},
        ),
        ({"model_type": "mistral"}, {"sliding_window": 4096, "global_layers": ()}),
        ({"model_type": "mistral", "sliding_window": None}, {"sliding_window": None}),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 4,
            },
            {"sliding_window": 8, "global_layers": (0, 1, 2, 3), "qkv_bias": True},
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8},
            {"sliding_window": None},
        ),
        ({"model_type": "gemma2"}, {"global_layers": (1, 3, 5), "tie_embeddings": True}),
        (
            {
                "model_type": "gemma3_text",
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e3,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window_pattern": 3,
            },
            {
                "rope_theta": 1e6,
                "local_rope_theta": 1e3,
                "rope_scaling": LinearRope(8.0),
                "global_layers": (2, 5),
            },
        ),
    ],
    ids=str,
)
def test_older_spellings_and_defaults_are_those_of_transformers(
    raw: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = parse({**BASE, **raw})
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; expected one of ['gemma2'"),
        ({"model_type": "mixtral"}, "model_type='mixtral' is not supported"),
        ({"model_type": "gemma3"}, "model_type='gemma3' is not supported; expected one of"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            "model_type='gemma3' is not supported (with a text_config; only text models are read)",
        ),
        ({"model_type": ["llama"]}, "model_type=['llama'] is not supported"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"num_local_experts": 8}, "not supported: num_local_experts=8"),
        ({"quantization_config": {"bits": 4}}, "not supported: quantization_config={'bits': 4}"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supp"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supp"),
        ({"rope_parameters": {"rope_type": "foo"}}, "rope type 'foo' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_theta": "x"}, "rope type 'default': rope_theta='x': expected a number"),
        ({"rope_theta": 0}, "rope_theta=0.0: expected a number above 0"),
        ({"rope_theta": float("inf")}, "rope type 'default': rope_theta=inf: expected a number"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "x"}},
            "rope type 'linear': factor='x': expected a number",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 0}},
            "LinearRope.factor=0.0: expected a number above 0",
        ),
        (llama3_rope(factor=[8]), "rope type 'llama3': factor=[8]: expected a number"),
        (llama3_rope(factor=0), "Llama3Rope.factor=0.0: expected a number above 0"),
        (
            llama3_rope(low_freq_factor=4.0),
            "low_freq_factor=4.0 must be above 0 and below high_freq_factor=4.0",
        ),
        (
            llama3_rope(low_freq_factor=0.0),
            "low_freq_factor=0.0 must be above 0 and below high_freq_factor=4.0",
        ),
        (
            llama3_rope(original_max_position_embeddings=0),
            "Llama3Rope.original_positions=0: expected at least 1",
        ),
        (
            {"model_type": "gemma3_text", "rope_local_base_freq": "x"},
            "rope type 'default': rope_theta='x': expected a number",
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_"),
        ({"hidden_act": "gelu"}, "not supported: hidden_act='gelu'"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias=True, mlp_bias=True"),
        ({"model_type": "qwen3", "attention_bias": True}, "not supported: attention_bias=True"),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "not supported: use_bidirectional_attention=True",
        ),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            "not supported: attn_logit_softcapping=50.0",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 6},
            "layer types ['chunked_attention'] are not supported",
        ),
        (
            {"num_hidden_layers": "two"},
            "num_hidden_layers='two': expected a whole number from 1 to 10000",
        ),
        ({"hidden_size": -1}, "transformers does not accept it"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: expected a whole number from 1 to 10000"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"vocab_size": None}, "config.json: "),
    ],
    ids=str,
)
def test_what_would_change_the_numbers_is_refused_before_any_weight_is_read(
    raw: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """There are no weights here to read."""
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama", **raw}))
    with pytest.raises(ValueError) as error:
        sources.open_model(str(tmp_path))
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/config.json: ")
    assert "\n" not in str(error.value)


def test_an_integer_too_long_for_python_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        sources.open_model(str(tmp_path))


NUMBERS = st.integers(-2, 9) | st.just(10**400) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=3)
ROPE_KEYS = ("rope_type", "rope_theta", "original_max_position_embeddings", *LLAMA3)


@given(data=st.data())
def test_any_value_is_read_or_refused_in_one_line_of_ours(data: st.DataObject) -> None:
    value = data.draw(SCALARS | st.lists(SCALARS, max_size=2))
    raw = BASE | {"model_type": data.draw(st.sampled_from(sorted(registry.FAMILIES)))}
    if data.draw(st.booleans()):
        raw |= llama3_rope(**{data.draw(st.sampled_from(ROPE_KEYS)): value})
    else:
        keys = (*raw, "rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters")
        raw[data.draw(st.sampled_from(keys))] = value
    try:
        parse(raw)
    except ValueError as error:
        assert flags._is_for_user(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"config\.json: not found"),
        ("{", r"config\.json: not valid JSON"),
        ("[" * 100_000, r"config\.json: not valid JSON"),
        ("\udcff", r"config\.json: not valid JSON"),
        ("[]", r"config\.json: expected a JSON object"),
        (
            '{"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "rms_norm_eps": 1}',
            "lacks intermediate_size, max_position_embeddings, num_attention_heads, num_hidden_la",
        ),
    ],
)
def test_an_unreadable_config_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        sources.open_model(str(tmp_path))


# Tensors


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_directory_reads_back_bit_equal(
    config: ModelConfig, param_dtype: Any, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, param_dtype=param_dtype)
    params = jax.tree.map(lambda x: x.astype(param_dtype), random_params(config))
    write_directory(config, params, tmp_path)
    source = sources.open_model(str(tmp_path), param_dtype=None)
    assert source.config == config
    assert_same_trees(source.load(), params)


def write_tensors(folder: Path, config: ModelConfig, **changes: Any) -> None:
    """Tensors of `config` with some replaced, or left out where the change is None."""
    write_directory(config, random_params(config), folder)
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    write_tensors(
        tmp_path,
        LLAMA,
        **{
            "model.norm.weight": None,
            "model.layers.1.self_attn.q_proj.bias": np.zeros(3, np.float32),
            "model.layers.0.mlp.up_proj.weight": np.zeros((24, 40), np.float32),
            "lm_head.weight": np.zeros((97, 24), np.int8),
        },
    )
    with pytest.raises(ValueError) as error:
        sources.open_model(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}: tensors do not fit config.json: missing model.norm.weight; "
        "unexpected model.layers.1.self_attn.q_proj.bias; "
        "model.layers.0.mlp.up_proj.weight has shape (24, 40), expected (40, 24); "
        "lm_head.weight has dtype I8, expected one of F32, BF16, F16"
    )


def test_buffers_and_the_copy_of_a_tied_head_are_ignored(tmp_path: Path) -> None:
    config = CONFIGS["llama-gqa"]
    junk = np.zeros(1, np.float32)
    extra = {"lm_head.weight": junk, "model.layers.0.self_attn.rotary_emb.inv_freq": junk}
    write_tensors(tmp_path, config, **extra)
    assert_same_trees(sources.open_model(str(tmp_path)).load(), random_params(config))


def test_tensors_of_unlike_dtypes_keep_theirs_until_they_are_loaded(tmp_path: Path) -> None:
    norm = np.full(24, 1 + 2**-12, np.float32)
    half = np.full((97, 24), 0.5, ml_dtypes.bfloat16)
    write_tensors(tmp_path, LLAMA, **{"model.norm.weight": norm, "lm_head.weight": half})
    weights = sources.open_model(str(tmp_path)).weights
    assert weights.arrays["head"].dtype == jnp.bfloat16
    assert weights.arrays["final_norm/scale"].dtype == jnp.float32
    assert weights.load("float32")["head"].dtype == jnp.float32
    assert weights.load("bfloat16")["final_norm"]["scale"][0] == 1


def test_weights_in_parts_are_those_that_the_index_names(tmp_path: Path) -> None:
    """Another file in the directory, a copy in another format say, is not read."""
    write_directory(LLAMA, random_params(LLAMA), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    owners = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(tensors)}
    for name in set(owners.values()):
        part = {key: tensor for key, tensor in tensors.items() if owners[key] == name}
        save_file(part, tmp_path / name)
    save_file({"odd": np.zeros(1)}, tmp_path / "consolidated.safetensors")
    index = tmp_path / hf.INDEX
    index.write_text(json.dumps({"weight_map": owners}))
    assert_same_trees(sources.open_model(str(tmp_path)).load(), random_params(LLAMA))
    outside = {key: f"../{tmp_path.name}/{name}" for key, name in owners.items()}
    index.write_text(json.dumps({"weight_map": outside}))  # the names alone count
    assert_same_trees(sources.open_model(str(tmp_path)).load(), random_params(LLAMA))
    (tmp_path / "model-0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-0\.safetensors: not a readable safetensors file"):
        sources.open_model(str(tmp_path))


def test_a_whole_model_is_read_without_the_copies_beside_it(tmp_path: Path) -> None:
    write_directory(LLAMA, random_params(LLAMA), tmp_path)
    for name in ("consolidated", "adapter_model"):
        save_file({"odd": np.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert_same_trees(sources.open_model(str(tmp_path)).load(), random_params(LLAMA))


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_directory(LLAMA, random_params(LLAMA), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({"model.norm.weight": np.zeros(24, np.float32)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError) as error:
        sources.open_model(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}: tensors do not fit config.json: "
        "model.norm.weight is in a.safetensors and b.safetensors"
    )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(text: str, tmp_path: Path) -> None:
    write_directory(LLAMA, random_params(LLAMA), tmp_path)
    (tmp_path / hf.INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: "):
        sources.open_model(str(tmp_path))


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    write_directory(LLAMA, random_params(LLAMA), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*.safetensors file"):
        sources.open_model(str(tmp_path))


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_weights_file_is_one_clear_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut anywhere, or with bytes of its header changed: an error, or a model of these shapes."""
    folder = tmp_path_factory.mktemp("damaged")
    write_directory(LLAMA, random_params(LLAMA), folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        at = data.draw(st.integers(0, 2000))
        content[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    path.write_bytes(content)
    try:
        loaded = sources.open_model(str(folder)).load()
    except ValueError as error:
        assert str(folder) in str(error)
        assert "\n" not in str(error)
    else:
        assert {path: leaf.shape for path, leaf in flat(loaded)} == expected_shapes(LLAMA)
    shutil.rmtree(folder)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (256, 256), (513, 300), (7, 600)])
def test_a_transpose_by_blocks_is_the_transpose(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).random(shape).astype(ml_dtypes.bfloat16)
    result = hf.transpose(matrix)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, matrix.T)
