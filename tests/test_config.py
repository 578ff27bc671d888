"""Configs: what is refused and how, what is hashed, and what flags and files make of them."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from absl import flags as absl_flags

from refine_af import config as config_lib
from refine_af.config import Experiment, config_hash
from refine_af.config_reading import from_dict
from refine_af.launch import flags

CONFIGS = {name: flags.load_config(name) for name in flags.available_configs()}
TINY = CONFIGS["tiny"]


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every field that is no config itself."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def with_value(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Copy of nested dictionaries with one leaf set."""
    head, _, rest = path.partition(".")
    return values | {head: with_value(values[head], rest, value) if rest else value}


def changed(path: str, value: Any, config: Experiment = TINY) -> Experiment:
    """The config with one field set, built anew and so validated."""
    return from_dict(Experiment, with_value(dataclasses.asdict(config), path, value))


LEAVES = dict(leaves(TINY))
# Values that are possible instead of the tiny config's, where one more is not.
OTHERS = {
    **{f"{stage}.sampling.stop_token_ids": (1,) for stage in ("instructions", "ppo", "instances")},
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.decode_kernel": "pallas",
    "instructions.classification_share": 0.5,
    "instructions.max_similarity": 0.5,
    "prompts.format": "chat",
    "reward.others": ("good=1",),
    "reward.normalise": "batch",
    "reward.floor": "unreadable",
    "ppo.trained": "full",
    "ppo.critic": "separate",
    "ppo.optimizer": "adafactor",
    "ppo.schedule": "cosine",
    "ppo.trackers": ("wandb",),
    "ppo.estimator": "rloo",
    "ppo.group_size": 4,
    "ppo.remat": "none",
    "ppo.dual_clip": 3.0,
    "ppo.kl_controller": "fixed",
    "sft.remat": "none",
    "ppo.gamma": 0.5,
    "ppo.gae_lambda": 0.5,
    "ppo.batch_size": 16,
    "ppo.num_minibatches": 4,
    "ppo.num_microbatches": 4,
    "ppo.lora.pattern": "q|k",
    "sft.lora.pattern": "q|k",
    "dataset.filter": "reward",
    "dataset.filter_at": 0.5,
    "dataset.max_similarity": 0.5,
    "sft.format": "chat",
    "sft.trained": "full",
    "sft.batch_size": 8,
    "sft.num_microbatches": 4,
    "sft.warmup_share": 0.5,
    "sft.eval_share": 0.5,
    "evaluation.format": "chat",
    "evaluation.track": "xlingual",
}


def other(path: str) -> Any:
    """A possible value that is not the tiny config's."""
    value = LEAVES[path]
    if path in OTHERS:
        return OTHERS[path]
    if path.endswith("top_p"):
        return 0.5
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, "END")
    return value + ("x" if isinstance(value, str) else 1)


def test_configs_are_shipped() -> None:
    assert {"tiny", "smollm2_135m"} <= CONFIGS.keys()
    assert all(isinstance(config, Experiment) for config in CONFIGS.values())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shipped_configs_survive_the_way_through_dictionaries(config: Experiment) -> None:
    """Also through JSON, which has no tuples: a workdir's config.json."""
    for values in (dataclasses.asdict(config), json.loads(json.dumps(dataclasses.asdict(config)))):
        again = from_dict(Experiment, values)
        assert again == config
        assert config_hash(again) == config_hash(config)


def test_lists_become_tuples_and_whole_numbers_floats() -> None:
    assert changed("ppo.sampling.stop", ["a", "b"]).ppo.sampling.stop == ("a", "b")
    coefficient = changed("ppo.kl_coef", 1).ppo.kl_coef
    assert (coefficient, type(coefficient)) == (1.0, float)
    assert config_hash(changed("ppo.kl_coef", 1)) == config_hash(changed("ppo.kl_coef", 1.0))


@pytest.mark.parametrize("path", LEAVES)
def test_the_hash_changes_with_every_field_but_the_mesh(path: str) -> None:
    start = changed("dataset.filter", "reward") if path == "dataset.filter_at" else TINY
    config = changed(path, other(path), start)
    assert dict(leaves(config)) == dict(leaves(start)) | {path: other(path)}
    assert (config_hash(config) == config_hash(start)) == path.startswith("mesh.")
    assert len(config_hash(config)) == 16


def test_nothing_can_be_set_afterwards() -> None:
    parts = [getattr(TINY, field.name) for field in dataclasses.fields(TINY)]
    for config in (TINY, TINY.ppo.lora, TINY.ppo.sampling, *parts):
        if dataclasses.is_dataclass(config):
            for field in dataclasses.fields(config):
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(config, field.name, None)


def counts(section: str, names: str) -> dict[str, str]:
    return {f"{section}{name}": f"{section}{name}=0: expected at least 1" for name in names.split()}


def sizes(section: str, names: str) -> dict[str, str]:
    return {f"{section}{name}": f"{section}{name}=0.0: expected > 0" for name in names.split()}


AT_LEAST_ONE = {
    **counts("instructions.", "num_instructions max_batches batch_size"),
    **counts("ppo.", "num_steps batch_size num_epochs num_minibatches num_microbatches"),
    **counts("ppo.", "kl_horizon checkpoint_every keep_checkpoints"),
    **counts("instances.", "batch_size answers_per_instruction max_per_instruction"),
    **counts("sft.", "num_epochs batch_size num_microbatches max_length checkpoint_every"),
    **counts("sft.", "keep_checkpoints"),
    **counts("evaluation.", "max_instances max_source_tokens batch_size max_new_tokens"),
    "ppo.lora.rank": "lora.rank=0: expected at least 1",
    "ppo.sampling.max_new_tokens": "max_new_tokens=0: expected at least 1",
}
ABOVE_ZERO = {
    **sizes("ppo.", "learning_rate max_grad_norm adam_eps clip_eps value_clip_eps kl_target"),
    **sizes("sft.", "learning_rate max_grad_norm"),
    "sft.lora.alpha": "lora.alpha=0.0: expected > 0",
}


@pytest.mark.parametrize(("path", "message"), (AT_LEAST_ONE | ABOVE_ZERO).items(), ids=str)
def test_zero_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        changed(path, 0)
    assert str(error.value) == message


NOT_NEGATIVE = {
    "seed": "seed=-1: expected at least 0",
    "instructions.num_seed_demos": "instructions.num_seed_demos=-1: expected at least 0",
    "instructions.num_generated_demos": "instructions.num_generated_demos=-1: expected at least 0",
    "prompts.num_demos": "prompts.num_demos=-1: expected at least 0",
    "ppo.warmup_steps": "ppo.warmup_steps=-1: expected at least 0",
    "ppo.value_coef": "ppo.value_coef=-1.0: expected at least 0",
    "ppo.entropy_coef": "ppo.entropy_coef=-1.0: expected at least 0",
    "ppo.kl_coef": "ppo.kl_coef=-1.0: expected at least 0",
    "ppo.sampling.temperature": "temperature=-1.0: expected 0 or at least 0.0001",
    "ppo.sampling.top_k": "top_k=-1: expected at least 0",
    "evaluation.num_examples": "evaluation.num_examples=-1: expected at least 0",
}


@pytest.mark.parametrize(("path", "message"), NOT_NEGATIVE.items(), ids=str)
def test_a_negative_number_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        changed(path, -1)
    assert str(error.value) == message


WORDS = "('q', 'k', 'v', 'o', 'gate', 'up', 'down')"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "model.dtype",
            "bfloat",
            "model.dtype='bfloat': expected one of ('float32', 'bfloat16'); "
            "did you mean 'bfloat16'?",
        ),
        (
            "model.param_dtype",
            "int4",
            "model.param_dtype='int4': expected one of ('float32', 'bfloat16')",
        ),
        (
            "prompts.format",
            "chats",
            "prompts.format='chats': expected one of ('raw', 'chat'); did you mean 'chat'?",
        ),
        (
            "sft.format",
            "alpacca",
            "sft.format='alpacca': expected one of ('alpaca', 'chat'); did you mean 'alpaca'?",
        ),
        (
            "evaluation.format",
            "",
            "evaluation.format='': expected one of ('raw', 'chat')",
        ),
        (
            "ppo.batch_size",
            10,
            "ppo.batch_size=10: must be a multiple of num_minibatches*num_microbatches=4",
        ),
        ("sft.batch_size", 3, "sft.batch_size=3: must be a multiple of num_microbatches=2"),
        ("ppo.sampling.temperature", 0.0, "ppo.sampling.temperature: PPO must sample, use > 0"),
        (
            "ppo.sampling.temperature",
            float("nan"),
            "ppo.sampling.temperature=nan: expected a finite number",
        ),
        ("ppo.sampling.top_p", 0.0, "top_p=0.0: expected in (0, 1]"),
        ("ppo.sampling.top_p", 1.5, "top_p=1.5: expected in (0, 1]"),
        ("ppo.sampling.stop", ("a", ""), "stop=('a', ''): expected strings that are not empty"),
        (
            "ppo.group_size",
            3,
            "ppo.group_size=3: expected a divisor of batch_size=8, at least 1 for gae",
        ),
        (
            "ppo.kl_coef",
            0.0,
            "ppo.kl_coef=0.0: the adaptive controller multiplies it; expected above 0, or "
            "kl_controller=fixed",
        ),
        (
            "ppo.kl_horizon",
            1,
            "ppo.kl_horizon=1: a step could turn kl_coef negative; expected above a fifth of "
            "batch_size=8",
        ),
        ("ppo.critic_warmup", 3, "ppo.critic_warmup=3: expected below num_steps=3"),
        ("ppo.dual_clip", 0.5, "ppo.dual_clip=0.5: expected 0 or above 1"),
        (
            "ppo.estimator",
            "gpro",
            "ppo.estimator='gpro': expected one of ('gae', 'rloo', 'grpo'); did you mean 'grpo'?",
        ),
        ("ppo.remat", "some", "ppo.remat='some': expected one of ('none', 'cheap', 'full')"),
        ("ppo.kl_controller", "", "ppo.kl_controller='': expected one of ('adaptive', 'fixed')"),
        ("ppo.gamma", 1.1, "ppo.gamma=1.1: expected in [0, 1]"),
        ("ppo.gae_lambda", -0.1, "ppo.gae_lambda=-0.1: expected in [0, 1]"),
        ("sft.warmup_share", 1.1, "sft.warmup_share=1.1: expected in [0, 1]"),
        ("sft.eval_share", 1.0, "sft.eval_share=1.0: expected in [0, 1)"),
        (
            "instructions.classification_share",
            2.0,
            "instructions.classification_share=2.0: expected in [0, 1]",
        ),
        (
            "instructions.max_similarity",
            0.0,
            "instructions.max_similarity=0.0: expected in (0, 1]",
        ),
        (
            "dataset.filter",
            "rewrd",
            "dataset.filter='rewrd': expected one of ('none', 'reward', 'share'); did you mean "
            "'reward'?",
        ),
        ("dataset.filter", "share", "dataset.filter_at=0.0: expected a share in (0, 1]"),
        (
            "dataset.filter_at",
            0.5,
            "dataset.filter_at=0.5: needs dataset.filter, 'reward' or 'share'",
        ),
        ("dataset.max_similarity", 1.1, "dataset.max_similarity=1.1: expected in (0, 1]"),
        (
            "dataset.license",
            "MIT: free",
            "dataset.license='MIT: free': expected one of the hub's names, as apache-2.0",
        ),
        (
            "sft.lora.pattern",
            "q|(",
            "lora.pattern='q|(': expected a regular expression "
            "(missing ), unterminated subpattern at position 2)",
        ),
        (
            "sft.lora.pattern",
            "q_proj",
            "lora.pattern='q_proj': expected a regular expression that is, in full, "
            f"one of {WORDS}",
        ),
        # Types, which a config file can get wrong.
        ("ppo.num_steps", 2.5, "ppo.num_steps=2.5: expected int"),
        ("ppo.num_steps", True, "ppo.num_steps=True: expected int"),
        ("ppo.learning_rate", "1e-3", "ppo.learning_rate='1e-3': expected float"),
        ("ppo.whiten_advantages", 1, "ppo.whiten_advantages=1: expected bool"),
        ("model.source", None, "model.source=None: expected str"),
        ("instances.sampling.stop", "\n", "instances.sampling.stop='\\n': expected a list of str"),
        ("instances.sampling.stop", (1,), "instances.sampling.stop=(1,): expected a list of str"),
    ],
)
def test_impossible_values_are_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        changed(path, value)
    assert str(error.value) == message


def test_a_filter_by_reward_needs_the_reward() -> None:
    filtered = changed("dataset.filter", "reward")
    with pytest.raises(ValueError, match=r"^dataset\.filter='reward': needs instances\.score"):
        changed("instances.score", False, filtered)


def test_groups_need_company_and_have_no_token_rewards() -> None:
    with pytest.raises(ValueError, match="at least 2 for rloo"):
        dataclasses.replace(TINY.ppo, estimator="rloo", group_size=1)
    with pytest.raises(ValueError, match="grpo has no token rewards"):
        dataclasses.replace(TINY.ppo, estimator="grpo", whiten_rewards=True)


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(config_lib).values() if dataclasses.is_dataclass(kind)]
)
def test_every_leaf_has_a_type_that_can_be_read(kind: type[Any]) -> None:
    for field in dataclasses.fields(kind):
        readable = field.type in (bool, int, float, str, tuple[str, ...], tuple[int, ...])
        assert readable or dataclasses.is_dataclass(field.type), field.name


# Command lines and files


@pytest.fixture
def parse() -> Iterator[Callable[..., Experiment]]:
    """The config of a command line; absl's flags are global, so those of a test go with it."""
    known = set(absl_flags.FLAGS)

    def run(*arguments: str) -> Experiment:
        assert flags.parse_with_config(["program", *arguments]) == ["program"]
        return flags.experiment()

    yield run
    for name in set(absl_flags.FLAGS) - known:
        delattr(absl_flags.FLAGS, name)
    absl_flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        ("", "seed", 0),
        ("--config.ppo.learning_rate=3e-6", "ppo.learning_rate", 3e-6),
        ("-config.ppo.learning_rate=3e-6", "ppo.learning_rate", 3e-6),
        ("--config.reward.bias=1", "reward.bias", 1.0),
        ("--config.ppo.num_steps=7", "ppo.num_steps", 7),
        ("--config.ppo.num_steps 7", "ppo.num_steps", 7),
        ("--config.mesh.fsdp=-2", "mesh.fsdp", -2),
        ("--config.seed=1 --config.seed=2", "seed", 2),
        ("--config.ppo.whiten_advantages=false", "ppo.whiten_advantages", False),
        ("--noconfig.ppo.whiten_advantages", "ppo.whiten_advantages", False),
        ("--config.model.source=random:other", "model.source", "random:other"),
        ("--config.instances.sampling.stop=('a','b')", "instances.sampling.stop", ("a", "b")),
        ("--config.instances.sampling.stop=ab", "instances.sampling.stop", ("ab",)),
        ("--config.instructions.sampling.stop=()", "instructions.sampling.stop", ()),
    ],
)
def test_an_override_sets_one_field_in_its_type(
    arguments: str, path: str, value: Any, parse: Callable[..., Experiment]
) -> None:
    found = dict(leaves(parse("--config", "tiny", *arguments.split())))
    assert found == LEAVES | {path: value}
    assert type(found[path]) is type(value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--noconfig.ppo.whitening", "--config.ppo.whitening: no such field; nearest: ppo.whiten"),
        ("--config.entropy_coef=1", "--config.entropy_coef: no such field; nearest: ppo.entropy_"),
        ("--config.zzzzzzzz=3", "--config.zzzzzzzz: no such field"),
        ("--config.ppo.num_steps=2.5", "--config.ppo.num_steps=2.5: expected a whole number"),
        ("--config.ppo.gamma=high", "--config.ppo.gamma=high: expected a number"),
        ("--config.ppo.gamma=a: b", "--config.ppo.gamma=a: b: expected a number"),
        ("--config.ppo.whiten_advantages=x", "--config.ppo.whiten_advantages=x: expected true or"),
        ("--config.prompts.format=chats", "prompts.format='chats': expected one of ('raw', 'chat"),
        ("--config.ppo.sampling.stop=(1,)", "ppo.sampling.stop=(1,): expected a list of str"),
        ("--config.ppo.gamma=2", "ppo.gamma=2.0: expected in [0, 1]"),
        *(
            (f"--config.mesh={value}", f"--config.mesh={value}: expected AXIS:SIZE of ['data', 'f")
            for value in ("8", "data:2,model:4", "data:2,data:4", "data:two", "data:2,", "")
        ),
    ],
)
def test_a_faulty_override_is_refused(
    argument: str, message: str, parse: Callable[..., Experiment]
) -> None:
    with pytest.raises((ValueError, absl_flags.Error)) as error:
        parse("--config=tiny", argument)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("value", "sizes"),
    [
        ("data:2,fsdp:4,tensor:2", (2, 4, 1, 2)),
        ("tensor:2,data:-1", (-1, 1, 1, 2)),
        ("fsdp:8,sequence:2", (1, 8, 2, 1)),
    ],
)
def test_a_mesh_is_one_override(
    value: str, sizes: tuple[int, ...], parse: Callable[..., Experiment]
) -> None:
    """Axes that are not named are 1."""
    mesh = parse("--config=tiny", f"--config.mesh={value}").mesh
    assert dataclasses.astuple(mesh) == sizes


def test_a_file_may_write_a_float_as_a_whole_number(
    tmp_path: Path, parse: Callable[..., Experiment]
) -> None:
    """An override is a float all the same."""
    source = Path(flags.configs.__path__[0], "tiny.py").read_text()
    (tmp_path / "mine.py").write_text(source.replace("learning_rate=1e-3", "learning_rate=1"))
    config = parse(f"--config={tmp_path / 'mine.py'}", "--config.ppo.learning_rate=.5")
    assert (config.ppo.learning_rate, config.sft.learning_rate) == (0.5, 1.0)
    assert type(config.sft.learning_rate) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("get_config = dict", "expected a function get_config() that returns an Experiment"),
        ("", "expected a function get_config() that returns an Experiment"),
        ("def get_config(:", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("import nonexistent", "ModuleNotFoundError: No module named 'nonexistent'"),
        (
            "from refine_af.config import Lora\ndef get_config(): return Lora(rank=0)",
            "ValueError: lora.rank=0: expected at least 1",
        ),
    ],
)
def test_a_file_that_gives_no_experiment_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        flags.load_config(str(path))
    assert str(error.value) == f"{path}: {message}"
