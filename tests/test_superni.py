"""Super-NaturalInstructions: reading tasks, writing prompts, scoring predictions."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from absl import logging

from refine_af import seeds, superni

RECORD: dict[str, Any] = {
    "Definition": ["Name the animal's sound"],
    "Categories": ["Sounds", "Animals"],
    "Positive Examples": [
        {"input": "cow", "output": "moo", "explanation": "Cows moo."},
        {"input": "cat ", "output": ["meow", "purr"]},
    ],
    "Negative Examples": [],
    "Instances": [
        {"id": "sound-0", "input": "dog", "output": ["woof", "bow wow"]},
        {"id": "sound-1", "input": " duck", "output": "quack"},
    ],
}
ZERO_SHOT = """Definition: Name the animal's sound.

Now complete the following example -
Input: dog
Output: """
ONE_SHOT = """Definition: Name the animal's sound.

 Positive Example 1 -
Input: cow
 Output: moo

Now complete the following example -
Input: dog
Output: """
TWO_SHOT = """Definition: Name the animal's sound.

 Positive Example 1 -
Input: cow
 Output: moo

 Positive Example 2 -
Input: cat
 Output: meow

Now complete the following example -
Input: dog
Output: """


def write(path: Path, content: object) -> Path:
    """Writes `content` as JSON."""
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_task(directory: Path, name: str) -> Path:
    """Writes RECORD with ids that start with the task's name."""
    instances = [{**each, "id": f"{name}-{i}"} for i, each in enumerate(RECORD["Instances"])]
    return write(directory / f"{name}.json", {**RECORD, "Instances": instances})


@pytest.fixture
def task(tmp_path: Path) -> superni.Task:
    """The task of RECORD."""
    return superni.load_task(write(tmp_path / "task7_sound.json", RECORD))


def make_task(name: str, category: str, *references: str) -> superni.Task:
    """A task whose instances have one reference each and the ids `<name>-<index>`."""
    instances = [superni.Instance(f"{name}-{i}", "x", (r,)) for i, r in enumerate(references)]
    return superni.Task(name, category, "Do it.", (), tuple(instances))


def count_words(text: str) -> int:
    """A stand-in for a tokenizer."""
    return len(text.split())


def test_load_task_reads_every_field(task: superni.Task) -> None:
    """Lists and plain strings are accepted alike; of several categories the first counts."""
    assert task == superni.Task(
        name="task7_sound",
        category="Sounds",
        definition="Name the animal's sound",
        examples=(superni.Example("cow", "moo"), superni.Example("cat ", "meow")),
        instances=(
            superni.Instance("sound-0", "dog", ("woof", "bow wow")),
            superni.Instance("sound-1", " duck", ("quack",)),
        ),
    )


def test_load_task_reads_a_plain_string_definition_as_a_list_of_one(tmp_path: Path) -> None:
    """Old task files have no list there; a string must not be cut to its first letter."""
    record = {**RECORD, "Definition": "Answer.", "Categories": "Sounds"}
    task = superni.load_task(write(tmp_path / "old.json", record))
    assert (task.definition, task.category) == ("Answer.", "Sounds")


def test_load_task_keeps_the_first_instances(tmp_path: Path) -> None:
    """`max_instances` cuts from the end."""
    task = superni.load_task(write(tmp_path / "task.json", RECORD), max_instances=1)
    assert [instance.id for instance in task.instances] == ["sound-0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"Definition": None},
            "'Definition' is missing, expected a string or a list of at least one string",
        ),
        (
            {"Categories": []},
            "'Categories' is [], expected a string or a list of at least one string",
        ),
        ({"Instances": {}}, "'Instances' is {}, expected a list of objects"),
        ({"Instances": ["dog"]}, "'Instances' is ['dog'], expected a list of objects"),
        ({"Instances": []}, "'Instances' is empty, expected at least one"),
        (
            {"Instances": [{"id": "a", "input": "dog", "output": ["woof", 3]}]},
            "Instances[0]: 'output' is ['woof', 3], "
            "expected a string or a list of at least one string",
        ),
        (
            {"Instances": [RECORD["Instances"][0], {"id": 4, "input": "dog", "output": "woof"}]},
            "Instances[1]: 'id' is 4, expected a string",
        ),
        (
            {"Positive Examples": [{"output": "moo"}]},
            "Positive Examples[0]: 'input' is missing, expected a string",
        ),
    ],
)
def test_load_task_says_what_is_wrong(tmp_path: Path, changes: Any, message: str) -> None:
    """The one-line error names the file, the key, what was got and what is expected."""
    path = write(tmp_path / "task.json", {**RECORD, **changes})
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}$"):
        superni.load_task(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"Definition": ',
            "cannot be read (Expecting value: line 1 column 16 (char 15)), expected JSON",
        ),
        (b'"\xff"', "cannot be read ('utf-8' codec can't decode byte 0xff"),
        (b"[1, 2]", "got [1, 2], expected a JSON object"),
    ],
)
def test_load_task_rejects_what_is_no_json_object(
    tmp_path: Path, content: bytes, message: str
) -> None:
    """Broken files end in the same kind of error."""
    path = tmp_path / "task.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        superni.load_task(path)


def test_load_task_names_an_absent_file(tmp_path: Path) -> None:
    """Also when it is asked for by its path."""
    message = f"{tmp_path / 'task.json'}: cannot be read ([Errno 2] No such file"
    with pytest.raises(ValueError, match=re.escape(message)):
        superni.load_task(tmp_path / "task.json")


def test_load_tasks_sorts_by_name(tmp_path: Path) -> None:
    """The order is that of strings and does not depend on the file system."""
    for number in [9, 10, 8, 12, 7, 11]:
        write_task(tmp_path, f"task{number}")
    (tmp_path / "README.md").write_text("not a task")
    names = [task.name for task in superni.load_tasks(tmp_path)]
    assert names == ["task10", "task11", "task12", "task7", "task8", "task9"]


def test_load_tasks_passes_max_instances_on(tmp_path: Path) -> None:
    """The cut holds for every task."""
    for name in ["task1", "task2"]:
        write_task(tmp_path, name)
    assert [len(t.instances) for t in superni.load_tasks(tmp_path, max_instances=1)] == [1, 1]


def test_load_tasks_reads_the_part_of_a_split_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absent tasks are counted in a warning, tasks outside the split are not read at all."""
    warnings: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    write_task(tmp_path, "task1")
    (tmp_path / "task2.json").write_text("never read")
    split = tmp_path / "split.txt"
    split.write_bytes(b"\xef\xbb\xbftask3\r\n\r\ntask1.json\r\ntask0\r\n")
    assert [task.name for task in superni.load_tasks(tmp_path, split)] == ["task1"]
    assert warnings == [f"{split}: 2 of 3 tasks have no file and are left out, the first is task0"]


def test_load_tasks_reads_a_complete_split_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is missing, so nothing is said."""
    monkeypatch.setattr(logging, "warning", pytest.fail)
    write_task(tmp_path, "task1")
    split = tmp_path / "split.txt"
    split.write_text("task1\n")
    assert len(superni.load_tasks(tmp_path, split)) == 1


def test_load_tasks_rejects_a_split_of_other_tasks(tmp_path: Path) -> None:
    """An evaluation of nothing is an error."""
    write_task(tmp_path, "task1")
    split = tmp_path / "split.txt"
    split.write_text("task2\ntask3\n")
    message = f"{split}: no task has a file among its 2 names, expected names such as task1"
    with pytest.raises(ValueError, match=re.escape(message)):
        superni.load_tasks(tmp_path, split)


def test_load_tasks_rejects_absent_files(tmp_path: Path) -> None:
    """No directory, an empty one, and no split file."""
    for directory in [tmp_path / "absent", tmp_path]:
        message = f"{directory}: no task is found, expected a directory of *.json files"
        with pytest.raises(ValueError, match=re.escape(message)):
            superni.load_tasks(directory)
    write_task(tmp_path, "task1")
    message = f"{tmp_path / 'split.txt'}: no such file, expected one task name a line"
    with pytest.raises(ValueError, match=re.escape(message)):
        superni.load_tasks(tmp_path, tmp_path / "split.txt")


def test_load_tasks_rejects_an_id_of_two_instances(tmp_path: Path) -> None:
    """One prediction would be scored against both."""
    for name in ["task1", "task2"]:
        write(tmp_path / f"{name}.json", RECORD)
    message = f"{tmp_path}: id 'sound-0' occurs twice, expected unique ids"
    with pytest.raises(ValueError, match=re.escape(message)):
        superni.load_tasks(tmp_path)


@pytest.mark.parametrize(
    ("num_examples", "expected"), [(0, ZERO_SHOT), (1, ONE_SHOT), (2, TWO_SHOT), (3, TWO_SHOT)]
)
def test_build_prompt_is_exact(task: superni.Task, num_examples: int, expected: str) -> None:
    """Character by character, the leading spaces and the open end included."""
    prompt = superni.build_prompt(task, task.instances[0], num_examples, count_words)
    assert prompt == expected


@pytest.mark.parametrize("definition", ["Answer.", "What is it?", 'Answer "A" or "B"', "Answer.\n"])
def test_build_prompt_adds_no_second_full_stop(task: superni.Task, definition: str) -> None:
    """A definition that ends in punctuation stays as it is."""
    task = dataclasses.replace(task, definition=definition)
    prompt = superni.build_prompt(task, task.instances[0], 0, count_words)
    assert prompt.startswith(f"Definition: {definition.strip()}\n\nNow complete")


def test_build_prompt_drops_examples_over_the_limit(task: superni.Task) -> None:
    """Zero-, one- and two-shot are 14, 22 and 30 words; a prompt at the limit still fits."""
    lengths = [count_words(prompt) for prompt in (ZERO_SHOT, ONE_SHOT, TWO_SHOT)]
    assert lengths == [14, 22, 30]
    for max_tokens, expected in [
        (30, TWO_SHOT), (29, ONE_SHOT), (22, ONE_SHOT), (21, ZERO_SHOT), (1, ZERO_SHOT)
    ]:  # fmt: skip
        assert superni.build_prompt(task, task.instances[0], 2, count_words, max_tokens) == expected


def test_build_prompt_drops_what_follows_a_long_example(task: superni.Task) -> None:
    """A later example that would fit does not jump the queue, so numbers stay in file order."""
    long = superni.Example("cow " * 20, "moo")
    task = dataclasses.replace(task, examples=(long, *task.examples))
    assert superni.build_prompt(task, task.instances[0], 3, count_words, 30) == ZERO_SHOT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  CAT,\n\tsat! ", "the cat sat"),
        ("it's a well-known fact", "its a wellknown fact"),
        ("- . -", ""),
        ("\u201cÉté\u201d", "\u201cété\u201d"),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    """Punctuation is ASCII's and leaves no space behind; articles stay."""
    assert superni.normalize(text) == expected


def test_exact_match_takes_any_reference() -> None:
    """Equal up to case, punctuation and white space, to one reference or another."""
    assert superni.exact_match("Yes.", ["no", "YES"]) == 1
    assert superni.exact_match("yes it is", ["no", "yes"]) == 0
    assert superni.exact_match("", ["yes"]) == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # L = 4 (the cat on mat); p = 4/6, r = 4/5; F = 2 * 16/30 / (44/30) = 8/11.
        ("the cat sat on the mat", "the cat lay on mat", 8 / 11),
        # In the other order of words only one of three is left: p = r = F = 1/3.
        ("red green blue", "blue green red", 1 / 3),
        # Words of more than three letters are stemmed: running -> run, dogs -> dog.
        ("Running DOGS!", "run dog", 1.0),
        # Punctuation parts words, unlike in `normalize`: p = 1/2, r = 1, F = 2/3.
        ("well-known", "well", 2 / 3),
        ("", "woof", 0.0),
        ("woof", "...", 0.0),
    ],
)
def test_rouge_l_by_hand(prediction: str, reference: str, expected: float) -> None:
    """F = 2pr / (p + r) with p = L / len(prediction) and r = L / len(reference)."""
    assert superni.rouge_l(prediction, [reference]) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_takes_the_best_reference() -> None:
    """Wherever it stands: the Fs are 0, 8/11 and 1/2 (L = 2, p = 2/6, r = 1)."""
    references = ["none here", "the cat lay on mat", "the cat"]
    for shift in range(3):
        turned = references[shift:] + references[:shift]
        assert superni.rouge_l("the cat sat on the mat", turned) == pytest.approx(8 / 11)


def test_score_averages_over_instances() -> None:
    """A task of three counts three times as much as one of one, in `all` and in its category.

    rougeL of sound: 1, 2/3 (p 1/2, r 1), 0; of color: 1; of size: 0 (missing).
    """
    tasks = [
        make_task("sound", "Animals", "moo", "woof", "meow"),
        make_task("color", "Animals", "black cat"),
        make_task("size", "Bodies", "big"),
    ]
    predictions = {
        "sound-0": "Moo.", "sound-1": "woof woof", "sound-2": "purr",
        "color-0": "black cat", "unknown-0": "big",
    }  # fmt: skip
    assert superni.score(tasks, predictions) == {
        "tasks": {
            "sound": {
                "category": "Animals", "instances": 3, "exact_match": 33.3333, "rougeL": 55.5556
            },
            "color": {"category": "Animals", "instances": 1, "exact_match": 100, "rougeL": 100},
            "size": {"category": "Bodies", "instances": 1, "exact_match": 0, "rougeL": 0},
        },
        "categories": {
            "Animals": {"instances": 4, "exact_match": 50, "rougeL": 66.6667},
            "Bodies": {"instances": 1, "exact_match": 0, "rougeL": 0},
        },
        "all": {"instances": 5, "exact_match": 40, "rougeL": 53.3333},
    }  # fmt: skip


def test_score_takes_a_missing_prediction_as_the_empty_string() -> None:
    """The same scores; a reference of punctuation alone makes the difference to 0 visible."""
    tasks = [make_task("a", "X", "...", "word")]
    assert superni.score(tasks, {}) == superni.score(tasks, {"a-0": "", "a-1": ""})
    assert superni.score(tasks, {})["all"] == {"instances": 2, "exact_match": 50, "rougeL": 0}


def test_shipped_evaluation_tasks_load() -> None:
    """Twelve tasks, one for each category of the official test split."""
    tasks = superni.load_tasks(seeds.EVALUATION_DIR)
    assert len(tasks) == len({task.category for task in tasks}) == 12
    assert all(task.examples for task in tasks)
