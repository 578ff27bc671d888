"""Scores on disk, by content: what an oracle has said of an example it is not asked again."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refine_af.models import processes
from refine_af.rewards import Example, Oracle, OracleError, checked

_LOOKUPS = 500  # keys a query


@dataclasses.dataclass(frozen=True)
class CachedOracle:
    """An oracle with a memory: equal examples are scored once, in this run or a later one.

    Attributes:
        path: SQLite file, made when missing; several runs may use it. Of several processes that
            run together the writer uses it.
        identity: tells oracles apart that share a file; it changes when an oracle would.
        ahead: whether `prefetch` may call the oracle from another thread while the device samples.
    """

    oracle: Oracle
    path: Path
    identity: str
    ahead: bool = False

    def __call__(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Components of any number of examples.

        Raises:
            OracleError: the file is not such a cache, or cannot be written; or as `checked`.
        """
        self._queue.wait(examples)
        if self.ahead:
            return processes.once(lambda: self._score(examples))
        return self._score(examples)

    def prefetch(self, examples: Sequence[Example], batch: int = 0) -> None:
        """Begin to score these, where that need not wait for the device.

        What has come in meanwhile of one batch is scored together. A fault shows up when the oracle
        is called.
        """
        if self.ahead and processes.is_writer():
            self._queue.add(examples, batch)

    @functools.cached_property
    def _queue(self) -> "_Queue":
        return _Queue(lambda examples: processes.by_writer(lambda: self._score(examples)))

    @functools.cached_property
    def _asking(self) -> threading.Lock:
        return threading.Lock()

    def _score(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        keys = [self._key(example) for example in examples]
        known = processes.once(lambda: self._known(keys))
        missing = {key: e for key, e in zip(keys, examples, strict=True) if key not in known}
        if missing:
            asked = list(missing.values())
            with self._asking:  # an oracle need not bear two callers
                table = checked(self.oracle(asked), asked)
            fresh = {
                key: {name: float(column[row]) for name, column in table.items()}
                for row, key in enumerate(missing)
            }
            known |= fresh
            processes.by_writer(lambda: self._keep(fresh))
        names = known[keys[0]].keys() if keys else ()
        unlike = next((key for key in keys if known[key].keys() != names), None)
        if unlike:
            raise OracleError(
                f"{self.path}: scores with the components {sorted(names)}, and some with "
                f"{sorted(known[unlike])}; remove the file"
            )
        return {name: np.asarray([known[key][name] for key in keys]) for name in names}

    def _known(self, keys: Sequence[str]) -> dict[str, dict[str, float]]:
        with self._open() as database:
            return _read(database, keys)

    def _keep(self, scores: dict[str, dict[str, float]]) -> None:
        with self._open() as database:
            _write(database, scores)

    def _key(self, example: Example) -> str:
        parts = [self.identity, example.instruction, example.input, example.output]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, components TEXT)"
                )
                yield database
        except (sqlite3.Error, OSError) as error:
            raise OracleError(f"{self.path}: no usable cache of scores ({error})") from None
        except (ValueError, RecursionError) as error:
            raise OracleError(f"{self.path}: damaged ({error}); remove the file") from None


class _Queue:
    """Examples on their way to an oracle, on a thread of its own, in the order they came."""

    def __init__(self, score: Callable[[list[Example]], Any]) -> None:
        self._score, self._changed = score, threading.Condition()
        self._waiting: collections.deque[tuple[int, Example]] = collections.deque()
        self._unscored: collections.Counter[Example] = collections.Counter()
        self._works = False

    def add(self, examples: Sequence[Example], batch: int) -> None:
        with self._changed:
            self._waiting.extend((batch, example) for example in examples)
            self._unscored.update(examples)
            if not self._works:
                self._works = True
                # A daemon, so that Ctrl-C need not wait for a slow server.
                threading.Thread(target=self._work, daemon=True).start()

    def wait(self, examples: Sequence[Example]) -> None:
        """Until none of these is on its way."""
        with self._changed:
            self._changed.wait_for(lambda: not any(self._unscored[e] for e in examples))

    def _work(self) -> None:
        while some := self._next():
            try:
                with contextlib.suppress(Exception, SystemExit):  # the caller will meet it, too
                    self._score(some)
            finally:
                with self._changed:
                    self._unscored.subtract(some)
                    self._unscored = +self._unscored
                    self._changed.notify_all()

    def _next(self) -> list[Example]:
        """All that has come of the first batch; none: the thread ends."""
        with self._changed:
            batch, some = self._waiting[0][0] if self._waiting else 0, []
            while self._waiting and self._waiting[0][0] == batch:
                some.append(self._waiting.popleft()[1])
            self._works = bool(some)
            return some


def _read(database: sqlite3.Connection, keys: Sequence[str]) -> dict[str, dict[str, float]]:
    found = {}
    for first in range(0, len(keys), _LOOKUPS):
        some = keys[first : first + _LOOKUPS]
        marks = ",".join("?" * len(some))
        query = f"SELECT key, components FROM scores WHERE key IN ({marks})"
        found.update({key: _scores(text) for key, text in database.execute(query, some)})
    return found


def _scores(text: Any) -> dict[str, float]:
    found = json.loads(text) if isinstance(text, str) else None
    scores: dict[str, float] = found if isinstance(found, dict) else {}
    if not scores or not all(type(x) is float and math.isfinite(x) for x in scores.values()):
        raise ValueError("a row holds something else than scores")
    return scores


def _write(database: sqlite3.Connection, rows: dict[str, dict[str, float]]) -> None:
    database.executemany(
        "INSERT OR REPLACE INTO scores VALUES (?, ?)",
        [(key, json.dumps(scores)) for key, scores in rows.items()],
    )
