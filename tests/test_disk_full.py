"""A full disk: one clear line, what was there before is whole, and with room again it goes on."""

import contextlib
import dataclasses
import os
import resource
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import data_sets
import jax
import numpy as np
import pytest
from runs import Done, Programs, differences
from tensorboardX.proto.summary_pb2 import Summary

from refine_af import checkpoints, dataset, events, records
from refine_af.config import Experiment
from refine_af.launch import flags
from refine_af.models import convert, lora, sources, transformer
from refine_af.models.config import LoraConfig
from refine_af.models.weights import TreeWeights
from refine_af.models.writing import WriteError
from refine_af.rewards import Example
from refine_af.score_cache import CachedOracle

TINY: Experiment = flags.load_config("tiny")
_ROOM = 16_384  # bytes that a full disk, or a file on it, still takes


@pytest.fixture(params=["tmpfs", "file size limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator["Disk"]:
    """A folder whose disk can be full.

    Only root may mount: elsewhere both are the limit on the size of a file, whose error the
    programs see at the same places.
    """
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)]
    mounted = request.param == "tmpfs" and os.geteuid() == 0 and not subprocess.call(mount)
    yield Disk(tmp_path, mounted)
    if mounted:
        subprocess.check_call(["umount", "--lazy", str(tmp_path)])


class Disk(NamedTuple):
    """A small file system, or a folder of any other."""

    folder: Path
    mounted: bool

    @contextlib.contextmanager
    def full(self, room: int = _ROOM) -> Iterator[None]:
        """It, or else each file of this process, takes next to nothing any more."""
        filler, limit = self.folder / "filler", resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.mounted:
            status = os.statvfs(self.folder)
            filler.write_bytes(bytes(status.f_bavail * status.f_frsize - room))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            filler.unlink(missing_ok=True)


# Writers: each of 100 KiB or more, of one of two contents, into a folder.

ROWS = [
    [{"batch": version, "text": f"{version}{i}" * 50} for i in range(1000)] for version in (0, 1)
]


def write_rows(folder: Path, version: int) -> None:
    records.cut(folder / "rows.jsonl", version)
    records.append_rows(folder / "rows.jsonl", ROWS[version])


def write_text(folder: Path, version: int) -> None:
    records.write_text(folder / "text", str(ROWS[version]))


def write_checkpoint(folder: Path, version: int) -> None:
    noise = jax.random.normal(jax.random.key(version), (128, 256))
    with checkpoints.open_manager(folder / "checkpoints", keep=1) as manager:
        checkpoints.save(manager, version, {"x": noise})


def write_model(folder: Path, version: int) -> None:
    convert.export(SOURCE, _weights(version), folder / "hf")


def write_orbax(folder: Path, version: int) -> None:
    source = dataclasses.replace(SOURCE, weights=_weights(version))
    convert.convert(source, folder / "orbax", overwrite=True)


def write_adapter(folder: Path, version: int) -> None:
    shape = LoraConfig(rank=64, alpha=4.0, pattern=".*")
    adapter = transformer.init(SOURCE.config, shape, key=jax.random.key(version))[1]
    lora.write_peft(adapter, shape, SOURCE.config, folder / "adapter", "random:tiny")


def write_dataset(folder: Path, version: int) -> None:
    made_of = data_sets.material(200, seed=version)
    dataset.write_dataset(made_of, folder)


def write_events(folder: Path, version: int) -> None:
    with contextlib.closing(events.EventFile(folder / str(version), 0)) as file:
        for step in range(3000):
            value = Summary.Value(tag="reward", simple_value=float(version))
            file.add(step, Summary(value=[value]))


def write_scores(folder: Path, version: int) -> None:
    def oracle(examples: Sequence[Example]) -> dict[str, np.ndarray]:
        return {"rew": np.ones(len(examples))}

    cache = CachedOracle(oracle, folder / "scores.sqlite", "")
    cache([Example(f"{version}", "", f"{i}") for i in range(2000)])


WRITERS = {
    name.removeprefix("write_"): value
    for name, value in [*globals().items()]
    if name.startswith("write_")
}
SOURCE = sources.open_model("random:tiny")


def _weights(version: int) -> TreeWeights:
    return TreeWeights(jax.tree.map(lambda x: x + np.float32(version), SOURCE.load()))


def content(folder: Path) -> dict[str, bytes]:
    """By file; of rows what counts: whole lines, which more may follow."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "filler":
            data = path.read_bytes()
            if path.suffix == ".jsonl":
                data = data[: data.rfind(b"\n") + 1]
            found[str(path.relative_to(folder))] = data
    return found


def test_a_disk_without_any_room_is_one_line_too(disk: Disk) -> None:
    """Then a save fails at once, while more of its writes are under way."""
    write_checkpoint(disk.folder, 0)
    with pytest.raises(WriteError, match="a checkpoint cannot be written"), disk.full(0):
        write_checkpoint(disk.folder, 1)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_line_and_earlier_data_is_whole(
    write: Callable[[Path, int], None], disk: Disk
) -> None:
    write(disk.folder, 0)
    before = content(disk.folder)
    with pytest.raises((OSError, ValueError)) as caught, disk.full():
        write(disk.folder, 1)
    assert str(disk.folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    after = content(disk.folder)
    assert [name for name in before if not after.get(name, b"").startswith(before[name])] == []
    write(disk.folder, 1)
    assert content(disk.folder) != before


def run_limited(programs: Programs, name: str, workdir: Path, limit: int | None) -> list[str]:
    """Lines on standard error of a program whose files take `limit` bytes each, and that ends so.

    Its standard streams are pipes, to which the limit does not apply.
    """
    limits = (limit or resource.RLIM_INFINITY,) * 2
    ended = subprocess.run(
        programs.command(name, workdir),
        env=programs.environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )
    assert ended.returncode == (2 if limit else 0), ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.stderr.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_with_room_again_ends_as_if_undisturbed(
    undisturbed: Done, programs: Programs, tmp_path: Path
) -> None:
    for name, limit, message in (
        ("generate_instructions", 8_000, "instructions.jsonl: cannot be written (File too large)"),
        ("generate_instructions", None, ""),
        ("train_ppo", 22_000, "ppo/checkpoints: a checkpoint cannot be written ("),
        ("pipeline", 60_000, "sft/hf: cannot be written (File too large); make room"),
        ("pipeline", None, ""),
    ):
        *_, last = run_limited(programs, name, tmp_path, limit)
        assert not limit or (last.startswith(f"error: {tmp_path}/") and message in last), last
    assert differences(undisturbed.workdir, tmp_path) == []
