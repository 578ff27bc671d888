"""Checkpoints through Orbax: saved in the background, finished or not there at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

T = TypeVar("T")


@contextmanager
def open_manager(directory: Path, *, keep: int) -> Iterator[ocp.CheckpointManager]:
    """Manager of `directory`; leaving the block waits for saves that are under way."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    manager = ocp.CheckpointManager(directory.absolute(), options=options)
    try:
        yield manager
    finally:
        manager.wait_until_finished()
        manager.close()


def save(manager: ocp.CheckpointManager, step: int, tree: Any) -> None:
    """Start saving; the arrays are copied before this returns, so they may be donated after."""
    manager.save(step, args=ocp.args.StandardSave(tree))


def restore_latest(manager: ocp.CheckpointManager, like: T) -> tuple[int, T]:
    """(step, tree) of the newest checkpoint; (0, `like`) when there is none.

    Args:
        like: a tree of arrays with the wanted shapes, dtypes and shardings.

    Raises:
        ValueError: the checkpoint is damaged, or holds another tree.
    """
    step = manager.latest_step()
    if step is None:
        return 0, like
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        return step, manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"{manager.directory / str(step)}: the checkpoint is damaged or of another config "
            f"({reason}); remove it to go on from the one before"
        ) from None


def latest_step(directory: Path) -> int:
    """Step of the newest finished checkpoint in `directory`, 0 when there is none."""
    if not directory.is_dir():
        return 0
    steps = [int(entry.name) for entry in directory.iterdir() if entry.name.isdigit()]
    return max(steps, default=0)
