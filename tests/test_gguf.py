"""GGUF files as llama.cpp writes them: weights, config and tokenizer; and what is refused."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import families
import gguf as gguf_lib
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import random_params, write_directory
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from refine_af.models import convert, gguf, hf, sources, transformer
from refine_af.models.config import LinearRope, ModelConfig
from refine_af.models.registry import PRESETS
from refine_af.models.weights import Weights, flat

Fields = dict[str, Any]
# Blocks hold up to 256 numbers of a row.
WIDE = dataclasses.replace(
    PRESETS["tiny"], embed_dim=256, hidden_dim=512, head_dim=64, vocab_size=40, tie_embeddings=False
)


def llama_cpp_permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """`permute` of llama.cpp's conversion/llama.py."""
    split = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def their_tensors(config: ModelConfig, stored: dict[str, np.ndarray]) -> Fields:
    """Tensors of Hugging Face by llama.cpp's names, permuted where it does so."""
    (arch,) = (a for a, name in gguf_lib.MODEL_ARCH_NAMES.items() if name == config.family)
    names, named = gguf_lib.get_tensor_name_map(arch, config.num_layers), {}
    for key, array in stored.items():
        if config.family == "llama" and ".q_proj." in key:
            array = llama_cpp_permute(array, config.num_heads)
        if config.family == "llama" and ".k_proj." in key:
            array = llama_cpp_permute(array, config.num_kv_heads)
        named[names.get_name(key, (".weight", ".bias"))] = array
    return named


def write_gguf(path: Path, config: ModelConfig, named: Fields, **fields: Any) -> str:
    """A file of arrays or (bytes, kind), and of fields beside the usual; None leaves one out."""
    usual = {
        "embedding_length": config.embed_dim,
        "feed_forward_length": config.hidden_dim,
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    arch = fields.pop("general.architecture", config.family)
    writer = gguf_lib.GGUFWriter(path, arch)
    for name, value in (usual | fields).items():
        if value is not None:
            name = name if name.startswith("tokenizer.") else f"{arch}.{name}"
            writer.add_key_value(name, value, gguf_lib.GGUFValueType.get_type(value))
    for name, tensor in named.items():
        if tensor is not None:
            data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def family_gguf(name: str, path: Path, named: Fields | None = None, **fields: Any) -> str:
    """The model of `families.saved(name)` with other tensors or fields."""
    config = sources.open_model(str(families.saved(name))).config
    stored = load_file(families.saved(name) / "model.safetensors")
    return write_gguf(path, config, their_tensors(config, stored) | (named or {}), **fields)


def random_tensors(config: ModelConfig, folder: Path) -> Fields:
    write_directory(config, random_params(config), folder)
    return their_tensors(config, load_file(folder / "model.safetensors"))


def assert_same_model(ours: sources.Source, theirs: sources.Source) -> None:
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.load(), theirs.load())


def ggml(**fields: Any) -> Fields:
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_LEVEL = ggml(
    model="gpt2",
    tokens=["<bos>", "<eos>", "<think>", *ALPHABET, "(h", "he", "12", "123", "xyz"],
    token_type=[3, 3, 4, *[1] * 261],  # control, control, user-defined, normal
    merges=["( h", "h e", "1 2", "12 3"],
    bos_token_id=0,
    eos_token_id=1,
)
QWEN2 = BYTE_LEVEL | ggml(pre="qwen2")
SCORES = {"he": -5.0, "el": -1.0, "\u2581h": -2.0, "ell": -3.0}
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SENTENCEPIECE = ggml(
    model="llama",
    tokens=["<unk>", "<s>", "</s>", *BYTES, *"\u2581helo", *SCORES],
    token_type=[2, 3, 3, *[6] * 256, *[1] * 9],  # unknown, control, control, byte, normal
    scores=[*[0.0] * 264, *SCORES.values()],
    unknown_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
BARE = SENTENCEPIECE | ggml(add_bos_token=False, add_eos_token=True, add_space_prefix=False)


def test_unpermute_undoes_what_llama_cpp_does() -> None:
    """Two heads of four rows, worked by hand, and three of six."""
    assert llama_cpp_permute(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert gguf._unpermute(np.asarray([0, 2, 1, 3, 4, 6, 5, 7]), 2).tolist() == list(range(8))
    rows = np.arange(36).reshape(18, 2)
    np.testing.assert_array_equal(gguf._unpermute(llama_cpp_permute(rows, 3), 3), rows)


LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}


@functools.partial(jax.jit, static_argnums=0)
def logits(definition: transformer.Definition, params: Any) -> jax.Array:
    decoder = transformer.bind(definition, params)
    hidden, _ = decoder(jnp.asarray([[5, 17, 3, 88, 42]]), jnp.zeros(1, jnp.int32))
    return decoder.logits(hidden)


@pytest.mark.parametrize("name", ["llama3", "smollm2", "llama-linear-rope", "qwen2.5", "qwen3"])
def test_a_file_is_the_model_of_the_directory(name: str, tmp_path: Path) -> None:
    """SmolLM2 has tied its head; Qwen is not permuted, and has biases or norms of q and k."""
    fields = LINEAR if name == "llama-linear-rope" else {"rope.scaling.factor": 1.0}
    file = sources.open_model(family_gguf(name, tmp_path / "model.gguf", **fields))
    directory = sources.open_model(str(families.saved(name)))
    assert_same_model(file, directory)
    assert (file.tokenizer, file.eos_ids) == (None, ())
    ours, theirs = (logits(transformer.define(s.config), s.load()) for s in (file, directory))
    assert jnp.abs(theirs).max() > 1
    np.testing.assert_array_equal(ours, theirs)


# Largest error of numbers up to 1: half a step, a whole one where Q4_0 saturates.
TOLERANCE = {"F32": 0, "F16": 2**-12, "BF16": 2**-9, "Q8_0": 1 / 250, "Q4_0": 1 / 8, "Q4_1": 1 / 15}


@pytest.mark.parametrize("kind", TOLERANCE)
def test_what_gguf_quantised_is_read_to_its_precision(kind: str, tmp_path: Path) -> None:
    named = {
        name: (gguf_lib.quantize(array, Kind[kind]), Kind[kind]) if array.ndim == 2 else array
        for name, array in random_tensors(WIDE, tmp_path).items()
    }
    source = sources.open_model(write_gguf(tmp_path / "model.gguf", WIDE, named))
    for path, array in flat(random_params(WIDE)):
        actual = source.weights.read(path, (slice(None),) * array.ndim)
        np.testing.assert_allclose(actual, array, atol=TOLERANCE[kind], rtol=0, err_msg=path)


# Our path, their name, their shape, kind, where in a block the scales lie.
BLOCKS = [
    ("embedding", "token_embd", (40, 256), Kind.Q4_K, slice(0, 4)),
    ("head", "output", (40, 256), Kind.Q6_K, slice(208, 210)),
    ("layers/attention/q/kernel", "blk.0.attn_q", (256, 256), Kind.Q4_K, slice(0, 4)),
    ("layers/attention/k/kernel", "blk.0.attn_k", (128, 256), Kind.Q6_K, slice(208, 210)),
    ("layers/feed_forward/down/kernel", "blk.0.ffn_down", (256, 512), Kind.Q8_0, slice(0, 2)),
]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, dict[str, np.ndarray]]:
    """Weights of random blocks with small scales, and those dequantised by `gguf`, by our path."""
    folder, rng = tmp_path_factory.mktemp("blocks"), np.random.default_rng(0)
    named, values = random_tensors(WIDE, folder), {}
    for path, name, (rows, columns), kind, scales in BLOCKS:
        length, size = gguf_lib.GGML_QUANT_SIZES[kind]
        stored = rng.integers(0, 256, (rows, columns // length, size), np.uint8)
        small = rng.uniform(1e-4, 1e-3, stored[..., scales][..., ::2].shape)
        stored[..., scales] = small.astype(np.float16).view(np.uint8)
        named[f"{name}.weight"] = stored.reshape(rows, -1), kind
        values[path] = gguf_lib.dequantize(stored.reshape(rows, -1), kind)
    return sources.open_model(write_gguf(folder / "model.gguf", WIDE, named)).weights, values


@given(data=st.data())
@pytest.mark.parametrize("path", [block[0] for block in BLOCKS])
def test_a_part_is_what_gguf_dequantises(path: str, data: st.DataObject, blocks: Any) -> None:
    """In several steps of few rows."""
    weights, values = blocks
    rows, columns = weights.arrays[path].shape[-2:]
    ends = [st.sets(st.integers(0, size), min_size=2, max_size=2) for size in (rows, columns)]
    index = tuple(slice(min(cut), max(cut)) for cut in map(data.draw, ends))
    expected = values[path]
    if "attention" in path:  # two halves of each head, from pairs
        expected = expected.reshape(-1, 32, 2, rows).swapaxes(1, 2).reshape(columns, rows)
    expected = expected if path == "embedding" else expected.T
    assert expected.std() > 0.005
    layer = [slice(1)] if path.startswith("layers") else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "_CHUNK", 5000)
        part = weights.read(path, (*layer, *index))
        everything = weights.read(path, (*layer, slice(None), slice(None)))
    np.testing.assert_array_equal(part.reshape(part.shape[-2:]), expected[index])
    np.testing.assert_array_equal(everything.reshape(rows, columns), expected)


@pytest.mark.parametrize("path", ["embedding", "head"])
def test_a_part_takes_the_memory_of_a_part(path: str, tmp_path: Path) -> None:
    config = dataclasses.replace(WIDE, vocab_size=1 << 17)  # 128 MiB in float32
    keys = hf.tensors(config).items()
    named = their_tensors(config, {k: np.zeros(t.shape, np.float32) for k, t in keys})
    rows = (np.zeros((config.vocab_size, 256 // 32 * 34), np.uint8), Kind.Q8_0)
    named |= {"token_embd.weight": rows, "output.weight": rows}
    weights = sources.open_model(write_gguf(tmp_path / "model.gguf", config, named)).weights
    size = weights.arrays[path].shape[0]
    tracemalloc.start()
    part = weights.read(path, (slice(size // 2, size // 2 + size // 32), slice(None)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.nbytes == 1 << 22 > peak // 8


def test_all_tensors_that_do_not_fit_are_named_at_once(tmp_path: Path) -> None:
    wrong = {
        "output_norm.weight": None,
        "blk.0.ffn_up.weight": np.zeros((24, 40), np.float32),
        **dict.fromkeys([f"blk.{i}.attn_q.bias" for i in (2, 1, 0)], np.zeros(3, np.float32)),
        **dict.fromkeys([f"blk.{i}.attn_v.weight" for i in (2, 1)], np.zeros((16, 24), np.int8)),
    }
    file = family_gguf("llama3", tmp_path / "model.gguf", wrong)
    with pytest.raises(ValueError, match=r"\A.*model\.gguf: tensors do not fit") as error:
        sources.open_model(file)
    assert str(error.value).endswith(
        ": missing output_norm.weight; unexpected blk.0.attn_q.bias; "
        "unexpected blk.1.attn_q.bias; unexpected blk.2.attn_q.bias; "
        "blk.0.ffn_up.weight has shape (24, 40), expected (40, 24); "
        "blk.1.attn_v.weight is of type I8, which gguf does not dequantise; "
        "blk.2.attn_v.weight is of type I8, which gguf does not dequantise"
    )


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"rope.freq_base": None}, "rope_theta", 1e4),
        ({"attention.key_length": None, "rope.dimension_count": None}, "head_dim", 6),
        ({"attention.head_count_kv": None}, "num_kv_heads", 4),
        (LINEAR | {"rope.scaling.type": None}, "rope_scaling", LinearRope(4.0)),
        ({"rope.scale_linear": 2.1}, "rope_scaling", LinearRope(2.1)),
        (LINEAR | {"rope.scaling.type": "none"}, "rope_scaling", None),
    ],
)
def test_absent_fields_mean_what_they_mean_to_llama_cpp(
    fields: Fields, name: str, expected: Any, tmp_path: Path
) -> None:
    file = family_gguf("llama3", tmp_path / "model.gguf", **fields)
    config = gguf.read_config(gguf.open_file(Path(file)), dtype="float32", param_dtype="float32")
    assert getattr(config, name) == expected


@pytest.mark.parametrize("preset", ["llama3.1-8b", "llama3.2-1b"])
def test_llama3_scaling_is_recognised_by_its_factors(preset: str, tmp_path: Path) -> None:
    """Factors as `generate_extra_tensors` of llama.cpp's conversion/llama.py has them."""
    rope = PRESETS[preset].rope_scaling
    config = dataclasses.replace(WIDE, rope_theta=5e5, rope_scaling=rope)
    turns = [8192 / (2 * math.pi * 5e5 ** (i / 64)) for i in range(0, 64, 2)]
    smooth = [min(max((t - 1) / (4 - 1), 0), 1) for t in turns]
    factors = np.asarray([1 / ((1 - s) / rope.factor + s) for s in smooth], np.float32)
    named = random_tensors(config, tmp_path) | {"rope_freqs.weight": factors}
    assert sources.open_model(write_gguf(tmp_path / "m.gguf", config, named)).config == config


FACTORS = np.asarray([1, 1, 2, 8], np.float32)


@pytest.mark.parametrize(
    ("fields", "factors", "message"),
    [
        ({"general.architecture": "falcon"}, None, "'falcon' is not supported; expected one of"),
        ({"block_count": None}, None, "no field 'llama.block_count'"),
        ({"attention.head_count": [4, 4, 4]}, None, "head_count' is list, expected int"),
        ({"expert_count": 8}, None, "expert_count=8 is not supported"),
        ({"attention.sliding_window": 9}, None, "sliding_window=9 is not supported"),
        ({"rope.dimension_count": 4}, None, "dimension_count=4 is not supported; expected"),
        (LINEAR | {"rope.scaling.type": "yarn"}, None, "rope scaling 'yarn' is not supported"),
        ({}, FACTORS, "rope_freqs.weight does not hold the scaling of LLaMA-3"),
        ({}, FACTORS[1:], r"is F32 of shape \(3,\), expected F32 of shape \(4,\)"),
        ({}, FACTORS.astype(np.float16), "is F16 of shape"),
        (LINEAR, FACTORS, "rope_freqs.weight and linear scaling exclude each other"),
        (BYTE_LEVEL, None, "tokenizer 'gpt2' with pre-tokenizer '' is not supported; expected"),
        (BYTE_LEVEL | ggml(pre="tekken"), None, "pre-tokenizer 'tekken' is not supported"),
        (BYTE_LEVEL | ggml(model="bert"), None, "tokenizer 'bert' .*is not supported"),
        (QWEN2 | ggml(merges=["no token"]), None, "the tokenizer cannot be read .*`no` out of voc"),
        (QWEN2 | ggml(token_type=[1]), None, "the tokenizer cannot be read"),
    ],
)
def test_what_would_give_other_numbers_or_tokens_is_refused_by_name(
    fields: Fields, factors: Any, message: str, tmp_path: Path
) -> None:
    file = family_gguf("llama3", tmp_path / "m.gguf", {"rope_freqs.weight": factors}, **fields)
    with pytest.raises(ValueError, match=rf"\A.*m\.gguf: .*{message}.*\Z"):  # . is not a new line
        sources.open_model(file)


# Tokenizers


TEXT, HELLO = "xyz(he 1234<eos>e\u0301<think>", "hello \u00e9</s>he"
# Words are cut in three ways; only Qwen makes one letter of e and its accent.
TOKENIZERS = {
    "smollm": (BYTE_LEVEL, TEXT, "x y z ( he Ġ 1 2 3 4 <eos> e Ì ģ <think>"),
    "llama-bpe": (BYTE_LEVEL, TEXT, "<bos> xyz (h e Ġ 123 4 <eos> e Ì ģ <think>"),
    "qwen2": (BYTE_LEVEL, TEXT, "x y z (h e Ġ 1 2 3 4 <eos> Ã © <think>"),
    "default": (SENTENCEPIECE, HELLO, "<s> ▁h ell o ▁ <0xC3> <0xA9> </s> ▁h e"),
    "bare": (BARE, HELLO, "h ell o ▁ <0xC3> <0xA9> </s> he </s>"),
}


def tokenizer_gguf(folder: Path, pre: str, fields: Fields) -> str:
    config = dataclasses.replace(WIDE, vocab_size=300)
    named, fields = random_tensors(config, folder), ggml(pre=pre) | fields
    return write_gguf(folder / f"{pre}.gguf", config, named, **fields)


def test_the_end_of_a_turn_ends_an_answer(tmp_path: Path) -> None:
    fields = BYTE_LEVEL | ggml(eot_token_id=2, eom_token_id=1)
    source = sources.open_model(tokenizer_gguf(tmp_path, "llama-bpe", fields))
    convert.convert(source, tmp_path / "orbax")
    assert sources.open_model(str(tmp_path / "orbax")).eos_ids == source.eos_ids == (1, 2)


@pytest.mark.parametrize("pre", TOKENIZERS)
def test_a_file_and_its_conversion_have_the_tokenizer(pre: str, tmp_path: Path) -> None:
    fields, text, pieces = TOKENIZERS[pre]
    source = sources.open_model(tokenizer_gguf(tmp_path, pre, fields))
    convert.convert(source, tmp_path / "orbax")
    converted = sources.open_model(str(tmp_path / "orbax"))
    assert_same_model(converted, source)
    assert converted.eos_ids == source.eos_ids == (fields["tokenizer.ggml.eos_token_id"],)
    for tokenizer in (source.tokenizer, converted.tokenizer):
        assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == pieces.split()
        ids = tokenizer(" he  (12)\n xyz").input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == " he  (12)\n xyz"


def test_tokenizers_need_no_torch(tmp_path: Path) -> None:
    files = [tokenizer_gguf(tmp_path, pre, fields) for pre, (fields, _, _) in TOKENIZERS.items()]
    code = """
import json, sys; sys.modules["torch"] = None
from refine_af.models import sources
print(json.dumps([sources.open_model(file).tokenizer("he 123").input_ids for file in sys.argv[1:]]))
"""
    run = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, check=True)
    ids = [sources.open_model(file).tokenizer("he 123").input_ids for file in files]
    assert json.loads(run.stdout) == ids


# Damage


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(family_gguf("llama3", tmp_path_factory.mktemp("whole") / "model.gguf", **QWEN2))


@given(data=st.data())
def test_a_file_cut_anywhere_is_refused_in_one_line(data: st.DataObject, file: Path) -> None:
    content, cut = file.read_bytes(), file.with_name("cut.gguf")
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"\A.*cut\.gguf: not a readable GGUF file .*\Z"):
        sources.open_model(str(cut))


def test_convert_refuses_a_damaged_file_in_one_line(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-1])
    (tmp_path / "magic.gguf").write_bytes(b"GGML" + file.read_bytes()[4:])
    command = [sys.executable, "-m", "refine_af.launch.convert", f"--target={tmp_path / 'target'}"]
    runs = {
        file: subprocess.Popen([*command, f"--source={file}"], stderr=subprocess.PIPE, text=True)
        for file in tmp_path.iterdir()
    }
    for file, run in runs.items():
        (error, end) = run.communicate()[1].split("\n")
        assert (run.returncode, end) == (2, "")
        assert error.startswith(f"error: {file}: not a readable GGUF file")
    assert not list(tmp_path.glob("target*"))
