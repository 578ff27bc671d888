"""The oracle that `config.reward.oracle` names.

| name | components |
|---|---|
| `judge`, `judge:MODEL` | `rew nat und coh` by the base model, or by another one |
| `trained:NAME_OR_DIR` | `rew nat und coh` by heads that `launch.train_oracle` trained |
| `oasst:DIR` | `rew` by the paper's reward model |
| `unieval:DIR` | `nat und coh` by the paper's text-quality model |
| `rules` | `length format language variety`, without any model |
| `FILE.py:FUNCTION` | what the function gives for a list of examples |
| `http://...`, `https://...` | what a server answers (`http_oracle`) |

Several may be joined with commas, `oasst:DIR,unieval:DIR` is the paper's own pair.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refine_af import base_model, trained_oracle
from refine_af.base_model import BaseModel
from refine_af.config import Experiment
from refine_af.http_oracle import HttpOracle
from refine_af.judge_oracle import JudgeOracle
from refine_af.mesh import make_mesh
from refine_af.models import processes
from refine_af.paper_oracles import OasstRewardModel, UniEval
from refine_af.rewards import WHOLE, Example, Oracle
from refine_af.rule_oracle import rules
from refine_af.score_cache import CachedOracle


@dataclasses.dataclass(frozen=True)
class Named:
    """An oracle that a name stands for, and what its scores depend on."""

    make: Callable[[], Oracle]  # reads its model
    identity: str
    needs_device: bool = True


@dataclasses.dataclass(frozen=True)
class OfWriter:
    """An oracle that one process asks, and tells the others: it need not say the same twice."""

    oracle: Oracle

    def __call__(self, examples: Sequence[Example]) -> Mapping[str, Any]:
        """What the oracle gives."""
        return processes.once(lambda: self.oracle(examples))


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several oracles as one."""

    oracles: Sequence[Oracle]

    def __call__(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """All of their components.

        Raises:
            ValueError: two give a component of the same name.
        """
        table: dict[str, np.ndarray] = {}
        for oracle in self.oracles:
            given = oracle(examples)
            twice = sorted(set(table) & set(given))
            if twice:
                raise ValueError(f"config.reward.oracle: two of its oracles give {twice}")
            table.update(given)
        return table


def check(config: Experiment) -> None:
    """Find what the config's oracles are without reading a model: a run is old when it scores.

    A user's file is run for it. Whether there is the model of `judge:MODEL` shows later.

    Raises:
        ValueError: there is no such oracle, or a file of it is missing.
    """
    _find_all(config, _no_base)


def load(config: Experiment, base: Callable[[], BaseModel], cache: Path | None) -> Oracle:
    """Oracle of a run.

    Args:
        base: the run's base model; called only when an oracle uses it.
        cache: file of known scores, unless the config names one; None: nothing is kept.

    Raises:
        ValueError: no such oracle, or it cannot be loaded.
    """
    parts = _find_all(config, base)
    made = [part.make() if part.needs_device else OfWriter(part.make()) for part in parts]
    oracle = made[0] if len(made) == 1 else Joined(made)
    path = Path(config.reward.cache).expanduser() if config.reward.cache else cache
    if path is None:
        return oracle
    identity = "\n".join(part.identity for part in parts)
    return CachedOracle(oracle, path, identity, not any(part.needs_device for part in parts))


def _no_base() -> BaseModel:
    raise AssertionError("the base model is for making an oracle, not for finding it")


def _find_all(config: Experiment, base: Callable[[], BaseModel]) -> list[Named]:
    return [_find(name.strip(), config, base) for name in config.reward.oracle.split(",")]


def _find(name: str, config: Experiment, base: Callable[[], BaseModel]) -> Named:
    if name.startswith(("http://", "https://")):
        server = HttpOracle(name, config.reward.timeout)
        return Named(lambda: server, name, needs_device=False)
    if ".py:" in name:
        text, _, function = name.rpartition(":")
        path = Path(text).expanduser()
        oracle = _function(path, function)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        return Named(lambda: oracle, f"{name} {content}", needs_device=False)
    kind, _, argument = name.partition(":")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"config.reward.oracle={name!r}: expected FILE.py:FUNCTION, an http(s) address or one "
            f"of {list(KINDS)}{hint}"
        )
    return KINDS[kind](argument, config, base)


def _judge(source: str, config: Experiment, base: Callable[[], BaseModel]) -> Named:
    options = dataclasses.replace(config.model, source=source or config.model.source)

    def make() -> Oracle:
        return JudgeOracle(base_model.load(options, config.mesh) if source else base())

    return Named(make, f"judge {options} {fingerprint(options.source)}")


def _trained(where: str, config: Experiment, base: Callable[[], BaseModel]) -> Named:
    description = trained_oracle.describe(where)
    mesh, dtype = config.mesh, config.model.dtype

    def make() -> Oracle:
        shared = base() if description.model == config.model.source else None
        return trained_oracle.load(where, shared, mesh=mesh, dtype=dtype)

    content = (trained_oracle.find(where) / trained_oracle.ADAPTER).read_bytes()
    return Named(make, f"trained {dtype} {description} {hashlib.sha256(content).hexdigest()}")


def _published(
    kind: type[OasstRewardModel | UniEval],
    directory: str,
    config: Experiment,
    _: Callable[[], BaseModel],
) -> Named:
    path, dtype = Path(directory).expanduser(), config.model.dtype
    if not directory or not path.is_dir():
        raise ValueError(
            f"config.reward.oracle: {directory!r} is no directory; download {kind.published} and "
            "give its directory, as in oasst:DIR or unieval:DIR"
        )

    def make() -> Oracle:
        return kind.load(path, make_mesh(config.mesh), dtype)

    return Named(make, f"{kind.__name__} {dtype} {fingerprint(directory)}")


def _rules(argument: str, _: Experiment, __: Callable[[], BaseModel]) -> Named:
    if argument:
        raise ValueError(f"config.reward.oracle='rules:{argument}': rules take no argument")
    return Named(lambda: rules, "rules", needs_device=False)


KINDS: dict[str, Callable[[str, Experiment, Callable[[], BaseModel]], Named]] = {
    "judge": _judge,
    "trained": _trained,
    "oasst": functools.partial(_published, OasstRewardModel),
    "unieval": functools.partial(_published, UniEval),
    "rules": _rules,
}


def fingerprint(source: str) -> str:
    """Changes when a file in a directory is written; "" where there is none (a name, say)."""
    path = Path(source).expanduser()
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    facts = [
        (file.name, stat.st_size, stat.st_mtime_ns)
        for file in found
        if file.is_file()
        for stat in [file.stat()]
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest() if facts else ""


def _function(path: Path, name: str) -> Oracle:
    """A function of a user's file, as an oracle.

    It takes a list of `Example` and returns components by name, or one array, which is then the
    reward itself. As in a script, modules beside the file can be imported.
    """
    if not path.is_file():
        raise ValueError(f"config.reward.oracle: {path}: no such file; expected FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"reward_oracle_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look there for their own module
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(_fault(error, path)) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(f"{path}: no function {name!r}; it has {known}")

    def oracle(examples: Sequence[Example]) -> Mapping[str, Any]:
        try:
            given = function(list(examples))
        except (Exception, SystemExit) as error:
            raise ValueError(_fault(error, path)) from error
        return given if isinstance(given, Mapping) else {WHOLE: np.asarray(given)}

    return oracle


def _fault(error: BaseException, path: Path) -> str:
    """What went wrong, and the line of the user's file where it did."""
    if isinstance(error, SyntaxError):
        return f"{path}: {type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    mine = path.resolve()
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == mine]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    return f"{where}: {type(error).__name__}: {error}"
