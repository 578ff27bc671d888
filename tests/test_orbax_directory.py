"""Orbax directories of models that are damaged, or another model's."""

import json
import shutil
from pathlib import Path

import families
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from refine_af.models import convert, sources


@pytest.mark.parametrize("part", ["manifest.ocdbt", "_METADATA", "d/*"])
@pytest.mark.parametrize("fault", ["cut", "flipped", "gone"])
def test_a_damaged_orbax_directory_is_named(part: str, fault: str, tmp_path: Path) -> None:
    convert.convert(sources.open_model(str(families.saved("llama2"))), tmp_path / "orbax")
    for file in (tmp_path / "orbax/params").glob(part):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "gone":
            file.unlink()
    with pytest.raises(ValueError, match=r"orbax/params: .*(damaged|not a readable)") as error:
        sources.open_model(str(tmp_path / "orbax")).load()
    assert "\n" not in str(error.value)


def test_an_orbax_directory_of_another_model_is_refused(tmp_path: Path) -> None:
    """All that is wrong with it, at once."""
    convert.convert(sources.open_model(str(families.saved("llama2"))), tmp_path / "orbax")
    path = tmp_path / "orbax/config.json"
    raw = json.loads(path.read_text()) | {"tie_word_embeddings": True, "intermediate_size": 8}
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError) as error:
        sources.open_model(str(tmp_path / "orbax"))
    assert "unexpected head" in str(error.value)
    assert "gate/kernel has shape (3, 24, 40), expected (3, 24, 8)" in str(error.value)


def test_no_flipped_bit_of_a_weight_is_taken(tmp_path: Path) -> None:
    """Weights are not compressed: without a checksum any bits would be read."""
    source = sources.open_model(str(families.saved("llama2")))
    convert.convert(source, tmp_path / "orbax")
    sound = source.load()
    file = max((tmp_path / "orbax/params").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = file.read_bytes()
    found = 0
    for position in np.random.default_rng(0).integers(len(data), size=12):
        damaged = bytearray(data)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        try:
            loaded = sources.open_model(str(tmp_path / "orbax")).load()
        except ValueError:
            found += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, loaded, sound)
    assert found >= 9  # flips of bytes that nothing reads change nothing


def test_compressed_weights_are_read_too(tmp_path: Path) -> None:
    """As Orbax writes by itself, and as directories were written before they had checksums."""
    source = sources.open_model(str(families.saved("llama2")))
    convert.convert(source, tmp_path / "orbax")
    params = tmp_path / "orbax/params"
    shutil.rmtree(params)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
        checkpointer.save(params, args=ocp.args.PyTreeSave(source.load()))
    jax.tree.map(
        np.testing.assert_array_equal,
        sources.open_model(str(tmp_path / "orbax")).load(),
        source.load(),
    )
