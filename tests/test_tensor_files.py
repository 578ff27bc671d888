"""Weights of the oracles in every form that they are published in, and files that are refused."""

import builtins
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle_models import (
    neox_raw,
    neox_tensors,
    reward_model,
    save,
    t5_model,
    t5_raw,
    t5_tensors,
)

from refine_af.models import gpt_neox, t5
from refine_af.models.hf import TableWeights
from refine_af.models.weights import flat

FORMS = [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)]
KEY = "gpt_neox.final_layer_norm.bias"


def tensors_of(kind: str, tied: bool = False) -> dict[str, torch.Tensor]:
    return neox_tensors(reward_model()) if kind == "neox" else t5_tensors(t5_model(tied=tied))


def open_as(kind: str, folder: Path) -> TableWeights:
    if kind == "neox":
        return gpt_neox.open_weights(folder, gpt_neox.from_hf_config(neox_raw()))
    return t5.open_weights(folder, t5.from_hf_config(t5_raw()))


def error_of(folder: Path, kind: str = "neox") -> str:
    with pytest.raises(ValueError) as error:
        open_as(kind, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["neox", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_forms_load_bit_equal(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in tensors_of(kind).items()
    }
    name: Any = str(dtype).removeprefix("torch.")
    trees = []
    for form, parts in FORMS:
        folder = save(tmp_path / f"{form}{parts}", tensors, {}, form, parts)
        weights = open_as(kind, folder)
        assert {array.dtype.name for array in weights.arrays.values()} == {name}
        trees.append(dict(flat(weights.load(name))))
    for tree in trees:
        for path, array in tree.items():
            assert array.dtype == jnp.dtype(name)
            np.testing.assert_array_equal(array, trees[0][path], err_msg=path)
    embedding = {"neox": "gpt_neox.embed_in.weight", "t5": "shared.weight"}[kind]
    np.testing.assert_array_equal(
        trees[0]["embedding"].astype(jnp.float32), tensors[embedding].float().numpy()
    )


def test_files_of_torch_before_1_6(tmp_path: Path) -> None:
    save(tmp_path / "zip", tensors_of("neox"), {}, "bin")
    save(tmp_path / "old", {}, {}, "bin")
    torch.save(
        tensors_of("neox"),
        tmp_path / "old" / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    first, second = (
        dict(flat(open_as("neox", tmp_path / d).load("float32"))) for d in ("zip", "old")
    )
    for path, array in first.items():
        np.testing.assert_array_equal(array, second[path])


def test_safetensors_come_before_torch_files(tmp_path: Path) -> None:
    save(tmp_path, tensors_of("neox"), {})
    (tmp_path / "pytorch_model.bin").write_bytes(b"junk")
    open_as("neox", tmp_path)


def test_a_part_reads_no_more_than_itself(tmp_path: Path) -> None:
    tensors = tensors_of("neox")
    weights = open_as("neox", save(tmp_path, tensors, {}, "bin", 3))
    index = (slice(1, 2), slice(3, 9), slice(10, 40))
    kernel = tensors["gpt_neox.layers.1.attention.query_key_value.weight"].numpy().T
    piece = weights.read("layers/qkv/kernel", index)
    np.testing.assert_array_equal(piece, kernel[None, 3:9, 10:40])


# What is wrong with the tensors


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_all_that_is_wrong_is_named_at_once(form: str, tmp_path: Path) -> None:
    tensors = tensors_of("neox")
    del tensors["out_proj.bias"]
    tensors["value_head.weight"] = torch.zeros(2)
    tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"] = torch.zeros(64, 48)
    tensors[KEY] = torch.zeros(64, dtype=torch.int8)
    names = {"safetensors": ("I8", "F32, BF16, F16"), "bin": ("int8", "float32, bfloat16, float16")}
    dtype, known = names[form]
    assert error_of(save(tmp_path, tensors, {}, form)) == (
        f"{tmp_path}: tensors do not fit config.json: missing out_proj.bias; "
        "unexpected value_head.weight; gpt_neox.layers.1.mlp.dense_h_to_4h.weight has shape "
        f"(64, 48), expected (48, 64); {KEY} has dtype {dtype}, expected one of {known}"
    )


def test_dropped_keys_of_t5_are_these_alone(tmp_path: Path) -> None:
    extra = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors = tensors_of("t5") | {extra: torch.zeros(8, 4)}
    files = open_as("t5", save(tmp_path / "a", tensors, {}, "bin"))
    read = set(files.table)
    blocks = [f"decoder.block.{i}.layer.0.SelfAttention" for i in range(3)]
    assert tensors.keys() - read == {
        extra,
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        *(f"{block}.{name}.weight" for block in blocks for name in "qk"),
        f"{blocks[0]}.relative_attention_bias.weight",
    }
    odd = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    folder = save(tmp_path / "b", tensors | {odd: torch.zeros(8, 4)}, {}, "bin")
    assert error_of(folder, "t5").endswith(f": unexpected {odd}")


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    tensors = tensors_of("t5")
    del tensors["lm_head.weight"]
    assert error_of(save(tmp_path, tensors, {}, "bin"), "t5") == (
        f"{tmp_path}: tensors do not fit config.json: missing lm_head.weight"
    )


def test_a_tensor_in_two_parts_and_one_that_is_none(tmp_path: Path) -> None:
    save(tmp_path, tensors_of("neox"), {}, "bin", 2)
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for name, extra in zip(names, ({}, {"epoch": 3}), strict=True):
        state = torch.load(tmp_path / name)
        torch.save(state | {KEY: torch.zeros(64)} | extra, tmp_path / name)
    assert error_of(tmp_path) == (
        f"{tmp_path}: tensors do not fit config.json: {KEY} is in {names[0]} and {names[1]}; "
        "epoch is of type int"
    )


# Files that are no tensors


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def _as_torch(state: Any, file: Path) -> None:
    torch.save(state, file)


def _as_pickle(state: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(state, protocol=2))


@pytest.mark.parametrize("write", [_as_torch, _as_pickle])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    write: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    target, file = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    write(tensors_of("neox") | {"extra": Malicious(target)}, file)
    message = error_of(tmp_path)
    assert message.startswith(
        f"{file}: refused, nothing of it was run: it is damaged or holds more than tensors ("
    )
    assert not target.exists()
    if write is _as_pickle:  # the trap is a real one
        pickle.loads(file.read_bytes())
        assert target.exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_a_damaged_file_is_one_clear_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert error_of(tmp_path).startswith(f"{tmp_path}/pytorch_model.bin: ")


def test_a_file_cut_short_is_one_clear_line(tmp_path: Path) -> None:
    file = save(tmp_path, tensors_of("neox"), {}, "bin") / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    assert error_of(tmp_path).startswith(f"{file}: ")


@pytest.mark.parametrize(("state", "kind"), [([1], "list"), ({1: 2}, "dict")])
def test_something_else_than_a_state_dict_is_refused(state: Any, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(state, file)
    assert error_of(tmp_path) == f"{file}: holds a {kind}, expected tensors by name"


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    save(tmp_path, tensors_of("neox"), {}, "bin", 2)
    file = tmp_path / "pytorch_model-00002-of-00002.bin"
    file.unlink()
    assert error_of(tmp_path).startswith(f"{file}: not a readable torch file (")


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    save(tmp_path, tensors_of("neox"), {}, "bin", 2)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": 3}')
    assert error_of(tmp_path) == f"{index}: expected a 'weight_map' of tensors to files"


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    assert error_of(tmp_path) == (
        f"{tmp_path}: neither *.safetensors nor pytorch_model.bin; "
        "expected a Hugging Face directory"
    )


def test_without_torch_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, tensors_of("neox"), {}, "bin")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(builtins, "__import__", without)
    assert error_of(tmp_path) == (
        f"{tmp_path}/pytorch_model.bin: reading torch's format needs torch 2.6 or later, "
        'found none: pip install -e ".[oracles]"; or convert the file to safetensors elsewhere'
    )


def test_a_torch_that_could_be_made_to_run_code_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, tensors_of("neox"), {}, "bin")
    monkeypatch.setattr("torch.__version__", "2.5.1+cpu")
    assert "needs torch 2.6 or later, found 2.5.1+cpu: pip install" in error_of(tmp_path)
