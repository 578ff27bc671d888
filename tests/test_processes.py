"""Several processes as one: what one does alone. Two real ones: test_many_hosts.py."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from programs import Program, refused

from refine_af.launch import flags
from refine_af.models import processes
from refine_af.rewards import OracleError

pytestmark = pytest.mark.usefixtures("only_its_own_flags")


def test_a_process_that_is_alone_does_everything_itself() -> None:
    done: list[int] = []
    marker = object()
    assert processes.is_writer() and not processes.several()
    assert processes.once(lambda: marker) is marker
    processes.by_writer(lambda: done.append(1))
    assert done == [1]
    assert processes.everyone((1, 2)) == [(1, 2)]
    host = processes.to_host({"a": jax.numpy.arange(3), "b": 1.5})
    assert isinstance(host["a"], np.ndarray)
    np.testing.assert_array_equal(host["a"], [0, 1, 2])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OracleError("a"), OracleError),
        (FileNotFoundError(2, "No such file", "x"), FileNotFoundError),
        (json.JSONDecodeError("a", "b", 0), ValueError),  # takes more than a text
        (ValueError("a"), ValueError),
        (KeyError("a"), KeyError),
    ],
)
def test_an_error_is_of_its_kind_on_the_other_side(error: Exception, kind: type[Exception]) -> None:
    there = processes._from_json(json.loads(json.dumps(processes._to_json(error))))
    assert type(there) is kind
    assert str(error) in str(there)


class SlowWriter:
    """A client whose keys are there at the third look, none of which may be long.

    What is there may take long to come.
    """

    looks = 0

    def blocking_key_value_get(self, _: str, milliseconds: int) -> str:
        assert milliseconds <= 1000
        self.looks += 1
        if self.looks < 3:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
        return ""

    def blocking_key_value_get_bytes(self, _: str, milliseconds: int) -> bytes:
        assert self.looks == 3 and milliseconds > 60_000
        return b'{"result": 5}'

    def wait_at_barrier(self, *_: Any) -> None:
        pass


def test_who_waits_for_the_writer_hears_signals_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SlowWriter()
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "is_writer", lambda: False)
    monkeypatch.setattr(processes, "_client", lambda: writer)
    assert processes.once(lambda: 1) == 5
    assert writer.looks == 3


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "a",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        (SLURM | {"SLURM_NTASKS": "2"}, True),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, False),  # in no step: a login shell
        ({"OMPI_MCA_orte_hnp_uri": "1", "OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),  # names, but no TPU is here
    ],
)
def test_only_a_launcher_makes_several(
    environment: dict[str, str], several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {*SLURM, "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.launched_as_several() == several


def test_the_hosts_of_a_tpu_slice_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))
    for hosts, several in (("a,b", True), ("localhost", False)):
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", hosts)
        assert processes.launched_as_several() == several


TOGETHER = "--coordinator_address, --num_processes, --process_id"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num_processes=2", f"--coordinator_address is missing: give {TOGETHER}, or none"),
        (
            "--coordinator_address=a:1 --num_processes=2",
            f"--process_id is missing: give {TOGETHER}, or none of them",
        ),
        (
            "--coordinator_address=a --num_processes=2 --process_id=0",
            "--coordinator_address=a: expected HOST:PORT",
        ),
        (
            "--coordinator_address=a:1 --num_processes=2 --process_id=2",
            "--process_id=2: expected 0 to 1 with --num_processes=2",
        ),
    ],
)
def test_flags_that_are_not_complete_are_refused(
    arguments: str, message: str, program: Program, tmp_path: Path
) -> None:
    result = program("report", f"--workdir={tmp_path}", *arguments.split())
    assert result.code == refused(message).code
    assert result.err.startswith(f"error: {message}")


@pytest.mark.parametrize("form", ["--process_id={}", "-process_id={}", "--process_id {}"])
def test_arguments_are_compared_without_the_number(form: str) -> None:
    """But for what only looks like it."""
    first, second = (
        flags._without_number(["--workdir=a", *form.format(i).split(), "--config=process_id"])
        for i in range(2)
    )
    assert first == second == ["--workdir=a", "--config=process_id"]


def test_help_shows_them(program: Program) -> None:
    found: Any = program("report", "--help")
    assert {name for name in TOGETHER.split(", ") if f"  {name}: " in found.out} == {
        *TOGETHER.split(", ")
    }
