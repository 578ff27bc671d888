"""Stage 2 as a whole, in this process: looks at held-out instructions, rollouts sampled ahead."""

import dataclasses
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from runs import rows_without_times
from tensorboardX.proto import event_pb2
from updates import CONFIG, assert_equal, base, new_state

from refine_af import checkpoints, flops, pipeline, ppo_records, records, rewards, rlaf, seeds
from refine_af.config import Ppo
from refine_af.policy import Policy
from refine_af.rlaf import RlafStage
from refine_af.training import TrainState

STEPS = 4
PPO = dataclasses.replace(
    CONFIG.ppo,
    num_steps=STEPS,
    num_epochs=1,
    num_microbatches=1,
    checkpoint_every=2,
    num_eval_prompts=2,
    num_eval_samples=2,
    eval_every=2,
    sample_ahead=True,
)
TEXTS = [f"Write about {thing}." for thing in ("cats", "rain", "tea", "ships", "snow")]
HELD_OUT = ["Name a | town.", "Sing <b>loudly."]


class Stopped(BaseException):
    """As if the process had been killed."""


def stage(workdir: Path, options: Ppo = PPO, stop_at: int | None = None) -> RlafStage:
    """With an oracle that counts letters, and fails in the rollout of a step."""
    config = dataclasses.replace(CONFIG, ppo=options)

    def oracle(examples: Any) -> dict[str, Any]:
        done = len(records.read_rows(workdir / ppo_records.METRICS))
        if stop_at is not None and done >= stop_at:
            raise Stopped
        lengths = [float(sum(map(str.isalpha, e.output))) for e in examples]
        return {name: lengths for name in rewards.PAPER_COMPONENTS}

    return RlafStage(config, base(), oracle, seeds.load(None), TEXTS, HELD_OUT, workdir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    stage(workdir).run()
    return workdir


def test_a_rollout_sampled_ahead_is_of_the_policy_one_step_back(undisturbed: Path) -> None:
    """Steps 0 and 1 have the answers of the first policy, the reference; step 2, behind a
    checkpoint, has those of the newest."""
    metrics = records.read_rows(undisturbed / ppo_records.METRICS)
    moved = [abs(row["kl/k3"]) for row in metrics]
    assert moved[0] == moved[1] == 0
    assert min(moved[2:]) > 0


@pytest.mark.slow
def test_without_it_every_rollout_is_of_the_newest_policy(tmp_path: Path) -> None:
    stage(tmp_path, dataclasses.replace(PPO, sample_ahead=False, num_steps=2)).run()
    assert records.read_rows(tmp_path / ppo_records.METRICS)[1]["kl/k3"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_stopped_run_goes_on_as_if_undisturbed(
    stop_at: int, undisturbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        stage(tmp_path, stop_at=stop_at).run()
    stage(tmp_path).run()
    for name in (ppo_records.METRICS, ppo_records.ROLLOUTS, ppo_records.SAMPLES):
        assert rows_without_times(tmp_path / name) == rows_without_times(undisturbed / name)


def test_the_same_instructions_are_looked_at_again_and_again(undisturbed: Path) -> None:
    samples = records.read_rows(undisturbed / ppo_records.SAMPLES)
    assert [(row["step"], row["instruction"]) for row in samples] == [
        (step, text) for step in (0, 2) for text in HELD_OUT
    ]
    metrics = records.read_rows(undisturbed / ppo_records.METRICS)
    assert ["eval/reward/mean" in row for row in metrics] == [True, False, True, False]
    rewards_of_last = [row["reward"] for row in samples[2:]]
    assert metrics[2]["eval/reward/mean"] == pytest.approx(sum(rewards_of_last) / 2, abs=1e-5)
    assert all(0 < row["time/mfu"] < 1 for row in metrics)


def test_a_prompt_without_room_for_its_answer_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    context = base().config.max_positions
    sampling = dataclasses.replace(PPO.sampling, max_new_tokens=context)
    message = rf"a prompt of PPO has \d+ tokens: .*max_new_tokens={context} .* too short; lower"
    with pytest.raises(ValueError, match=message):
        stage(tmp_path, dataclasses.replace(PPO, sampling=sampling)).run()
    assert not records.read_rows(tmp_path / ppo_records.METRICS)


@pytest.mark.slow
def test_the_best_policy_is_kept_and_taken(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one after step 2, say, though later ones are newer; damaged, it is the next best."""
    options = dataclasses.replace(
        PPO, keep_best=True, keep_checkpoints=1, eval_every=1, checkpoint_every=STEPS
    )
    mine = stage(tmp_path, options)
    seen = iter([0.0, 1.0, 3.0, 2.0, 1.5])
    look = RlafStage._look

    def looked(self: RlafStage, state: TrainState) -> Any:
        answers, reward = look(self, state), next(seen)
        judged = [dataclasses.replace(judgement, reward=reward) for judgement in answers.judgements]
        return answers._replace(judgements=judged)

    monkeypatch.setattr(RlafStage, "_look", looked)
    with pytest.raises(Stopped):
        dataclasses.replace(mine, oracle=stage(tmp_path, options, stop_at=3).oracle).run()
    seen = iter([2.0, 1.5])
    mine.run()
    folder = tmp_path / "ppo/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]
    assert ppo_records.read_looks(tmp_path) == {1: 1, 2: 3, 3: 2, 4: 1.5}
    assert_equal(rlaf.tuned_policy(mine.config, base(), tmp_path), sampling_params(folder, 2))
    damage(folder / "2")
    assert_equal(rlaf.tuned_policy(mine.config, base(), tmp_path), sampling_params(folder, 4))


def sampling_params(folder: Path, step: int) -> Any:
    with checkpoints.open_manager(folder, keep=1) as manager:
        state = checkpoints.restore(manager, step, checkpoints.shapes_of(new_state()))
    return Policy(base(), PPO).for_sampling(state.params)


def damage(checkpoint: Path) -> None:
    for path in (checkpoint / "default").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def test_tensorboard_has_figures_and_texts(undisturbed: Path) -> None:
    (path,) = (undisturbed / "ppo").glob("events.out.tfevents.*")
    values = [v for event in _events(path) for v in event.summary.value]
    assert len([v for v in values if v.tag == "reward/mean"]) == STEPS
    tables = [v.tensor.string_val[0].decode() for v in values if v.tag.startswith("samples")]
    assert len(tables) == 2
    for table in tables:
        header, rule, *rows = table.split("\n")
        assert header == "| instruction | input | output | reward | finish_reason |"
        assert rule.count("---") == 5
        assert len(rows) == len(HELD_OUT)
        assert "Name a \\| town." in rows[0]
        assert "&lt;b>loudly" in rows[1]


def _events(path: Path) -> list[Any]:
    data, events, at = path.read_bytes(), [], 0
    while at < len(data):  # length, its checksum, record, its checksum
        size = int.from_bytes(data[at : at + 8], "little")
        events.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
        at += size + 16
    return events


@pytest.mark.slow
def test_weights_and_biases_goes_on_in_the_run_of_the_workdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in with the calls that are made: the package is an extra."""
    begun: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []
    run = types.SimpleNamespace(
        log=logged.append, define_metric=lambda *_, **__: None, finish=lambda: None
    )

    def init(**arguments: Any) -> Any:
        begun.append(arguments)
        return run

    def table(columns: list[str], data: list[list[Any]]) -> Any:
        return columns, data

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Table=table))
    options = dataclasses.replace(PPO, trackers=("wandb",), num_steps=2)
    with pytest.raises(Stopped):
        stage(tmp_path, options, stop_at=1).run()
    stage(tmp_path, options).run()
    metrics = records.read_rows(tmp_path / ppo_records.METRICS)
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["config"]["ppo"]["num_steps"] == 2
    assert [row["ppo_step"] for row in logged] == [0, 0, 0, 0, 1]
    assert logged[-1]["reward/mean"] == metrics[1]["reward/mean"]
    assert [line[0] for line in logged[-2]["samples"][1]] == HELD_OUT
    assert not list((tmp_path / "ppo").glob("events.*"))


def test_weights_and_biases_must_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before anything is made."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    config = dataclasses.replace(CONFIG, ppo=dataclasses.replace(PPO, trackers=("wandb",)))
    with pytest.raises(ValueError, match=r"ppo.trackers: wandb is not installed; pip install -e"):
        pipeline.Run(config, tmp_path).check(["train_ppo"])


def test_operations_of_a_step_by_hand() -> None:
    """Two for each weight and token, layers and head apart, times passes."""
    shape = base().config
    layer = 4 * shape.embed_dim * shape.head_dim * (shape.num_heads + shape.num_kv_heads) // 2
    layer += 3 * shape.embed_dim * shape.hidden_dim + 2 * shape.embed_dim  # and its two norms
    layers = shape.num_layers * layer + shape.embed_dim
    head = shape.embed_dim * shape.vocab_size
    forward = flops.forward(shape, 10, 3)
    assert forward == 2 * (layers * 10 + head * 3)
    for options, passes in (
        (dataclasses.replace(PPO, num_epochs=2), 2 + 2 * 2),
        (dataclasses.replace(PPO, num_epochs=2, trained="full"), 2 + 2 * 3),
    ):
        assert flops.of_step(shape, options, 10, 3) == passes * forward
    separate = dataclasses.replace(PPO, critic="separate")
    critic = flops.forward(shape, 10, 0)
    assert flops.of_step(shape, separate, 10, 3) == 4 * forward + 3 * critic
