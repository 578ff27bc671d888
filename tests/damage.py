"""Damage to valid input, for the fuzzers, and what a reader may do about it."""

import copy
import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
from hypothesis import strategies as st

from refine_af.launch import flags

T = TypeVar("T")

ODD_TEXTS = [
    *("", " ", "\0", "\r\n", "\u2028", "\ud800", "\ufeff", "e\u0301", "a" * 300),
    *("../../x", "/etc/passwd", "~/x", "C:\\x", "https://localhost/x", "owner/name"),
    *("{{ 7*7 }}", "{% for a in range(9) %}", "$x^{2$", "</script><script>alert(1)</script>"),
]
ODD_NUMBERS = [
    *(0, -1, 1, 2, 3, 255, 2**31 - 1, 2**31, 2**32, 2**60, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, -0.0, -1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
]
ODD_VALUES = st.sampled_from(
    [None, True, False, [], {}, [[]], {"": {}}, [None] * 9, *ODD_TEXTS, *ODD_NUMBERS]
) | st.text(max_size=20)
# What JSON itself cannot say, or not to everyone.
_ODD_BYTES = [
    *(b"", b"\0", b"\n", b"\r", b'"', b"\\", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf"),
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b'"\\u0000"', b"\xe2\x80\xa8"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"[" * 700 + b"]" * 700, b"," * 9, b'"id":1,'),
    *(b"\xff" * 4, b"\xff" * 8, b"\0" * 8, b"\0" * 7 + b"\x10", b"\0" * 7 + b"\x80"),
    *(n.to_bytes(8, "little") for n in (1, 2**16, 2**31, 2**40, 2**60, 2**63 - 1)),
]
# What a reader never does, by the names of sys.audit: start a program, use the network.
_NEVER = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
_NEVER += ("socket.getaddrinfo", "pty.spawn")
_HEADROOM = 1 << 30  # bytes that a reader of a small file may ask for at most
_MOST_SECONDS = 60  # an example: this finds what hangs, not what is slow on a busy machine

_seen: list[str] = []
_watching = False


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event in _NEVER:
        _seen.append(f"{event}{args!r:.200}")


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[None]:
    """Fails on a program that was started and on the network; huge allocations are refused."""
    global _watching
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _HEADROOM, hard))
    _seen.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert not _seen, _seen


def read(reader: Callable[[], T], *where: Path | str) -> T | None:
    """What a reader gives; None where it refuses, in one line that names the input.

    Args:
        where: the input; one of several will do.

    Whatever else it raises goes through, and so does a ValueError that no `raise` of this project
    made: a program would show its traceback.
    """
    with watched():
        try:
            return reader()
        except (ValueError, OSError) as error:
            if not flags._is_for_user(error):
                raise
            message = str(error)
    assert any(str(name) in message for name in where), message
    assert "\n" not in message, message
    return None


def written_into(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def fuzz(share: float = 1.0) -> Callable[[T], T]:
    """Settings of a fuzzer: this share of the profile's examples."""
    usual = hypothesis.settings.default
    assert usual is not None
    return hypothesis.settings(
        max_examples=max(round(usual.max_examples * share), 1),
        deadline=_MOST_SECONDS * 1000,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@st.composite
def edited(draw: st.DrawFn, content: bytes) -> bytes:
    """A few places of a file overwritten, cut out, doubled, or stuffed with something odd."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "put", "insert", "cut", "end", "double", "random"]))
        if kind == "flip":
            byte = draw(st.integers(0, 255))
            content = content[:at] + bytes([byte]) + content[at + 1 :]
        elif kind == "random":
            some = draw(st.binary(max_size=16))
            content = content[:at] + some + content[at + len(some) :]
        elif kind in ("put", "insert"):
            odd = draw(st.sampled_from(_ODD_BYTES))
            content = content[:at] + odd + content[at + (len(odd) if kind == "put" else 0) :]
        elif kind == "end":
            content = content[:at]
        else:
            size = draw(st.integers(1, 64))
            part = content[at : at + size]
            content = content[:at] + (part * 2 if kind == "double" else b"") + content[at + size :]
    return content


def _places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a tree."""
    if isinstance(node, dict):
        items: list[tuple[Any, Any]] = list(node.items())
    elif isinstance(node, list):
        items = list(enumerate(node))
    else:
        return []
    return [place for key, value in items for place in [(node, key), *_places(value)]]


@st.composite
def changed(draw: st.DrawFn, value: Any, odd: st.SearchStrategy[Any] = ODD_VALUES) -> Any:
    """A copy of a tree of dictionaries and lists with some values replaced, removed or renamed."""
    root = {"": copy.deepcopy(value)}
    for _ in range(draw(st.integers(1, 3))):
        node, key = draw(st.sampled_from(_places(root)))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "wrap"]))
        if kind == "replace":
            node[key] = copy.deepcopy(draw(odd))
        elif kind == "wrap":
            node[key] = [node[key]]
        elif node is not root:
            old = node.pop(key)
            if kind == "rename" and isinstance(node, dict):
                node[draw(st.sampled_from(ODD_TEXTS))] = old
    return root.get("")


def json_files(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON file of this content, with odd values or odd bytes."""
    whole = json.dumps(value).encode()
    odd = changed(value).map(lambda value: json.dumps(value).encode())
    return odd | edited(whole)


def jsonl_files(*rows: Any) -> st.SearchStrategy[bytes]:
    """The same of lines; the last one ends with its newline."""
    whole = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    odd = changed(list(rows)).map(
        lambda rows: b"".join(
            json.dumps(row).encode() + b"\n" for row in (rows if isinstance(rows, list) else [rows])
        )
    )
    return odd | edited(whole)
