"""Weights that lie somewhere: what does not fit, how much is in memory, who reads what."""

import dataclasses
import os
import random
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from decoders import LLAMA, MISTRAL, random_params, write_directory

from refine_af.config import Mesh
from refine_af.mesh import make_mesh, param_shardings
from refine_af.models import convert, sources
from refine_af.models.hf import HfWeights
from refine_af.models.weights import Index, TreeWeights, flat, get, refuse


def test_eight_faults_of_each_kind_are_named_and_the_others_counted() -> None:
    faults = [f"unexpected u{i}" for i in range(9)] + ["m has shape (1,), expected (2,)"]
    faults += [f"missing m{i:02}" for i in range(20)] + [f"d{i} has dtype I8" for i in range(8)]
    names = [[f"missing m{i:02}" for i in range(8)], [f"unexpected u{i}" for i in range(8)]]
    expected = (
        f"here: tensors do not fit config.json: {'; '.join(names[0])} and 12 more; "
        f"{'; '.join(names[1])} and 1 more; m has shape (1,), expected (2,); "
        f"{'; '.join(f'd{i} has dtype I8' for i in range(8))}"
    )
    for seed in range(3):
        random.Random(seed).shuffle(faults)
        with pytest.raises(ValueError) as error:
            refuse(faults, "here")
        assert str(error.value) == expected
    refuse([], "here")


# Memory


def test_layers_are_read_into_one_array(tmp_path: Path) -> None:
    """Beside the array itself one layer of sixteen is in memory, not all of them."""
    config = dataclasses.replace(LLAMA, num_layers=16, embed_dim=64, hidden_dim=256)
    write_directory(config, random_params(config), tmp_path)
    weights = sources.open_model(str(tmp_path)).weights
    path, whole = "layers/feed_forward/down/kernel", (slice(None),) * 3
    expected = get(random_params(config), path)
    weights.read(path, whole)
    tracemalloc.start()
    try:
        array = weights.read(path, whole)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(array, expected)
    assert peak < 1.3 * array.nbytes


def test_weights_of_the_wanted_dtype_are_not_copied_on_the_host() -> None:
    array = np.ones((512, 512), np.float32)
    weights = TreeWeights({"head": array})
    weights.load("float32")
    tracemalloc.start()
    try:
        loaded = weights.load("float32")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(loaded["head"], array)
    assert peak < 0.5 * array.nbytes


# Onto a mesh


def test_each_device_reads_its_own_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(MISTRAL, num_heads=4, num_kv_heads=2, vocab_size=96)
    write_directory(config, random_params(config), tmp_path)
    devices = make_mesh(Mesh(fsdp=4, tensor=2))
    shardings = param_shardings(config, None, devices)[0]
    sizes: dict[str, list[int]] = {}
    read = HfWeights.read

    def spy(self: HfWeights, path: str, index: Index) -> np.ndarray:
        piece = read(self, path, index)
        sizes.setdefault(path, []).append(piece.size)
        return piece

    monkeypatch.setattr(HfWeights, "read", spy)
    placed = sources.open_model(str(tmp_path)).load(shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, random_params(config))
    for path, array in flat(placed):
        shard = array.addressable_shards[0].data.size
        assert set(sizes[path]) == {shard}, path
        assert sum(sizes[path]) == array.size, "a shard that several devices hold is read once"
    assert (
        sizes["layers/attention/q/kernel"][0]
        == placed["layers"]["attention"]["q"]["kernel"].size // 8
    )


# One of two processes; prints what it read of each directory, and what there is, in bytes.
PROCESS = """
import sys

import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
address, rank, *directories = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))

import numpy as np
from refine_af.config import Mesh
from refine_af.mesh import make_mesh, param_shardings
from refine_af.models import sources
from refine_af.models.weights import flat, get

for directory in directories:
    source = sources.open_model(directory)
    alone = source.load()
    assert {device for leaf in jax.tree.leaves(alone) for device in leaf.devices()} == {
        jax.local_devices()[0]
    }
    read, sizes = source.weights.read, []

    def counted(path, index):
        piece = read(path, index)
        sizes.append(piece.nbytes)
        return piece

    source.weights.read = counted
    mesh = make_mesh(Mesh(fsdp=4))
    placed = source.load(param_shardings(source.config, None, mesh)[0])
    for path, array in flat(placed):
        assert len(array.sharding.device_set) == 4
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, get(alone, path)[shard.index])
    print(type(source.weights).__name__, sum(sizes), sum(a.nbytes for a in jax.tree.leaves(alone)))
"""


@pytest.mark.slow
def test_each_of_two_hosts_reads_its_own_half(tmp_path: Path) -> None:
    """Two real processes with two devices each, and one mesh over both."""
    config = dataclasses.replace(MISTRAL, vocab_size=96)
    hf_form = write_directory(config, random_params(config), tmp_path / "hf")
    convert.convert(sources.open_model(str(hf_form)), tmp_path / "orbax")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(rank), hf_form, tmp_path / "orbax"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    lines = [[line.split() for line in printed.splitlines()] for printed, _ in outputs]
    for kind, first, second in zip(("HfWeights", "OrbaxWeights"), *lines, strict=True):
        assert first[0] == second[0] == kind
        total = int(first[2])
        for _, size, _ in (first, second):
            assert total / 2 <= int(size) < 0.55 * total  # norms are on both
