"""Pushing a data set, to a stand-in of the hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from data_sets import material
from programs import Program, refused

from refine_af import dataset, hub

pytestmark = pytest.mark.usefixtures("only_its_own_flags")


class Hub:
    """Takes what the client of the hub is told to send."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, bytes]] = {}

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.fault:
            raise self.fault
        self.repositories[repo_id] = options
        return f"https://hub.example/datasets/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        assert options["repo_type"] == "dataset"
        assert options["ignore_patterns"] == ["*.partial"]
        self.files[repo_id] = {
            str(path.relative_to(folder_path)): path.read_bytes()
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        }


def stand_in(monkeypatch: pytest.MonkeyPatch, fault: Exception | None = None) -> Hub:
    taken = Hub(fault)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: taken)
    return taken


def test_the_whole_folder_goes_to_a_private_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken = stand_in(monkeypatch)
    dataset.write_dataset(material(5, seed=0), tmp_path)
    assert hub.push(tmp_path, "me/poems") == "https://hub.example/datasets/me/poems"
    assert taken.repositories["me/poems"] == {
        "repo_type": "dataset",
        "private": True,
        "exist_ok": True,
    }
    folder = tmp_path / "dataset"
    assert taken.files["me/poems"] == {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert {"README.md", "train.parquet", "plots/lengths.png"} <= taken.files["me/poems"].keys()


def test_a_hub_that_does_not_take_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, OSError("401 Client\n Error"))
    message = rf"^--push_to_hub=me/x: the hub did not take {tmp_path}/dataset: 401 Client Error; "
    with pytest.raises(ValueError, match=message):
        hub.push(tmp_path, "me/x")


@pytest.mark.parametrize(
    ("name", "arms", "message"),
    [
        ("poems", "refine_af", "expected OWNER/NAME (no owner)"),
        ("", "refine_af", "expected OWNER/NAME"),
        ("me/po ems", "refine_af", "expected OWNER/NAME (Repo id must use alphanumeric chars"),
        (
            "me/poems",
            "refine_af,self_instruct",
            "takes the data set of one arm; give --arms=refine_af, and for the others the same "
            "command with another name",
        ),
    ],
)
def test_a_wrong_name_is_refused_before_any_work(
    name: str, arms: str, message: str, program: Program, tmp_path: Path
) -> None:
    result = program(
        "generate_instances",
        "--config=tiny",
        f"--workdir={tmp_path / 'run'}",
        f"--arms={arms}",
        f"--push_to_hub={name}",
    )
    assert result[:2] == (2, "")
    assert result.err.startswith(f"error: --push_to_hub={name}: {message}")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_program_pushes_the_data_set_of_a_run_that_is_done(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken = stand_in(monkeypatch)
    arm = tmp_path / "self_instruct"
    dataset.write_dataset(material(5, seed=0), arm)
    result = program(
        "generate_instances",
        "--config=tiny",
        f"--workdir={tmp_path}",
        "--arms=self_instruct",
        "--push_to_hub=me/poems",
    )
    done = f"generate_instances: nothing to do in {tmp_path}\n"
    assert result == (0, f"{done}pushed: https://hub.example/datasets/me/poems\n", "")
    assert taken.files["me/poems"]["README.md"] == (arm / "dataset/README.md").read_bytes()


def test_an_unfinished_run_is_not_pushed(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken = stand_in(monkeypatch)
    workdir = f"--workdir={tmp_path}"
    result = program("generate_instances", "--config=tiny", workdir, "--push_to_hub=me/poems")
    lacking = "instructions.jsonl: 0 of 12 instructions; run generate_instructions first"
    assert result == refused(f"{tmp_path}/{lacking}")
    assert not taken.repositories
