"""Checkpoints: the same bits come back, on any mesh, and only finished ones count."""

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from refine_af import checkpoints, interruptions, mesh, training
from refine_af.config import Mesh
from refine_af.profiling import Profile
from refine_af.progress import bar
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
        "adapter": {"a": draw((16, 8), np.float32), "b": jnp.asarray(draw((8, 16)), jnp.bfloat16)},
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


MESHES = {
    "one device": ONE,
    "fsdp 8": on_mesh(8, fsdp=8),
    "fsdp 4, tensor 2": on_mesh(8, fsdp=4, tensor=2),
    "data 2, tensor 2": on_mesh(4, data=2, fsdp=1, tensor=2),
}


@pytest.mark.parametrize("written", [ONE, MESHES["fsdp 8"]], ids=["one device", "fsdp 8"])
@pytest.mark.parametrize("read", MESHES.values(), ids=MESHES)
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
    """Where the writer still reads an array, as it can on a CPU, JAX copies instead of donating."""
    placed = ONE(state(1))
    eat = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    compiled = eat.lower(placed).compile()
    assert compiled.memory_analysis().alias_size_in_bytes > 0  # it would reuse them
    with checkpoints.open_manager(tmp_path, keep=1) as manager:
        checkpoints.save(manager, 1, placed)
        compiled(placed)
    assert_equal(restore(tmp_path, ONE(state()))[1], state(1))


def test_without_a_checkpoint_there_is_nothing(tmp_path: Path) -> None:
    assert restore(tmp_path / "new", ONE(state())) == (0, None)


def test_shapes_are_enough_to_restore(tmp_path: Path) -> None:
    """So that no second state need be there at the same time."""
    read = MESHES["fsdp 4, tensor 2"]
    save(tmp_path, 3)
    placed = read(state())
    like = checkpoints.shapes_of(placed)
    jax.tree.map(lambda x: x.delete(), placed)
    step, restored = restore(tmp_path, like)
    assert step == 3
    assert_equal(restored, state(3))
    for ours, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(placed), strict=True):
        assert ours.sharding == wanted.sharding


def test_an_error_in_the_block_still_finishes_the_save(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        checkpoints.open_manager(tmp_path, keep=1) as manager,
    ):
        checkpoints.save(manager, 4, ONE(state(4)))
        raise KeyboardInterrupt
    assert_equal(restore(tmp_path, ONE(state()))[1], state(4))


@pytest.mark.parametrize("name", ["7.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-12", "other"])
def test_what_is_not_finished_does_not_count_and_is_removed(name: str, tmp_path: Path) -> None:
    """A save that was killed leaves a directory of another name; what is not Orbax's stays."""
    save(tmp_path, 5)
    (tmp_path / name / "default").mkdir(parents=True)
    assert checkpoints.latest_step(tmp_path) == 5
    step, restored = restore(tmp_path, ONE(state()))
    assert step == 5
    assert_equal(restored, state(5))
    assert (tmp_path / name).exists() == (name == "other")


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    losses: dict[int, float] = {}

    def best() -> int | None:
        return min(losses, key=losses.__getitem__) if losses else None

    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 1.5], start=1):  # each in a start of its own
        losses[step] = loss
        with checkpoints.open_manager(tmp_path, keep=2, best=best) as manager:
            checkpoints.save(manager, step, ONE(state(step)))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 4, 5]
    with checkpoints.open_manager(tmp_path, keep=2, best=best) as manager:
        assert_equal(checkpoints.restore(manager, 2, ONE(state())), state(2))


def test_the_hash_of_the_config_is_kept(tmp_path: Path) -> None:
    assert checkpoints.config_of(tmp_path) is None
    with checkpoints.open_manager(tmp_path, keep=1) as manager:
        checkpoints.save(manager, 4, ONE(state()), config="c0ffee")
    assert checkpoints.config_of(tmp_path) == "c0ffee"


def test_too_little_space_is_told_beforehand(tmp_path: Path) -> None:
    huge = {"x": jax.ShapeDtypeStruct((1 << 40,), jnp.float32)}
    with checkpoints.open_manager(tmp_path, keep=2) as manager:
        checkpoints.check_space(manager, ONE(state()), 2)
        with pytest.raises(OSError, match=r"GiB are free, 12288\.0 GiB are needed; make room"):
            checkpoints.check_space(manager, huge, 2)


# Damage. One array alone: of several, Orbax leaves those behind that it reads when the first fails.


def save_array(directory: Path, *steps: int) -> None:
    rng = np.random.default_rng(0)
    with checkpoints.open_manager(directory, keep=9) as manager:
        for step in steps:
            noise = rng.standard_normal((64, 64), np.float32)
            checkpoints.save(manager, step, {"x": jnp.asarray(noise).at[0, 0].set(step)})


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "removed":
        return file.unlink()
    data[len(data) // 2] ^= 4
    file.write_bytes(data if how == "flipped" else data[: len(data) // 2])


@pytest.mark.parametrize(
    "pattern", ["d/*", "_METADATA", "manifest.ocdbt", "ocdbt.process_0/d/*", "../_CHECKPOINT_*"]
)
@pytest.mark.parametrize("how", ["flipped", "cut", "removed"])
def test_of_a_damaged_checkpoint_the_one_before_is_used(
    pattern: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bit that flips in an array, too, which its file format lets pass."""
    save_array(tmp_path, 5, 6)
    files = (tmp_path / "6/default").glob(pattern)
    damage(max(files, key=lambda file: file.stat().st_size), how)
    step, restored = restore(tmp_path, {"x": jnp.zeros((64, 64))})
    assert restored["x"][0, 0] == step
    if pattern == "../_CHECKPOINT_*" and how != "flipped":
        assert step == 6, "nothing of the arrays is lost"
        return
    assert step == 5
    (notice,) = [m for m in caplog.messages if m.startswith(f"{tmp_path}/6: the checkpoint is ")]
    assert notice.endswith("; going on from step 5")
    assert "\n" not in notice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "damaged-6"]
    save_array(tmp_path, 6)
    assert restore(tmp_path, {"x": jnp.zeros((64, 64))})[0] == 6


def test_when_all_are_damaged_that_is_an_error(tmp_path: Path) -> None:
    save_array(tmp_path, 5, 6)
    for step in (5, 6):
        damage(tmp_path / f"{step}/default/manifest.ocdbt", "cut")
    message = (
        rf"^{tmp_path}/6: the checkpoint is damaged \(.*\), and so are all before it; remove "
        rf"{tmp_path} to begin again with step 0$"
    )
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, {"x": jnp.zeros((64, 64))})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "6"]


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("tree/x", {"x": jnp.zeros((64, 32))}),
        ("tree/x", {"x": jnp.zeros((64, 64), jnp.bfloat16)}),
        ("tree/x", {"y": jnp.zeros((64, 64))}),
        ("tree/y", {"x": jnp.zeros((64, 64)), "y": jnp.zeros(1)}),
    ],
)
def test_checkpoints_of_another_tree_are_refused(
    name: str, like: dict[str, jax.Array], tmp_path: Path
) -> None:
    """And not taken for damaged ones."""
    save_array(tmp_path, 4, 5)
    with pytest.raises(ValueError, match=rf"/5: the checkpoint is of another config: {name} with"):
        restore(tmp_path, like)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


# Signals


def take_steps(
    directory: Path,
    at: dict[int, Callable[[], None]],
    *,
    learning: bool = False,
    resumable: Callable[[int], bool] = lambda _: True,
) -> list[int]:
    """Steps that a signal in some of them lets pass: `tree` counts them; none is due to be saved.

    Args:
        at: what happens in a step.
        learning: whether that is while it learns, instead of before.
    """
    taken: list[int] = []
    eat = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)

    def happen(step: int) -> None:
        at.get(step, lambda: None)()

    def prepare(step: int, tree: Any) -> None:
        if not learning:
            happen(step)

    def learn(step: int, tree: Any, _: None) -> tuple[Any, dict[str, str]]:
        tree = eat(tree)
        if learning:
            happen(step)
        taken.append(step)
        return tree, {}

    interruptions.install()
    with (
        checkpoints.open_manager(directory, keep=9) as manager,
        bar("steps", total=9, unit="step") as progress,
    ):
        first, found = checkpoints.restore_latest(manager, {"x": jnp.zeros(())})
        tree = found or {"x": jnp.zeros(())}
        assert tree["x"] == first
        checkpoints.advance(
            manager,
            tree,
            range(first, 9),
            prepare=prepare,
            learn=learn,
            due=lambda done: done == 2,
            resumable=resumable,
            config="",
            progress=progress,
            profile=Profile(directory / "profile", 0),
        )
    return taken


def send(signum: signal.Signals, times: int = 1) -> Callable[[], None]:
    def act() -> None:
        for _ in range(times):
            signal.raise_signal(signum)

    return act


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("learning", "times", "saved"),
    [
        (False, 1, 4),  # step 4 is dropped, the state after 0 to 3 is saved
        (True, 1, 5),  # it is finished first
        (True, 2, 2),  # it is cut, its arrays are given away already: the last one that was due
    ],
)
def test_a_signal_saves_the_newest_finished_step(
    learning: bool, times: int, saved: int, signum: signal.Signals, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        take_steps(tmp_path, {4: send(signum, times)}, learning=learning)
    assert interruptions.received() == signum
    assert checkpoints.latest_step(tmp_path) == saved
    assert take_steps(tmp_path, {}) == list(range(saved, 9))


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize(("before", "cut"), [(0, False), (1, True)])
def test_the_save_that_all_agreed_to_outlives_a_first_signal(
    before: int, cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a host's own, that is: the one before it came to another host. A second ends all."""
    others = SimpleNamespace(several=lambda: True, everyone=lambda mine: [mine, signal.SIGINT])
    monkeypatch.setattr(interruptions, "processes", others)
    save = checkpoints.save

    def disturbed(*args: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        save(*args)

    monkeypatch.setattr(checkpoints, "save", disturbed)
    with pytest.raises(KeyboardInterrupt) as caught:
        take_steps(tmp_path, {0: send(signal.SIGTERM, before)})
    assert (type(caught.value) is not interruptions.AgreedInterrupt) == cut
    assert checkpoints.latest_step(tmp_path) == (0 if cut else 1)
    assert interruptions.received() == (signal.SIGTERM if before else signal.SIGINT)


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("broken", [False, True])
def test_a_signal_while_restoring_is_not_taken_for_damage(
    broken: bool, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor lost, where TensorStore swallows its exception; the read may go on or fail."""
    save_array(tmp_path, 5, 6)
    read = ocp.StandardCheckpointHandler.restore

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        for _ in range(times):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        if broken:
            raise ValueError("cannot be read")
        return read(*args, **kwargs)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", interrupted)
    interruptions.install()
    with pytest.raises(KeyboardInterrupt):
        restore(tmp_path, {"x": jnp.zeros((64, 64))})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "6"]


@pytest.mark.usefixtures("own_handlers")
def test_a_state_that_is_not_all_that_the_next_step_needs_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        take_steps(tmp_path, {4: send(signal.SIGTERM)}, resumable=lambda done: done != 4)
    assert checkpoints.latest_step(tmp_path) == 2


def test_the_latest_step_of_nothing_is_0(tmp_path: Path) -> None:
    assert checkpoints.latest_step(tmp_path / "missing") == 0
    assert checkpoints.latest_step(tmp_path) == 0
