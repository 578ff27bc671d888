"""What the HTML pages share: their templates, and how these write numbers and text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

_NONE, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
_MAX_TEXT = 1200  # characters of one shown text


def environment() -> jinja2.Environment:
    """Where the templates are found; text in them is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clip": clip,
        "count": lambda number: f"{number:,}",
        "duration": _duration,
        "settings": _settings,
        "fixed": _fixed,
        "share": _share,
        "short": _short,
        "signed": _signed,
        "interval": _interval,
    }
    return environment


def clip(text: str, length: int = _MAX_TEXT) -> str:
    """The beginning of a text, with an ellipsis where something is left out."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _short(number: float | None, digits: int = 3) -> str:
    """A number of so many significant digits, or of all that its integer part has."""
    if number is None:
        return _NONE
    large = abs(number) >= 10**digits - 0.5
    text = f"{number:,.0f}" if large else f"{number:.{digits}g}"
    return text.replace("-", _MINUS)


def _fixed(number: float | None, decimals: int) -> str:
    """A number with so many decimals."""
    return _NONE if number is None else f"{number:z.{decimals}f}".replace("-", _MINUS)


def _signed(number: float, decimals: int, sign: str = "+") -> str:
    """A number with its sign and so many decimals."""
    return f"{number:{sign}.{decimals}f}".replace("-", _MINUS)


def _interval(ends: tuple[float, float] | None, decimals: int, sign: str = "+") -> str:
    """Its ends, each with its sign unless that is empty."""
    return _NONE if ends is None else " to ".join(_signed(end, decimals, sign) for end in ends)


def _share(part: float, whole: float) -> str:
    """`part` of `whole` in percent."""
    if not whole:
        return _NONE
    return "<1%" if 0 < part / whole < 0.005 else f"{part / whole:.0%}"


def _duration(seconds: float) -> str:
    """`42.0 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _settings(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line `path.to.field = value` for every leaf of a nested config."""
    lines = []
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            lines += _settings(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} = {json.dumps(value, ensure_ascii=False)}")
    return lines
