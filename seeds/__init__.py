"""Seed tasks in the Self-Instruct schema, and small evaluation tasks. Standard library only."""

import dataclasses
import json
from pathlib import Path
from typing import Any

SEED_TASKS = Path(__file__).parent / "seed_tasks.jsonl"
EVALUATION_DIR = Path(__file__).parent / "evaluation"  # SuperNI task files

_TYPES = {"id": str, "instruction": str, "instances": list, "is_classification": bool}


@dataclasses.dataclass(frozen=True)
class Instance:
    """One worked example of a task; `input` may be empty."""

    input: str
    output: str


@dataclasses.dataclass(frozen=True)
class SeedTask:
    """A task to learn from, in the schema of Self-Instruct (arXiv 2212.10560)."""

    id: str
    instruction: str
    instances: tuple[Instance, ...]  # at least one
    is_classification: bool


def load(path: Path | str | None = None) -> list[SeedTask]:
    """Read seed tasks, this project's own by default; blank lines are skipped.

    Raises:
        ValueError: `file:line: ...` for a line that is not a seed task or repeats an id, or the
            file cannot be read or is empty.
    """
    path = Path(path) if path else SEED_TASKS
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read seed tasks: {error}") from None
    tasks: dict[str, SeedTask] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        task = _parse(line, f"{path}:{number}")
        if task.id in tasks:
            raise ValueError(f"{path}:{number}: id {task.id!r} stands in the file twice")
        tasks[task.id] = task
    if not tasks:
        raise ValueError(f"{path}: no seed tasks; expected one JSON object a line")
    return list(tasks.values())


def _parse(line: str, where: str) -> SeedTask:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # refuses halves of characters, "\\ud800"
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for field, kind in _TYPES.items():
        if not isinstance(row.get(field), kind):
            found = repr(row[field])[:40] if field in row else "nothing"
            raise ValueError(f"{where}: {field!r} must be a {kind.__name__}, found {found}")
    if not row["instruction"].strip():
        raise ValueError(f"{where}: 'instruction' is empty")
    if not row["instances"]:
        raise ValueError(f"{where}: 'instances' is empty; expected at least one")
    instances = tuple(_parse_instance(raw, where) for raw in row["instances"])
    return SeedTask(row["id"], row["instruction"], instances, row["is_classification"])


def _parse_instance(raw: Any, where: str) -> Instance:
    if not (
        isinstance(raw, dict) and all(isinstance(raw.get(k), str) for k in ("input", "output"))
    ):
        raise ValueError(
            f"{where}: an instance must be an object with strings 'input' and 'output'"
        )
    return Instance(raw["input"], raw["output"])
