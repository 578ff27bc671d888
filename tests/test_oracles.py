"""Oracles by name: a user's function, rules, a server, several at once, and what is remembered."""

import contextlib
import dataclasses
import http.server
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_af import http_oracle, oracles, rewards
from refine_af.configs import tiny
from refine_af.http_oracle import HttpOracle
from refine_af.rewards import Example, Oracle
from refine_af.rule_oracle import rules
from refine_af.score_cache import CachedOracle

EXAMPLES = [Example("Sing.", "", "la la"), Example("Add.", "1 2", "3")]


def no_base() -> Any:
    raise AssertionError("this oracle needs no model")


def load(name: str, known: Path | None = None, **options: Any) -> Oracle:
    config = tiny.get_config()
    reward = dataclasses.replace(config.reward, oracle=name, **options)
    return oracles.load(dataclasses.replace(config, reward=reward), no_base, known)


# A user's function


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return f"{path}:score"


def test_a_function_may_give_components_or_the_reward_itself(tmp_path: Path) -> None:
    lengths = "[len(e.output) for e in examples]"
    named = write(tmp_path / "a.py", f"def score(examples): return {{'length': {lengths}}}")
    plain = write(tmp_path / "b.py", f"def score(examples): return {lengths}")
    assert load(named)(EXAMPLES) == {"length": [5, 1]}
    judged = rewards.judge(load(plain), EXAMPLES, [True, True], tiny.get_config().reward)
    assert [j.reward for j in judged] == [5.0, 1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(examples): pass", r"r\.py: no function 'score'; it has \['other'\]"),
        ("score = 1", "no function 'score'"),
        (
            "from oracle_beside import nothing",
            r"r\.py:1: ImportError: cannot import name 'nothing'",
        ),
        ("import nothing_of_the_kind", r"r\.py:1: ModuleNotFoundError: No module named 'nothing"),
        ("def score(", "r.py: SyntaxError"),
    ],
)
def test_a_file_that_cannot_serve_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "oracle_beside.py").write_text("")
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "r.py", text))


def test_a_fault_has_its_line_where_the_path_is_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "r.py", "def score(examples):\n    return 1 / 0\n")
    (tmp_path / "here").mkdir()
    for folder, name in ((tmp_path, "r.py"), (tmp_path / "here", "../r.py")):
        monkeypatch.chdir(folder)
        with pytest.raises(ValueError, match=r"r\.py:2: ZeroDivisionError"):
            load(f"{name}:score")(EXAMPLES)


def test_a_file_may_have_dataclasses(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Weights:\n"
        "    length: float = 2.0\n"
        "def score(examples): return [Weights().length] * len(examples)\n"
    )
    np.testing.assert_array_equal(load(write(tmp_path / "r.py", text))(EXAMPLES)["reward"], [2, 2])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no such file; expected FILE\.py:FUNCTION"):
        load("missing.py:score")
    with pytest.raises(
        ValueError, match=r"'rule': expected FILE\.py:FUNCTION.*did you mean 'rules'"
    ):
        load("rule")
    with pytest.raises(ValueError, match="rules take no argument"):
        load("rules:strict")
    with pytest.raises(ValueError, match=r"download MingZhong/unieval-dialog and give its dir"):
        load("unieval")


def test_check_finds_a_typo_and_reads_no_model() -> None:
    config = tiny.get_config()
    oracles.check(config)
    wrong = dataclasses.replace(config.reward, oracle="rules,trianed:here")
    with pytest.raises(ValueError, match="did you mean 'trained'"):
        oracles.check(dataclasses.replace(config, reward=wrong))


@pytest.mark.parametrize(
    ("line", "fault"), [("1 / 0", "ZeroDivisionError: division by zero"), ("exit(3)", "SystemExit")]
)
def test_a_fault_in_a_function_has_its_line(tmp_path: Path, line: str, fault: str) -> None:
    text = f"def helper():\n    {line}\n\ndef score(examples):\n    helper()\n"
    oracle = load(write(tmp_path / "r.py", text))
    with pytest.raises(ValueError, match=rf"'Sing\.' .*r\.py:2: {fault}"):
        rewards.components(oracle, EXAMPLES)


def test_joined_oracles_give_all_components_once(tmp_path: Path) -> None:
    mine = write(tmp_path / "a.py", "def score(examples): return {'mine': [1.0] * len(examples)}")
    names = ["length", "format", "language", "variety", "mine"]
    assert list(load(f"rules, {mine}")(EXAMPLES)) == names
    with pytest.raises(ValueError, match=r"two of its oracles give \['mine'\]"):
        load(f"{mine},{mine}")(EXAMPLES)


# Rules


@pytest.mark.parametrize(
    ("name", "output", "expected"),
    [
        ("length", "yes", 1 / 3),
        ("length", "one two three", 1.0),
        ("length", "word " * 300, 0.5),
        ("format", "A whole sentence.", 1.0),
        ("format", "a text that stops in the", 2 / 3),
        ("format", "Output: a (bracket and the", 0.0),
        ("language", "A sentence.", 1.0),
        ("language", "Да no", 0.5),
        ("language", "42", 1.0),
        ("variety", "a b c d", 1.0),
        ("variety", "a b c a b c a b c", 3 / 7),
        ("variety", "", 1.0),
    ],
)
def test_rules_by_hand(name: str, output: str, expected: float) -> None:
    assert rules([Example("Say something.", "", output)])[name] == pytest.approx(expected)


# A server


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Any], tuple[int, Any]]], str]]:
    """Starts a server that answers what a function of the request says; gives its address."""
    servers = []

    def start(answer: Callable[[Any], tuple[int, Any]]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, content = answer(body)
                self.send_response(status)
                with contextlib.suppress(BrokenPipeError):  # nobody waits any more
                    self.end_headers()
                    self.wfile.write(json.dumps(content).encode())

            def log_message(self, *_: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/score"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_scores_in_batches(serve: Any) -> None:
    sizes = []

    def answer(body: Any) -> tuple[int, Any]:
        sizes.append(len(body["examples"]))
        lengths = [len(e["instruction"] + e["input"] + e["output"]) for e in body["examples"]]
        return 200, {"components": {"length": lengths}}

    found = load(serve(answer))(EXAMPLES * 20)
    np.testing.assert_array_equal(found["length"], [10, 8] * 20)
    assert sizes == [32, 8]


def test_a_busy_server_is_asked_again(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_oracle, "_BACKOFF", 0.01)
    calls = []

    def answer(body: Any) -> tuple[int, Any]:
        calls.append(body)
        return (503, {}) if len(calls) < 4 else (200, {"rewards": [1, 2.5]})

    np.testing.assert_array_equal(load(serve(answer))(EXAMPLES)["reward"], [1, 2.5])
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (404, {}, "failed on the instruction 'Sing.' .*: 404 Client Error"),
        (503, {}, "503 Server Error"),
        (200, [], "expected an object with 'components' or 'rewards'"),
        (200, {"rewards": []}, "expected 1 numbers as 'reward'"),
        (200, {"components": {"a": ["x", 1]}}, "expected 1 numbers as 'a'"),
    ],
)
def test_a_server_that_does_not_answer_well(
    serve: Any, monkeypatch: pytest.MonkeyPatch, status: int, content: Any, message: str
) -> None:
    monkeypatch.setattr(http_oracle, "_BACKOFF", 0.01)
    address = serve(lambda _: (status, content))
    with pytest.raises(ValueError, match=message) as error:
        rewards.components(load(address), EXAMPLES)
    assert address in str(error.value)


def test_an_answer_that_is_no_json_is_named() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(ValueError, match="its answer is no JSON"):
            HttpOracle(f"http://127.0.0.1:{server.server_port}/", timeout=5.0)(EXAMPLES)


def test_no_server_and_a_slow_one(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_oracle, "_BACKOFF", 0.01)
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:1/, .*Max retries exceeded"):
        HttpOracle("http://127.0.0.1:1/", timeout=1.0)(EXAMPLES)
    with pytest.raises(ValueError, match=r"oracle http.* 2 examples from 'Sing\.' on: "):
        rewards.components(HttpOracle("http://127.0.0.1:1/", timeout=1.0), EXAMPLES)
    released = threading.Event()

    def answer(_: Any) -> tuple[int, Any]:
        released.wait(5)
        return 200, {"rewards": [0, 0]}

    monkeypatch.setattr(http_oracle, "_RETRIES", 1)
    with pytest.raises(ValueError, match="timed out"):
        HttpOracle(serve(answer), timeout=0.05)(EXAMPLES)
    released.set()


# Memory


@dataclasses.dataclass
class Counting:
    """Scores by length and counts what it is asked."""

    asked: list[Example] = dataclasses.field(default_factory=list)

    def __call__(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        self.asked += examples
        return {"a": np.asarray([len(e.output) / 3 for e in examples]), "b": np.ones(len(examples))}


def test_equal_examples_are_scored_once_and_never_again(tmp_path: Path) -> None:
    inner = Counting()
    first = CachedOracle(inner, tmp_path / "new" / "scores", "an oracle")
    found = first([*EXAMPLES, *EXAMPLES[::-1]])
    np.testing.assert_array_equal(found["a"], np.asarray([5, 1, 1, 5]) / 3)
    assert inner.asked == EXAMPLES
    again = CachedOracle(inner, tmp_path / "new" / "scores", "an oracle")(EXAMPLES[1:])
    assert again["a"] == [1 / 3] and inner.asked == EXAMPLES  # to the last bit
    CachedOracle(inner, tmp_path / "new" / "scores", "another")(EXAMPLES)
    assert inner.asked == EXAMPLES * 2


def test_more_examples_than_a_query_holds(tmp_path: Path) -> None:
    many = [Example("a", str(i), "x" * (i % 7)) for i in range(1200)]
    cached = CachedOracle(Counting(), tmp_path / "scores", "")
    for _ in range(2):
        np.testing.assert_array_equal(cached(many)["a"] * 3, [i % 7 for i in range(1200)])


def test_scores_that_cannot_be_used_are_not_remembered(tmp_path: Path) -> None:
    answers = [[np.nan], [1.0, 2.0], [1.0]]
    oracle = CachedOracle(lambda _: {"a": np.asarray(answers.pop(0))}, tmp_path / "s", "")
    for message in (r"^reward oracle gave {'a': nan}", r"^reward oracle gave 'a' of shape \(2,\)"):
        with pytest.raises(ValueError, match=message):
            rewards.components(oracle, EXAMPLES[:1])
    assert rewards.components(oracle, EXAMPLES[:1])["a"] == [1.0]


def test_scores_of_unlike_components_are_not_mixed(tmp_path: Path) -> None:
    answers = [{"a": [1.0]}, {"b": [1.0]}]
    oracle = CachedOracle(lambda _: answers.pop(0), tmp_path / "s", "")
    for example in EXAMPLES:
        oracle([example])
    with pytest.raises(ValueError, match=r"components \['a'\], and some with \['b'\]; remove"):
        oracle(EXAMPLES)


def test_an_oracle_changes_its_identity_with_what_it_is(tmp_path: Path) -> None:
    assert oracles.fingerprint("a-hub/name") == ""
    file = tmp_path / "weights"
    file.write_text("a")
    before = oracles.fingerprint(str(tmp_path))
    file.write_text("ab")
    after = oracles.fingerprint(str(tmp_path))
    assert before not in ("", after)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert oracles.fingerprint(str(tmp_path)) == after


def test_what_was_asked_ahead_is_there_when_it_is_wanted(tmp_path: Path) -> None:
    inner = Counting()
    oracle = CachedOracle(inner, tmp_path / "scores", "", ahead=True)
    for example in EXAMPLES:
        oracle.prefetch([example])
    assert oracle(EXAMPLES)["b"].tolist() == [1, 1]
    assert sorted(inner.asked, key=str) == sorted(EXAMPLES, key=str)
    resting = CachedOracle(Counting(), tmp_path / "others", "")
    resting.prefetch(EXAMPLES)
    assert resting.oracle.asked == []


def test_a_rollout_does_not_wait_for_the_scores_of_the_next(tmp_path: Path) -> None:
    """The oracle gets stuck in the second one, whose answers were asked for before the call."""
    stuck, go_on = threading.Event(), threading.Event()

    def inner(examples: Sequence[Example]) -> dict[str, np.ndarray]:
        if examples[0] == EXAMPLES[1]:
            stuck.set()
            assert go_on.wait(60)
        return {"length": np.asarray([float(len(e.output)) for e in examples])}

    oracle = CachedOracle(inner, tmp_path / "scores", "", ahead=True)
    oracle.prefetch(EXAMPLES[:1], 0)
    oracle.prefetch(EXAMPLES[1:], 1)
    assert stuck.wait(60)
    assert len(oracle(EXAMPLES[:1])["length"]) == 1
    go_on.set()
    assert len(oracle(EXAMPLES)["length"]) == len(EXAMPLES)


def test_a_fault_that_came_ahead_is_told_when_the_oracle_is_called(tmp_path: Path) -> None:
    def fails(_: Sequence[Example]) -> dict[str, np.ndarray]:
        raise ValueError("no")

    oracle = CachedOracle(fails, tmp_path / "scores", "", ahead=True)
    oracle.prefetch(EXAMPLES)
    with pytest.raises(ValueError, match=r"reward oracle failed on .*'Sing\.'.*: no"):
        rewards.components(oracle, EXAMPLES)


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores"
    path.write_text("not a database, but long enough to be looked at " * 50)
    with pytest.raises(ValueError, match=f"{path}: no usable cache of scores"):
        CachedOracle(Counting(), path, "")(EXAMPLES)


def test_a_config_remembers_where_it_says(tmp_path: Path) -> None:
    mine = write(tmp_path / "a.py", "def score(examples): return [1.0] * len(examples)")
    assert not isinstance(load(mine), CachedOracle)
    runs = load(mine, tmp_path / "run")
    named = load(mine, tmp_path / "run", cache=str(tmp_path / "shared"))
    assert isinstance(runs, CachedOracle) and runs.path == tmp_path / "run" and runs.ahead
    assert isinstance(named, CachedOracle) and named.path == tmp_path / "shared"
    write(tmp_path / "a.py", "def score(examples): return [2.0] * len(examples)")
    changed = load(mine, tmp_path / "run")
    assert isinstance(changed, CachedOracle) and changed.identity != runs.identity
