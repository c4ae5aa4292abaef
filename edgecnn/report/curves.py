"""The plots of pruning and training: widths before and after, and values over the epochs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from edgecnn.report.numbers import digits
from edgecnn.report.svg import VALUE_SIZE, Canvas, Point, Scale, shorten, text_width

ROW = 22.0
"""Height of one layer's row in px."""

MAX_MARKS = 60
"""Points of a line that are marked one by one, at most."""


@dataclass(frozen=True)
class Curve:
    """A line over the epochs.

    Attributes:
        label: its name.
        series: number of its colour.
        points: (epoch, value), in order, at least one.
        is_marked: whether each value shows as a dot.
    """

    label: str
    series: int
    points: tuple[Point, ...]
    is_marked: bool = False


@dataclass(frozen=True)
class Width:
    """One layer's number of channels before and after pruning; `note` is said where the two are the same."""

    label: str
    before: int
    after: int
    note: str = ""


def curves(lines: Sequence[Curve], y_label: str, title: str, width: float) -> str:
    """Draw values over the epochs, each line named at the top.

    Args:
        lines: at least one.
        y_label: of the values, with their unit.
        title: for those who cannot see the plot.
        width: px.
    """
    height, left, right = 270.0, 50.0, width - 12
    legend, x, y = [], 0.0, 14.0
    for line in lines:
        room = text_width(line.label, bold=True) + 37
        if x + room > width and x > 0:
            x, y = 0.0, y + 20
        legend.append((line, x, y))
        x += room
    top = y + 40
    height += y - 14
    values = [value for line in lines for _, value in line.points]
    ends = [epoch for line in lines for epoch, _ in line.points]
    margin = max((max(values) - min(values)) * 0.08, abs(max(values)) * 0.01, 1e-6)
    low = min(values) - margin
    y_scale = Scale(max(low, 0.0) if min(values) >= 0 else low, max(values) + margin, height - 44, top)
    x_scale = Scale(0.0, max(ends) or 1.0, left, right)
    canvas = Canvas(width, height, title)
    for line, start, baseline in legend:
        canvas.circle((start + 5, baseline - 4), 4.5, f"mark s{line.series}")
        canvas.text((start + 15, baseline), line.label, "name")
    canvas.y_axis(y_scale, left, right, y_label)
    canvas.x_axis(x_scale, top, height - 44, "epoch", max(int(width / 100), 3))
    for line in lines:
        places = [(x_scale(epoch), y_scale(value)) for epoch, value in line.points]
        if len(places) > 1:
            canvas.path(places, f"line {'' if line.is_marked else 'thin '}s{line.series}")
        marked = line.is_marked or len(places) == 1
        for (epoch, value), place in zip(line.points, places, strict=True):
            if marked and len(places) <= MAX_MARKS:
                canvas.circle(
                    place, 4, f"mark s{line.series}", f"{line.label}, epoch {digits(epoch)}: {value:.4g}"
                )
    return canvas.render()


def widths(rows: Sequence[Width], width: float) -> str:
    """Draw each layer's channels: the whole bar before pruning, the filled part after it.

    Args:
        rows: in the order of the network.
        width: px.
    """
    figures = [f"{row.before} → {row.after}" if row.before != row.after else str(row.before) for row in rows]
    right = max(text_width(text, VALUE_SIZE, True) for text in figures) + 12
    left = min(max(text_width(row.label) for row in rows) + 12, width * 0.38)
    most = max(max(row.before for row in rows), 1)
    canvas = Canvas(width, ROW * len(rows) + 4, "Channels of each layer before and after pruning")
    scale = Scale(0, most, left, width - right)
    for index, (row, text) in enumerate(zip(rows, figures, strict=True)):
        top = ROW * index
        tip = f"{row.label}: {text} channels{f', {row.note}' if row.note else ''}"
        canvas.text((0, top + 15), shorten(row.label, left - 10), "label", tip=tip)
        canvas.rect((left, top + 6), (scale(row.before) - left, 10), "track", tip, radius=2)
        canvas.rect(
            (left, top + 6), (scale(row.after) - left, 10), f"bar s{0 if row.note else 1}", tip, radius=2
        )
        canvas.text((width, top + 15), text, "value", "end")
    return canvas.render()


def smooth(points: Sequence[Point], num_bins: int) -> tuple[Point, ...]:
    """Return the means of neighbouring points, `num_bins` of them at most.

    Example:
        >>> smooth([(1, 4.0), (2, 2.0), (3, 1.0), (4, 1.0)], 2)
        ((1.5, 3.0), (3.5, 1.0))
    """
    if len(points) <= num_bins:
        return tuple(points)
    edges = [index * len(points) // num_bins for index in range(num_bins + 1)]
    parts = [points[a:b] for a, b in itertools.pairwise(edges)]
    return tuple((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts)
