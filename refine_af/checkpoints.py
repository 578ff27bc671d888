"""Checkpoints through Orbax: saved in the background, finished or not there at all, verified.

Beside the tree lies its fingerprint, so that a bit that rotted on disk is found, too, and in the
metadata the hash of the config that it was made with.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import Array, UInt32
from orbax.checkpoint import checkpoint_managers

from refine_af import interruptions, records
from refine_af.models import processes, writing
from refine_af.models.one_line import one_line
from refine_af.profiling import Profile
from refine_af.progress import bar

T = TypeVar("T")
P = TypeVar("P")

# What is neither a damaged checkpoint nor a disk that takes none.
_NOT_OF_FILES = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)


class DamagedError(ValueError):
    """A checkpoint whose content is not what was saved."""


class OtherTreeError(ValueError):
    """A checkpoint of a tree with other arrays."""


@dataclasses.dataclass
class _Keep(checkpoint_managers.PreservationPolicy):
    """The newest, and the best where there is one."""

    num: int
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.num :], self.best()}
        return [step in kept for step in steps]


@contextmanager
def open_manager(
    directory: Path, *, keep: int, best: Callable[[], int | None] = lambda: None
) -> Iterator[ocp.CheckpointManager]:
    """Manager of `directory`; leaving the block waits for saves that are under way.

    What a killed save has left behind is removed.

    Args:
        keep: how many of the newest stay.
        best: step that stays as well, asked after each save.

    Raises:
        OSError: a save has failed, for want of space say; the ones before it are whole.
    """
    options = ocp.CheckpointManagerOptions(
        create=True,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # else metadata that is damaged is fatal
        preservation_policy=_Keep(keep, best),
    )
    manager = ocp.CheckpointManager(
        directory.absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
    )
    try:
        yield manager
    finally:
        try:
            finish(manager)
        finally:
            with _writing(directory):  # after a save that failed at once others may be writing
                manager.close()


def check_space(manager: ocp.CheckpointManager, tree: Any, keep: int, *, beside: int = 0) -> None:
    """See to it that as many checkpoints of `tree` as will be there at a time fit on the disk.

    Args:
        beside: bytes of what else is to be written there.

    Raises:
        OSError: they do not.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    new = max(keep + 1 - len(manager.all_steps()), 1)  # one more while it is being written
    needed = new * size + beside
    processes.once(lambda: writing.check_space(Path(manager.directory), needed))


def save(manager: ocp.CheckpointManager, step: int, tree: Any, config: str = "") -> None:
    """Start saving; the arrays are copied or held before this returns: they may be donated after.

    Args:
        config: hash of the config behind it.

    Raises:
        OSError: the save before has failed.
    """
    content = {"tree": tree, "fingerprint": _fingerprint(tree)}
    with _writing(Path(manager.directory)):
        manager.save(
            step,
            args=ocp.args.StandardSave(content),
            custom_metadata={"config": config},
        )


def finish(manager: ocp.CheckpointManager) -> None:
    """Wait for saves that are under way.

    Raises:
        OSError: one has failed.
    """
    with _writing(Path(manager.directory)):
        manager.wait_until_finished()


def advance(
    manager: ocp.CheckpointManager,
    state: T,
    steps: range,
    *,
    prepare: Callable[[int, T], P],
    learn: Callable[[int, T, P], tuple[T, dict[str, str]]],
    due: Callable[[int], bool],
    resumable: Callable[[int], bool] = lambda _: True,
    config: str,
    progress: bar,
    profile: Profile,
) -> T:
    """State after `steps`; a signal ends them with the newest state saved.

    Args:
        prepare: what a step learns from; a signal drops it.
        learn: the next state, whose donor `state` may be, and figures to show; whatever it writes
            down is whole, since a signal waits for it.
        due: whether a checkpoint is due after so many steps; it always is after the last one.
        resumable: whether the state after so many steps is all that the next one needs.
        config: hash of the config.
        profile: which steps are traced.
    """
    newest = steps.start, state
    with closing(profile.over(steps)) as traced:  # saved first, traces are written afterwards
        try:
            with interruptions.shared():
                for step in traced:
                    prepared = prepare(step, state)
                    with interruptions.held():
                        state, shown = learn(step, state, prepared)
                        newest = step + 1, state
                        if due(step + 1) or step + 1 == steps.stop:
                            save(manager, *newest, config)
                    progress.update()
                    progress.show(**shown)
                    interruptions.agree()
        except KeyboardInterrupt as error:
            step, tree = newest  # a second signal may have come when the arrays were given away
            unsaved = step > (manager.latest_step() or 0)
            alone = processes.several() and not isinstance(error, interruptions.AgreedInterrupt)
            if unsaved and resumable(step) and not alone and not _is_deleted(tree):
                save(manager, step, tree, config)
            raise
    return state


def _is_deleted(tree: Any) -> bool:
    return any(x.is_deleted() for x in jax.tree.leaves(tree))


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Orbax and TensorStore have many kinds of errors for a disk that does not take a file."""
    try:
        yield
    except _NOT_OF_FILES:
        raise
    except Exception as error:
        raise writing.WriteError(
            f"{directory}: a checkpoint cannot be written ({one_line(error)}); the ones before it "
            "are whole"
        ) from None


@jax.jit
def _fingerprint(tree: Any) -> UInt32[Array, ""]:
    """Sum of all bits, read as whole numbers: the same on every mesh, another after one flip."""

    def bits(x: Array) -> Array:
        if x.dtype == jnp.bool_:
            return x
        return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")

    parts = [jnp.sum(bits(jnp.asarray(x)), dtype=jnp.uint32) for x in jax.tree.leaves(tree)]
    return sum(parts, start=jnp.zeros((), jnp.uint32))


def shapes_of(tree: T) -> T:
    """The tree with each array's shape, dtype and sharding in its place."""
    shapes: T = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    return shapes


def restore_latest(manager: ocp.CheckpointManager, like: T) -> tuple[int, T | None]:
    """(step, tree) of the newest sound checkpoint; (0, None) when there is none at all.

    Newer ones that are damaged are named in a warning, and renamed to `damaged-STEP`.

    Args:
        like: what `shapes_of` says of the wanted tree, whose arrays need not be there any more.

    Raises:
        ValueError: all are damaged, or of another config.
    """
    faults: dict[int, ValueError] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            tree = restore(manager, step, like)
        except (DamagedError, OtherTreeError) as error:  # one before it that fits: damaged, too
            faults[step] = error
            continue
        _set_aside(manager, faults, f"going on from step {step}")
        return step, tree
    if not faults:
        return 0, None
    others = [fault for fault in faults.values() if isinstance(fault, OtherTreeError)]
    raise ValueError(
        f"{others[0]}; take another --workdir, or remove it"
        if others
        else f"{next(iter(faults.values()))}, and so are all before it; remove "
        f"{manager.directory} to begin again with step 0"
    )


def restore_best(
    manager: ocp.CheckpointManager, like: T, losses: dict[int, float]
) -> tuple[int, T | None]:
    """(step, tree) of the sound checkpoint with the lowest loss; (0, None) when there is none.

    Args:
        like: as in `restore_latest`.
        losses: by step, of this and other checkpoints; loses those that turn out to be damaged,
            which are renamed as there.
    """
    while there := losses.keys() & set(manager.all_steps()):
        step = min(there, key=lambda step: (losses[step], step))
        try:
            return step, restore(manager, step, like)
        except DamagedError as fault:
            del losses[step]
            _set_aside(manager, {step: fault}, "the next best one is taken")
    return 0, None


def restore(manager: ocp.CheckpointManager, step: int, like: T) -> T:
    """The tree that was saved as `step`.

    Args:
        like: as in `restore_latest`.

    Raises:
        DamagedError: its content is not what was saved.
        OtherTreeError: it was saved from a tree of other names, shapes or dtypes.
    """
    path = manager.directory / str(step)
    wanted = {"tree": shapes_of(like), "fingerprint": np.zeros((), np.uint32)}
    found: dict[str, Any] = {}
    fault: ValueError | None = None
    try:
        found = _read(manager, step, wanted)
    except (DamagedError, OtherTreeError) as error:
        fault = error
    if fault := _agreed(fault):
        raise fault
    if _fingerprint(found["tree"]) != found["fingerprint"]:
        raise DamagedError(f"{path}: the checkpoint is damaged (its bits do not add up)")
    tree: T = found["tree"]
    return tree


def _read(manager: ocp.CheckpointManager, step: int, wanted: Any) -> dict[str, Any]:
    """The parts of a checkpoint that are this process's.

    Not with `manager.restore`, in which a process waits for the others: one that finds its own
    part damaged would not come.
    """
    path = manager.directory / str(step)
    handler, args = ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(wanted)
    try:
        with interruptions.held():  # in a callback of TensorStore the exception would be lost
            unlike = _arrays(manager.item_metadata(step)) ^ _arrays(wanted)
            found = {} if unlike else handler.restore(path / "default", args=args)
    except _NOT_OF_FILES:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        if interruptions.received():  # it may be what a signal has become
            raise KeyboardInterrupt from None
        raise DamagedError(f"{path}: the checkpoint is damaged ({one_line(error)})") from None
    if unlike:
        name, shape, dtype = min(unlike)
        raise OtherTreeError(
            f"{path}: the checkpoint is of another config: {name} with shape {shape} and dtype "
            f"{dtype} is in one of them only"
        )
    return dict(found)


def _agreed(fault: ValueError | None) -> ValueError | None:
    """Of several processes, each of which reads its part, what any of them has found."""
    text = next(filter(None, processes.everyone(str(fault) if fault else "")), "")
    return fault or (DamagedError(text) if text else None)


def _arrays(tree: Any) -> set[tuple[str, tuple[int, ...], str]]:
    """(path, shape, dtype) of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        (jax.tree_util.keystr(path, simple=True, separator="/"), tuple(x.shape), str(x.dtype))
        for path, x in leaves
    }


def _set_aside(manager: ocp.CheckpointManager, faults: Mapping[int, ValueError], then: str) -> None:
    """Rename what is faulty, by step: it can be saved again, and what can be rescued is there.

    Args:
        then: what is done instead, for the warning.
    """

    def rename() -> None:
        for number, fault in faults.items():
            logging.warning("%s; %s", fault, then)
            aside = manager.directory / f"damaged-{number}"
            shutil.rmtree(aside, ignore_errors=True)
            (manager.directory / str(number)).rename(aside)

    processes.once(rename)
    manager.reload()


def latest_step(directory: Path) -> int:
    """Step of the newest finished checkpoint in `directory`, 0 when there is none."""
    return processes.once(lambda: _latest_step(directory))


def _latest_step(directory: Path) -> int:
    if not directory.is_dir():
        return 0
    steps = [int(entry.name) for entry in directory.iterdir() if entry.name.isdigit()]
    return max(steps, default=0)


def config_of(directory: Path) -> str | None:
    """Hash of the config behind the newest checkpoint; None when there is none, or no such hash."""
    path = directory / str(latest_step(directory)) / "_CHECKPOINT_METADATA"
    try:
        found = records.read_json(path).get("custom_metadata")
    except ValueError:  # damaged: restoring will tell
        return None
    return found.get("config") if isinstance(found, dict) else None
