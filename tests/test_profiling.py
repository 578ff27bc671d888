"""Steps that are traced: which ones, what is written, and an end by an error."""

import contextlib
import gzip
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from programs import Program
from runs import Done, Programs

from refine_af.profiling import Profile


def step_names(folder: Path) -> set[str]:
    """Numbers of the steps in the one trace of a folder, as XProf reads them."""
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    return {str(dict(e.stats).get("step_num")) for e in events if e.name == "step"}


def test_steps_behind_the_first_two_are_traced(tmp_path: Path) -> None:
    done = []
    for step in Profile(tmp_path, 2).over(range(10, 16)):
        jnp.sum(jnp.arange(8) * step).block_until_ready()
        done.append(step)
    assert done == list(range(10, 16))
    assert step_names(tmp_path) == {"12", "13"}
    (trace,) = tmp_path.glob("plugins/profile/*/perfetto_trace.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


@pytest.mark.parametrize("steps", [range(0, 2), range(5, 5)])
def test_a_run_that_is_too_short_has_no_trace_and_says_so(
    steps: range, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(Profile(tmp_path, 3).over(steps)) == list(steps)
    assert f"0 of 3 steps are traced: {len(steps)} are left" in caplog.text
    assert list(Profile(tmp_path, 0).over(range(5))) == list(range(5))
    assert not list(tmp_path.iterdir())


def test_a_trace_ends_with_the_run_that_fails(tmp_path: Path) -> None:
    steps = Profile(tmp_path, 9).over(range(6))
    with pytest.raises(KeyError), contextlib.closing(steps):
        for step in steps:
            if step == 3:
                raise KeyError
    assert step_names(tmp_path) == {"2", "3"}
    assert list(Profile(tmp_path / "next", 1).over(range(3))) == [0, 1, 2]  # it can trace again


@pytest.mark.slow
def test_programs_trace_training(undisturbed: Done, programs: Programs, tmp_path: Path) -> None:
    """On one device: eight take minutes to compile."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed.workdir, workdir)
    for program, folder in (("train_ppo", "ppo"), ("finetune", "sft")):
        shutil.rmtree(workdir / folder)
        ended = programs.run(program, workdir, "--profile_steps=1")
        assert ended.code == 0, ended.err
        assert step_names(workdir / folder / "profile") == {"2"}


def test_a_negative_number_of_steps_is_refused(program: Program, tmp_path: Path) -> None:
    code, _, err = program(
        "train_ppo", "--config=tiny", f"--workdir={tmp_path}", "--profile_steps=-1"
    )
    assert code == 2
    assert "profile_steps" in err
