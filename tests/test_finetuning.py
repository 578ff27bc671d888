"""The stage of fine-tuning: crashes, the best epoch, all weights, and the export."""

import dataclasses
import functools
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from decoders import source_of
from jax.tree_util import keystr, tree_leaves_with_path
from orbax.checkpoint import CheckpointManager

from refine_af import (
    checkpoints,
    finetuning,
    memory,
    mesh,
    records,
    sft_examples,
    training,
    trunk,
)
from refine_af import config as config_lib
from refine_af.base_model import BaseModel
from refine_af.config import Experiment, Sampling
from refine_af.configs import tiny
from refine_af.finetuning import FinetuningStage
from refine_af.models import hf, lora, transformer, writing
from refine_af.models.byte_tokenizer import byte_tokenizer
from refine_af.models.registry import PRESETS
from refine_af.requests import Request
from refine_af.sft_examples import encode

TINY = PRESETS["tiny"]
TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
SFT = dataclasses.replace(tiny.get_config().sft, batch_size=4, num_microbatches=2, max_length=256)


@functools.cache
def base() -> BaseModel:
    """Random weights with logits of order 1 on two devices, each with half of the weights."""
    devices = mesh.make_mesh(config_lib.Mesh(fsdp=2), jax.devices()[:2])
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.15 * rng.standard_normal(shape.shape)).astype(np.float32)

    shapes = jax.eval_shape(lambda: transformer.init(TINY, key=jax.random.key(0)))[0]
    params = jax.device_put(
        jax.tree_util.tree_map_with_path(draw, shapes),
        mesh.param_shardings(TINY, None, devices)[0],
    )
    source = source_of(TINY, params, (EOS,), TOKENIZER)
    return BaseModel(source, transformer.define(TINY), params, devices)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    left, right = tree_leaves_with_path(actual), tree_leaves_with_path(expected)
    assert [keystr(path) for path, _ in left] == [keystr(path) for path, _ in right]
    for (path, a), (_, b) in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=keystr(path))


# The stage


def row(instruction: str, text: str = "", output: str = "la") -> dict[str, str]:
    return {"instruction": instruction, "input": text, "output": output}


ROWS = [row(f"Say word {i}.", "x" * (5 + i), "ab" * (1 + i % 5)) for i in range(13)] + [
    row("This one is left out.", "y" * 300)
]
EXPERIMENT = dataclasses.replace(tiny.get_config(), sft=SFT)


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    """Each start of the stage takes what the start before compiled and drew."""
    draw, drawn = BaseModel.new_adapter, {}

    def new_adapter(self: BaseModel, options: config_lib.Lora, key: jax.Array) -> Any:
        if isinstance(key, jax.core.Tracer):  # for its shapes
            return draw(self, options, key)
        seed = (options, *jax.random.key_data(key).tolist())
        if seed not in drawn:
            drawn[seed] = draw(self, options, key)
        return jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), drawn[seed])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseModel, "new_adapter", new_adapter)
        for name in ("optimizer", "make_step"):
            patch.setattr(finetuning, name, functools.cache(getattr(finetuning, name)))
        yield


def stage(workdir: Path, config: Experiment = EXPERIMENT) -> FinetuningStage:
    return FinetuningStage(config, base(), ROWS, workdir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workdir of an undisturbed run: 2 epochs of 3 steps, a checkpoint after every second."""
    workdir = tmp_path_factory.mktemp("whole")
    stage(workdir).run()
    return workdir


def metrics(workdir: Path) -> list[records.Row]:
    rows = records.read_rows(workdir / finetuning.METRICS)
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def tuned(workdir: Path) -> Any:
    """Adapter, as it was written."""
    return jax.tree.map(np.asarray, lora.read_peft(workdir / finetuning.ADAPTER, TINY)[1])


def test_the_stage_takes_every_step_and_learns(whole: Path) -> None:
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["epoch"] for row in rows] == pytest.approx([(i + 1) / 3 for i in range(6)])
    assert ["eval_loss" in row for row in rows] == [False, False, True] * 2
    assert np.mean([row["loss"] for row in rows[3:]]) < np.mean([row["loss"] for row in rows[:3]])


def test_what_is_padding_is_told(whole: Path) -> None:
    batches = stage(Path()).batches
    area = batches.layout.num_rows * batches.layout.row_length
    used = [sft_examples.num_tokens(batches.of_step(step)) for step in range(6)]
    shares = [row["batch/padding_share"] for row in metrics(whole)]
    assert shares == pytest.approx([1 - count / area for count in used])


def fail_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, killed when it is called for the `call`-th time."""
    calls = iter(range(call))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (records, "append_rows", 1),  # before the first checkpoint
        (records, "append_rows", 4),  # a row after the second
        (checkpoints, "save", 1),  # rows are written that no checkpoint holds
        (hf, "write", 0),  # all steps are done, the export is not
        (hf, "_write_file", 0),
    ],
    ids=["row-1", "row-4", "save-1", "export", "export-file"],
)
def test_a_run_that_was_killed_ends_as_an_undisturbed_one(
    module: Any, name: str, call: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, fail_at(call, getattr(module, name)))
        stage(tmp_path).run()
    assert not finetuning.finished(tmp_path)
    stage(tmp_path).run()
    assert finetuning.finished(tmp_path)
    assert metrics(tmp_path) == metrics(whole)
    assert_close(tuned(tmp_path), tuned(whole), 0)
    file = f"{finetuning.EXPORT}/model.safetensors"
    assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()


def test_a_start_that_restores_holds_one_state(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that it gave the shapes of is gone by then."""
    made: list[weakref.ref[jax.Array]] = []
    fresh, restore = FinetuningStage._new_state, checkpoints.restore

    def new_state(*args: Any) -> training.TrainState:
        state = fresh(*args)
        made.extend(weakref.ref(x) for x in jax.tree.leaves(state.opt_state))
        return state

    def watched(*args: Any) -> Any:
        assert made and not [x for x in made if x() is not None]
        return restore(*args)

    monkeypatch.setattr(FinetuningStage, "_new_state", new_state)
    monkeypatch.setattr(checkpoints, "restore", watched)
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    stage(tmp_path).run()
    assert_close(tuned(tmp_path), tuned(whole), 0)


def keeping_best(workdir: Path) -> FinetuningStage:
    options = dataclasses.replace(SFT, keep_best=True, keep_checkpoints=1)
    return stage(workdir, dataclasses.replace(EXPERIMENT, sft=options))


def set_losses(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Those of the epochs, which end with steps 3 and 6."""
    given = iter(losses)
    monkeypatch.setattr(FinetuningStage, "_eval_loss", lambda *_: next(given))


def train_only(mine: FinetuningStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take all steps; the first write of the export is the end."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hf, "write", fail_at(0, hf.write))
        mine.run()


def saved(mine: FinetuningStage, step: int) -> Any:
    """What is trained, of a checkpoint."""
    like = checkpoints.shapes_of(mine._new_state(finetuning.optimizer(mine.config.sft, 6)))
    with checkpoints.open_manager(mine.workdir / finetuning.CHECKPOINTS, keep=9) as manager:
        return checkpoints.restore(manager, step, like).params


def test_the_best_epoch_is_kept_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the first of two; and a second start still knows."""
    set_losses(monkeypatch, 1.0, 2.0)
    mine = keeping_best(tmp_path)
    train_only(mine, monkeypatch)
    mine.run()
    folder = tmp_path / finetuning.CHECKPOINTS
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]
    first, last = (saved(mine, step)["adapter"] for step in (3, 6))
    assert_close(tuned(tmp_path), first, 0)
    with pytest.raises(AssertionError):
        assert_close(first, last, 0)


@pytest.mark.parametrize("losses", [(1.0, 2.0), (1.0, float("nan"))])
def test_of_a_damaged_best_the_next_best_is_exported(
    losses: tuple[float, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The state of the last step, where no loss is left; a third start knows no more of it."""
    set_losses(monkeypatch, *losses)
    mine = keeping_best(tmp_path)
    train_only(mine, monkeypatch)
    folder = tmp_path / finetuning.CHECKPOINTS
    manifest = folder / "3/default/manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:10])
    train_only(mine, monkeypatch)
    (notice,) = [m for m in caplog.messages if m.startswith(f"{folder}/3: the checkpoint is dam")]
    assert notice.endswith("; the next best one is taken")
    mine.run()
    assert sorted(path.name for path in folder.iterdir()) == ["6", "damaged-3"]
    assert_close(tuned(tmp_path), saved(mine, 6)["adapter"], 0)


def test_a_loss_that_is_not_finite_is_no_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written as null, and read so by a second start."""
    set_losses(monkeypatch, float("nan"), 2.0)
    mine = keeping_best(tmp_path)
    train_only(mine, monkeypatch)
    mine.run()
    assert_close(tuned(tmp_path), saved(mine, 6)["adapter"], 0)


def test_a_save_that_fails_before_the_best_is_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_losses(monkeypatch, 1.0, 2.0)
    mine = keeping_best(tmp_path)
    wait, errors = CheckpointManager.wait_until_finished, [ValueError("No space left")]

    def fails_once(manager: CheckpointManager) -> None:
        wait(manager)
        last = manager.latest_step() == 6 and threading.current_thread() is threading.main_thread()
        if last and errors:
            raise errors.pop()

    monkeypatch.setattr(CheckpointManager, "wait_until_finished", fails_once)
    with pytest.raises(OSError, match=r"a checkpoint cannot be written \(No space left\); the"):
        mine.run()


def test_a_train_state_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    with pytest.raises(
        ValueError, match=r"^finetune: the train state .*; train an adapter \(lora\) of low"
    ):
        stage(tmp_path).run()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_space_for_checkpoints_and_a_float32_export_is_asked_for(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step: three checkpoints, and the model in the dtype of its export."""
    asked: list[int] = []

    def check_space(_: Path, needed: int) -> None:
        asked.append(needed)
        raise OSError

    params = jax.tree.map(lambda x: x.astype(dtype), base().params)
    mine = dataclasses.replace(
        stage(tmp_path),
        base=dataclasses.replace(base(), source=source_of(TINY, params, (EOS,), TOKENIZER)),
    )
    monkeypatch.setattr(writing, "check_space", check_space)
    with pytest.raises(OSError):
        mine.run()
    state = jax.tree.leaves(mine._new_state(finetuning.optimizer(SFT, 6)))
    weights = jax.tree.leaves(params)
    assert asked == [3 * sum(x.nbytes for x in state) + 4 * sum(x.size for x in weights)]


def test_a_step_that_is_not_finite_is_recorded_as_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is NaN, and JSON has no such number."""
    make_step = finetuning.make_step

    def broken(*args: Any) -> Callable[..., Any]:
        step = make_step(*args)

        def run(*inputs: Any) -> Any:
            state, figures = step(*inputs)
            return state, figures | {"loss": jnp.where(state.step == 2, jnp.nan, figures["loss"])}

        return run

    monkeypatch.setattr(finetuning, "make_step", broken)
    stage(tmp_path).run()
    assert [row["loss"] is None for row in metrics(tmp_path)] == [False, True] + [False] * 4


def test_without_an_example_that_fits_there_is_nothing_to_do(tmp_path: Path) -> None:
    short = dataclasses.replace(EXPERIMENT, sft=dataclasses.replace(SFT, max_length=100))
    with pytest.raises(ValueError, match=r"none of 14 examples fits sft.max_length=100"):
        stage(tmp_path, short).run()


def test_the_model_of_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fine-tuning has not finished; run finetune first"):
        finetuning.tuned_model(EXPERIMENT, base(), tmp_path)


# All weights


FULL = dataclasses.replace(
    EXPERIMENT,
    sft=dataclasses.replace(SFT, trained="full", remat="none", keep_best=True, keep_checkpoints=1),
)


@pytest.mark.slow
def test_all_weights_are_trained_exported_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind a checkpoint, the run ends as an undisturbed one; its base is as it was."""
    before = jax.tree.map(np.array, base().params)
    whole, killed = (stage(tmp_path / name, FULL) for name in ("whole", "killed"))
    whole.run()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records, "append_rows", fail_at(4, records.append_rows))
        killed.run()
    killed.run()
    assert metrics(killed.workdir) == metrics(whole.workdir)
    assert metrics(whole.workdir)[-1]["eval_loss"] < metrics(whole.workdir)[2]["eval_loss"]
    assert_close(base().params, before, 0)
    files = [
        workdir / finetuning.EXPORT / "model.safetensors"
        for workdir in (whole.workdir, killed.workdir)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (whole.workdir / finetuning.ADAPTER).exists()
    (best,) = {path.name for path in (whole.workdir / finetuning.CHECKPOINTS).iterdir()}
    state = saved(whole, int(best))
    expected = trunk.for_sampling(base(), FULL.sft, state)
    assert_close(finetuning.tuned_model(FULL, base(), whole.workdir), expected, 0)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max() > 0, state["model"], before)
    assert all(jax.tree.leaves(moved))


# The export, as transformers reads it


@pytest.fixture(scope="module")
def exported(whole: Path) -> transformers.PreTrainedModel:
    torch.set_num_threads(1)  # its threads and XLA's, spinning on the same cores
    return transformers.AutoModelForCausalLM.from_pretrained(
        whole / finetuning.EXPORT, attn_implementation="eager"
    ).eval()


def test_the_loss_on_held_out_examples_is_that_of_the_export(
    exported: transformers.PreTrainedModel, whole: Path
) -> None:
    total = count = 0.0
    for prompt, response in stage(whole).batches.held_out:
        with torch.no_grad():
            logits = exported(torch.tensor([prompt + response])).logits[0]
        logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        total -= logprobs[range(len(response)), response].sum().item()
        count += len(response)
    assert metrics(whole)[-1]["eval_loss"] == pytest.approx(total / count, abs=1e-5)


def test_the_export_writes_the_same_greedy_text(
    exported: transformers.PreTrainedModel, whole: Path
) -> None:
    prompt = encode(ROWS[10], TOKENIZER, "alpaca", EOS)[0]
    params = finetuning.tuned_model(EXPERIMENT, base(), whole)
    request = Request(tuple(prompt), Sampling(temperature=0.0, max_new_tokens=32))
    (ours,) = base().engine(2).generate(params, [request])
    with torch.no_grad():
        theirs = exported.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)
    assert list(ours.token_ids) == theirs[0, len(prompt) :].tolist()
    assert len(set(ours.token_ids)) > 1


def test_the_export_has_its_tokenizer_and_is_not_the_base(
    exported: transformers.PreTrainedModel, whole: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / finetuning.EXPORT)
    text = "Sing — ♪\n"
    assert tokenizer(text).input_ids == TOKENIZER(text).input_ids
    assert tokenizer.eos_token_id == exported.config.eos_token_id[0] == EOS
    kernel = exported.model.layers[0].self_attn.q_proj.weight.detach().numpy().T
    before = np.asarray(base().params["layers"]["attention"]["q"]["kernel"][0])
    assert 1e-4 < np.abs(kernel - before).max() < 0.1
