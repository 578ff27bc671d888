"""What the fuzzers of test_fuzz*.py found, one test a crash, and what input must never reach."""

import dataclasses
import json
import socket
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import gguf as gguf_lib
import huggingface_hub
import numpy as np
import pytest
from damage import read
from decoders import random_params, write_directory
from programs import jsonl
from safetensors.numpy import save_file

from refine_af import pipeline, records, rlaf, seeds, superni, tokens, trained_oracle
from refine_af.config import Experiment, Lora
from refine_af.config_reading import from_dict
from refine_af.configs import tiny
from refine_af.http_oracle import HttpOracle
from refine_af.instances import InstanceStage
from refine_af.launch import _files, flags
from refine_af.models import convert, gguf, hf_config, sources, tensor_files
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.registry import PRESETS
from refine_af.report import write_report
from refine_af.rewards import Example
from refine_af.score_cache import CachedOracle

TINY = PRESETS["tiny"]
DEEP, LONG, HALF = "[" * 100_000, "9" * 5000, '"\\ud800"'


def refusal(reader: Callable[[], Any], where: Path | str) -> str:
    """The line in which it says no, `damage.read`'s rules kept."""
    assert read(reader, where) is None
    with pytest.raises((ValueError, OSError)) as error:
        reader()
    return str(error.value)


# JSON


@pytest.mark.parametrize("value", [DEEP, LONG, HALF], ids=["deep", "long", "half"])
def test_json_that_python_cannot_hold(value: str, tmp_path: Path) -> None:
    """Seeds, tasks, rows and objects: RecursionError, a bare ValueError, a late encoding error."""
    path = tmp_path / "file"
    path.write_text(f'{{"a": {value}}}\n')
    assert "not valid JSON" in refusal(lambda: seeds.load(path), f"{path}:1")
    assert "not valid JSON" in refusal(lambda: records.read_rows(path), f"{path}:1")
    assert "not valid JSON" in refusal(lambda: records.read_json(path), path)
    assert "expected JSON in UTF-8" in refusal(lambda: superni.load_task(path), path)


@pytest.mark.parametrize("value", ["NaN", "[1e999]", "-Infinity"])
def test_a_row_with_what_could_not_be_written_again(value: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"output": "a"}}\n{{"output": "b", "mine": {value}}}\n')
    message = refusal(lambda: _files.read_input(path, ("output",)), f"{path}:2")
    assert "not valid JSON" in message


TINY_RUN = tiny.get_config()
TASK = {"id": "a", "instruction": "Say it.", "input": "", "output": "it", "batch": 0}


@pytest.mark.parametrize("label", [{}, {"is_classification": "no"}], ids=["missing", "text"])
def test_rows_of_a_workdir_without_their_label(
    label: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of instructions; and of instances, when the data set is made of them."""
    run = pipeline.Run(TINY_RUN, tmp_path)
    path = jsonl(tmp_path / "instructions.jsonl", TASK | label)
    message = refusal(lambda: pipeline.generate_instructions(run), f"{path}: row 0: is_class")
    assert message.endswith("expected true or false")
    monkeypatch.setattr(pipeline.Run, "accepted_instructions", lambda _: [])
    monkeypatch.setattr(pipeline.Run, "base", None)
    monkeypatch.setattr(rlaf, "tuned_policy", lambda *_: None)
    monkeypatch.setattr(InstanceStage, "run", lambda *_: None)
    path = jsonl(tmp_path / "instances.jsonl", TASK | label)
    refusal(lambda: pipeline.generate_instances(run), f"{path}: row 0: is_classification=")
    jsonl(path, TASK | {"is_classification": False})
    path = jsonl(tmp_path / "rejected_instances.jsonl", {"batch": 0})
    refusal(lambda: pipeline.generate_instances(run), f"{path}:1: 'reason' is missing")


@pytest.mark.parametrize("earlier", [3, [3], "abc", None])
def test_a_config_on_record_with_other_hashes_than_texts(earlier: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "config.json", {"earlier": earlier})
    refusal(lambda: pipeline.claim(TINY_RUN, tmp_path, force=False), f"{path}: earlier=")


@pytest.mark.parametrize("seconds", ["long", None, True])
def test_timings_that_are_no_numbers(
    seconds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told, unless the stage itself has failed: that is told instead."""
    run = pipeline.Run(TINY_RUN, tmp_path)
    path = jsonl(tmp_path / "timings.json", {"evaluate": seconds})
    monkeypatch.setitem(pipeline.STAGES, "evaluate", lambda _: True)
    refusal(lambda: pipeline.run_stage(run, "evaluate"), f"{path}: evaluate={seconds!r}")

    def fail(_: pipeline.Run) -> bool:
        raise ValueError("the stage's own")

    monkeypatch.setitem(pipeline.STAGES, "evaluate", fail)
    with pytest.raises(ValueError, match=r"^the stage's own$"):
        pipeline.run_stage(run, "evaluate")


@pytest.mark.parametrize("row", [{}, {"batch": "1"}, {"batch": True}, {"batch": -1}])
def test_resuming_from_a_row_without_its_number(row: dict[str, Any], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"batch": 0}, row)
    assert "expected each row's number" in refusal(lambda: records.resume([path]), path)


def test_a_file_of_settings_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"hash": "\xff"}')
    assert "not UTF-8" in refusal(lambda: records.read_json(path), path)


def test_a_split_that_is_not_utf_8(tmp_path: Path) -> None:
    split = tmp_path / "split.txt"
    split.write_bytes(b"task1\xff")
    message = refusal(lambda: superni.load_tasks(seeds.EVALUATION_DIR, split), split)
    assert message == f"{split}: not UTF-8 (invalid start byte at byte 5)"


# Configs


EXPERIMENT = flags.load_config("tiny")


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("ppo", None, "ppo=None: expected the fields of Ppo"),
        ("ppo", {}, "'ppo.num_steps' is missing"),
        ("seed_tasks", 3, "seed_tasks=3: expected str"),
    ],
)
def test_a_config_with_something_else_for_a_section(section: str, value: Any, message: str) -> None:
    values = dataclasses.asdict(EXPERIMENT) | {section: value}
    assert refusal(lambda: from_dict(Experiment, values), section) == message


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan")])
def test_a_number_that_is_no_float(value: Any) -> None:
    values = dataclasses.asdict(EXPERIMENT.ppo) | {"learning_rate": value}
    message = refusal(lambda: from_dict(type(EXPERIMENT.ppo), values, "ppo."), "ppo.learning_rate")
    assert "expected" in message


def test_a_pattern_that_python_has_doubts_about_warns_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Lora(pattern="[[]|q")


# Models


def raw(**changes: Any) -> dict[str, Any]:
    return families.CONFIGS["llama3"]().to_dict() | changes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 2**40),  # a list as long, a table nine times as long
        ("num_hidden_layers", 10**6),
        ("hidden_size", 2**70),
        ("vocab_size", 2**63),
        ("rms_norm_eps", float("nan")),
    ],
)
def test_a_config_of_an_absurd_size(key: str, value: Any) -> None:
    def parse() -> Any:
        dtypes = {"dtype": "float32", "param_dtype": "float32"}
        return hf_config.parse(raw(**{key: value}), "config.json", **dtypes)

    assert "expected a " in refusal(parse, "config.json")


def test_a_safetensors_header_with_a_line_break(tmp_path: Path) -> None:
    """The library quotes it."""
    header = json.dumps({"a": {"dtype": "\r\n", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refusal(lambda: tensor_files.open_safetensors(tmp_path), path)


def test_end_tokens_that_are_none(tmp_path: Path) -> None:
    ids = [True, -1, 2**31, "</s>", 7]
    assert hf_config.end_ids(tmp_path, {"eos_token_id": ids}) == (7,)


def gguf_of(path: Path, value_type: int, count: int, tail: bytes = b"") -> Path:
    """A header with one field, a list of `count` values of a type."""
    field = b"\x01\0\0\0\0\0\0\0a" + (9).to_bytes(4, "little")
    field += value_type.to_bytes(4, "little") + count.to_bytes(8, "little") + tail
    numbers = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + numbers + field)
    return path


def test_a_list_that_goes_on_after_the_end_of_its_gguf_file(tmp_path: Path) -> None:
    """2^60 numbers, of which the library would make an object each, past the end, for ever."""
    uint8 = gguf_lib.GGUFValueType.UINT8
    path = gguf_of(tmp_path / "a.gguf", uint8, 2**60)
    assert f"a list of {2**60} entries" in refusal(lambda: gguf.open_file(path), path)
    path = gguf_of(tmp_path / "b.gguf", uint8, 10**6, b"\0" * 9)
    assert "ends before 1 numbers" in refusal(lambda: gguf.open_file(path), path)


def test_lists_in_lists_in_a_gguf_file(tmp_path: Path) -> None:
    nested = (gguf_lib.GGUFValueType.ARRAY.to_bytes(4, "little") + (1).to_bytes(8, "little")) * 5000
    path = gguf_of(tmp_path / "a.gguf", gguf_lib.GGUFValueType.ARRAY, 1, nested)
    assert "not a readable GGUF file" in refusal(lambda: gguf.open_file(path), path)


def test_a_chat_template_that_fails() -> None:
    tokenizer = byte_tokenizer()
    for template in ("{{ 1 / 0 }}", "{{", "{{ 'a' + 1 }}", "{{ ''.__class__.__mro__ }}"):
        tokenizer.chat_template = template
        refusal(lambda: tokens.encode_prompt(tokenizer, "hi", "chat"), "its chat template fails")


def test_a_tokenizer_that_fails_only_when_it_is_used(tmp_path: Path) -> None:
    write_directory(TINY, random_params(TINY), tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": [1]}))
    refusal(lambda: sources.open_model(str(tmp_path)), "the tokenizer cannot be read")


# Oracles


def answer(value: Any) -> Callable[[], Any]:
    oracle = HttpOracle("http://server.test", 1.0)
    return lambda: oracle._read({"rewards": [value]}, 1)


def test_a_server_that_answers_with_a_number_beyond_floats() -> None:
    assert "expected 1 numbers" in refusal(answer(10**400), "http://server.test")


@pytest.mark.parametrize("content", ["", "3", "{", '{"rew": "a"}', '{"rew": NaN}', "{}", None, 2.5])
def test_a_cache_with_something_else_than_scores(content: Any, tmp_path: Path) -> None:
    cached = CachedOracle(lambda asked: {"rew": np.ones(len(asked))}, tmp_path / "scores", "")
    examples = [Example("a", "", "b")]
    cached(examples)
    with sqlite3.connect(cached.path) as database:
        database.execute("UPDATE scores SET components = ?", (content,))
    database.close()
    assert refusal(lambda: cached(examples), cached.path).endswith("; remove the file")


def test_a_description_of_an_oracle_that_is_too_deep(tmp_path: Path) -> None:
    path = tmp_path / trained_oracle.DESCRIPTION
    path.write_text(DEEP)
    assert "not valid JSON" in refusal(lambda: trained_oracle.describe(tmp_path), path)


# Reports


@pytest.mark.parametrize(
    ("file", "row"),
    [
        ("instructions.jsonl", {"instruction": 3}),
        ("ppo/metrics.jsonl", {"reward/mean": 1.0}),
        ("instances.jsonl", {}),
        ("evaluation.json", {"arms": {"base": 3}}),
        ("timings.json", {"train_ppo": "long"}),
        ("config.json", {"config": 3}),
    ],
)
def test_a_report_of_what_no_stage_wrote(file: str, row: Any, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    message = refusal(lambda: write_report(jsonl(path, row) and tmp_path), tmp_path)
    assert "not as the stage" in message


# Nothing leaves its directory, nobody is asked unasked


def test_an_index_that_names_files_elsewhere(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "secret.safetensors")
    index = model / tensor_files.INDEX
    for name in ("..", "", "a\0b", "\r\n", "\ud800"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        message = refusal(lambda: tensor_files.open_safetensors(model), index)
        assert message.endswith("in 'weight_map' names no file")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refusal(lambda: tensor_files.open_safetensors(model), model / "secret.safetensors")


def test_a_link_out_of_a_model_is_not_copied(tmp_path: Path) -> None:
    """The hub's own cache is made of links, within a repository."""
    (tmp_path / "secret.txt").write_text("secret")
    repository = tmp_path / "models--a--b"
    model = repository / "snapshots" / "0123"
    write_directory(TINY, random_params(TINY), model)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text("licence")
    (model / "LICENSE").symlink_to("../../blobs/abc")
    convert.convert(sources.open_model(str(model)), tmp_path / "first")
    assert (tmp_path / "first/LICENSE").read_text() == "licence"
    (model / "notes.txt").symlink_to(tmp_path / "secret.txt")
    source = sources.open_model(str(model))
    message = refusal(lambda: convert.convert(source, tmp_path / "second"), model / "notes.txt")
    assert "links out of its directory" in message
    assert not (tmp_path / "second").exists()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Attempts to reach anybody; all fail."""
    attempts: list[Any] = []

    def refuse(*args: Any, **_: Any) -> Any:
        attempts.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return attempts


@pytest.mark.parametrize(
    "source",
    ["./model", "../model", "runs/modle", "runs/modle.gguf", "gone/model.gguf", "~/model", "a/b/c"],
)
def test_a_misspelt_path_asks_nobody(
    source: str, network: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "runs/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    refusal(lambda: sources.open_model(source), source)
    assert not network


def test_a_model_on_disk_asks_nobody(network: list[Any], tmp_path: Path) -> None:
    write_directory(TINY, random_params(TINY), tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    sources.open_model(str(tmp_path)).load()
    assert not network


def test_the_hub_is_not_asked_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    refused: list[str] = []

    def download(hub_id: str, **_: Any) -> str:
        refused.append(hub_id)
        raise OSError("not today")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refusal(lambda: sources.open_model("owner/name"), "owner/name")
    assert set(refused) == {"owner/name"}
    assert "'owner/name': no such directory; asking the Hugging Face hub" in capsys.readouterr().err
