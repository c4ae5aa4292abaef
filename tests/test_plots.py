"""The plots of report.html: any figures can be drawn, and nothing is left out unsaid."""

from __future__ import annotations

import pytest
from pages import drawn

from edgecnn.report.plots import Dot, Ratio, Samples, distributions, forest, scatter, sweep
from edgecnn.report.svg import Canvas, Scale
from edgecnn.report.timeline import Moment, timed_dots, timeline

VALUES = {
    "one": [3.0],
    "all the same": [2.0] * 50,
    "all zero": [0.0] * 20,
    "far outliers": [1.0, 1.1, 1.2] * 40 + [900.0],
    "ascending": [float(i) for i in range(1, 400)],
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("width", [370.0, 1070.0])
def test_any_samples_can_be_drawn(name: str, width: float) -> None:
    rows = [Samples(name, 1, VALUES[name]), Samples("fast", 2, [0.001] * 30, (0.001, 0.001))]
    for svg in (distributions(rows[:1], width), distributions(rows, width)):
        assert drawn(svg).count("path", "area") in (1, 2)
    drawn(timeline(rows, [[Moment(0.0, 50.0), Moment(1.0, 51.0)], []], width))


def test_outliers_beyond_the_axis_are_counted() -> None:
    text = drawn(distributions([Samples("a", 1, VALUES["far outliers"])], 1070)).text
    assert "1 beyond, to 900 ms" in text


def test_a_hollow_dot_and_no_line_where_nothing_was_decided() -> None:
    page = drawn(
        forest([Ratio("a", 1, 1.3, None, None, "undecided"), Ratio("b", 2, 2, 1.9, 2.1, "faster")], 370)
    )
    assert page.count("path", "error") == 3
    assert page.count("circle", "open") == 1


def test_points_of_one_place_and_of_equal_accuracy_can_be_drawn() -> None:
    dots = [Dot("a", 1, 1.0, 100.0), Dot("b", 2, 1.0, 100.0), Dot("c", 3, 90.0, 100.0)]
    page = drawn(scatter(dots, "size, MB", "top-1, %", 512))
    assert page.count("circle", "mark") == 3
    assert [page.text.count(name) for name in ("a: 1.00", "b: 1.00", "c: 90.0")] == [1, 1, 1]
    drawn(sweep([[Dot("a", 1, 1, 0.0)], [Dot("b", 2, 1, 0.0)]], 512))


def test_decimation_keeps_the_slowest() -> None:
    values = [1000.0] * 5000
    values[1234] = 99_000.0
    kept = timed_dots(Samples("a", 1, values))
    assert len(kept) <= 600
    assert (1234.0 + 99.0, 99_000.0) in kept
    assert kept == sorted(kept)


@pytest.mark.parametrize(("low", "high", "log"), [(1, 1, False), (0, 1, True), (float("nan"), 1, False)])
def test_a_scale_refuses_what_it_cannot_show(low: float, high: float, log: bool) -> None:
    with pytest.raises(ValueError, match="a scale from"):
        Scale(low, high, 0, 100, log)


def test_a_canvas_refuses_a_place_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="a coordinate is nan, expected a finite number"):
        Canvas(10, 10, "plot").line((0, float("nan")), (1, 1), "grid")
