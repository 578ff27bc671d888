"""A config rebuilt from plain values, such as those of a JSON file."""

import dataclasses
import math
import sys
import typing
from typing import Any

from refine_af.validation import require


def from_dict(cls: type[Any], values: dict[str, Any], path: str = "") -> Any:
    """Rebuild a (nested) config dataclass, which validates it.

    A whole number becomes a float, and a list a tuple, where the field is one.

    Raises:
        ValueError: a value, named after `path`, is missing, has the wrong type or is not possible.
    """
    where = path.removesuffix(".") or cls.__name__
    require(isinstance(values, dict), f"{where}={values!r}: expected the fields of {cls.__name__}")
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name = path + field.name
        require(field.name in values, f"{name!r} is missing")
        value = values[field.name]
        if dataclasses.is_dataclass(field.type):
            fields[field.name] = from_dict(typing.cast(type, field.type), value, f"{name}.")
        else:
            fields[field.name] = _typed(name, field.type, value)
    return cls(**fields)


def _typed(name: str, kind: Any, value: Any) -> Any:
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if kind in (bool, int, float, str):
        require(type(value) is kind, f"{name}={value!r}: expected {kind.__name__}")
        require(
            kind is not float or math.isfinite(value), f"{name}={value}: expected a finite number"
        )
        return value
    assert typing.get_origin(kind) is tuple, f"{name}: fields of type {kind} cannot be read"
    item = typing.get_args(kind)[0]
    fits = isinstance(value, list | tuple) and all(type(x) is item for x in value)
    require(fits, f"{name}={value!r}: expected a list of {item.__name__}")
    return tuple(value)
