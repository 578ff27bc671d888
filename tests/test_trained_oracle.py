"""A trained oracle: what surrounds an example changes nothing, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refine_af import (
    base_model,
    oracle_evaluation,
    oracle_examples,
    oracle_training,
    rewards,
    seeds,
    trained_oracle,
)
from refine_af.base_model import BaseModel
from refine_af.config import PAPER_COMPONENTS, Lora, Mesh, Model, Reward
from refine_af.oracle_training import OracleOptions
from refine_af.rewards import Example
from refine_af.trained_oracle import TrainedOracle, encode

NAME = "smollm2-135m-instruct"
OPTIONS = OracleOptions(
    seed=0,
    num_epochs=1,
    learning_rate=1e-3,
    batch_size=1,
    max_length=64,
    lora=Lora(rank=2, alpha=4.0, pattern="q|v"),
)
EXAMPLES = [
    Example("Say hello.", "", "Hello."),
    Example("Name a colour.", "not red", "Blue, like the sky over a quiet sea in summer."),
    Example("", "", ""),
    Example("Count to three. " * 9, "", "1, 2, 3"),
    Example("Long.", "", "word " * 50),
]


def tiny(dtype: str = "float32") -> BaseModel:
    return base_model.load(Model(source="random:tiny", dtype=dtype, param_dtype="float32"), Mesh())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An oracle whose adapter does something."""
    base = tiny()
    params = oracle_training.new_params(base, OPTIONS)
    keys = iter(jax.random.split(jax.random.key(7), 8))
    params["adapter"] = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params["adapter"]
    )
    folder = tmp_path_factory.mktemp("oracle")
    trained_oracle.write(params, oracle_training.description(base, OPTIONS), folder)
    return folder


@pytest.fixture(scope="module")
def oracle(directory: Path) -> TrainedOracle:
    return trained_oracle.load(directory, tiny())


def rows(table: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack([table[name] for name in PAPER_COMPONENTS], axis=1)


# Scores


def test_order_company_and_padding_change_nothing(oracle: TrainedOracle) -> None:
    together = rows(oracle(EXAMPLES))
    assert together.shape == (5, 4) and together.dtype == np.float64
    assert len(np.unique(together[:, 0])) == 5
    np.testing.assert_allclose(rows(oracle(EXAMPLES[::-1]))[::-1], together, atol=1e-6)
    for example, wanted in zip(EXAMPLES, together, strict=True):
        np.testing.assert_allclose(rows(oracle([example])), wanted[None], atol=1e-6)
    twice = rows(oracle([*EXAMPLES, EXAMPLES[1]]))
    np.testing.assert_array_equal(twice[5], twice[1])


def test_it_is_an_oracle(oracle: TrainedOracle) -> None:
    assert {name: column.shape for name, column in oracle([]).items()} == dict.fromkeys(
        PAPER_COMPONENTS, (0,)
    )
    judged = rewards.judge(oracle, [EXAMPLES[0], None], [True, True], Reward())
    components = judged[0].components
    assert components is not None
    assert all(0 < components[name] < 1 for name in ("nat", "und", "coh"))


def test_the_adapter_and_the_heads_are_what_the_file_says(
    oracle: TrainedOracle, directory: Path
) -> None:
    """Without the adapter the scores are others; the base model keeps its weights."""
    tensors = load_file(directory / "adapter.safetensors")
    assert {str(t.dtype) for n, t in tensors.items() if n.startswith("adapter/")} == {"float16"}
    bare = jax.tree.map(lambda x: 0 * x, oracle.params["adapter"])
    without = dataclasses.replace(oracle, params={**oracle.params, "adapter": bare})
    assert np.abs(rows(without(EXAMPLES)) - rows(oracle(EXAMPLES))).max() > 1e-3
    fresh = tiny()
    assert jax.tree.all(jax.tree.map(np.array_equal, fresh.params, oracle.base.params))
    assert trained_oracle.load(directory, fresh).base is fresh


def test_it_loads_the_model_that_it_names(oracle: TrainedOracle, directory: Path) -> None:
    alone = trained_oracle.load(directory, mesh=Mesh(data=8, fsdp=1), dtype="float32")
    np.testing.assert_allclose(rows(alone(EXAMPLES)), rows(oracle(EXAMPLES)), atol=1e-5)


# Texts


def test_one_format_and_what_goes_when_it_is_too_long() -> None:
    base = tiny()

    def text(example: Example, max_length: int) -> str:
        ids = encode(example, base.tokenizer, base.end_id, max_length)
        assert ids[-1] == base.end_id and len(ids) <= max_length
        return base.tokenizer.decode(ids[:-1])

    example = Example("Do it.", "now", "It is done.")
    whole = "Task: Do it.\nnow\nResponse: It is done."
    assert text(example, 64) == whole
    assert text(example, 32) == whole[-31:]
    assert text(Example("Do it.", "", "x" * 99), 32) == "esponse: " + "x" * 22


# What is refused


def test_another_model_is_refused_in_one_line(directory: Path, oracle: TrainedOracle) -> None:
    base = oracle.base
    other = dataclasses.replace(base, params=jax.tree.map(lambda x: x * 1.5, base.params))
    with pytest.raises(ValueError, match=r"was trained on 'random:tiny', which .* is not: weights"):
        trained_oracle.load(directory, other)
    shape = dataclasses.replace(base.config, rope_theta=5.0)
    renamed = dataclasses.replace(
        base, source=dataclasses.replace(base.source, config=shape, name="mine")
    )
    message = r"which 'mine' is not: config_hash \w+ is not \w+$"
    with pytest.raises(ValueError, match=message):
        trained_oracle.load(directory, renamed)
    trained_oracle.load(directory, tiny("bfloat16"))  # another arithmetic is no other model


def test_files_that_do_not_fit_are_refused(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    base = tiny()
    tensors = load_file(copy / "adapter.safetensors")
    save_file(
        {**tensors, "heads/kernel": tensors["heads/kernel"][:, :3]}, copy / "adapter.safetensors"
    )
    with pytest.raises(ValueError, match=r"heads/kernel has shape \(32, 3\), expected \(32, 4\)"):
        trained_oracle.load(copy, base)
    (copy / "adapter.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="safetensors: not readable"):
        trained_oracle.load(copy, base)
    content = json.loads((copy / "oracle.json").read_text())
    (copy / "oracle.json").write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(ValueError, match="expected format 1 with"):
        trained_oracle.load(copy, base)
    del content["max_length"]
    (copy / "oracle.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'max_length' is missing"):
        trained_oracle.load(copy, base)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match=rf"or one of \[{NAME!r}\]"):
        trained_oracle.find("smollm2")


# The shipped one


def test_the_shipped_oracle_is_described_and_small() -> None:
    assert trained_oracle.shipped() == [NAME]
    description = trained_oracle.describe(NAME)
    assert description.model == NAME
    folder = trained_oracle.find(NAME)
    assert (folder / "adapter.safetensors").stat().st_size < 8e6
    assert "train_oracle" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_the_shipped_oracle_tells_good_answers_of_held_out_tasks_from_corrupted_ones() -> None:
    """On one draw of each corruption; the card has the figures of six."""
    oracle = trained_oracle.load(NAME)
    unseen = oracle_examples.split(seeds.load())[1]
    pairs = oracle_evaluation.corrupted_pairs(unseen, 1)
    table = oracle_evaluation.accuracies(oracle_evaluation.score(oracle, pairs))
    assert len(pairs) > 300
    assert oracle_evaluation.find(table, "mismatched")["rew"] >= 0.90
    assert oracle_evaluation.find(table, "shuffled")["rew"] >= 0.95
    assert oracle_evaluation.find(table, "all")["rew"] >= 0.90
