"""The plot of a run over its time: every latency, and the board's temperature and clock below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
    series = [(row, decimate(_timed(row))) for row in rows]
    panels = _panels(traces)
    legend = _legend(rows, width)
    top = legend[-1][1] + 42
    left, right, bottom = 50.0, width - 12, top + 200
    end = max([points[-1][0] for _, points in series] + [trace[-1].t_s for trace in traces if trace])
    x_scale = Scale(0.0, end or 1.0, left, right)
    high = max(fence(row.values_ms) for row in rows)
    low = min(min(row.values_ms) for row in rows)
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


def decimate(points: Sequence[Point], most: int = MAX_DOTS) -> list[Point]:
    """Return all points, or of more than `most` each group's median and its largest, in order.

    Example:
        >>> decimate([(0, 5), (1, 7), (2, 6), (3, 1), (4, 9), (5, 2)], most=4)
        [(1, 7), (2, 6), (4, 9), (5, 2)]
    """
    if len(points) <= most:
        return list(points)
    num_groups = max(most // 2, 1)
    found: list[Point] = []
    for index in range(num_groups):
        group = points[index * len(points) // num_groups : (index + 1) * len(points) // num_groups]
        ordered = sorted(group, key=lambda point: point[1])
        found += sorted({ordered[len(ordered) // 2], ordered[-1]})
    return found


def _timed(row: Samples) -> list[Point]:
    """Return each latency with the second at which it ended."""
    times = list(accumulate(value / 1e3 for value in row.values_ms))
    factor = 1.0 if row.span_s is None or times[-1] <= 0 else max(row.span_s / times[-1], 1.0)
    return [(time * factor, value) for time, value in zip(times, row.values_ms, strict=True)]


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
