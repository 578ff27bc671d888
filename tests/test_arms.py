"""Both arms of a run: what they share, what each has for itself, stopping and going on."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from programs import Program, refused
from runs import PREDICTIONS, Done, Programs, arm_outputs, differences

from refine_af import arms, dataset, evaluation, finetuning, pipeline, records
from refine_af.configs import tiny

BOTH = "--arms=refine_af,self_instruct"
pytestmark = pytest.mark.usefixtures("only_its_own_flags")


def test_one_arm_has_the_workdir_and_the_other_a_folder() -> None:
    assert arms.folder(Path("run"), "refine_af") == Path("run")
    assert arms.folder(Path("run"), "self_instruct") == Path("run/self_instruct")


@pytest.mark.parametrize("name", ["pipeline", "generate_instances", "finetune"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("self_instuct", "'self_instuct': expected one of {}; did you mean 'self_instruct'?"),
        ("refine_af,x", "'x': expected one of {}"),
        ("", "'': expected one of {}"),
    ],
)
def test_an_unknown_arm_is_refused(
    name: str, given: str, message: str, program: Program, tmp_path: Path
) -> None:
    result = program(name, "--config=tiny", f"--workdir={tmp_path / 'run'}", f"--arms={given}")
    assert result == refused(f"--arms={message.format(arms.ARMS)}")
    assert not (tmp_path / "run").exists()


def test_an_arm_without_its_data_set_is_not_tuned(program: Program, tmp_path: Path) -> None:
    given = ["--config=tiny", f"--workdir={tmp_path}", "--config.sft.batch_size=16"]
    result = program("finetune", *given, "--arms=self_instruct")
    folder = tmp_path / "self_instruct/dataset"
    assert result == refused(f"{folder}: not finished; run generate_instances first")


def test_another_set_that_is_not_there_is_refused_before_any_work(
    program: Program, tmp_path: Path
) -> None:
    others = f"--config.dataset.others=('{tmp_path / 'mine.jsonl'}',)"
    result = program("pipeline", "--config=tiny", f"--workdir={tmp_path / 'run'}", others)
    expected = "no such file; dataset.others expects .jsonl, .json, .parquet"
    assert result == refused(f"{tmp_path / 'mine.jsonl'}: {expected}")
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_either_arm_belong_to_one_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "self_instruct" / finetuning.CHECKPOINTS
    config_of = {folder: "c0ffee"}.get
    monkeypatch.setattr(pipeline.checkpoints, "config_of", config_of)
    with pytest.raises(ValueError, match=f"^{folder}: this workdir was made with config c0ffee"):
        pipeline.claim(tiny.get_config(), tmp_path, force=False)


def test_the_arm_without_ppo_does_not_train(tmp_path: Path) -> None:
    run = pipeline.Run(tiny.get_config(), tmp_path, ("self_instruct",))
    assert not pipeline.train_ppo(run)
    assert not any(tmp_path.iterdir())


# Whole runs


@pytest.fixture(scope="module")
def both(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A run of both arms in one go."""
    workdir = tmp_path_factory.mktemp("both") / "run"
    ended = programs.run("pipeline", workdir, BOTH)
    assert ended.code == 0, ended.err
    return Done(workdir, ended)


@pytest.mark.slow
def test_the_method_is_the_same_with_the_other_arm_beside_it(both: Done, undisturbed: Done) -> None:
    assert differences(undisturbed.workdir, both.workdir) == [PREDICTIONS, evaluation.SCORES]
    arm = both.workdir / "self_instruct"
    assert {path.name for path in arm.iterdir()} == {
        "instances.jsonl",
        "rejected_instances.jsonl",
        "dataset",
        "sft",
    }


@pytest.mark.slow
def test_the_arms_answer_the_same_prompts_with_other_weights(both: Done) -> None:
    method, baseline = (dataset.read(arms.folder(both.workdir, arm)) for arm in arms.ARMS)
    written = {row["id"] for row in records.read_rows(both.workdir / "instructions.jsonl")}
    assert {row["id"] for row in method + baseline} <= written
    assert {row["arm"] for row in method} == {"refine_af"}
    assert {row["arm"] for row in baseline} == {"self_instruct"}
    assert {row["prompt"] for row in method} & {row["prompt"] for row in baseline}
    assert [row["output"] for row in method] != [row["output"] for row in baseline]
    found = json.loads((both.workdir / evaluation.SCORES).read_text())
    assert list(found["arms"]) == ["base", "refine_af", "self_instruct"]
    asked = [row["arm"] for row in records.read_rows(both.workdir / PREDICTIONS)]
    assert [asked.count(arm) for arm in found["arms"]] == [24, 24, 24]
    page = (both.workdir / "report.html").read_text()
    assert '<th class="n">REFINE-AF</th><th class="n">Self-Instruct</th>' in page
    assert page.index("Verbs and their objects, REFINE-AF") > 0


@pytest.mark.slow
def test_an_arm_that_comes_later_and_is_stopped_ends_as_if_it_had_been_there(
    both: Done, undisturbed: Done, programs: Programs, tmp_path: Path
) -> None:
    workdir = shutil.copytree(undisturbed.workdir, tmp_path / "run")
    running = programs.start("pipeline", workdir, BOTH)
    tuned = workdir / "self_instruct/sft/metrics.jsonl"
    assert running.stop_when(tuned.exists, signal.SIGTERM).code == 0
    ended = programs.run("pipeline", workdir, BOTH)
    assert ended.code == 0, ended.err
    # Answers may have come in another order.
    assert {*differences(both.workdir, workdir)} <= {PREDICTIONS, evaluation.SCORES}
    whole, later = (
        json.loads((d / evaluation.SCORES).read_text()) for d in (both.workdir, workdir)
    )
    assert whole["arms"] == later["arms"]
    assert arm_outputs(workdir / "self_instruct") == arm_outputs(both.workdir / "self_instruct")
