"""A reward that pays for up to twelve words of output; see ../experiment.md."""

from collections.abc import Sequence

from refine_af.rewards import Example

ENOUGH = 12


def score(examples: Sequence[Example]) -> dict[str, list[float]]:
    """The share of so many words that each output has."""
    return {"words": [min(len(e.output.split()), ENOUGH) / ENOUGH for e in examples]}
