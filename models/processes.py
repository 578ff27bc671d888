"""Several processes that run one program together, on one host or on many.

All of them run the same Python code on the same values and meet in the same device programs (SPMD).
What only one may do, or what may differ between them (files, free memory, a server's answer), goes
through this module: process 0, the *writer*, does it, and the others are told. A process that runs
alone is the writer.
"""

import atexit
import contextlib
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

T = TypeVar("T")

_LAUNCHERS = ("gketpu", "gcetpu", "slurm", "ompi")  # as jax.distributed names them
_HEARTBEAT_TIMEOUT = 30  # seconds without a sign of life, then a process counts as dead
_LOOK = 0.5  # seconds between two looks for the failure of another process
_DAY = 24 * 3600 * 1000  # milliseconds; it is not by waiting that a death is noticed
_SLICE = 1000  # milliseconds; a wait inside the client is deaf to signals
_LONG = 20  # seconds of waiting for the others that call for a notice
_WAITING = (
    "{}: still waiting for all processes to start; is one of them missing, or is the address of "
    "process 0 out of reach?"
)
_FAILURE = "refine_af/failure"

_calls = itertools.count()  # of `everyone` and `once`: all processes make them in the same order
_thread = threading.local()
_leaving = threading.Event()


def launched_as_several() -> bool:
    """Whether a launcher that JAX knows started this process as one of several.

    On Cloud TPU the metadata server is asked; elsewhere only the environment is looked at.
    """
    for launcher in ClusterEnv._cluster_types:
        if launcher.name in _LAUNCHERS and launcher.is_env_present():
            return launcher.get_process_count() > 1
    return False


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Meet the other processes, before the first use of a device; without arguments by launcher.

    From here on the death of one ends all within a minute, and `fail` within seconds.

    The others have five minutes to come; then JAX ends the process.
    """
    # Its handler of SIGTERM would take the place of Python's.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = f"--coordinator_address={coordinator_address}" if coordinator_address else "launcher"
    notice = threading.Timer(_LONG, print, (_WAITING.format(where),), {"file": sys.stderr})
    notice.daemon = True
    notice.start()
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
    )
    notice.cancel()
    watcher = threading.Thread(target=_watch, daemon=True)
    watcher.start()
    atexit.register(_leave, watcher)  # runs before JAX takes leave


def _leave(watcher: threading.Thread) -> None:
    _leaving.set()
    watcher.join()


def _watch() -> None:
    """End this process when another one has failed."""
    while not _leaving.wait(_LOOK):
        try:
            reason, code = json.loads(_client().key_value_try_get(_FAILURE))
        except jax.errors.JaxRuntimeError:
            continue  # nobody has failed
        if not _leaving.is_set():
            print(f"error: another process has failed: {reason}", file=sys.stderr, flush=True)
            os._exit(code)


def await_news() -> None:
    """Stay until this process is ended by the death of another one, if there was one.

    Called when devices could not meet: the lost connection shows before who was lost does.
    """
    threading.Event().wait(_HEARTBEAT_TIMEOUT + 10 * _LOOK)


def fail(reason: str, code: int) -> NoReturn:
    """End this process, and by that all: they are told why, and nobody waits for anybody."""
    _leaving.set()
    message = json.dumps((f"process {_number()}: {reason}", code))
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was faster
        _client().key_value_set(_FAILURE, message)
    if is_writer():
        threading.Event().wait(4 * _LOOK)  # it serves the others what they are to read
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def several() -> bool:
    """Whether there are other processes."""
    return jax.distributed.is_initialized()


def is_writer() -> bool:
    """Whether this is the process that writes files and talks to the world."""
    return not several() or _number() == 0


def own_folder(folder: Path) -> Path:
    """The folder, or one in it for this process where there are several."""
    return folder / f"process{_number()}" if several() else folder


def _client() -> Any:
    return distributed.global_state.client


def _number() -> int:
    # Not jax.process_index(), which on TPUs may be another one and starts the devices.
    return distributed.global_state.process_id


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """In this thread nothing is shared with the other processes."""
    before, _thread.alone = getattr(_thread, "alone", False), True
    try:
        yield
    finally:
        _thread.alone = before


def _together() -> bool:
    return several() and not getattr(_thread, "alone", False)


def by_writer(action: Callable[[], object]) -> None:
    """Run `action` on the writer alone; the others do not wait for it."""
    if is_writer():
        with _alone():
            action()


def once(action: Callable[[], T]) -> T:
    """What `action` returns on the writer, which alone runs it, or raises there.

    All processes must come here; all but the writer wait. Inside `action` nothing else is shared.

    Returns:
        On the writer the very result; on the others what JSON makes of it (arrays, too, are lists).
    """
    if not _together():
        return action()
    call, client = f"refine_af/{next(_calls)}", _client()
    fault: Exception | None = None
    if is_writer():
        try:
            with _alone():
                result = action()
            message: dict[str, Any] = {"result": result}
        except Exception as error:
            fault, message = error, {"fault": _to_json(error)}
        text = json.dumps(message, default=lambda array: array.tolist())
        client.key_value_set_bytes(f"{call}/data", text.encode())
        client.key_value_set(f"{call}/there", "")
    else:
        _await(f"{call}/there")
        message = json.loads(client.blocking_key_value_get_bytes(f"{call}/data", _DAY))
        if "fault" in message:
            fault = _from_json(message["fault"])
        else:
            result = message["result"]
    client.wait_at_barrier(call, _DAY)
    if is_writer():
        client.key_value_delete(f"{call}/")
    if fault:
        raise fault
    return result


def _await(key: str) -> None:
    """Wait for a small value, however long that takes; Python's signals come between two looks.

    A look's time is that of the transfer, too: a large value would never come.
    """
    while True:
        try:
            _client().blocking_key_value_get(key, _SLICE)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        else:
            return


def _to_json(error: Exception) -> dict[str, Any]:
    kinds = [(kind.__module__, kind.__name__) for kind in type(error).__mro__[:-2]]
    return {"kinds": kinds, "text": str(error)}


def _from_json(fault: dict[str, Any]) -> Exception:
    """An exception of the nearest class that is known here and takes a text."""
    for module, name in fault["kinds"]:
        kind = getattr(sys.modules.get(module), name, None)
        with contextlib.suppress(TypeError):
            if isinstance(kind, type) and issubclass(kind, Exception):
                return kind(fault["text"])
    return RuntimeError(fault["text"])


def everyone(value: T) -> list[T]:
    """The value of every process, by its number, as JSON gives it back; all must come here."""
    if not _together():
        return [value]
    call, client = f"refine_af/{next(_calls)}", _client()
    client.key_value_set(f"{call}/{_number():09}", json.dumps(value))
    client.wait_at_barrier(call, _DAY)
    found = sorted(client.key_value_dir_get(f"{call}/"))
    client.wait_at_barrier(f"{call}/read", _DAY)
    if is_writer():
        client.key_value_delete(f"{call}/")
    return [json.loads(text) for _, text in found]


def to_host(tree: Any) -> Any:
    """Arrays as NumPy arrays, whole, also where devices of other processes hold parts of them."""

    def fetch(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(fetch, tree)


def to_devices(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array laid out as asked; one of the host must be the same on all processes.

    `jax.device_put` would compare them, at the price of a collective for each array.
    """
    traced = isinstance(x, jax.core.Tracer)  # for its shape: nothing is there to be put
    if traced or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
