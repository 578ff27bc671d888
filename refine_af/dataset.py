"""The data set that an arm of a run leaves behind, in the folder `dataset/`.

    train            a row for each triplet, with where it came from
    alpaca           instruction, input, output
    chat             messages: a turn of the user's and one of the assistant's
    statistics.json  counts, lengths, vocabulary, verbs, overlap with the seeds, rewards
    plots/           figures of them
    README.md        the card; it is written last

The first three are there as `.parquet` and as `.jsonl`, with the same rows.
`datasets.load_dataset(FOLDER)` gives the first, `load_dataset(FOLDER, "alpaca")` and `"chat"` the
two forms that other trainers take. (All that it reads by the card has to be of one file format.)
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import jinja2
from datasets import Dataset, Features, List, Value

from refine_af import dataset_plots, dataset_statistics, instructions, other_sets, records
from refine_af.config import DataSet, Experiment, config_hash
from refine_af.dataset_statistics import REWARD
from refine_af.models.writing import writing
from refine_af.records import Row
from refine_af.rewards import WHOLE, Example
from refine_af.seeds import SeedTask

FOLDER = "dataset"
ROWS, ALPACA, CHAT = "train", "alpaca", "chat"
STATISTICS, CARD = "statistics.json", "README.md"
LEFT_OUT = "rejected_rows.jsonl"  # beside the folder: rows that its own filters dropped
FIELDS = ("id", "instruction", "input", "output")  # texts of each instance

_TEXT, _TEXTS, _NUMBER = Value("string"), List(Value("string")), Value("float64")
_COLUMNS = {
    "id": _TEXT,  # of the instruction
    "instruction": _TEXT,
    "input": _TEXT,
    "output": _TEXT,
    "is_classification": Value("bool"),
    "arm": _TEXT,
    "model": _TEXT,
    "seed": Value("int64"),
    "seed_ids": _TEXTS,  # tasks that the prompt of the instruction showed, from the seeds
    "generated_ids": _TEXTS,  # and from the model's own instructions
    "instruction_prompt": _TEXT,
    "demo_ids": _TEXTS,  # seed tasks that the prompt of the instance showed
    "prompt": _TEXT,  # of the instance
    "avg_similarity": _NUMBER,  # ROUGE-L F with the pool, as it was when the instruction came
    "max_similarity": _NUMBER,
    "most_similar": _TEXT,
    REWARD: _NUMBER,
}
_ALPACA_COLUMNS = {name: _TEXT for name in ("instruction", "input", "output")}
_CHAT_COLUMNS = {"messages": List({"role": _TEXT, "content": _TEXT})}


@dataclasses.dataclass(frozen=True)
class Material:
    """What a data set is made of, as the stages left it."""

    config: Experiment
    arm: str
    seeds: Sequence[SeedTask]
    instructions: Sequence[Row]  # accepted
    instances: Sequence[Row]  # accepted
    rejected: Mapping[str, Mapping[str, int]]  # of each stage, reasons with their counts


def finished(target: Path) -> bool:
    """Whether an arm's data set is complete: the card is the last that is written."""
    return records.exists(target / FOLDER / CARD)


def read(target: Path) -> list[Row]:
    """Rows of an arm's data set.

    Raises:
        ValueError: it is not finished, or its rows are gone.
    """
    if not finished(target):
        raise ValueError(f"{target / FOLDER}: not finished; run generate_instances first")
    path = target / FOLDER / f"{ROWS}.jsonl"
    rows = records.read_rows(path, ("instruction", "input", "output"))
    if not rows:
        raise ValueError(
            f"{path}: no rows; remove {target / FOLDER} and run generate_instances again"
        )
    return rows


def write_dataset(made_of: Material, target: Path) -> None:
    """Write all files of the folder; each is replaced as a whole.

    Raises:
        ValueError: no row is left.
    """
    options, folder = made_of.config.dataset, target / FOLDER
    if not made_of.instances:
        raise ValueError(
            "dataset: no instance was accepted; see the reasons in rejected_instances.jsonl, and "
            "raise instances.sampling.max_new_tokens or answers_per_instruction"
        )
    rows, left_out = sift(rows_of(made_of), options)
    reasons = Counter(row["reason"] for row in left_out)
    if left_out:
        records.write_text(target / LEFT_OUT, _lines(left_out))
    if not rows:
        raise ValueError(
            f"dataset: its filters left no row of {len(left_out)} ({dict(reasons)}); see "
            f"{target / LEFT_OUT}, and change dataset.filter_at or dataset.max_similarity"
        )
    folder.mkdir(parents=True, exist_ok=True)
    components = {name: _NUMBER for name in rows[0] if name not in _COLUMNS}
    _write_rows(rows, _COLUMNS | components, folder / ROWS)
    _write_rows(list(map(alpaca, rows)), _ALPACA_COLUMNS, folder / ALPACA)
    _write_rows(list(map(chat, rows)), _CHAT_COLUMNS, folder / CHAT)
    statistics = dataset_statistics.of_rows(rows, [seed.instruction for seed in made_of.seeds])
    dropped = {**made_of.rejected, "data set": reasons}
    content = {"arm": made_of.arm, **statistics, "dropped": dropped}
    records.write_text(folder / STATISTICS, json.dumps(content, indent=1) + "\n")
    plots = dataset_plots.pngs(statistics)
    for name, image in plots.items():
        records.write_bytes(folder / f"plots/{name}.png", image)
    records.write_text(folder / CARD, _card(made_of, statistics, dropped, list(plots)))


def rows_of(made_of: Material) -> list[Row]:
    """A row for each accepted instance, with where its parts came from."""
    tasks = {task["id"]: task for task in made_of.instructions}
    seeds = {seed.id: seed.instruction for seed in made_of.seeds}
    texts = seeds | {key: task["instruction"] for key, task in tasks.items()}
    rows = []
    for instance in made_of.instances:
        task = tasks[instance["id"]]
        shown = task["prompt_ids"]
        kind = task["is_classification"]
        prompt = instructions.build_prompt([(i, texts[i]) for i in shown], is_classification=kind)
        nearest = max(task["most_similar"].items(), key=lambda item: item[1], default=(None, 0.0))
        row = {
            **{name: instance[name] for name in ("id", "instruction", "input", "output")},
            "is_classification": kind,
            "arm": made_of.arm,
            "model": task["model"],
            "seed": task["seed"],
            "seed_ids": [i for i in shown if i in seeds],
            "generated_ids": [i for i in shown if i not in seeds],
            "instruction_prompt": prompt.text,
            "demo_ids": instance["demo_ids"],
            "prompt": instance["prompt"],
            "avg_similarity": task["avg_similarity"],
            "max_similarity": nearest[1],
            "most_similar": nearest[0],
            REWARD: instance.get(REWARD),
        }
        parts = instance.get("components") or {}
        rows.append(row | {f"{REWARD}_{name}": x for name, x in parts.items() if name != WHOLE})
    return rows


def sift(rows: Sequence[Row], options: DataSet) -> tuple[list[Row], list[Row]]:
    """(rows that stay, rows that go with the `reason`): what other sets have, and low rewards."""
    kept, dropped = [], []
    for row, repeat in zip(rows, other_sets.repeats(rows, options), strict=True):
        if repeat is None:
            kept.append(row)
        else:
            near = {"most_similar": repeat.text, "max_similarity": repeat.similarity}
            dropped.append({**row, **near, "reason": "in_another_set"})
    if options.filter == "none" or not kept:
        return kept, dropped
    if options.filter == "share":
        count = math.ceil(Decimal(str(options.filter_at)) * len(kept))  # .07 of 100 is 7
        ranked = sorted(range(len(kept)), key=lambda i: -kept[i][REWARD])  # of equals the first
        best = set(ranked[:count])
    else:
        best = {i for i, row in enumerate(kept) if row[REWARD] >= options.filter_at}
    low = [{**row, "reason": "low_reward"} for i, row in enumerate(kept) if i not in best]
    return [row for i, row in enumerate(kept) if i in best], dropped + low


def alpaca(row: Row) -> Row:
    """A row in the form of Stanford Alpaca."""
    return {name: row[name] for name in _ALPACA_COLUMNS}


def chat(row: Row) -> Row:
    """A row as the two turns of a chat."""
    asked = Example(row["instruction"], row["input"], row["output"]).context
    turns = [("user", asked), ("assistant", row["output"])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _lines(rows: Sequence[Row]) -> str:
    return "".join(map(records.to_line, rows))


def _write_rows(rows: Sequence[Row], columns: Mapping[str, Any], stem: Path) -> None:
    """As JSONL, and as parquet with these columns."""
    records.write_text(stem.with_suffix(".jsonl"), _lines(rows))
    path, partial = stem.with_suffix(".parquet"), stem.with_suffix(".parquet.partial")
    table = Dataset.from_list(list(rows), Features(columns))
    with writing(path):
        table.to_parquet(str(partial))
    partial.replace(path)


def _card(
    made_of: Material,
    statistics: Mapping[str, Any],
    dropped: Mapping[str, Mapping[str, int]],
    plots: Sequence[str],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    config = made_of.config
    return environment.get_template("dataset_card.md.j2").render(
        arm=made_of.arm,
        license=config.dataset.license,
        config=config,
        settings=json.dumps(dataclasses.asdict(config), indent=1, ensure_ascii=False),
        hash=config_hash(config),
        statistics=statistics,
        dropped={stage: Counter(counts).most_common() for stage, counts in dropped.items()},
        plots={name: dataset_plots.PLOTS[name] for name in plots},
        size=_size_category(statistics["rows"]),
    )


def _size_category(rows: int) -> str:
    """As the hub names it."""
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")]
    return next((name for bound, name in bounds if rows < bound), "100K<n<1M")
