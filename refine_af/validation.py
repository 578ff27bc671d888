"""Checks of a config's fields: each says what the field is and what was expected of it."""

import difflib
from numbers import Number
from typing import Any


def require(condition: bool, what: str) -> None:
    """Raise ValueError with `what` unless `condition` holds."""
    if not condition:
        raise ValueError(what)


def require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is in `allowed`; names the nearest."""
    near = difflib.get_close_matches(value, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    require(value in allowed, f"{name}={value!r}: expected one of {allowed}{hint}")


def require_at_least(minimum: int, config: Any, section: str, *names: str) -> None:
    """Raise ValueError unless each named field of `config` is at least `minimum`."""
    for name in names:
        value = _number(config, section, name)
        require(value >= minimum, f"{section}{name}={value}: expected at least {minimum}")


def require_positive(config: Any, section: str, *names: str) -> None:
    """Raise ValueError unless each named field of `config` is above 0."""
    for name in names:
        value = _number(config, section, name)
        require(value > 0, f"{section}{name}={value}: expected > 0")


def _number(config: Any, section: str, name: str) -> Any:
    value = getattr(config, name)
    require(isinstance(value, Number), f"{section}{name}={value!r}: expected a number")
    return value
