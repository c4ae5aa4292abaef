"""Small plots as inline SVG: scales, ticks and a canvas of marks.

Marks carry CSS classes instead of colours, so that the page decides how they look in light, in dark and on
paper; the classes "s0" to "s7" are the colours of series. Texts are escaped, and no coordinate that is not
finite can get into a drawing.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]

FONT_SIZE = 12.0
"""Of the plots' texts in px, as the page's style sheet sets it; widths are estimated from it."""

VALUE_SIZE = 13.0
"""Of the figures beside the marks, which are bold."""

NARROW, WIDE = set("ijlI.,:;'|!()[]ft /-"), set("mwMW@%—")


@dataclass(frozen=True)
class Scale:
    """From values to pixels.

    Attributes:
        low, high: the values at both ends.
        start, stop: their pixels; stop < start turns the axis around, as for y.
        log: whether equal ratios, instead of equal differences, take equal room; needs low > 0.

    Raises:
        ValueError: if the values are not finite, not low < high, or not positive on a logarithmic scale.

    Example:
        >>> Scale(0, 10, 100, 200)(2.5), Scale(1, 100, 0, 80, log=True)(10)
        (125.0, 40.0)
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __post_init__(self) -> None:
        """Check the ends."""
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        if not finite or self.low >= self.high or (self.log and self.low <= 0):
            kind = "0 < low < high" if self.log else "low < high"
            raise ValueError(f"a scale from {self.low} to {self.high}, expected finite numbers, {kind}")

    def __call__(self, value: float) -> float:
        """Return the pixel of a value, which may lie beyond the ends."""
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.stop - self.start)

    def inside(self, value: float) -> bool:
        """Whether a value lies between the ends."""
        return self.low <= value <= self.high

    def ticks(self, count: int = 5) -> list[float]:
        """Return about `count` round values between the ends.

        Example:
            >>> Scale(0, 1, 0, 100).ticks(), Scale(0.5, 30, 0, 1, log=True).ticks()
            ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.5, 1.0, 2.0, 5.0, 10.0, 20.0])
        """
        if self.log and self.high / self.low > 4:
            return _log_ticks(self.low, self.high, count + 1)
        step = nice_step((self.high - self.low) / count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


def nice_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is at least about `least`.

    Example:
        >>> nice_step(0.13), nice_step(30), nice_step(1)
        (0.2, 50.0, 1.0)
    """
    power = 10.0 ** math.floor(math.log10(least))
    factor = next((f for f in (1, 2, 5) if f * power >= least * 0.999), 10)
    return float(f"{factor * power:.6g}")


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return 1, 2 and 5 times powers of ten, or only powers of ten where those are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [float(f"{f * 10.0**p:.6g}") for p in powers for f in factors]
        found = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Return ticks with as many decimals as tell them apart.

    Example:
        >>> tick_texts([0.0, 0.5, 1.0]), tick_texts([0.5, 1.0, 20.0]), tick_texts([1000.0, 2000.0])
        (['0.0', '0.5', '1.0'], ['0.5', '1', '20'], ['1000', '2000'])
    """
    steps = {round(b - a, 12) for a, b in itertools.pairwise(ticks)}
    if len(steps) != 1:
        return [f"{tick:.6g}" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(steps.pop()) + 1e-9))
    return [f"{tick:.{decimals}f}" for tick in ticks]


def text_width(text: str, size: float = FONT_SIZE, bold: bool = False) -> float:
    """Return about how many pixels a text takes in a wide sans-serif font of `size` px.

    Example:
        >>> text_width("mm") > text_width("ab") > text_width("il")
        True
    """
    units = sum(0.36 if c in NARROW else 0.9 if c in WIDE else 0.68 if c.isupper() else 0.6 for c in text)
    return size * units * (1.12 if bold else 1.0)


def shorten(text: str, width: float, bold: bool = False) -> str:
    """Return a text that fits into `width` px, its middle left out where it must.

    Example:
        >>> shorten("short", 200), shorten("stage1/block2/conv/weight", 80)
        ('short', 'stage1…eight')
    """
    if text_width(text, FONT_SIZE, bold) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        cut = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        if text_width(cut, FONT_SIZE, bold) <= width:
            return cut
    return "…"


class Canvas:
    """A drawing under way; `render` gives the element.

    Args:
        width, height: px; the page scales it to the room there is.
        title: what the plot shows, for those who cannot see it.

    Example:
        >>> canvas = Canvas(10, 10, "a<b")
        >>> canvas.line((0, 0), (10, 2.5), "grid")
        >>> canvas.render()
        '<svg viewBox="0 0 10 10" role="img"><title>a&lt;b</title><path class="grid" d="M0 0L10 2.5"/></svg>'
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height = width, height
        self._title = title
        self._parts: list[str] = []

    def line(self, start: Point, stop: Point, style: str) -> None:
        """Draw a straight line."""
        self.path((start, stop), style)

    def path(self, points: Iterable[Point], style: str, closed: bool = False) -> None:
        """Draw a line through points; a closed one is an area."""
        steps = "L".join(f"{_px(x)} {_px(y)}" for x, y in points)
        self._parts.append(f'<path class="{style}" d="M{steps}{"Z" if closed else ""}"/>')

    def dots(self, points: Iterable[Point], style: str) -> None:
        """Draw many dots in one element: a stroke with round ends and no length each."""
        steps = "".join(f"M{_px(x)} {_px(y)}h0" for x, y in points)
        if steps:
            self._parts.append(f'<path class="dots {style}" d="{steps}"/>')

    def circle(self, centre: Point, radius: float, style: str, tip: str = "") -> None:
        """Draw one dot, with a text that shows when pointed at."""
        place = f'cx="{_px(centre[0])}" cy="{_px(centre[1])}" r="{_px(radius)}"'
        self._mark("circle", place, style, tip)

    def rect(self, corner: Point, size: Point, style: str, tip: str = "", radius: float = 0) -> None:
        """Draw a box from its upper left corner; `size` is width and height."""
        place = f'x="{_px(corner[0])}" y="{_px(corner[1])}" width="{_px(max(size[0], 0))}"'
        place += f' height="{_px(max(size[1], 0))}"' + (f' rx="{_px(radius)}"' if radius else "")
        self._mark("rect", place, style, tip)

    def text(self, place: Point, text: str, style: str = "", anchor: str = "start", tip: str = "") -> None:
        """Write a text; `anchor` is "start", "middle" or "end", and the place is on its baseline."""
        end = "" if anchor == "start" else f' text-anchor="{anchor}"'
        kind = f' class="{style}"' if style else ""
        hover = f"<title>{_escape(tip)}</title>" if tip else ""
        place_ = f'x="{_px(place[0])}" y="{_px(place[1])}"'
        self._parts.append(f"<text{kind} {place_}{end}>{hover}{_escape(text)}</text>")

    def _mark(self, name: str, place: str, style: str, tip: str) -> None:
        inner = f"><title>{_escape(tip)}</title></{name}>" if tip else "/>"
        self._parts.append(f'<{name} class="{style}" {place}{inner}')

    def x_axis(
        self, scale: Scale, top: float, bottom: float, label: str, count: int, factor: float = 1.0
    ) -> None:
        """Draw grid lines from `top` to `bottom`, ticks times `factor` and the axis' label below."""
        ticks = scale.ticks(count)
        for tick, text in zip(ticks, tick_texts([tick * factor for tick in ticks]), strict=True):
            x = scale(tick)
            self.line((x, top), (x, bottom), "grid")
            self.text((x, bottom + 16), text, "tick", "middle")
        self.text(((scale.start + scale.stop) / 2, bottom + 34), label, "axis", "middle")

    def y_axis(self, scale: Scale, left: float, right: float, label: str, factor: float = 1.0) -> None:
        """Draw grid lines from `left` to `right`, ticks times `factor` before them and the label above."""
        ticks = scale.ticks()
        for tick, text in zip(ticks, tick_texts([tick * factor for tick in ticks]), strict=True):
            y = scale(tick)
            self.line((left, y), (right, y), "grid")
            self.text((left - 7, y + 4), text, "tick", "end")
        self.text((0, scale.stop - 12), label, "axis")

    def render(self) -> str:
        """Return the svg element."""
        box = f'viewBox="0 0 {_px(self.width)} {_px(self.height)}"'
        title = f"<title>{_escape(self._title)}</title>"
        return f'<svg {box} role="img">{title}{"".join(self._parts)}</svg>'


def _px(value: float) -> str:
    """Return a coordinate to a tenth of a pixel.

    Raises:
        ValueError: if it is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(f"a coordinate is {value}, expected a finite number")
    text = f"{value:.1f}"
    text = text[:-2] if text.endswith(".0") else text
    return "0" if text == "-0" else text


def _escape(text: str) -> str:
    """Return a text as XML writes it, without control characters and marks that turn text around."""
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))
