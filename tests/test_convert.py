"""Conversion both ways: bit-equal, whole or not at all, in little memory."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import convert_7b
import families
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers
from convert_7b import write_random
from decoders import CONFIGS, noise, source_of, write_directory
from safetensors.numpy import load_file, save_file

from refine_af.models import convert, hf, sources, transformer
from refine_af.models.registry import PRESETS
from refine_af.models.weights import TreeWeights, flat

PROMPT = {"prompt_token_ids": [5, 17, 3, 88, 42, 9, 60, 23, 71, 30, 4, 12]}  # past the windows


def program(name: str, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program; `before` is what the shell does first."""
    return python("-m", f"refine_af.launch.{name}", *arguments, before=before)


def python(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'{before}\nexec "$@"', "sh", sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )


def there_and_back(source: Path, folder: Path, dtype: str | None = None) -> tuple[Path, Path]:
    orbax, back = folder / "orbax", folder / "back"
    convert.convert(sources.open_model(str(source), param_dtype=None), orbax, dtype=dtype)
    convert.convert(sources.open_model(str(orbax), param_dtype=None), back)
    return orbax, back


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_bit_equal(first: Path, second: Path) -> None:
    ours, theirs = tensors_of(first), tensors_of(second)
    assert ours.keys() == theirs.keys()
    for key, array in ours.items():
        assert array.dtype == theirs[key].dtype, key
        np.testing.assert_array_equal(array, theirs[key], err_msg=key)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged as a warning, by transformers too, whose logger keeps to itself otherwise."""
    transformers.utils.logging.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        yield caplog
    transformers.utils.logging.disable_propagation()


def test_a_warning_of_transformers_would_be_seen(
    tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    folder = families.copy("llama2", tmp_path / "model")
    tensors = tensors_of(folder)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert any("model.norm.weight" in record.getMessage() for record in warned.records)


@pytest.mark.parametrize("family", families.PARAMS)
def test_there_and_back_is_bit_equal_and_transformers_takes_it(
    family: str, tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    orbax, back = there_and_back(families.saved(family), tmp_path)
    assert_bit_equal(families.saved(family), back)
    for name in ("config.json", "generation_config.json"):
        read = [json.loads((d / name).read_text()) for d in (families.saved(family), orbax, back)]
        assert read[0] == read[1] == read[2]
    _, info = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    assert not warned.records


@pytest.mark.parametrize("family", families.PARAMS)
def test_an_export_from_memory_is_taken_without_a_warning(
    family: str, tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    """Its config.json is of our making: it has to say the same as that of transformers."""
    source = sources.open_model(str(families.saved(family)))
    params = source.load()
    write_directory(source.config, params, tmp_path / "ours")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert not warned.records
    ids = torch.tensor([PROMPT["prompt_token_ids"]])
    with torch.no_grad():
        expected = families.build(family)(ids).logits
        assert torch.equal(model.eval()(ids).logits, expected)


def test_an_export_keeps_unlike_dtypes(tmp_path: Path) -> None:
    source = sources.open_model(str(families.saved("llama2")))
    params = source.load()
    params |= {"head": params["head"].astype(jax.numpy.bfloat16)}
    convert.export(source, TreeWeights(params), tmp_path / "ours")
    found = sources.open_model(str(tmp_path / "ours")).weights.arrays
    assert {path for path, x in found.items() if x.dtype == jax.numpy.bfloat16} == {"head"}


# The program `generate`, once for each list of arguments, in one process.
GENERATE = """
import json
import sys

from refine_af.launch import flags, generate

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["generate", *arguments]
    flags.start(generate.main, resumes=False)
"""


@pytest.mark.parametrize("names", [["llama2", "gemma3"]], ids=len)
def test_generate_prints_the_same_tokens_for_both_forms(names: list[str], tmp_path: Path) -> None:
    """Those of transformers."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps(PROMPT))
    runs = []
    for name in names:
        convert.convert(sources.open_model(str(families.saved(name))), tmp_path / name)
        for kind, model in (("hf", families.saved(name)), ("orbax", tmp_path / name)):
            output = f"--output={tmp_path}/{name}.{kind}.jsonl"
            prompts = f"--prompts={tmp_path}/prompts.jsonl"
            runs.append([f"--model={model}", prompts, output, "--max_new_tokens=32"])
    run = python("-c", GENERATE, json.dumps(runs))
    assert run.returncode == 0, run.stderr
    ids = torch.tensor([PROMPT["prompt_token_ids"]])
    for name in names:
        rows = [
            json.loads((tmp_path / f"{name}.{kind}.jsonl").read_text()) for kind in ("hf", "orbax")
        ]
        assert rows[0] == rows[1], name
        expected = families.build(name).generate(ids, max_new_tokens=32, do_sample=False)
        assert rows[0]["token_ids"] == expected[0, ids.shape[1] :].tolist(), name


def test_convert_says_in_one_line_what_it_wrote(tmp_path: Path) -> None:
    """In the home directory, if that is what `~` in the target means."""
    run = program(
        "convert",
        f"--source={families.saved('gemma3')}",
        "--target=~/orbax",
        before=f"HOME={tmp_path}; export HOME; cd {tmp_path}",
    )
    assert run.returncode == 0, run.stderr
    size = sum(array.nbytes for array in tensors_of(families.saved("gemma3")).values()) / 1e9
    assert run.stdout == (
        f"{tmp_path}/orbax: an Orbax directory, {size:.2f} GB of weights; "
        "no tokenizer was found in the source\n"
    )
    assert (tmp_path / "orbax/params").is_dir()


@pytest.mark.parametrize("family", families.PARAMS)
def test_both_forms_load_alike(family: str, tmp_path: Path) -> None:
    orbax = tmp_path / "orbax"
    source = sources.open_model(str(families.saved(family)))
    convert.convert(source, orbax)
    again = sources.open_model(str(orbax))
    assert again.config == source.config
    jax.tree.map(np.testing.assert_array_equal, again.load(), source.load())


def test_another_dtype_is_cast_on_the_way(tmp_path: Path) -> None:
    _, back = there_and_back(families.saved("qwen3"), tmp_path, dtype="bfloat16")
    for key, array in tensors_of(families.saved("qwen3")).items():
        cast = tensors_of(back)[key]
        assert cast.dtype == "bfloat16"
        np.testing.assert_array_equal(cast, array.astype("bfloat16"))
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


def test_orbax_reads_what_we_write(tmp_path: Path) -> None:
    """Without this project's code: a plain restore of the checkpoint."""
    source = sources.open_model(str(families.saved("qwen2.5")))
    convert.convert(source, tmp_path / "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore((tmp_path / "orbax/params").absolute())
    jax.tree.map(np.testing.assert_array_equal, restored, source.load())


def test_large_models_are_written_in_shards_with_an_index(tmp_path: Path) -> None:
    config = CONFIGS["llama-untied"]
    params = noise(jax.eval_shape(lambda: transformer.init(config, key=jax.random.key(0)))[0], 0)
    write_directory(config, params, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    hf.write(TreeWeights(params), config, tmp_path, shard_bytes=20_000)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / name).stat().st_size < 24_000 for name in files)
    size = json.loads((tmp_path / hf.INDEX).read_text())["metadata"]["total_size"]
    assert size == sum(leaf.nbytes for _, leaf in flat(params))
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    loaded = sources.open_model(str(tmp_path)).load()
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_weights_of_a_source_with_a_tokenizer_keep_it(tmp_path: Path) -> None:
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    convert.convert(sources.open_model("random:tiny"), orbax)
    (orbax / "evil.py").write_text("raise SystemExit")
    convert.convert(sources.open_model(str(orbax)), back)
    for folder in (orbax, back):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(tokenizer("h\u00e9!").input_ids) == "h\u00e9!"
    assert not (back / "evil.py").exists()


def test_an_unreadable_file_beside_the_weights_is_named_as_the_source_s(tmp_path: Path) -> None:
    folder = families.copy("llama2", tmp_path / "model")
    (folder / "LICENSES").mkdir()  # a directory is none of the files
    convert.convert(sources.open_model(str(folder)), tmp_path / "first")
    (folder / "LICENSE").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError) as error:
        convert.convert(sources.open_model(str(folder)), tmp_path / "second")
    assert str(error.value) == f"{folder}/LICENSE: cannot be read (No such file or directory)"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "model"]


# Whole or not at all


def test_an_existing_target_is_refused_without_overwrite(tmp_path: Path) -> None:
    source = sources.open_model(str(families.saved("llama2")))
    convert.convert(source, tmp_path / "target")
    with pytest.raises(ValueError, match=r"target: exists; .*--overwrite"):
        convert.convert(source, tmp_path / "target")
    (tmp_path / "target/old.json").touch()
    convert.convert(source, tmp_path / "target", overwrite=True)
    assert not (tmp_path / "target/old.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_overwrite_never_removes_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").touch()
    source = sources.open_model(str(families.saved("llama2")))
    with pytest.raises(ValueError, match="photos: not a model's directory"):
        convert.convert(source, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos/cat.png").exists()


@pytest.mark.parametrize("name", ["notes/thesis.txt", "ppo/metrics.jsonl", "README.md"])
def test_overwrite_refuses_a_directory_with_what_no_model_has(name: str, tmp_path: Path) -> None:
    """A workdir has a config.json, too."""
    source = sources.open_model(str(families.saved("llama2")))
    convert.convert(source, tmp_path / "m")
    (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "m" / name).touch()
    message = f"m: has {name.partition('/')[0]}, which is no part of a model"
    with pytest.raises(ValueError, match=message):
        convert.convert(source, tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / name).exists()


def content(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_was_kept_of_a_target_whose_name_goes_on_stays(tmp_path: Path) -> None:
    old = tmp_path / ".m.v2.abcd1234/old"  # of a writer of m.v2 that was killed
    old.mkdir(parents=True)
    (old / "config.json").touch()
    (old.parent / "lock").touch()
    convert.convert(sources.open_model(str(families.saved("llama2"))), tmp_path / "m")
    assert old.exists()
    with convert.staged(tmp_path / "m.v2", overwrite=True):
        assert (tmp_path / "m.v2").exists() and not old.exists()


def test_what_lies_beside_the_target_stays(tmp_path: Path) -> None:
    source = sources.open_model(str(families.saved("llama2")))
    for name in ("m.old", "m.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    for _ in range(2):
        convert.convert(source, tmp_path / "m", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.old", "m.partial"]
    assert (tmp_path / "m.old/mine").exists() and (tmp_path / "m.partial/mine").exists()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_failed_rename_keeps_the_old_model(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes back to its place; where the disk does not take that either, both are kept."""
    source, target = sources.open_model(str(families.saved("llama2"))), tmp_path / "m"
    convert.convert(source, target)
    before, rename, count = content(target), Path.rename, iter(range(failures))

    def fail(self: Path, to: Path) -> Path:
        if to == target and next(count, None) is not None:
            raise OSError(errno.EIO, "broken", str(self))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="broken") as error:
        convert.convert(source, target, dtype="bfloat16", overwrite=True)
    if failures == 1:
        assert [path.name for path in tmp_path.iterdir()] == ["m"]
        assert content(target) == before
    else:
        (private,) = tmp_path.iterdir()
        assert content(private / "old") == before
        assert json.loads((private / "new/config.json").read_text())["dtype"] == "bfloat16"
        assert str(private / "old") in str(error.value)


def test_of_two_programs_with_one_target_the_second_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with (
        pytest.raises(ValueError, match="m: exists; give another target"),
        convert.staged(target, overwrite=False) as slow,
    ):
        with convert.staged(target, overwrite=False) as fast:
            (fast / "config.json").write_text("fast")
        (slow / "config.json").write_text("slow")
    assert content(tmp_path) == {Path("m/config.json"): b"fast"}


_KILLED = """
import os, signal, sys
from pathlib import Path
from refine_af.models import convert

target, moment = Path(sys.argv[1]), sys.argv[2]
with convert.staged(target, overwrite=True) as new:
    (new / "config.json").write_text("new")
    if moment == "between the renames":
        target.rename(new.parent / "old")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["while writing", "between the renames"])
def test_what_a_killed_program_has_left_is_cleared_away(moment: str, tmp_path: Path) -> None:
    """The old model is back before the next start is at work; what is another's stays."""
    target = tmp_path / "m"
    for folder in (target, tmp_path / ".m.mine"):
        folder.mkdir()
        (folder / "config.json").write_text("old")
    killed = subprocess.run([sys.executable, "-c", _KILLED, target, moment], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len([*tmp_path.iterdir()]) == 2 + (moment == "while writing")
    with pytest.raises(KeyboardInterrupt), convert.staged(target, overwrite=True):
        assert content(target) == {Path("config.json"): b"old"}
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.mine", "m"]


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_a_target_appears_only_when_it_is_complete(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle; an old target stays as it was."""
    config = CONFIGS["llama-mha"]
    params = noise(jax.eval_shape(lambda: transformer.init(config, key=jax.random.key(0)))[0], 0)
    source = source_of(config, params)
    if kind == "hf":
        convert.convert(source, tmp_path / "source")
        source = sources.open_model(str(tmp_path / "source"))
    target = tmp_path / "target"
    convert.convert(source, target)
    before, names = content(target), set(tmp_path.iterdir())
    count = iter(range(3))

    def progress(_: int) -> None:
        if next(count, None) is None:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        convert.convert(source, target, overwrite=True, progress=progress)
    assert content(target) == before
    assert set(tmp_path.iterdir()) == names


@pytest.mark.parametrize("kind", ["hf", pytest.param("orbax", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_clear_line(kind: str, tmp_path: Path) -> None:
    """A limit of 4 KiB on the size of files stands in for the disk."""
    source = families.saved("llama2")
    if kind == "orbax":
        source = tmp_path / "source"
        convert.convert(sources.open_model(str(families.saved("llama2"))), source)
    names = set(tmp_path.iterdir())
    run = program(
        "convert",
        f"--source={source}",
        f"--target={tmp_path / 'target'}",
        before="ulimit -f 8",  # blocks of 512 bytes
    )
    assert run.returncode == 2, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if "error: " in line]
    assert line.startswith(f"error: {tmp_path / 'target'}: cannot be written (")
    assert "File too large" in line
    assert "Traceback" not in run.stderr
    assert names == set(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["truncated", "misfits"])
def test_a_source_that_does_not_fit_is_one_line_and_no_target(fault: str, tmp_path: Path) -> None:
    folder = families.copy("llama2", tmp_path / "source")
    file = folder / "model.safetensors"
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
        expected = [f"error: {file}: not a readable safetensors file ("]
    else:
        tensors = tensors_of(folder) | {"lm_head.weight": np.zeros((3, 24), np.float32)}
        del tensors["model.norm.weight"]
        save_file(tensors, file)
        expected = [f"error: {folder}: tensors do not fit", "missing model.norm.weight"]
        expected += ["lm_head.weight has shape (3, 24), expected (97, 24)"]
    run = program("convert", f"--source={folder}", f"--target={tmp_path / 'target'}")
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith(expected[0])
    assert all(text in line for text in expected)
    assert list(tmp_path.iterdir()) == [folder]


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 10))
    with pytest.raises(OSError, match=r"0\.0 MiB are free, .* MiB are needed; make room"):
        convert.convert(sources.open_model("random:tiny"), tmp_path / "target")
    assert not list(tmp_path.iterdir())


# Memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """1.6 GB of weights there and back, with at most 0.4 GB more than a few kB of them take.

    tests/convert_7b.py does the same with 13.5 GB.
    """
    peaks = {}
    for preset in ("tiny", "smollm2-1.7b"):
        config = dataclasses.replace(PRESETS[preset], num_layers=12, param_dtype="bfloat16")
        folder = tmp_path / preset
        write_random(config, folder / "hf")
        peaks[preset] = [
            convert_7b.convert(folder / "hf", folder / "orbax"),
            convert_7b.convert(folder / "orbax", folder / "back"),
        ]
        assert convert_7b.assert_bit_equal(folder / "hf", folder / "back")
    for small, large in zip(*peaks.values(), strict=True):
        assert large < small + 0.4
