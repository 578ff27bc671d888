"""The figures of a data set, from its statistics: PNG for its card, SVG for the report."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Wedge
from matplotlib.ticker import MaxNLocator

from refine_af import plots

_COLOURS = (plots.BLUE, plots.ORANGE)
_RING = 0.33  # width of each of the two rings, of a radius of 1
_SMALLEST = 0.012  # share of the circle that has room for a word


class Plot(NamedTuple):
    """A figure and the words around it."""

    title: str
    caption: str
    draw: Callable[[Figure, Mapping[str, Any]], None]
    size: tuple[int, int]  # pixels


def pngs(statistics: Mapping[str, Any]) -> dict[str, bytes]:
    """The figures by name, on white; those without anything to draw are left out."""
    drawn = {name: plots.png(*plot.size)(plot.draw)(statistics) for name, plot in PLOTS.items()}
    return {name: image for name, image in drawn.items() if image}


def svgs(statistics: Mapping[str, Any]) -> list[tuple[Plot, str]]:
    """The figures for a page, each as the text of an `<svg>`, or ""."""
    return [(plot, plots.inline_svg(*plot.size)(plot.draw)(statistics)) for plot in PLOTS.values()]


def verb_circle(figure: Figure, statistics: Mapping[str, Any]) -> None:
    """The most frequent leading verbs (inside), each with its most frequent objects (outside)."""
    top = statistics["verbs"]["top"]
    total = sum(verb["count"] for verb in top)
    if not total:
        return
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.set_xlim(-1.02, 1.02)
    axes.set_ylim(-1.02, 1.02)
    start = 0.0
    for number, verb in enumerate(top):
        colour = _COLOURS[number % len(_COLOURS)]
        _sector(axes, verb["verb"], start, verb["count"] / total, 1 - _RING, (colour, 0.75))
        inner = start
        for place, (noun, count) in enumerate(verb["objects"].items()):
            _sector(axes, noun, inner, count / total, 1.0, (colour, 0.55 - 0.1 * place))
            inner += count / total
        start += verb["count"] / total


def _sector(
    axes: Axes, word: str, start: float, share: float, radius: float, fill: tuple[str, float]
) -> None:
    """A part of a ring, clockwise from the top, with its word where there is room for it."""
    first, last = 90 - 360 * (start + share), 90 - 360 * start
    colour, alpha = fill
    axes.add_patch(
        Wedge((0, 0), radius, first, last, width=_RING, color=(colour, alpha), linewidth=0)
    )
    if share >= _SMALLEST:
        angle = (first + last) / 2
        x, y = ((radius - _RING / 2) * part for part in _unit(angle))
        turned = angle % 360
        rotation = turned - 180 if 90 < turned < 270 else turned
        axes.text(x, y, word[:14], ha="center", va="center", rotation=rotation, fontsize=10)


def _unit(degrees: float) -> tuple[float, float]:
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def seed_overlap(figure: Figure, statistics: Mapping[str, Any]) -> None:
    """ROUGE-L of every instruction with the seed instruction that is nearest to it."""
    _histograms(
        figure, {"ROUGE-L with the nearest seed": statistics["seed_overlap"]}, "instructions"
    )


def lengths(figure: Figure, statistics: Mapping[str, Any]) -> None:
    """Lengths in words of instructions, of inputs that are not empty, and of outputs."""
    panels = {
        f"words in the {part}": statistics[f"{part}_words"]
        for part in ("instruction", "input", "output")
    }
    _histograms(figure, panels, "count")


def quality(figure: Figure, statistics: Mapping[str, Any]) -> None:
    """Reward of the rows, and each component that it is made of."""
    panels = {name.removeprefix("reward_"): x for name, x in statistics["rewards"].items()}
    _histograms(figure, panels, "rows")


def _histograms(figure: Figure, panels: Mapping[str, Mapping[str, Any]], unit: str) -> None:
    """One beside the other; those of nothing are left out."""
    drawn = {label: values["histogram"] for label, values in panels.items() if values}
    for number, (label, histogram) in enumerate(drawn.items(), start=1):
        axes = figure.add_subplot(1, len(drawn), number)
        edges: Sequence[float] = histogram["edges"]
        widths = [right - left for left, right in itertools.pairwise(edges)]
        axes.bar(
            edges[:-1],
            histogram["counts"],
            width=[0.9 * width for width in widths],
            align="edge",
            color=plots.BLUE,
            alpha=0.85,
        )
        axes.set_xlabel(label)
        axes.set_ylabel(unit if number == 1 else "")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


PLOTS = {
    "verbs": Plot(
        "Verbs and their objects",
        "The 20 most frequent leading verbs inside, up to four objects of each outside; many thin "
        "parts mean a varied set.",
        verb_circle,
        (620, 620),
    ),
    "seed_overlap": Plot(
        "Overlap with the seed tasks",
        "0 is an instruction without a word in common with any seed, 1 a copy.",
        seed_overlap,
        (620, 270),
    ),
    "lengths": Plot("Lengths", "Inputs that are empty are left out.", lengths, (1000, 270)),
    "quality": Plot(
        "Reward of the rows",
        "By the oracle that training used, so a judgement of that and not of people.",
        quality,
        (1000, 270),
    ),
}
