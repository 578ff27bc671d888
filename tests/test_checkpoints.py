"""Checkpoints: the same bits come back, on any mesh, and only finished ones count."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from refine_af import checkpoints, mesh, training
from refine_af.config import Mesh
from refine_af.training import TrainState


def on_mesh(devices: int, **axes: int) -> Callable[[Any], Any]:
    """Places a tree: matrices cut along fsdp and tensor, the rest whole."""
    where = mesh.make_mesh(Mesh(**axes), jax.devices()[:devices])

    def put(x: jax.Array) -> jax.Array:
        spec = PartitionSpec("fsdp", "tensor") if x.ndim == 2 else PartitionSpec()
        return jax.device_put(x, NamedSharding(where, spec))

    return lambda tree: jax.tree.map(put, tree)


ONE = on_mesh(1)


def state(seed: int = 0) -> TrainState:
    """Host arrays of a train state in the middle of a run, of several dtypes."""
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    params = {
        "adapter": {"a": draw((8, 4), np.float32), "b": jnp.asarray(draw((4, 8)), jnp.bfloat16)},
        "value_head": {"kernel": draw(8, np.float32), "bias": np.float32(draw())},
    }
    made = training.new_state(params, optax.adam(1e-3), 0.1)
    noisy = jax.tree.map(lambda x: (x + 7 * (seed + 1)).astype(x.dtype), made)
    return jax.tree.map(np.asarray, noisy._replace(params=params))


def save(directory: Path, *steps: int, keep: int = 9, place: Callable[[Any], Any] = ONE) -> None:
    with checkpoints.open_manager(directory, keep=keep) as manager:
        for step in steps:
            checkpoints.save(manager, step, place(state(step)))


def restore(directory: Path, like: Any) -> tuple[int, Any]:
    with checkpoints.open_manager(directory, keep=9) as manager:
        return checkpoints.restore_latest(manager, like)


def assert_equal(actual: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.parametrize("written", [ONE, on_mesh(8, fsdp=4, tensor=2)], ids=["1", "4x2"])
@pytest.mark.parametrize(
    "read",
    [ONE, on_mesh(8, fsdp=4, tensor=2), on_mesh(8, fsdp=2, tensor=4), on_mesh(4, data=2, fsdp=2)],
    ids=["1", "4x2", "2x4", "2x2"],
)
def test_the_same_bits_come_back_on_any_mesh(
    written: Callable[[Any], Any], read: Callable[[Any], Any], tmp_path: Path
) -> None:
    save(tmp_path, 3, place=written)
    like = read(jax.tree.map(np.zeros_like, state()))
    step, restored = restore(tmp_path, like)
    assert step == 3
    assert_equal(restored, state(3))
    for ours, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert ours.sharding == wanted.sharding


def test_the_newest_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    save(tmp_path, 2, 9, 10, 11, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["10", "11"]
    step, restored = restore(tmp_path, ONE(state()))
    assert step == checkpoints.latest_step(tmp_path) == 11
    assert_equal(restored, state(11))


def test_a_later_start_goes_on_with_the_numbers(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, keep=2)
    save(tmp_path, 3, keep=2)
    assert restore(tmp_path, ONE(state()))[0] == 3
    assert not (tmp_path / "1").exists()


def test_what_is_saved_may_be_donated_at_once(tmp_path: Path) -> None:
    eat = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    with checkpoints.open_manager(tmp_path, keep=1) as manager:
        placed = ONE(state(1))
        checkpoints.save(manager, 1, placed)
        eat(placed)
        assert placed.params["adapter"]["a"].is_deleted()
    assert_equal(restore(tmp_path, ONE(state()))[1], state(1))


def test_without_a_checkpoint_the_given_state_is_the_first(tmp_path: Path) -> None:
    like = ONE(state())
    step, restored = restore(tmp_path / "new", like)
    assert step == 0
    assert restored is like


def test_an_error_in_the_block_still_finishes_the_save(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        checkpoints.open_manager(tmp_path, keep=1) as manager,
    ):
        checkpoints.save(manager, 4, ONE(state(4)))
        raise KeyboardInterrupt
    assert_equal(restore(tmp_path, ONE(state()))[1], state(4))


@pytest.mark.parametrize("name", ["7.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-12", "other"])
def test_what_is_not_finished_does_not_count(name: str, tmp_path: Path) -> None:
    """A save that was killed leaves a directory of another name."""
    save(tmp_path, 5)
    (tmp_path / name / "default").mkdir(parents=True)
    assert checkpoints.latest_step(tmp_path) == 5
    step, restored = restore(tmp_path, ONE(state()))
    assert step == 5
    assert_equal(restored, state(5))


# One array alone: of several, Orbax leaves those behind that it reads when the first one fails.


def save_array(directory: Path, *steps: int) -> None:
    with checkpoints.open_manager(directory, keep=9) as manager:
        for step in steps:
            checkpoints.save(manager, step, {"x": jnp.full((64, 64), step, jnp.float32)})


@pytest.mark.parametrize("pattern", ["d/*", "_METADATA", "manifest.ocdbt"])
@pytest.mark.parametrize("flip", [True, False], ids=["flipped", "cut"])
def test_a_damaged_checkpoint_is_an_error_and_the_one_before_is_good(
    pattern: str, flip: bool, tmp_path: Path
) -> None:
    save_array(tmp_path, 5, 6)
    (file,) = (tmp_path / "6/default").glob(pattern)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data if flip else data[: len(data) // 2])
    message = rf"{tmp_path}/6: the checkpoint is damaged .* remove it to go on from the one before"
    like = {"x": jnp.zeros((64, 64))}
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, like)
    shutil.rmtree(tmp_path / "6")
    step, restored = restore(tmp_path, like)
    assert step == 5
    assert (restored["x"] == 5).all()


@pytest.mark.parametrize(("name", "columns"), [("x", 32), ("y", 64)])
def test_a_checkpoint_of_another_tree_is_refused(name: str, columns: int, tmp_path: Path) -> None:
    save_array(tmp_path, 5)
    with pytest.raises(ValueError, match=r"/5: the checkpoint is damaged or of another config"):
        restore(tmp_path, {name: jnp.zeros((64, columns))})


def test_the_latest_step_of_nothing_is_0(tmp_path: Path) -> None:
    assert checkpoints.latest_step(tmp_path / "missing") == 0
    assert checkpoints.latest_step(tmp_path) == 0
