"""The plot of a run over its time: every latency, and the board's temperature and clock below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgecnn.report.numbers import time_axis
from edgecnn.report.plots import MAX_DOTS, Samples, fence
from edgecnn.report.svg import Canvas, Point, Scale, shorten, text_width

PANEL = 72.0
FEW = 150
"""Fewer dots than this are drawn larger."""


@dataclass(frozen=True)
class Moment:
    """What the board said at one time of the run.

    Attributes:
        t_s: seconds since the run's start.
        temperature_c: °C, or None.
        frequency_mhz: of the CPU, or None.
        throttled: what held the clock back, in words, or None.
    """

    t_s: float
    temperature_c: float | None = None
    frequency_mhz: float | None = None
    throttled: str | None = None


def timeline(rows: Sequence[Samples], traces: Sequence[Sequence[Moment]], width: float) -> str:
    """Draw latencies over the seconds of the run, with temperature, clock and throttling where known.

    Args:
        rows: artifacts; one with a `span_s` is stretched over it, since it also warmed up and paused.
        traces: of each artifact's run, may be empty.
        width: px.
    """
    series = [(row, timed_dots(row)) for row in rows]
    panels = _panels(traces)
    legend = _legend(rows, width)
    top = legend[-1][1] + 42
    left, right, bottom = 50.0, width - 12, top + 200
    end = max([points[-1][0] for _, points in series] + [trace[-1].t_s for trace in traces if trace])
    x_scale = Scale(0.0, end or 1.0, left, right)
    high = max(fence(row.spread) for row in rows)
    low = min(row.spread.ranked(1) for row in rows)
    y_low = 0.0 if high > 2 * low else max(low - (high - low or high or 1.0) * 0.15, 0.0)
    y_scale = Scale(y_low, high + ((high - y_low) * 0.05 or 1.0), bottom, top)
    floor = bottom + PANEL * len(panels)
    canvas = Canvas(width, floor + 42, "Latency of each inference over the run")
    for row, (x, y, text) in zip(rows, legend, strict=True):
        canvas.circle((x + 5, y - 4), 4.5, f"mark s{row.series}")
        canvas.text((x + 15, y), text, "name")
    for start, stop in [span for trace in traces for span in _throttled(trace)]:
        corner, size = (x_scale(start), top), (max(x_scale(stop) - x_scale(start), 2), floor - top)
        canvas.rect(corner, size, "throttle", "throttled")
    factor, unit = time_axis(y_scale.high)
    canvas.y_axis(y_scale, left, right, f"latency, {unit}", factor)
    canvas.x_axis(x_scale, top, floor, "time in the run, s", int(width / 90))
    for row, points in series:
        shown = [(x_scale(t), y_scale(value)) for t, value in points if y_scale.inside(value)]
        canvas.dots(shown, f"s{row.series}{' few' if len(shown) < FEW else ''}")
        for t, value in points:
            if value > y_scale.high:
                x = x_scale(t)
                canvas.path(
                    [(x - 4, top + 6), (x + 4, top + 6), (x, top)], f"mark s{row.series}", closed=True
                )
    for index, (name, curves) in enumerate(panels):
        _panel(canvas, x_scale, curves, rows, (name, bottom + PANEL * index))
    return canvas.render()


def timed_dots(row: Samples, most: int = MAX_DOTS) -> list[Point]:
    """Return each latency with the second at which it ended, of more than `most` a selection.

    They are then put into groups of as many in a row, of which each gives its median and its slowest.

    Example:
        >>> timed_dots(Samples("a", 0, [5000, 7000, 6000, 1000, 9000, 2000]), most=4)
        [(12.0, 7000.0), (18.0, 6000.0), (28.0, 9000.0), (30.0, 2000.0)]
    """
    values = np.asarray(row.values_ms, np.float64)
    seconds = float(values.sum()) / 1e3
    factor = 1.0 if row.span_s is None or seconds <= 0 else max(row.span_s / seconds, 1.0)
    num_groups = max(most // 2, 1) if len(values) > most else len(values)
    found: list[Point] = []
    elapsed_ms = 0.0
    for index in range(num_groups):
        group = values[index * len(values) // num_groups : (index + 1) * len(values) // num_groups]
        ends = elapsed_ms + np.cumsum(group)
        middle = np.argpartition(group, len(group) // 2)[len(group) // 2]
        kept = sorted({int(middle), int(group.argmax())})
        found += [(factor * float(ends[i]) / 1e3, float(group[i])) for i in kept]
        elapsed_ms = float(ends[-1])
    return found


def _panels(traces: Sequence[Sequence[Moment]]) -> list[tuple[str, list[list[Point]]]]:
    """Return the panels under the plot that any artifact has values for, with a curve for each artifact."""
    temperatures = [[(m.t_s, m.temperature_c) for m in t if m.temperature_c is not None] for t in traces]
    clocks = [[(m.t_s, m.frequency_mhz / 1e3) for m in t if m.frequency_mhz is not None] for t in traces]
    panels = [("temperature, °C", temperatures), ("clock, GHz", clocks)]
    return [(name, curves) for name, curves in panels if any(len(curve) > 1 for curve in curves)]


def _throttled(trace: Sequence[Moment]) -> list[tuple[float, float]]:
    """Return from when to when the board held its clock back."""
    spans: list[tuple[float, float]] = []
    for moment, after in zip(trace, [*trace[1:], *trace[-1:]], strict=True):
        if moment.throttled and spans and spans[-1][1] >= moment.t_s:
            spans[-1] = (spans[-1][0], after.t_s)
        elif moment.throttled:
            spans.append((moment.t_s, after.t_s))
    return spans


def _panel(
    canvas: Canvas,
    x_scale: Scale,
    curves: Sequence[Sequence[Point]],
    rows: Sequence[Samples],
    place: tuple[str, float],
) -> None:
    """Draw the curves of one panel; `place` is its name and its upper edge."""
    name, top = place
    values = [value for curve in curves for _, value in curve]
    low, high = min(values), max(values)
    margin = max((high - low) * 0.15, abs(high) * 0.02, 0.01)
    y_scale = Scale(low - margin, high + margin, top + PANEL - 4, top + 30)
    canvas.line((x_scale.start, top), (x_scale.stop, top), "rule")
    canvas.text((0, top + 20), name, "axis")
    for value in sorted({low, high}):
        canvas.text((x_scale.start - 7, y_scale(value) + 4), f"{value:.3g}", "tick", "end")
    for curve, row in zip(curves, rows, strict=True):
        if curve:
            canvas.path([(x_scale(t), y_scale(value)) for t, value in curve], f"line thin s{row.series}")


def _legend(rows: Sequence[Samples], width: float) -> list[tuple[float, float, str]]:
    """Return the place of each name above the plot, in as many lines as they need, and the name."""
    found: list[tuple[float, float, str]] = []
    x, y = 0.0, 14.0
    for row in rows:
        text = shorten(row.label, width - 20, True)
        room = text_width(text, bold=True) + 15
        if x + room > width and x > 0:
            x, y = 0.0, y + 20
        found.append((x, y, text))
        x += room + 22
    return found
