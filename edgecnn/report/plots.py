"""The plots of a report's page, each from plain numbers to an svg element.

Series are told apart by colour and always named beside their marks, so that no plot needs its colours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy.typing as npt

from edgecnn.report.numbers import digits, interval_ms_text, ms_text, ratio_text, time_axis
from edgecnn.report.svg import FONT_SIZE, VALUE_SIZE, Canvas, Point, Scale, shorten, text_width
from edgecnn.runner.statistics import Distribution

MAX_DOTS = 600
"""Dots of one series in a plot; of more samples, groups are drawn by their median and their slowest."""

MIN_GUTTERS = 700.0
"""Plots at least this wide have room for names beside their rows."""

RIDGE = 28.0
"""Height of a histogram, px."""

LOG_FROM = 6.0
"""Latencies whose medians are further apart than this factor share a logarithmic axis."""


@dataclass(frozen=True)
class Samples:
    """One artifact's latencies.

    Attributes:
        label: its name.
        series: number of its colour.
        values_ms: in the order they were measured, at least one.
        interval_ms: confidence interval of the median, or None.
        span_s: seconds the run took with its pauses, or None for the sum of the latencies.
        known: the values without their order, where somebody has counted them; else they are counted here.
    """

    label: str
    series: int
    values_ms: Sequence[float] | npt.NDArray[Any]
    interval_ms: tuple[float, float] | None = None
    span_s: float | None = None
    known: Distribution | None = None

    @cached_property
    def spread(self) -> Distribution:
        """The values without their order."""
        return self.known or Distribution.of(self.values_ms)


@dataclass(frozen=True)
class Ratio:
    """A comparison: above 1 the candidate is faster; no interval means that it was not decided."""

    label: str
    series: int
    ratio: float
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class Dot:
    """A point of a scatter or line plot, with the interval of its y value."""

    label: str
    series: int
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bar:
    """A bar with its figure in words and what shows when it is pointed at."""

    label: str
    series: int
    value: float
    text: str
    tip: str = ""


def distributions(rows: Sequence[Samples], width: float) -> str:
    """Draw each artifact's histogram over a box: quartiles, median with its interval, 5th to 95th percentile.

    The axis ends where no row has more than outliers, those above p75 + 3 IQR; what lies beyond is counted.
    """
    medians = [row.spread.median() for row in rows]
    low = min(row.spread.ranked(1) for row in rows)
    high = max(fence(row.spread) for row in rows)
    log = low > 0 and max(medians) > LOG_FROM * min(medians)
    margin = (high - low or high or 1.0) * 0.03
    low, high = (low / 1.1, high * 1.1) if log else (max(low - margin, 0.0), high + margin)
    gutters = _gutters([row.label for row in rows], [_figures(row, high) for row in rows], width)
    scale = Scale(low, high, gutters.left, width - gutters.right, log)
    height = 80.0 if gutters.is_stacked else 58.0
    bottom = height * len(rows) + 4
    canvas = Canvas(width, bottom + 42, "Distribution of latencies, one row per artifact")
    factor, unit = time_axis(high)
    label = f"latency, {unit}{' (logarithmic)' if log else ''}"
    canvas.x_axis(scale, 4, bottom, label, int((scale.stop - scale.start) / 75), factor)
    for index, row in enumerate(rows):
        top = height * index
        room = gutters.name_room(width, _figures(row, high))
        canvas.text(
            (gutters.edge, top + gutters.shift), shorten(row.label, room, True), f"name s{row.series}"
        )
        value, note = _figures(row, high).split("\n")
        right = (width - gutters.edge, top + gutters.shift)
        canvas.text(right, value, "value", "end")
        if note and gutters.is_stacked:
            canvas.text((right[0] - text_width(value, VALUE_SIZE, True) - 8, right[1]), note, "tick", "end")
        elif note:
            canvas.text((right[0], right[1] + 16), note, "tick", "end")
        _distribution(canvas, scale, row, top + height - 24)
    return canvas.render()


def _figures(row: Samples, high: float) -> str:
    """Return a row's median and, on a second line, what lies beyond the axis."""
    beyond = row.spread.count_above(high)
    note = f"{beyond:,} beyond, to {ms_text(row.spread.ranked(len(row.values_ms)))}" if beyond else ""
    return f"{ms_text(row.spread.median())}\n{note}"


@dataclass(frozen=True)
class _Gutters:
    """Where names and figures stand: beside the rows of a wide plot, above those of a narrow one."""

    left: float
    right: float
    is_stacked: bool

    @property
    def edge(self) -> float:
        """Distance of names and figures from the plot's edge."""
        return 8.0 if self.is_stacked else 0.0

    @property
    def shift(self) -> float:
        """From a row's upper edge to the baseline of its name."""
        return 20.0 if self.is_stacked else 32.0

    def name_room(self, width: float, figures: str) -> float:
        """Return how long a name may be beside its figures."""
        return width - 34 - _figures_width(figures) if self.is_stacked else self.left - 20


def _figures_width(figures: str) -> float:
    value, _, note = figures.partition("\n")
    return text_width(value, VALUE_SIZE, True) + text_width(note) + 8


def _gutters(names: Sequence[str], figures: Sequence[str], width: float) -> _Gutters:
    """Return the room at both sides of a plot's rows."""
    if width < MIN_GUTTERS:
        return _Gutters(12, 12, True)
    left = min(max(text_width(name, bold=True) for name in names) + 20, width / 4)
    lines = [line for figure in figures for line in figure.split("\n")]
    return _Gutters(left, max(text_width(line, VALUE_SIZE, True) for line in lines) + 20, False)


def fence(spread: Distribution) -> float:
    """Return where an axis may end: three interquartile ranges above the box, if anything is beyond.

    Where more than one sample in twenty is, it ends further on, at up to four times the median.

    Example:
        >>> fence(Distribution.of([10.0, 10.0, 11.0, 11.0] * 25 + [500.0]))
        14.0
        >>> fence(Distribution.of([10.0] * 90 + [500.0] * 10))
        40.0
    """
    lower, middle, upper = (spread.percentile(percent) for percent in (25, 50, 75))
    most = max(upper + 3 * (upper - lower), min(spread.percentile(95), 4 * middle))
    return min(spread.ranked(spread.num_samples), most)


def _distribution(canvas: Canvas, scale: Scale, row: Samples, base: float) -> None:
    """Draw one row, the histogram standing on `base` and the box below it."""
    style, spread = f"s{row.series}", row.spread
    quantile = {q: scale(min(spread.percentile(q), scale.high)) for q in (5, 25, 75, 95)}
    middle = scale(spread.median())
    limit = fence(spread)
    canvas.path(_ridge(spread, limit, scale, base), f"area {style}", closed=True)
    outliers = [value for value in spread.values[spread.values > limit].tolist() if scale.inside(value)]
    step = -(-len(outliers) // MAX_DOTS) or 1
    canvas.dots([(scale(value), base + 9) for value in outliers[::step]], style)
    canvas.line((quantile[5], base + 9), (quantile[95], base + 9), f"whisker {style}")
    canvas.rect((quantile[25], base + 4), (quantile[75] - quantile[25], 10), f"box {style}", radius=2)
    if row.interval_ms is not None:
        left, right = (scale(min(max(value, scale.low), scale.high)) for value in row.interval_ms)
        tip = f"95 % interval of the median: {interval_ms_text(row.interval_ms)}"
        canvas.rect((left, base + 4), (max(right - left, 1), 10), f"interval {style}", tip)
    canvas.line((middle, base + 1), (middle, base + 17), "median")


def _ridge(spread: Distribution, limit: float, scale: Scale, base: float) -> list[Point]:
    """Return the outline of a smoothed histogram of what is not above `limit`, in bins of 4 px."""
    num_bins = max(8, int(abs(scale.stop - scale.start) / 4))
    step = (scale.stop - scale.start) / num_bins
    counts = [0.0] * (num_bins + 2)
    for value, count in zip(spread.values.tolist(), spread.counts.tolist(), strict=True):
        if value <= limit and scale.inside(value):
            counts[1 + min(int((scale(value) - scale.start) / step), num_bins - 1)] += count
    smooth = [(a + 2 * b + c) / 4 for a, b, c in zip(counts, counts[1:], counts[2:], strict=False)]
    top = max(smooth) or 1.0
    used = [index for index, count in enumerate(smooth) if count > 0]
    first, last = max(min(used, default=0) - 1, 0), min(max(used, default=0) + 1, num_bins - 1)
    outline = [
        (scale.start + (index + 0.5) * step, base - RIDGE * smooth[index] / top)
        for index in range(first, last + 1)
    ]
    return [(outline[0][0], base), *outline, (outline[-1][0], base)]


def forest(rows: Sequence[Ratio], width: float) -> str:
    """Draw ratios with their intervals around 1, on a logarithmic axis."""
    ends = [end for row in rows for end in (row.ratio, row.low, row.high) if end is not None]
    low, high = min(min(*ends, 1.0) / 1.08, 0.9), max(max(*ends, 1.0) * 1.08, 1.1)
    figures = [f"{ratio_text(row.ratio)} {row.verdict}" for row in rows]
    gutters = _gutters([row.label for row in rows], figures, width)
    scale = Scale(low, high, gutters.left, width - gutters.right, log=True)
    height, place = (50.0, 35.0) if gutters.is_stacked else (36.0, 18.0)
    bottom = height * len(rows) + 28
    canvas = Canvas(width, bottom + 40, "Ratios to the baseline with 95 % intervals; 1 is no difference")
    canvas.x_axis(scale, 26, bottom, "times as fast as the baseline", int((scale.stop - scale.start) / 75))
    one = scale(1.0)
    canvas.line((one, 22), (one, bottom), "reference")
    if one - 18 > text_width("← slower"):
        canvas.text((one - 8, 14), "← slower", "tick", "end")
    if width - one - 18 > text_width("faster →"):
        canvas.text((one + 8, 14), "faster →", "tick")
    for index, (row, figure) in enumerate(zip(rows, figures, strict=True)):
        y = 26 + height * index + place
        baseline = y - 15 if gutters.is_stacked else y + 4
        name = shorten(row.label, gutters.name_room(width, figure), True)
        canvas.text((gutters.edge, baseline), name, f"name s{row.series}")
        canvas.text((width - gutters.edge, baseline), figure, "value", "end")
        style = f"s{row.series}" if row.verdict in ("faster", "slower") else "open"
        if row.low is not None and row.high is not None:
            canvas.line((scale(row.low), y), (scale(row.high), y), f"error {style}")
            for end in (row.low, row.high):
                canvas.line((scale(end), y - 5), (scale(end), y + 5), f"error {style}")
        canvas.circle((scale(row.ratio), y), 5, f"mark {style}", figure)
    return canvas.render()


def scatter(dots: Sequence[Dot], x_label: str, y_label: str, width: float) -> str:
    """Draw y (better upwards) against x (better to the left), and the line no other dot is better than."""
    height, left = 270.0, 50.0
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    log = min(xs) > 0 and max(xs) > LOG_FROM * min(xs)
    low, high = (min(xs) / 1.3, max(xs) * 1.5) if log else (0.0, max(xs) * 1.15 or 1.0)
    x_scale = Scale(low, high, left, width - 12, log)
    margin = max((max(ys) - min(ys)) * 0.25, 0.5)
    y_scale = Scale(max(min(ys) - margin, 0.0), min(max(ys) + margin, 100.0) + 1e-9, height - 44, 34)
    canvas = Canvas(width, height, f"{y_label} against {x_label}")
    canvas.y_axis(y_scale, left, width - 12, y_label)
    canvas.x_axis(x_scale, 34, height - 44, x_label, 5)
    best = frontier([(dot.x, dot.y) for dot in dots])
    if len(best) > 1:
        steps = [best[0]] + [p for a, b in itertools.pairwise(best) for p in ((b[0], a[1]), b)]
        canvas.path([(x_scale(x), y_scale(y)) for x, y in steps], "frontier")
    places = [(x_scale(dot.x), y_scale(dot.y)) for dot in dots]
    for dot, place in zip(dots, places, strict=True):
        tip = f"{dot.label}: {digits(dot.x)}, {dot.y:.2f}"
        canvas.circle(place, 5.5, f"mark s{dot.series}", tip)
    _name_dots(canvas, dots, places, left)
    return canvas.render()


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that none is better than: x not larger and y not smaller, by growing x.

    Example:
        >>> frontier([(1, 90), (2, 89), (3, 95)])
        [(1, 90), (3, 95)]
    """
    found: list[Point] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found


def _name_dots(canvas: Canvas, dots: Sequence[Dot], places: Sequence[Point], left: float) -> None:
    """Write each dot's name where it hides least: beside, above or below it."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    for dot, (x, y) in zip(dots, places, strict=True):
        text = shorten(dot.label, 160, True)
        size = text_width(text, bold=True)
        options = [(x + 10, y + 4), (x - 10 - size, y + 4)]
        options += [(x - size / 2, y + shift) for shift in (-12, 22, -27, 37)]
        options = [(min(max(tx, left + 4), canvas.width - 14 - size), ty) for tx, ty in options]
        boxes = [(tx, ty - FONT_SIZE, tx + size, ty + 3) for tx, ty in options]
        hidden = [sum(_overlap(box, other) for other in taken) for box in boxes]
        best = hidden.index(min(hidden))
        taken.append(boxes[best])
        canvas.text(options[best], text, f"name s{dot.series}")


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return the area two boxes (left, top, right, bottom) share."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def bars(rows: Sequence[Bar], title: str, width: float) -> str:
    """Draw horizontal bars from 0, each under its name and figure."""
    most = max((row.value for row in rows), default=0.0) or 1.0
    canvas = Canvas(width, 34.0 * len(rows) + 2, title)
    for index, row in enumerate(rows):
        top = 34.0 * index
        label = shorten(row.label, width - text_width(row.text, VALUE_SIZE, True) - 18)
        canvas.text((0, top + 14), label, "label", tip=row.tip or row.label)
        canvas.text((width, top + 14), row.text, "value", "end")
        canvas.rect((0, top + 20), (width, 6), "track", radius=3)
        length = max(width * row.value / most, 2.0 if row.value > 0 else 0.0)
        canvas.rect((0, top + 20), (length, 6), f"bar s{row.series}", row.tip, radius=3)
    return canvas.render()


def sweep(series: Sequence[Sequence[Dot]], width: float) -> str:
    """Draw median latency over the number of threads, one line per artifact, with intervals."""
    dots = [dot for line in series for dot in line]
    counts = sorted({dot.x for dot in dots})
    ends = [(line[-1], shorten(line[-1].label, width / 3.5, True)) for line in series]
    left, right = 50.0, width - 16 - max(text_width(text, bold=True) for _, text in ends)
    height = 270.0
    x_scale = Scale(math.log2(counts[0]) - 0.15, math.log2(counts[-1]) + 0.15, left, right)
    top = max(dot.high if dot.high is not None else dot.y for dot in dots) * 1.08 or 1.0
    y_scale = Scale(0.0, top, height - 44, 34)
    canvas = Canvas(width, height, "Median latency over the number of threads")
    factor, unit = time_axis(top)
    canvas.y_axis(y_scale, left, right, f"median, {unit}", factor)
    for count in counts:
        canvas.text((x_scale(math.log2(count)), height - 28), f"{count:g}", "tick", "middle")
    canvas.text(((left + right) / 2, height - 10), "threads", "axis", "middle")
    for line in series:
        style = f"s{line[0].series}"
        places = [(x_scale(math.log2(dot.x)), y_scale(dot.y)) for dot in line]
        canvas.path(places, f"line {style}")
        for dot, place in zip(line, places, strict=True):
            if dot.low is not None and dot.high is not None:
                canvas.line((place[0], y_scale(dot.low)), (place[0], y_scale(dot.high)), f"error {style}")
            canvas.circle(place, 4, f"mark {style}", f"{dot.label}, {dot.x:g} threads: {ms_text(dot.y)}")
    lowest = 34.0 - 16
    for dot, text in sorted(ends, key=lambda end: -end[0].y):
        lowest = max(y_scale(dot.y) + 4, lowest + 16)
        canvas.text((right + 10, lowest), text, f"name s{dot.series}")
    return canvas.render()
