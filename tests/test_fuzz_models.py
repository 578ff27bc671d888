"""Model directories, GGUF files, adapters and checkpoints with anything in them: a model, or one
line that says why not; no code is run, nobody is asked over the network, nothing huge is allocated.
"""

import functools
import json
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import families
import jax
import numpy as np
import torch
from damage import changed, edited, fuzz, json_files, read, written_into
from decoders import random_params, write_directory
from hypothesis import example, given
from hypothesis import strategies as st
from oracle_models import neox_raw, t5_raw
from test_checkpoints import restore, save, state
from test_gguf import QWEN2, SENTENCEPIECE, family_gguf

from refine_af import tokens
from refine_af.models import (
    gguf,
    gpt_neox,
    hf,
    hf_config,
    lora,
    orbax_directory,
    sources,
    t5,
    tensor_files,
)
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.config import LoraConfig
from refine_af.models.registry import PRESETS
from refine_af.models.transformer import init
from refine_af.models.weights import TreeWeights, Weights, expected_shapes

_HELD = tempfile.TemporaryDirectory()
FOLDER = Path(_HELD.name)
TINY = PRESETS["tiny"]
written = functools.partial(written_into, FOLDER)


def read_all(weights: Weights) -> None:
    for path, array in weights.arrays.items():
        assert weights.read(path, (slice(None),) * len(array.shape)).shape == array.shape


# Configs


RAW = {name: make().to_dict() for name, make in families.CONFIGS.items()}


@fuzz(3)
@given(st.sampled_from(sorted(RAW)).flatmap(lambda name: changed(RAW[name])))
def test_configs_of_decoders(raw: Any) -> None:
    path = written("config.json", json.dumps(raw).encode())

    def parse() -> Any:
        config = hf_config.parse(
            hf_config.read_json(path), str(path), dtype="float32", param_dtype="float32"
        )
        ends = hf_config.end_ids(FOLDER, hf_config.read_json(path))
        return config, ends

    found = read(parse, path)
    if found is not None:
        config, ends = found
        shapes = expected_shapes(config)
        assert all(0 < size < 2**63 for shape in shapes.values() for size in shape)
        assert len(hf.tensors(config)) < 10**6
        assert all(type(i) is int and 0 <= i < 2**31 for i in ends)
        json.dumps(hf_config.to_raw(config, eos_ids=ends), allow_nan=False)


@fuzz()
@given(json_files(RAW["llama3.1"]))
def test_files_of_configs(content: bytes) -> None:
    path = written("config.json", content)
    read(lambda: hf_config.read_json(path), path)


@fuzz()
@given(changed(neox_raw()), changed(t5_raw()))
def test_configs_of_oracles(neox: Any, encoder: Any) -> None:
    path = written("config.json", json.dumps(neox).encode())
    read(lambda: gpt_neox.from_hf_config(hf_config.read_json(path), str(path)), path)
    path.write_text(json.dumps(encoder))
    read(lambda: t5.from_hf_config(hf_config.read_json(path), str(path)), path)


# Tensors


def _directory() -> Path:
    folder = write_directory(TINY, random_params(TINY), FOLDER / "tiny")
    byte_tokenizer().save_pretrained(folder)
    return folder


DIRECTORY = _directory()
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def _safetensors() -> bytes:
    from safetensors.numpy import save

    return save(TENSORS)


SAFETENSORS = _safetensors()
HEADER = json.loads(SAFETENSORS[8 : 8 + int.from_bytes(SAFETENSORS[:8], "little")])


def with_header(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + SAFETENSORS[-32:]


def read_tensors(files: tensor_files.TensorFiles) -> None:
    for key, (shape, dtype) in files.headers.items():
        if dtype in files.dtypes:  # `TableWeights` refuses others
            assert files.read(key, (slice(None),) * len(shape)).shape == shape


@fuzz(3)
@given(edited(SAFETENSORS) | changed(HEADER).map(with_header))
def test_safetensors(content: bytes) -> None:
    path = written("safetensors/model.safetensors", content)
    read(lambda: read_tensors(tensor_files.open_safetensors(path.parent)), path)


INDEX = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
HOSTILE_NAMES = ["../secret.safetensors", "/etc/passwd", "..", ".", "", "x/../../y", "a\0b", "~"]


@fuzz()
@given(
    json_files(INDEX)
    | st.sampled_from(HOSTILE_NAMES).map(
        lambda name: json.dumps({"weight_map": {"a": name}}).encode()
    )
)
def test_indices_of_weights(content: bytes) -> None:
    """None of them reads a file outside its directory."""
    path = written(f"indexed/{tensor_files.INDEX}", content)
    written("indexed/one.safetensors", SAFETENSORS)
    written("secret.safetensors", SAFETENSORS)
    files = read(lambda: tensor_files.open_safetensors(path.parent), path.parent)
    if files is not None:
        assert {file.parent for file in files._owner.values()} <= {path.parent}


def _torch_file(zipped: bool) -> bytes:
    path = FOLDER / "torch.bin"
    tensors = {key: torch.from_numpy(array) for key, array in TENSORS.items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


# Opcodes that import and call: what a hostile pickle is made of.
CALLS = [b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"csubprocess\nPopen\n"]
PICKLES = st.lists(
    st.sampled_from(
        [
            *CALLS,
            b"(",
            b")",
            b"t",
            b"R",
            b"b",
            b"o",
            b"i",
            b"}",
            b"]",
            b"s",
            b"u",
            b"e",
            b"V" + b"echo\n",
            b"K\x05",
            b"J\xff\xff\xff\x7f",
            b"Q",
            b"h\x00",
            b"q\x00",
            b"\x85",
            b"\x81",
            b"\x92",
            b"\x93",
            b"\x8c\x02os",
            b"\x8c\x06system",
            b".",
        ]
    ),
    max_size=24,
).map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")


@fuzz(2)
@given(edited(_torch_file(True)) | edited(_torch_file(False)) | PICKLES)
@example(pickle.dumps({"a": 1}))
def test_torch_files(content: bytes) -> None:
    path = written("torch/pytorch_model.bin", content)
    read(lambda: read_tensors(tensor_files.TorchFiles([path])), path)


# Whole directories


FILES = {
    path.name: path.read_bytes() for path in DIRECTORY.iterdir() if path.suffix != ".safetensors"
}
TEMPLATE = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
TEMPLATES = [
    TEMPLATE,
    "{{",
    "{{ x.y.z }}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
]
TEMPLATES += ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include '/etc/passwd' %}"]
TEMPLATES += ["{{ 'a' + 1 }}"]


def open_and_use(folder: Path) -> None:
    source = sources.open_model(str(folder))
    if source.tokenizer is not None:
        for form in ("raw", "chat"):
            if form == "raw" or source.tokenizer.chat_template:
                ids = tokens.encode_prompt(source.tokenizer, "Hi, <b>!", form)
                assert all(type(i) is int for i in ids)
                tokens.decode(source.tokenizer, ids)


@fuzz()
@given(st.data())
def test_model_directories(data: st.DataObject) -> None:
    folder = FOLDER / "damaged"
    shutil.copytree(DIRECTORY, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(sorted(FILES)))
    content = FILES[name]
    (folder / name).write_bytes(data.draw(json_files(json.loads(content)) | edited(content)))
    template = folder / "chat_template.jinja"
    template.unlink(missing_ok=True)
    if data.draw(st.booleans()):
        template.write_text(data.draw(st.sampled_from(TEMPLATES)))
    read(lambda: open_and_use(folder), folder)


ADAPTER = FOLDER / "adapter"
SHAPE = LoraConfig(rank=2, alpha=4.0, pattern="q|v")
lora.write_peft(
    jax.tree.map(np.asarray, init(TINY, SHAPE, key=jax.random.key(0))[1]),
    SHAPE,
    TINY,
    ADAPTER,
    "tiny",
)
ADAPTER_CONFIG = json.loads((ADAPTER / "adapter_config.json").read_text())
ADAPTER_WEIGHTS = (ADAPTER / "adapter_model.safetensors").read_bytes()


@fuzz()
@given(json_files(ADAPTER_CONFIG), st.just(ADAPTER_WEIGHTS) | edited(ADAPTER_WEIGHTS))
def test_adapters(config: bytes, weights: bytes) -> None:
    (ADAPTER / "adapter_config.json").write_bytes(config)
    (ADAPTER / "adapter_model.safetensors").write_bytes(weights)
    found = read(lambda: lora.read_peft(ADAPTER, TINY), ADAPTER)
    if found is not None:
        assert np.isfinite(found[0].scale)


# GGUF


GGUF = [
    Path(family_gguf(name, FOLDER / f"{name}.gguf", **fields)).read_bytes()
    for name, fields in (("llama3", QWEN2), ("smollm2", SENTENCEPIECE))
]


def _headers(content: bytes) -> int:
    """Where the tensors begin, roughly: damage to them changes numbers only."""
    return max(content.find(b"blk.2.ffn_down") + 64, 256)


@fuzz(2)
@given(
    st.sampled_from(GGUF).flatmap(
        lambda content: (
            edited(content[:400]).map(lambda head: head + content[400:])
            | edited(content[: _headers(content)]).map(
                lambda head: head + content[_headers(content) :]
            )
            | edited(content)
        )
    )
)
def test_gguf(content: bytes) -> None:
    path = written("damaged.gguf", content)

    def use() -> None:
        reader = gguf.open_file(path)
        config = gguf.read_config(reader, dtype="float32", param_dtype="float32")
        tokenizer = gguf.read_tokenizer(reader)
        assert all(0 <= i < 2**31 for i in gguf.end_ids(reader))
        if tokenizer is not None:
            ids = tokens.encode_prompt(tokenizer, "Hi, <b>!", "raw")
            tokens.decode(tokenizer, ids)
        read_all(gguf.GgufWeights(reader, config))

    read(use, path)


# Orbax


def _orbax() -> Path:
    orbax_directory.write(TreeWeights(random_params(TINY)), FOLDER / "orbax")
    return FOLDER / "orbax"


ORBAX = _orbax()
ORBAX_FILES = sorted(path for path in ORBAX.rglob("*") if path.is_file())


@fuzz(0.15)
@given(st.data())
def test_orbax_directories(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(ORBAX_FILES))
    whole = path.read_bytes()
    path.write_bytes(data.draw(edited(whole)))
    try:
        read(lambda: read_all(orbax_directory.OrbaxWeights(ORBAX, TINY)), ORBAX)
    finally:
        path.write_bytes(whole)


CHECKPOINTS = FOLDER / "checkpoints"
save(CHECKPOINTS, 3)
CHECKPOINT_FILES = sorted(path for path in (CHECKPOINTS / "3").rglob("*") if path.is_file())
LIKE = jax.tree.map(np.zeros_like, state())


@fuzz(0.1)
@given(st.data())
def test_checkpoints(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(CHECKPOINT_FILES))
    whole = path.read_bytes()
    path.write_bytes(data.draw(edited(whole)))
    try:
        read(lambda: restore(CHECKPOINTS, LIKE), CHECKPOINTS)
    finally:
        path.write_bytes(whole)
