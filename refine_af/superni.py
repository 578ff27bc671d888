"""Super-NaturalInstructions: task files, evaluation prompts and scores.

Tasks, prompt and scoring rules are those of Wang et al., 2022, "Super-NaturalInstructions:
Generalization via Declarative Instructions on 1600+ NLP Tasks" (https://arxiv.org/abs/2204.07705),
with its two tracks, `default` (English) and `xlingual` (cross-lingual). A task file is one JSON
object, of which these keys are read:

    Definition         str, or [str] of which the first is used
    Categories         str, or [str] of which the first is used
    Positive Examples  [{input: str, output: str, or [str] of which the first is used}]
    Instances          [{id: str, input: str, output: str, or [str] that are all references}]
"""

import functools
import json
import reprlib
import statistics
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging
from nltk.stem import porter
from rouge_score import tokenize

from refine_af import novelty
from refine_af.models.gpt2_tokenizer import gpt2_tokenizer

InstanceScores = Mapping[str, tuple[float, float]]  # id -> (exact match, ROUGE-L F), in [0, 1]

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Instance:
    """One test case; a prediction is right when it agrees with any of the references."""

    id: str
    input: str
    references: tuple[str, ...]  # at least one


@dataclass(frozen=True)
class Example:
    """One positive example, shown to the model in a few-shot prompt."""

    input: str
    output: str


@dataclass(frozen=True)
class Task:
    """One task: its definition in words, its demonstrations and its test cases."""

    name: str  # the file's name without `.json`
    category: str
    definition: str
    examples: tuple[Example, ...]
    instances: tuple[Instance, ...]  # at least one
    track: str = "default"  # of config.TRACKS: how it is scored


def load_task(path: str | Path, max_instances: int = 100, track: str = "default") -> Task:
    """Read one task file, keeping its first `max_instances` (at least 1) instances.

    Raises:
        ValueError: the file cannot be read, is no JSON object, or a key is missing or mistyped.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # refuses halves of characters, "\\ud800"
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}), expected JSON in UTF-8") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {reprlib.repr(content)}, expected a JSON object")
    instances = _records(content, "Instances", str(path))[:max_instances]
    if not instances:
        raise ValueError(f"{path}: 'Instances' is empty, expected at least one")
    return Task(
        name=path.stem,
        category=_texts(content, "Categories", str(path))[0],
        definition=_texts(content, "Definition", str(path))[0],
        examples=tuple(
            Example(_text(record, "input", where), _texts(record, "output", where)[0])
            for where, record in _records(content, "Positive Examples", str(path))
        ),
        instances=tuple(
            Instance(
                _text(record, "id", where),
                _text(record, "input", where),
                _texts(record, "output", where),
            )
            for where, record in instances
        ),
        track=track,
    )


def load_tasks(
    directory: str | Path,
    split_file: str | Path | None = None,
    max_instances: int = 100,
    track: str = "default",
) -> list[Task]:
    """Read the tasks of a directory, sorted by name.

    Args:
        directory: holds one `<task name>.json` per task.
        split_file: a text file with one task name a line, with or without `.json`. Only these
            tasks are read; those without a file are left out with a warning, so that a part of a
            split can be evaluated.
        max_instances: per task, at least 1.
        track: of config.TRACKS; how the tasks are scored, which their files do not say.

    Raises:
        ValueError: no task is found, a file is malformed, or an instance id occurs twice.
    """
    paths = {path.stem: path for path in Path(directory).glob("*.json")}
    if not paths:
        raise ValueError(f"{directory}: no task is found, expected a directory of *.json files")
    if split_file is not None:
        paths = _select(paths, Path(split_file))
    tasks = [load_task(paths[name], max_instances, track) for name in sorted(paths)]
    ids = Counter(instance.id for task in tasks for instance in task.instances)
    repeated = [id for id, count in ids.items() if count > 1]
    if repeated:
        raise ValueError(f"{directory}: id {repeated[0]!r} occurs twice, expected unique ids")
    return tasks


def build_prompt(
    task: Task,
    instance: Instance,
    num_examples: int,
    count_tokens: Callable[[str], int],
    max_tokens: int = 1024,
) -> str:
    """The prompt of Tk-Instruct (https://arxiv.org/abs/2204.07705), zero- or few-shot.

    Only the definition is given a final period; Tk-Instruct's own code also ends inputs, and
    outputs of examples, with one where they have no punctuation.

    The first example that would make the prompt longer than `max_tokens`, and those after it, are
    dropped. A prompt too long without any example is returned whole.

    Args:
        task: gives the definition and the examples.
        instance: the test case to complete.
        num_examples: show at most this many positive examples, at least 0.
        count_tokens: gives the length of a text in tokens of the model that will read it.
        max_tokens: the longest prompt, in these tokens, that an example may lead to.
    """
    definition = task.definition.strip()
    if not definition.endswith(tuple(string.punctuation)):
        definition += "."
    head = f"Definition: {definition}\n\n"
    tail = f"Now complete the following example -\nInput: {instance.input.strip()}\nOutput: "
    for number, example in enumerate(task.examples[:num_examples], start=1):
        shown = f"Input: {example.input.strip()}\n Output: {example.output.strip()}"
        longer = f"{head} Positive Example {number} -\n{shown}\n\n"
        if count_tokens(longer + tail) > max_tokens:
            break
        head = longer
    return head + tail


def normalize(text: str) -> str:
    """`text` in lower case, without ASCII punctuation, its white space collapsed."""
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 when the prediction equals any reference after `normalize`, else 0."""
    return float(normalize(prediction) in map(normalize, references))


class _Stemmer:
    """Porter's, as `rouge-score` calls it; stemming is most of its time, and words come again."""

    stem = staticmethod(functools.lru_cache(1 << 16)(porter.PorterStemmer().stem))


def words(text: str, track: str = "default") -> list[str]:
    """What ROUGE-L compares: Porter-stemmed runs of [a-z0-9], or GPT-2's tokens without blanks.

    A blank that is a token by itself stays, as the empty string, in the cross-lingual track.
    """
    if track == "xlingual":
        return [token.lstrip("\u0120") for token in gpt2_tokenizer().encode(text).tokens]
    return tokenize.tokenize(text, _Stemmer)


def rouge_l(prediction: str, references: Sequence[str], track: str = "default") -> float:
    """Largest ROUGE-L F over the references (at least one), in [0, 1], as `rouge-score` rounds it.

    With L the longest common subsequence of the words, p = L / len(prediction) and r = L /
    len(reference), F = 2pr / (p + r). A text without words scores 0.
    """
    ids: dict[str, int] = {}
    first, *others = (
        [ids.setdefault(word, len(ids)) for word in words(text, track)]
        for text in (prediction, *references)
    )
    return max(novelty.rouge_l(other, first) for other in others)


def score(tasks: Sequence[Task], predictions: Mapping[str, str]) -> dict[str, Any]:
    """Score the predictions of one arm, as the official evaluation does.

    Args:
        tasks: at least one, with ids that are unique over all of them.
        predictions: the predicted text by instance id. A missing one counts as the empty string,
            one for an unknown id is ignored.

    Returns:
        `tasks` (by name), `categories` (by name) and `all`, each score a dict of the number of
        `instances` and of the means over them, `exact_match` and `rougeL` (x 100, 4 decimals); a
        task's has its `category` too. In a category and in `all` a task thus counts by its size.
    """
    return summarize(tasks, score_instances(tasks, predictions))


def score_instances(
    tasks: Sequence[Task], predictions: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """What `score` takes the means of, by instance id."""
    return {
        each.id: _score_one(each, predictions.get(each.id, ""), task.track)
        for task in tasks
        for each in task.instances
    }


def summarize(tasks: Sequence[Task], scores: InstanceScores) -> dict[str, Any]:
    """The means that `score` returns."""
    by_task = {task.name: [scores[each.id] for each in task.instances] for task in tasks}
    by_category: dict[str, list[tuple[float, float]]] = {}
    for task in tasks:
        by_category.setdefault(task.category, []).extend(by_task[task.name])
    return {
        "tasks": {t.name: {"category": t.category, **_mean(by_task[t.name])} for t in tasks},
        "categories": {name: _mean(by_category[name]) for name in sorted(by_category)},
        "all": _mean([pair for pairs in by_task.values() for pair in pairs]),
    }


def _score_one(instance: Instance, prediction: str, track: str) -> tuple[float, float]:
    references = instance.references
    return exact_match(prediction, references), rouge_l(prediction, references, track)


def _mean(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    exact, rouge = (round(100 * statistics.fmean(column), 4) for column in zip(*pairs, strict=True))
    return {"instances": len(pairs), "exact_match": exact, "rougeL": rouge}


def _select(paths: Mapping[str, Path], split_file: Path) -> dict[str, Path]:
    """The paths whose names the split file lists."""
    if not split_file.is_file():
        raise ValueError(f"{split_file}: no such file, expected one task name a line")
    try:
        lines = split_file.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{split_file}: not UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    names = {line.removesuffix(".json") for line in lines}
    found = {name: path for name, path in paths.items() if name in names}
    missing = sorted(names - found.keys())
    if not found:
        raise ValueError(
            f"{split_file}: no task has a file among its {len(names)} names, "
            f"expected names such as {min(paths)}"
        )
    if missing:
        text = "%s: %d of %d tasks have no file and are left out, the first is %s"
        logging.warning(text, split_file, len(missing), len(names), missing[0])
    return found


def _text(record: Mapping[str, object], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise _wrong(where, key, value, "a string")
    return value


def _texts(record: Mapping[str, object], key: str, where: str) -> tuple[str, ...]:
    """A string, or a list of at least one, as a tuple."""
    value = record.get(key)
    texts = [value] if isinstance(value, str) else value
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise _wrong(where, key, value, "a string or a list of at least one string")
    return tuple(texts)


def _records(
    record: Mapping[str, object], key: str, where: str
) -> list[tuple[str, dict[str, object]]]:
    """The objects of a list, each after its place in words, for errors about it."""
    value = record.get(key)
    if not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
        raise _wrong(where, key, value, "a list of objects")
    return [(f"{where}: {key}[{index}]", entry) for index, entry in enumerate(value)]


def _wrong(where: str, key: str, value: object, expected: str) -> ValueError:
    got = "is missing" if value is None else f"is {reprlib.repr(value)}"
    return ValueError(f"{where}: {key!r} {got}, expected {expected}")
