"""An oracle behind HTTP: examples are posted as JSON, components come back."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from refine_af.rewards import WHOLE, Example, OracleError

_BATCH = 32  # examples a request
_RETRIES, _BACKOFF = 5, 0.5  # waits of 0, 1, 2, 4, 8 seconds, or what the server asks for
_BUSY = (429, 500, 502, 503, 504)


@dataclasses.dataclass(frozen=True)
class HttpOracle:
    """POST `{"examples": [{"instruction", "input", "output"}, ...]}` to `url`.

    The answer is `{"components": {name: [number, ...]}}` or `{"rewards": [number, ...]}`. A request
    that finds nobody, a busy server or no beginning of an answer in `timeout` seconds is made
    again, five times, with growing pauses. An answer that breaks off is an error.
    """

    url: str
    timeout: float

    def __call__(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Components of any number of examples.

        Raises:
            OracleError: the server cannot be reached, or is busy for too long.
            ValueError: it refuses, or answers something else.
        """
        retry = Retry(
            total=_RETRIES,
            backoff_factor=_BACKOFF,
            status_forcelist=_BUSY,
            allowed_methods=None,  # scoring again changes nothing, so POST, too, may be repeated
            raise_on_status=False,
        )
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            parts = [
                self._ask(session, examples[first : first + _BATCH])
                for first in range(0, len(examples), _BATCH)
            ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _ask(self, session: requests.Session, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        body = {"examples": [dataclasses.asdict(example) for example in examples]}
        try:
            response = session.post(self.url, json=body, timeout=self.timeout)
            response.raise_for_status()
            return self._read(response.json(), len(examples))
        except requests.JSONDecodeError as error:
            raise ValueError(f"{self.url}: its answer is no JSON ({error})") from None
        except requests.RequestException as error:
            status = None if error.response is None else error.response.status_code
            if status is not None and status < 500 and status not in _BUSY:
                raise ValueError(f"{self.url}: {error}") from None  # one example may be at fault
            first = f"{len(examples)} examples from {examples[0].instruction[:80]!r} on"
            raise OracleError(f"reward oracle {self.url}, {first}: {error}") from None

    def _read(self, answer: Any, count: int) -> dict[str, np.ndarray]:
        if isinstance(answer, dict) and "rewards" in answer:
            answer = {"components": {WHOLE: answer["rewards"]}}
        table = answer.get("components") if isinstance(answer, dict) else None
        if not isinstance(table, dict) or not table:
            raise ValueError(f"{self.url}: expected an object with 'components' or 'rewards'")
        for name, column in table.items():
            numbers = isinstance(column, list) and all(
                type(x) is float or (type(x) is int and abs(x) <= sys.float_info.max)
                for x in column
            )
            if not numbers or len(column) != count:
                raise ValueError(f"{self.url}: expected {count} numbers as {name!r}")
        return {name: np.asarray(column, np.float64) for name, column in table.items()}
