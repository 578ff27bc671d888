"""Stages 2 and 3 ask the same question: write an input and an output for an instruction."""

import re
from collections.abc import Sequence

import numpy as np

from refine_af import config as config_lib
from refine_af.seeds import SeedTask

HEADER = "Come up with an example for each task: an input, which may be empty, and the output.\n\n"
Pair = tuple[str, str]  # input and output of an answer
UNREADABLE = ("unparsable", "empty_output")  # faults of an answer without an output
_AROUND = " \"'\u201c\u201d\u2018\u2019.!?"  # quotes and the end of a sentence
_INPUT = re.compile(r"^\s*Input\s*\d*\s*:")  # a chat model says it again
_OUTPUT = re.compile(r"\n\s*Output\s*\d*\s*:")
_ANOTHER = re.compile(r"\n\s*(?:Input|Output)\s*\d*\s*:")


def demos(seeds: Sequence[SeedTask], options: config_lib.Prompts) -> list[SeedTask]:
    """Seed tasks short enough to be shown."""

    def size(seed: SeedTask) -> int:
        first = seed.instances[0]
        return len(seed.instruction) + len(first.input) + len(first.output)

    short = [s for s in seeds if size(s) <= options.max_demo_chars]
    if len(short) < options.num_demos:
        raise ValueError(
            f"prompts.max_demo_chars={options.max_demo_chars}: only {len(short)} seed tasks are "
            f"that short, prompts.num_demos={options.num_demos} are needed"
        )
    return short


def pick(shown: Sequence[SeedTask], count: int, rng: np.random.Generator) -> list[SeedTask]:
    """Some of the demonstrations, none of them twice."""
    return [shown[i] for i in rng.choice(len(shown), size=count, replace=False)]


def instance_prompt(
    instruction: str, shown: Sequence[SeedTask], count: int, rng: np.random.Generator
) -> str:
    """Few-shot prompt that ends where the answer's input is to be written."""
    return with_demos(instruction, pick(shown, count, rng))


def with_demos(instruction: str, picked: Sequence[SeedTask]) -> str:
    """The prompt with these demonstrations, in their order."""
    parts = [
        f"Task: {seed.instruction}\nInput: {seed.instances[0].input}\n"
        f"Output: {seed.instances[0].output}\n\n"
        for seed in picked
    ]
    return HEADER + "".join(parts) + f"Task: {instruction}\nInput:"


def parse_instance(completion: str, *, accept_unmarked: bool) -> Pair | None:
    """(input, output) of an answer, stripped; None when it has no `Output:`.

    Where the model goes on with another pair, only the first counts, as in Self-Instruct.

    Args:
        accept_unmarked: take a text without `Output:` as the output of an empty input.
    """
    parts = _OUTPUT.split("\n" + completion, maxsplit=1)
    if len(parts) == 2:
        return _INPUT.sub("", parts[0]).strip(), _ANOTHER.split(parts[1])[0].strip()
    return ("", completion.strip()) if accept_unmarked else None


def fault(pair: Pair | None) -> str | None:
    """Reason to drop what an answer says, whatever the others say; or None.

    Self-Instruct's rules (arXiv 2212.10560, appendix A), but that an output in other quotes, or
    with another end, is a copy of its input, too.
    """
    if pair is None:
        return UNREADABLE[0]
    text, output = pair
    if not output:
        return UNREADABLE[1]
    if text == output or (_bare(text) and _bare(text) == _bare(output)):
        return "input_equals_output"
    if text.endswith(":") or output.endswith(":"):
        return "ends_with_colon"
    return None


def _bare(text: str) -> str:
    return " ".join(text.split()).strip(_AROUND)
