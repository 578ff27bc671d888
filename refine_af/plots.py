"""The figures of the report, each as the text of an inline SVG.

Every public function but `calibration` (a PNG) draws one figure and returns its `<svg>` element, or
"" when the data hold nothing to draw. The SVG has a transparent background, and its text and axes
take the colour of the page around it (`currentColor`), so it reads in light and in dark. One unit
is one CSS pixel. Equal data give equal bytes.

The two hues stay apart for colour-blind readers and reach a contrast of 3:1 on white and on
near-black; the third colour of a figure is the colour of its text.
"""

import functools
import html
import io
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from refine_af.records import Row

_P = ParamSpec("_P")

BLUE, ORANGE = "#3d85d8", "#d9751e"
_INK = "#010203"  # stands for the colour of the page's text until the SVG is written
FULL_WIDTH = 1000
_HALF_WIDTH = 490
_ROW_HEIGHT = 25  # of one bar or one pair of dots
_MAX_LABEL = 46  # characters
_MAX_OBJECT = 20
_MAX_VERBS = 16
_SHADES = (0.62, 0.52, 0.42, 0.33, 0.26)  # opacity of a verb's objects, most frequent first

_STYLE: dict[Any, Any] = {
    "font.size": 12,
    "text.parse_math": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.size": 0,
    "figure.constrained_layout.wspace": 0.07,
    "axes.formatter.useoffset": False,
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "refine-af",
}


@contextmanager
def _styled(width: int, height: int) -> Iterator[Figure]:
    """An empty figure of this size in pixels, to be drawn and saved within."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield Figure(figsize=(width / 72, height / 72), layout="constrained")


def inline_svg(
    width: int, height: int
) -> Callable[[Callable[Concatenate[Figure, _P], None]], Callable[_P, str]]:
    """Turns `draw(figure, *data)` into `draw(*data) -> svg` for a figure of this size in pixels."""

    def decorate(draw: Callable[Concatenate[Figure, _P], None]) -> Callable[_P, str]:
        description = (draw.__doc__ or draw.__name__).partition("\n")[0]

        @functools.wraps(draw)
        def svg(*args: _P.args, **kwargs: _P.kwargs) -> str:
            with _styled(width, height) as figure:
                draw(figure, *args, **kwargs)
                return _svg_text(figure, draw.__name__, description) if figure.axes else ""

        return svg

    return decorate


def _svg_text(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element; all its ids begin with the name."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    width = round(figure.get_size_inches()[0] * 72)
    label = f'role="img" aria-label="{html.escape(description)}" style="width: {width}px"'
    text = text.replace("<svg", f"<svg {label}", 1)
    return text.replace(_INK, "currentColor")


def png(
    width: int, height: int
) -> Callable[[Callable[Concatenate[Figure, _P], None]], Callable[_P, bytes]]:
    """Turns `draw(figure, *data)` into `draw(*data) -> PNG` on white, for a file of its own."""

    def decorate(draw: Callable[Concatenate[Figure, _P], None]) -> Callable[_P, bytes]:
        @functools.wraps(draw)
        def image(*args: _P.args, **kwargs: _P.kwargs) -> bytes:
            with _styled(width, height) as figure:
                draw(figure, *args, **kwargs)
                buffer = io.BytesIO()
                # Without the version of matplotlib, equal data give equal bytes for longer.
                metadata = {"Software": None}
                figure.savefig(buffer, format="png", facecolor="white", metadata=metadata)
                return buffer.getvalue() if figure.axes else b""

        return image

    return decorate


# Reliability, a file of its own


@png(FULL_WIDTH, 270)
def calibration(figure: Figure, curves: Mapping[str, tuple[Sequence[float], ...]]) -> None:
    """A panel for each head: what it predicts against what is the case.

    Args:
        curves: of each head, predicted probabilities, observed shares and counts of its bins.
    """
    for i, (name, (predicted, observed, counts)) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), i + 1)
        low = 0.5 if name == "rew" else 0.0  # the favourite of two has at least a half
        axes.plot([low, 1], [low, 1], color=_INK, alpha=0.3, linewidth=1)
        axes.plot(predicted, observed, color=BLUE)
        sizes = 8 + 120 * np.asarray(counts) / max(sum(counts), 1)
        axes.scatter(predicted, observed, s=sizes, color=BLUE, clip_on=False)
        axes.set_title(name)
        axes.set_xlim(low, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("predicted")


# Lines over steps


def _series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one key, over the rows that have it."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    pairs = [pair for pair in pairs if math.isfinite(pair[1])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Centred moving mean over a twentieth of the points; at the ends over the points there are."""
    half = len(values) // 40
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _line(axes: Axes, rows: Sequence[Row], key: str, colour: str = BLUE, label: str = "") -> None:
    """Draws one key over the steps; many values are drawn faintly with their trend over them."""
    steps, values = _series(rows, key)
    if not steps:
        return
    many = len(steps) >= 40
    if many:
        axes.plot(steps, values, color=colour, linewidth=1, alpha=0.45)
    trend = _smooth(values) if many else values
    axes.plot(steps, trend, color=colour, label=label, marker="" if many else ".", markersize=6)


def _panels(figure: Figure, rows: Sequence[Row], titles: Mapping[str, str]) -> dict[str, Axes]:
    """One panel beside the other for every key that the rows have, with its line drawn."""
    present = [key for key in titles if _series(rows, key)[0]]
    panels = {}
    for i, key in enumerate(present):
        axes = figure.add_subplot(1, len(present), i + 1)
        axes.set_title(titles[key])
        _step_axis(axes)
        _line(axes, rows, key, BLUE, key.rpartition("/")[2])
        panels[key] = axes
    return panels


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.margins(x=0.02)


@inline_svg(FULL_WIDTH, 300)
def reward(figure: Figure, rows: Sequence[Row]) -> None:
    """Mean reward of each PPO step, in a band of one standard deviation to each side."""
    steps, means = _series(rows, "reward/mean")
    if not steps:
        return
    axes = figure.add_subplot()
    _step_axis(axes)
    deviations = dict(zip(*_series(rows, "reward/std"), strict=True))
    spread = _smooth([deviations.get(step, 0.0) for step in steps])
    middle = _smooth(means)
    axes.fill_between(steps, middle - spread, middle + spread, color=BLUE, alpha=0.16, linewidth=0)
    _line(axes, rows, "reward/mean")
    axes.set_ylabel("reward")


@inline_svg(FULL_WIDTH, 230)
def reward_components(figure: Figure, rows: Sequence[Row], names: Sequence[str]) -> None:
    """The scores that the reward is made of, one panel each, on their own scales."""
    known = {
        "rew": "preference (rew)",
        "nat": "naturalness (nat)",
        "und": "understandability (und)",
        "coh": "coherence (coh)",
    }
    _panels(figure, rows, {f"reward/{name}": known.get(name, name) for name in names})


@inline_svg(FULL_WIDTH, 250)
def divergence(figure: Figure, rows: Sequence[Row]) -> None:
    """KL from the starting model by the k1 and k3 estimators, and the coefficient against it."""
    titles = {"kl/k1": "KL per answer (nats)", "kl/coef": "KL coefficient"}
    panels = _panels(figure, rows, titles)
    if "kl/k1" in panels:
        _line(panels["kl/k1"], rows, "kl/k3", ORANGE, "k3")
        panels["kl/k1"].legend()


@inline_svg(FULL_WIDTH, 250)
def answers(figure: Figure, rows: Sequence[Row]) -> None:
    """Length of the sampled answers, the share that end by themselves and the share that parse."""
    titles = {
        "length/mean": "answer length (tokens)",
        "length/eos_rate": "share that end by themselves",
        "reward/usable_share": "share of use",
    }
    for key, axes in _panels(figure, rows, titles).items():
        if key != "length/mean":
            axes.set_ylim(-0.03, 1.03)


@inline_svg(FULL_WIDTH, 250)
def policy(figure: Figure, rows: Sequence[Row]) -> None:
    """How far each update moves the policy: clip fraction, entropy and largest ratio."""
    titles = {
        "ppo/clip_fraction": "clip fraction",
        "ppo/entropy": "entropy (nats per token)",
        "ppo/ratio_max": "largest probability ratio",
    }
    _panels(figure, rows, titles)


@inline_svg(FULL_WIDTH, 250)
def critic(figure: Figure, rows: Sequence[Row]) -> None:
    """Loss of the value head and the share of the returns' variance that it explains."""
    titles = {"ppo/value_loss": "value loss", "ppo/explained_variance": "explained variance"}
    panels = _panels(figure, rows, titles)
    if "ppo/explained_variance" in panels:
        panels["ppo/explained_variance"].set_ylim(top=1.03)


@inline_svg(FULL_WIDTH, 280)
def finetuning_loss(figure: Figure, rows: Sequence[Row]) -> None:
    """Training loss of the supervised fine-tuning, with the held-out loss where it was taken."""
    if not _series(rows, "loss")[0]:
        return
    axes = figure.add_subplot()
    _step_axis(axes)
    axes.set_ylabel("loss (nats per token)")
    _line(axes, rows, "loss", BLUE, "training")
    steps, values = _series(rows, "eval_loss")
    if steps:
        axes.plot(steps, values, color=ORANGE, marker="o", markersize=6, label="held-out")
        axes.legend()


# Distributions and bars


def _histogram(figure: Figure, values: Sequence[float], bins: np.ndarray, label: str) -> Axes:
    axes = figure.add_subplot()
    axes.hist(values, bins=bins.tolist(), color=BLUE, alpha=0.85, rwidth=0.9)
    axes.set_xlabel(label)
    axes.set_ylabel("instructions")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return axes


@inline_svg(_HALF_WIDTH, 270)
def overlap(figure: Figure, overlaps: Sequence[float]) -> None:
    """Histogram of each instruction's ROUGE-L overlap, 0 to 1, with its nearest pool entry."""
    if overlaps:
        _histogram(figure, overlaps, np.linspace(0, 1, 21), "ROUGE-L with the nearest instruction")


@inline_svg(_HALF_WIDTH, 270)
def instruction_lengths(figure: Figure, lengths: Sequence[int]) -> None:
    """Histogram of the instructions' lengths in words, in at most 25 bars of whole words."""
    if lengths:
        width = -(-(max(lengths) + 1) // 25)
        bins = np.arange(0, max(lengths) + width + 1, width) - 0.5
        axes = _histogram(figure, lengths, bins, "words in the instruction")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _bar_rows(
    figure: Figure, labels: Sequence[str], place: tuple[int, int, int] = (1, 1, 1)
) -> Axes:
    """Axes with one labelled row for each horizontal bar, first at the top; sets the height."""
    width = figure.get_size_inches()[0]
    figure.set_size_inches(width, (_ROW_HEIGHT * len(labels) + 60) / 72)
    axes = figure.add_subplot(*place)
    axes.set_yticks(range(len(labels)), [_short(label, _MAX_LABEL) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x")
    return axes


@inline_svg(FULL_WIDTH, 300)
def verbs(figure: Figure, counts: Mapping[tuple[str, str], int]) -> None:
    """The most frequent leading verbs, each bar divided by the objects of the verb.

    Args:
        counts: instructions of each (verb, object).
    """
    objects: dict[str, Counter[str]] = defaultdict(Counter)
    for (verb, noun), count in counts.items():
        objects[verb][_short(noun, _MAX_OBJECT)] += count
    ranked = sorted(objects.items(), key=lambda item: (-item[1].total(), item[0]))[:_MAX_VERBS]
    if not ranked:
        return
    axes = _bar_rows(figure, [verb for verb, _ in ranked])
    axes.set_xlabel("instructions")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    pixels_per_count = 0.8 * FULL_WIDTH / ranked[0][1].total()
    for row, (_, nouns) in enumerate(ranked):
        _object_bar(axes, row, nouns, pixels_per_count)


def _object_bar(axes: Axes, row: int, nouns: Counter[str], pixels_per_count: float) -> None:
    """One verb's bar: its most frequent objects, darkest first, then all others.

    Names that their parts have no room for follow behind the bar.
    """
    named = [item for item in nouns.items() if item[0]]
    top = sorted(named, key=lambda item: (-item[1], item[0]))[: len(_SHADES)]
    rest = nouns.total() - sum(count for _, count in top)
    gap = 1.5 / pixels_per_count
    left, behind = 0, []
    for (noun, count), shade in zip(top, _SHADES, strict=False):
        axes.barh(row, count - gap, left=left, height=0.78, color=BLUE, alpha=shade)
        if count * pixels_per_count > 6.4 * len(noun) + 10:
            middle = left + (count - gap) / 2
            axes.text(middle, row, noun, ha="center", va="center", fontsize=11)
        else:
            behind.append(noun)
        left += count
    if rest:
        axes.barh(row, rest - gap, left=left, height=0.78, color=BLUE, alpha=0.12)
    names = ", ".join(behind)
    axes.text(left + rest + 4 * gap, row, names, va="center", fontsize=11, alpha=0.7)


@inline_svg(FULL_WIDTH, 300)
def evaluation(figure: Figure, scores: Mapping[str, Mapping[str, float]]) -> None:
    """ROUGE-L of every task before and after, largest gain at the top.

    Args:
        scores: for each arm, by its name and the one before training first, the score of each
            task, 0 to 100. The gain is that of the last arm over the first.
    """
    axes = _paired(figure, scores)
    if axes:
        axes.set_xlabel("ROUGE-L")
        axes.set_xlim(-1, 101)


@inline_svg(FULL_WIDTH, 300)
def held_out(figure: Figure, rewards: Mapping[str, Mapping[str, float]]) -> None:
    """Reward of every held-out instruction before and after, largest gain at the top.

    Args:
        rewards: for each arm, by its name, the mean reward of each instruction.
    """
    axes = _paired(figure, rewards)
    if axes:
        axes.set_xlabel("reward")


def _paired(figure: Figure, scores: Mapping[str, Mapping[str, float]]) -> Axes | None:
    """A row for each thing that was scored, with a mark for each arm; None without any."""
    if not scores:
        return None
    arms = list(scores)
    first, last = scores[arms[0]], scores[arms[-1]]
    tasks = sorted(first.keys() & last.keys(), key=lambda task: (first[task] - last[task], task))
    if not tasks:
        return None
    axes = _bar_rows(figure, tasks)
    positions = range(len(tasks))
    axes.hlines(
        positions,
        [first[task] for task in tasks],
        [last[task] for task in tasks],
        color=_INK,
        alpha=0.3,
        linewidth=3,
    )
    between = [(ORANGE, "D")] * (len(arms) - 2)
    marks = [(_INK, "|"), *between, (BLUE, "o")][-len(arms) :]
    for arm, (colour, marker) in zip(arms, marks, strict=True):
        values = [scores[arm].get(task, math.nan) for task in tasks]
        axes.plot(
            values, positions, marker, color=colour, markersize=9, markeredgewidth=2, label=arm
        )
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0, handlelength=1)
    return axes


@inline_svg(FULL_WIDTH, 300)
def timings(figure: Figure, seconds: Mapping[str, float]) -> None:
    """Wall-clock time of each stage in the order of the run."""
    if not seconds:
        return
    axes = _bar_rows(figure, list(seconds))
    unit, size = ("minutes", 60) if max(seconds.values()) >= 120 else ("seconds", 1)
    values = [value / size for value in seconds.values()]
    bars = axes.barh(range(len(values)), values, height=0.62, color=BLUE, alpha=0.85)
    axes.bar_label(bars, fmt="%.1f", padding=5)
    axes.margins(x=0.08)
    axes.set_xlabel(unit)


def draw_gains(figure: Figure, panels: Mapping[str, Mapping[str, tuple[float, Any]]]) -> None:
    """Gain in ROUGE-L of every task with its interval, largest gain of the first panel at the top.

    Args:
        panels: by its title, for each task the gain and the ends of its interval or None. All have
            the same tasks.
    """
    if not panels or not all(panels.values()):
        return
    first = next(iter(panels.values()))
    tasks = sorted(first, key=lambda task: (-first[task][0], task))
    rows = [(gain, *(ends or ())) for found in panels.values() for gain, ends in found.values()]
    furthest = 1.05 * max(abs(value) for row in rows for value in row) or 1.0
    for i, (title, found) in enumerate(panels.items()):
        axes = _bar_rows(figure, tasks, (1, len(panels), i + 1))
        axes.tick_params(labelleft=not i)
        axes.axvline(0, color=_INK, alpha=0.5, linewidth=1)
        for row, task in enumerate(tasks):
            gain, ends = found[task]
            axes.hlines(row, *(ends or (gain, gain)), color=BLUE, alpha=0.5, linewidth=3)
            axes.plot(gain, row, "o", color=BLUE, markersize=7)
        axes.set_title(_short(title, 110 // len(panels)))
        axes.set_xlim(-furthest, furthest)
        axes.set_xlabel("gain in ROUGE-L")


gains = inline_svg(FULL_WIDTH, 300)(draw_gains)
