"""What the text of a compiled program, and its trace, say of it: collectives, operations."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONSTANT = re.compile(r"constant\((\d+)\)")
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """Collectives of one kind and shape."""

    kind: str
    shape: str  # of the result on each device
    size: int  # bytes of it
    count: int  # times that it runs; in a loop of unknown length, once


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program, the most bytes in sum first.

    A loop's length is the largest constant that its condition compares with.
    """
    found: dict[str, list[tuple[str, str, int]]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    bodies = _bodies(text)
    entry = ""
    for name, (is_entry, lines) in bodies.items():
        entry = name if is_entry else entry
        found[name] = [one for line in lines for one in _collective(line)]
        calls[name] = [call for line in lines for call in _calls(line, bodies)]
    counts: Counter[tuple[str, str, int]] = Counter()

    def visit(name: str, times: int) -> None:
        for one in found.get(name, ()):
            counts[one] += times
        for callee, often in calls.get(name, ()):
            visit(callee, times * often)

    visit(entry, 1)
    listed = [Collective(*one, count) for one, count in counts.items()]
    return sorted(listed, key=lambda c: -c.size * c.count)


def _bodies(text: str) -> dict[str, tuple[bool, list[str]]]:
    """Lines of each computation, and whether it is the entry."""
    bodies: dict[str, tuple[bool, list[str]]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            lines = []
            bodies[start[2]] = bool(start[1]), lines
        else:
            lines.append(line)
    return bodies


def _collective(line: str) -> Iterator[tuple[str, str, int]]:
    match = _COLLECTIVE.search(line)
    if not match:
        return
    arrays = [(f"{kind}[{dims}]", _size(kind, dims)) for kind, dims in _ARRAY.findall(match[1])]
    if match[3] and match[2] != "all-reduce":  # (operand, result, ...)
        arrays = [max(arrays, key=lambda array: array[1])]
    yield match[2], " ".join(shape for shape, _ in arrays), sum(size for _, size in arrays)


def _size(kind: str, dims: str) -> int:
    bits = re.search(r"\d+", kind)
    width = int(bits[0]) if bits else 8
    return math.prod(int(n) for n in dims.split(",") if n) * width // 8


def _calls(line: str, bodies: dict[str, tuple[bool, list[str]]]) -> Iterator[tuple[str, int]]:
    loop = _WHILE.search(line)
    if loop:
        condition = bodies.get(loop[1], (False, []))[1]
        limits = [int(n) for text in condition for n in _CONSTANT.findall(text)]
        yield loop[2], max(limits, default=1)
    for name in _CALLED.findall(line):
        yield name, 1
    for names in _BRANCHES.findall(line):
        for name in names.split(","):
            yield name.strip().lstrip("%"), 1


def operations(jaxpr: core.Jaxpr) -> float:
    """Floating-point operations of all products of a traced program, over all devices.

    Loops count as often as they run; a `while` loop once, and what a kernel does not at all.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * inner
        elif name == "cond":
            total += max(operations(branch.jaxpr) for branch in params["branches"])
        elif name == "while":
            total += operations(params["body_jaxpr"].jaxpr)
        elif name != "pallas_call":
            times = params["length"] if name == "scan" else 1
            total += times * sum(map(operations, _inner(params)))
    return total


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """Programs inside an equation."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
