"""`launch.generate`: rows with their own parameters, faults of rows, samples, int8."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from programs import Program, jsonl, refused

from refine_af import records
from refine_af.engine import Engine

pytestmark = pytest.mark.usefixtures("only_its_own_flags")

KEYS = ["prompt", "completion", "prompt_token_ids", "token_ids", "logprobs", "finish_reason"]
GENERATE = ("generate", "--model=random:tiny", "--max_new_tokens=6")


def test_generate_answers_each_row_with_its_own_parameters(
    program: Program, tmp_path: Path
) -> None:
    sampled = {"prompt": "ab", "temperature": 5, "seed": 7}
    rows = [
        {"prompt": "ab"},
        {"prompt_token_ids": [68, 69], "max_new_tokens": 3},
        {"prompt": "ab", "stop": "bb"},
        {"prompt": "ab", "stop": ["no", "bbb"], "presence_penalty": -1},
        sampled,
        {"prompt_token_ids": [68, 69], **sampled, "mine": "ignored"},
        sampled | {"seed": 8},
        sampled | {"top_k": 1},
    ]
    prompts, output = jsonl(tmp_path / "rows", *rows), tmp_path / "new/out"
    assert program(*GENERATE, f"--prompts={prompts}", f"--output={output}")[:2] == (0, "")
    greedy, short, stopped, stops, first, same, other, top = found = records.read_rows(output)
    assert all(list(row) == KEYS for row in found)
    assert all(row["prompt_token_ids"] == [68, 69] for row in found)
    assert [row["prompt"] for row in found] == [row.get("prompt", "") for row in rows]
    assert all(len(row["logprobs"]) == len(row["token_ids"]) for row in found)
    assert (greedy["completion"], greedy["finish_reason"]) == ("bbbbbb", "length")
    assert short["token_ids"] == greedy["token_ids"][:3] == [69] * 3
    assert (stopped["completion"], stopped["finish_reason"]) == ("", "stop")
    assert stopped["token_ids"] == [69] * 2
    assert stops["token_ids"] == [69] * 3
    assert first["token_ids"] == same["token_ids"] != other["token_ids"] != greedy["token_ids"]
    assert top["token_ids"] == greedy["token_ids"]


def test_a_bad_adapter_leaves_an_earlier_output(program: Program, tmp_path: Path) -> None:
    prompts, output = jsonl(tmp_path / "rows", {"prompt": "ab"}), tmp_path / "out"
    output.write_text("earlier\n")
    files = (f"--prompts={prompts}", f"--output={output}", f"--adapter={tmp_path}/none")
    result = program(*GENERATE, *files)
    assert result.code == 2
    assert result.err.startswith(f"error: {tmp_path}/none")
    assert output.read_text() == "earlier\n"


@pytest.mark.usefixtures("own_handlers")
def test_a_signal_says_where_the_rows_are(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it comes after the first of three."""
    write = records.write_text

    def write_then_stop(path: Path, text: str) -> None:
        write(path, text)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(records, "write_text", write_then_stop)
    prompts, output = jsonl(tmp_path / "rows", *3 * [{"prompt": "ab"}]), tmp_path / "out"
    result = program(*GENERATE, f"--prompts={prompts}", f"--output={output}")
    assert result.code == 143
    assert f"\nstopped; the rows so far are in {output}\n" in result.err
    assert len(records.read_rows(output)) == 1


def test_what_was_there_stays_until_there_is_a_row(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> Iterator[object]:
        signal.raise_signal(signal.SIGTERM)
        yield

    monkeypatch.setattr(Engine, "stream", stop)
    prompts, output = jsonl(tmp_path / "rows", {"prompt": "ab"}), jsonl(tmp_path / "out", {"a": 1})
    result = program(*GENERATE, f"--prompts={prompts}", f"--output={output}")
    assert (result.code, result.err.splitlines()[-1]) == (143, "stopped; no row was written")
    assert records.read_rows(output) == [{"a": 1}]


def test_flags_that_would_lose_something_are_refused(program: Program, tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "rows", {"prompt": "ab"})
    link = tmp_path / "link"
    link.symlink_to(rows)
    given = f"--prompts={rows}"
    message = f"--output={link}: is the file of --prompts; give another"
    assert program(*GENERATE, given, f"--output={link}") == refused(message)
    message = f"--output={tmp_path}: is a directory; expected a file to write"
    assert program(*GENERATE, given, f"--output={tmp_path}") == refused(message)
    message = f"{link}3: no such file; expected JSONL"
    assert program(*GENERATE, f"--prompts={link}3", f"--output={link}") == refused(message)
    message = f"{tmp_path}: a directory; expected JSONL"
    assert program(*GENERATE, f"--prompts={tmp_path}", f"--output={link}2") == refused(message)
    message = "--output and --prompt exclude each other: its answer is printed"
    assert program(*GENERATE, "--prompt=ab", f"--output={link}2") == refused(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "rows"]


def test_memory_that_runs_out_is_one_line_with_advice(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: object) -> None:
        jax.jit(lambda: jnp.zeros((1 << 44,)))()

    monkeypatch.setattr(Engine, "stream", greedy)
    result = program(*GENERATE, "--prompt=ab")
    assert result.code == 2
    assert result.err.splitlines()[-1] == (
        "error: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 70368744177664 bytes.)"
        ": lower --batch_size (now 16), lower --max_new_tokens (now 6), set --int8_weights (now "
        "False)"
    )


def test_generate_prints_the_continuation_of_one_prompt(program: Program) -> None:
    assert program(*GENERATE, "--prompt=ab")[:2] == (0, "bbbbbb\n")


IDS = "prompt_token_ids must be a list of integers"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{}", "expected a string 'prompt' or 'prompt_token_ids'"),
        (b'{"prompt": 3}', "expected a string 'prompt' or 'prompt_token_ids'"),
        (b'{"prompt": ""}', "the prompt is empty"),
        (b'{"prompt_token_ids": 3}', IDS),
        (b'{"prompt_token_ids": [1.5]}', IDS),
        (b'{"prompt_token_ids": [260]}', "token id 260 in the prompt: expected 0 to 259"),
        (b'{"prompt": "a", "top_p": 0}', "top_p=0.0: expected in (0, 1]"),
        (b'{"prompt": "a", "min_p": 2}', "min_p=2.0: expected in [0, 1]"),
        (b'{"prompt": "a", "temperature": "hot"}', "temperature='hot': expected float"),
        (b'{"prompt": "a", "temperature": -1}', "temperature=-1.0: expected 0 or at least 0.0001"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature=nan: expected a finite number"),
        (b'{"prompt": "a", "presence_penalty": Infinity}', "presence_penalty=inf: expected a fin"),
        (b'{"prompt": "a", "stop": 5}', "stop=5: expected a list of str"),
        (b'{"prompt": "a", "stop_token_ids": "x"}', "stop_token_ids='x': expected a list of int"),
        (b'{"prompt": "a", "max_new_tokens": 2.5}', "max_new_tokens=2.5: expected int"),
        (b'{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens=0: expected at least 1"),
        (b'{"prompt": "a", "seed": null}', "seed=None: expected int"),
        (b'{"prompt": "\xff"}', "line 2 is not UTF-8 (invalid start byte at byte 12)"),
        (b'{"prompt": "\\ud800"}', "the prompt is not a text: surrogates not allowed"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "line 2 is not valid JSON (Exceeds the"),
        (b"[" * 100_000, "line 2 is not valid JSON (maximum recursion depth exceeded"),
        (b'{"prompt": "a", "tempratur": 1}', "unknown 'tempratur'; did you mean 'temperature'?"),
        (b'{"prompt": "a", "num_samples": 0}', "num_samples=0: expected an int of at least 1"),
        (b'{"prompt": "a", "stop_token_ids": [260]}', "token id 260 in stop_token_ids: expected"),
        (b"[1]", "line 2 is not a JSON object"),
        (b'{"prompt": "a"', "line 2 is not valid JSON (Expecting ',' delimiter: line 1 column 15"),
    ],
)
def test_generate_answers_a_row_that_it_cannot_use_with_the_error(
    line: bytes, message: str, program: Program, tmp_path: Path
) -> None:
    """The rows around it are answered; the exit status says that not all was well."""
    good = b'{"prompt": "ab"}'
    prompts, output = tmp_path / "rows", tmp_path / "out"
    prompts.write_bytes(b"\n".join([good, line, good]))
    code, out, err = program(*GENERATE, f"--prompts={prompts}", f"--output={output}")
    assert (code, out) == (2, "")
    assert f"error: {output}: 1 of 3 rows hold an error, the first: row 1: {message}" in err
    first, faulty, last = records.read_rows(output)
    assert first == last and first["completion"] == "bbbbbb"
    assert (faulty["finish_reason"], faulty["completion"]) == ("error", "")
    assert faulty["error"].startswith(f"row 1: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file; expected JSONL"), (b" \n", "no rows; expected JSONL")],
)
def test_generate_needs_rows(
    content: bytes | None, message: str, program: Program, tmp_path: Path
) -> None:
    prompts = tmp_path / "rows"
    if content is not None:
        prompts.write_bytes(content)
    files = (f"--prompts={prompts}", f"--output={tmp_path / 'out'}")
    assert program(*GENERATE, *files) == refused(f"{prompts}: {message}")
    assert not (tmp_path / "out").exists()


def test_generate_draws_samples_of_each_row_in_any_order(program: Program, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "rows", {"prompt": "ab"}, {"prompt": "c", "max_new_tokens": 1})
    options = ("--temperature=5", "--top_p=0.9", "--num_samples=3", "--full_logprobs")
    found = {}
    for name in ("noas_completed", "as_completed"):
        output = tmp_path / name
        assert (
            program(*GENERATE, *options, f"--{name}", f"--prompts={prompts}", f"--output={output}")[
                0
            ]
            == 0
        )
        found[name] = records.read_rows(output)
    in_order, as_completed = found.values()
    assert [row["prompt"] for row in in_order] == ["ab"] * 3 + ["c"] * 3
    assert [row.pop("row") for row in as_completed] == [1, 1, 1, 0, 0, 0]
    assert sorted(row.pop("sample") for row in as_completed) == [0, 0, 1, 1, 2, 2]
    assert sorted(map(json.dumps, as_completed)) == sorted(map(json.dumps, in_order))
    assert len({tuple(row["token_ids"]) for row in in_order[:3]}) == 3
    assert all(
        a > b
        for row in in_order
        for a, b in zip(row["logprobs"], row["full_logprobs"], strict=True)
    )


def test_generate_says_what_is_wrong_with_one_prompt(program: Program) -> None:
    assert program(*GENERATE, "--prompt=a", "--top_k=-1") == refused(
        "top_k=-1: expected at least 0"
    )


@pytest.mark.parametrize(
    "option", [pytest.param("int8_weights", marks=pytest.mark.slow), "int8_cache"]
)
def test_generate_with_int8_says_much_the_same(
    option: str, program: Program, tmp_path: Path
) -> None:
    prompts = jsonl(tmp_path / "rows", {"prompt": "ab", "max_new_tokens": 2})
    rows = []
    for name in (f"no{option}", option):
        files = (f"--prompts={prompts}", f"--output={tmp_path / name}")
        assert program(*GENERATE, f"--{name}", *files)[0] == 0
        rows += records.read_rows(tmp_path / name)
    assert rows[0]["token_ids"] == rows[1]["token_ids"]
    assert rows[0]["logprobs"] != rows[1]["logprobs"]
    assert rows[0]["logprobs"] == pytest.approx(rows[1]["logprobs"], abs=0.02)


def test_generate_with_guesses_says_the_same(program: Program, tmp_path: Path) -> None:
    rows = {"prompt": "ab"}, {"prompt": "ab", "temperature": 5, "seed": 7, "top_k": 9}
    prompts, found = jsonl(tmp_path / "rows", *rows), []
    for count in (0, 3):
        files = (f"--prompts={prompts}", f"--output={tmp_path / str(count)}")
        assert program(*GENERATE, f"--draft_tokens={count}", *files)[0] == 0
        found.append([row["token_ids"] for row in records.read_rows(tmp_path / str(count))])
    assert found[0] == found[1]
