"""What the text of a compiled program, and its trace, say of it: collectives, operations."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core
from jax.interpreters import partial_eval

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_FUSION = re.compile(r" fusion\(.*calls=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONSTANT = re.compile(r"constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")


Shape = tuple[int, ...]


class Collective(NamedTuple):
    """Collectives of one kind and shape."""

    kind: str
    shape: str  # of the result on each device
    size: int  # bytes of it
    times: int  # that it runs; in a loop of unknown length, once

    @property
    def sizes(self) -> set[Shape]:
        """Of each array of the result, its axes in order of size, those of one entry left out."""
        arrays = (dims.split(",") for _, dims in _ARRAY.findall(self.shape))
        return {tuple(sorted(int(n) for n in dims if n not in ("", "1"))) for dims in arrays}


class _Found(NamedTuple):
    """A collective's line.

    In fusions, lines of one channel are pieces of one collective. Elsewhere each is one of its own:
    a function that is called several times gives all its copies the same channel.
    """

    kind: str
    shape: str
    size: int
    channel: str  # the line itself where it is not in a fusion


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program, the most bytes in sum first.

    A loop's length is what the compiler noted, or else the largest constant that its condition
    compares with.
    """
    found: dict[str, list[tuple[str, _Found]]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    bodies, fusions = _bodies(text), set(_FUSION.findall(text))
    entry = ""
    for name, (is_entry, lines) in bodies.items():
        entry = name if is_entry else entry
        found[name] = [(line, one) for line in lines for one in _collective(line, name in fusions)]
        calls[name] = [call for line in lines for call in _calls(line, bodies)]
    times: Counter[tuple[str, _Found]] = Counter()

    def visit(name: str, often: int) -> None:
        for one in found.get(name, ()):
            times[one] += often
        for callee, repeated in calls.get(name, ()):
            visit(callee, often * repeated)

    visit(entry, 1)
    by_channel: dict[_Found, int] = {}
    for (_, one), often in times.items():
        by_channel[one] = min(by_channel.get(one, often), often)
    counts: Counter[tuple[str, str, int]] = Counter()
    for one, often in by_channel.items():
        counts[one[:3]] += often
    listed = [Collective(*one, often) for one, often in counts.items()]
    return sorted(listed, key=lambda c: -c.size * c.times)


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


def _collective(line: str, fused: bool) -> Iterator[_Found]:
    match = _COLLECTIVE.search(line)
    if not match:
        return
    arrays = [(f"{kind}[{dims}]", _size(kind, dims)) for kind, dims in _ARRAY.findall(match[1])]
    if match[3] and match[2] != "all-reduce":  # (operands, results, numbers)
        arrays = [array for array in arrays if array[0] not in ("u32[]", "s32[]")]
        arrays = arrays[len(arrays) // 2 :]
    channel = _CHANNEL.search(line) if fused else None
    shape, size = " ".join(shape for shape, _ in arrays), sum(size for _, size in arrays)
    yield _Found(match[2], shape, size, channel[1] if channel else line)


def _size(kind: str, dims: str) -> int:
    bits = re.search(r"\d+", kind)
    width = int(bits[0]) if bits else 8
    return math.prod(int(n) for n in dims.split(",") if n) * width // 8


def _calls(line: str, bodies: dict[str, tuple[bool, list[str]]]) -> Iterator[tuple[str, int]]:
    loop = _WHILE.search(line)
    if loop:
        condition = bodies.get(loop[1], (False, []))[1]
        limits = [int(n) for text in condition for n in _CONSTANT.findall(text)]
        noted = _TRIPS.search(line)
        yield loop[2], int(noted[1]) if noted else max(limits, default=1)
    for name in _CALLED.findall(line):
        yield name, 1
    for names in _BRANCHES.findall(line):
        for name in names.split(","):
            yield name.strip().lstrip("%"), 1


def shapes_in(text: str) -> set[Shape]:
    """Shapes of all results of a compiled program, on one device."""
    return {
        tuple(int(n) for n in dims.split(",") if n)
        for line in text.splitlines()
        for _, dims in _ARRAY.findall(line.partition(" = ")[2].partition("(%")[0])
    }


def shapes_made(program: core.ClosedJaxpr, least: int) -> set[Shape]:
    """Shapes of what a traced program computes, over all devices: those of `least` bytes and more.

    Left out is what a kernel or a device does for itself.
    """
    return set(_shapes(program.jaxpr, least))


def _shapes(jaxpr: core.Jaxpr, least: int) -> Iterator[Shape]:
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            dtype = getattr(variable.aval, "dtype", None)  # a token has none
            if dtype is not None and math.prod(_shape(variable)) * dtype.itemsize >= least:
                yield _shape(variable)
        if equation.primitive.name not in ("pallas_call", "shard_map"):
            for inner in _inner(equation.params):
                yield from _shapes(inner, least)


def operations(program: core.ClosedJaxpr) -> float:
    """Floating-point operations of all products of a traced program, over all devices.

    Loops count as often as they run; a `while` loop once, and what a kernel does not at all. What
    nobody asks for, gradients of frozen weights, is left out, as by the compiler.
    """
    used, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return _operations(used)


def _operations(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = _shape(equation.invars[0])
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * math.prod(_shape(equation.outvars[0])) * inner
        elif name == "cond":
            total += max(_operations(branch.jaxpr) for branch in params["branches"])
        elif name == "while":
            total += _operations(params["body_jaxpr"].jaxpr)
        elif name != "pallas_call":
            times = params["length"] if name == "scan" else 1
            total += times * sum(map(_operations, _inner(params)))
    return total


def _shape(variable: Any) -> Shape:
    shape: Shape = variable.aval.shape
    return shape


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """Programs inside an equation."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
