"""A report's page as data, and its rendering: one file of HTML that needs no other, nor a network."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from edgecnn.report.numbers import bytes_text, percent_text, points_text, range_text, ratio_text
from edgecnn.report.results import MIN_DIFFERENCE

FULL_WIDTH, HALF_WIDTH, NARROW_WIDTH = 1070.0, 512.0, 370.0
"""px of a plot: on a line of its own, of two on a line, and on a narrow screen."""

TONES = ("", "good", "bad", "warn", "unknown")
"""How a figure is coloured; it also says so in words."""


@dataclass(frozen=True)
class TileRow:
    """One figure of a tile.

    Attributes:
        value: in large.
        label: what it is of, above it.
        detail: what it was made from, below it.
        tone: one of TONES.
        unit: in small after the value.
    """

    value: str
    label: str = ""
    detail: str = ""
    tone: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Tile:
    """One of the questions at the top of the page."""

    title: str
    rows: tuple[TileRow, ...]


@dataclass(frozen=True)
class Figure:
    """A plot, drawn once for wide screens and once for narrow ones, so that its texts keep their size.

    Attributes:
        draw: from a width in px to an svg element.
        title: above the plot.
        caption: below the plot.
        is_wide: whether it takes a line of its own.
    """

    draw: Callable[[float], str]
    title: str = ""
    caption: str = ""
    is_wide: bool = False
    kind: str = "figure"

    @property
    def svg(self) -> str:
        """The plot for wide screens and for paper."""
        return self.draw(FULL_WIDTH if self.is_wide else HALF_WIDTH)

    @property
    def narrow_svg(self) -> str:
        """The plot for narrow screens."""
        return self.draw(NARROW_WIDTH)


@dataclass(frozen=True)
class Cell:
    """A table's cell that is more than a text."""

    text: str
    tone: str = ""
    mono: bool = False
    tip: str = ""


@dataclass(frozen=True)
class Table:
    """Columns and rows; the first `num_texts` columns are texts, the others figures.

    Attributes:
        columns: headings.
        rows: of cells or texts.
        num_texts: columns aligned to the left.
        title: above the table.
        caption: below the table.
        is_half: whether it shares its line with a plot or another table.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell | str, ...], ...]
    num_texts: int = 1
    title: str = ""
    caption: str = ""
    is_half: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Note:
    """A sentence where there is nothing to draw."""

    text: str
    kind: str = "note"


Block = Figure | Table | Note


@dataclass(frozen=True)
class Section:
    """A heading, a sentence about how to read it, and blocks."""

    title: str
    blocks: tuple[Block, ...]
    lead: str = ""


@dataclass(frozen=True)
class Part:
    """One report on the page: a device's, or compress'.

    Attributes:
        kicker: small, above the heading.
        heading: what was measured.
        facts: a few words each, under the heading.
        banner: what nobody may overlook, or "".
        tiles: the verdict at one glance.
        warnings: what the user should know.
        sections: everything else.
    """

    kicker: str
    heading: str
    facts: tuple[str, ...]
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    warnings: tuple[str, ...] = ()
    banner: str = ""


PARETO_TEXT = "Up and to the left is better; a dashed line joins the files that none beats in both."


def size_row(before: int, after: int, label: str) -> TileRow:
    """Return how much smaller a file is; under 1 % it is neither.

    Example:
        >>> row = size_row(2000, 1000, "ONNX")
        >>> row.value, row.unit, row.detail, row.tone
        ('2.00×', 'smaller', '2.00 kB → 1.00 kB', 'good')
        >>> size_row(1000, 2000, "ONNX").unit, size_row(1000, 1001, "ONNX").value
        ('LARGER', 'same size')
    """
    detail = f"{bytes_text(before)} → {bytes_text(after)}"
    ratio = max(before, 1) / max(after, 1)
    if abs(ratio - 1) < MIN_DIFFERENCE:
        return TileRow("same size", label, detail)
    if ratio > 1:
        return TileRow(ratio_text(ratio), label, detail, "good", "smaller")
    return TileRow(ratio_text(1 / ratio), label, detail, "bad", "LARGER")


Interval = tuple[float | None, float | None]


def speed_row(ratio: float, interval: Interval, verdict: str, label: str, detail: str) -> TileRow:
    """Return how much faster a file is; `ratio` is above 1 when it is.

    Example:
        >>> row = speed_row(0.5, (0.4, 0.625), "slower", "ONNX", "1 ms → 2 ms")
        >>> row.value, row.unit, row.tone, row.detail.splitlines()[1]
        ('2.00×', 'SLOWER', 'bad', '95 % interval 1.60–2.50')
        >>> speed_row(1.01, (0.9, 1.1), "no difference", "ONNX", "").value
        'no difference'
    """
    low, high = interval
    if verdict == "slower" and low is not None and high is not None:
        low, high = 1 / high, 1 / low
    detail = f"{detail}\n{interval_text(low, high)}"
    if verdict == "faster":
        return TileRow(ratio_text(ratio), label, detail, "good", "faster")
    if verdict == "slower":
        return TileRow(ratio_text(1 / ratio), label, detail, "bad", "SLOWER")
    return TileRow(verdict, label, detail, "warn")


def cost_row(before: float, after: float, label: str) -> TileRow:
    """Return what a file costs in top-1, both fractions.

    Example:
        >>> row = cost_row(0.9, 0.895, "ONNX")
        >>> row.value, row.unit, row.detail, row.tone
        ('−0.50', 'points', 'top-1 90.00 % → 89.50 %', 'warn')
    """
    points = 100 * (after - before)
    tone = "good" if points > -0.005 else "bad" if points < -1 else "warn"
    detail = f"top-1 {percent_text(before)} → {percent_text(after)}"
    value, _, unit = points_text(points).partition(" points")
    return TileRow(value, label, detail, tone, "points" if value[0] in "+−" else unit)


def interval_text(low: float | None, high: float | None) -> str:
    """Return a confidence interval of 95 % in words.

    Example:
        >>> interval_text(1.708, 1.93), interval_text(None, None)
        ('95 % interval 1.71–1.93', 'too few blocks for an interval')
    """
    if low is None or high is None:
        return "too few blocks for an interval"
    return f"95 % interval {range_text(low, high)}"


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell | str]], num_texts: int = 1) -> Table:
    """Return a plain table."""
    return Table(tuple(columns), tuple(tuple(row) for row in rows), num_texts)


def without_empty(sections: Sequence[Section]) -> tuple[Section, ...]:
    """Return the sections that show something, and one that says what was not measured and why.

    Example:
        >>> found = without_empty([Section("Operators", (Note("No profile was taken."),))])
        >>> found[0].title, found[0].blocks[0].rows
        ('Not measured', (('Operators', 'No profile was taken.'),))
    """
    empty = [s for s in sections if all(isinstance(block, Note) for block in s.blocks)]
    rows = [(s.title, " ".join(block.text for block in s.blocks if isinstance(block, Note))) for s in empty]
    rest = tuple(section for section in sections if section not in empty)
    return (*rest, Section("Not measured", (table(("what", "why"), rows, 2),))) if rows else rest


def environment_tables(environment: Mapping[str, Any]) -> tuple[Table, ...]:
    """Return the machine and its software as names and values, in two tables side by side.

    Example:
        >>> tables = environment_tables({"cpu": {"cores": 4}, "governor": None, "peak_rss_bytes": 2_000_000})
        >>> tables[0].rows, tables[1].rows
        ((('cpu, cores', '4'), ('governor', 'not known')), (('peak rss', '2.00 MB'),))
    """
    rows = _flat("", environment)
    half = -(-len(rows) // 2)
    halves = [part for part in (rows[:half], rows[half:]) if part]
    return tuple(Table(("what", "value"), tuple(part), num_texts=2, is_half=True) for part in halves)


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Return the leaves of nested mappings with their path in words."""
    if isinstance(value, Mapping) and value:
        start = f"{prefix}, " if prefix else ""
        return [row for key, item in value.items() for row in _flat(f"{start}{_words(key)}", item)]
    if prefix.endswith(" bytes") and isinstance(value, (int, float)):
        return [(prefix.removesuffix(" bytes"), bytes_text(value))]
    for ending, unit in (("temperature c", "°C"), (" mhz", "MHz")):
        if prefix.endswith(ending) and isinstance(value, (int, float)):
            return [(prefix[: -1 - len(ending.split()[-1])], f"{value:.4g} {unit}")]
    if value is None or value in ("", [], {}):
        return [(prefix, "not known" if value is None else "none")]
    if isinstance(value, bool):
        return [(prefix, "yes" if value else "no")]
    if isinstance(value, (list, tuple)):
        return [(prefix, ", ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value))]
    return [(prefix, f"{value:.4g}" if isinstance(value, float) else str(value))]


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def render_page(title: str, parts: Sequence[Part], data: Mapping[str, Any], version: str) -> str:
    """Return the page.

    Args:
        title: of the document.
        parts: from top to bottom; the first gives the page its heading.
        data: JSON-ready, embedded for programs to read.
        version: of edgecnn.
    """
    template = _templates().get_template("page.html.j2")
    return template.render(title=title, parts=parts, data=embedded_json(data), version=version)


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgecnn.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["drawing"] = Markup  # plots escape their own texts
    environment.filters["breakable"] = breakable
    return environment


def breakable(text: str) -> Markup:
    r"""Return an escaped text that may be broken after the separators of names, but not in figures.

    Example:
        >>> breakable("a_b<c 1.25 ms")
        Markup('a_<wbr>b&lt;c 1.25\xa0ms')
    """
    text = re.sub(r"(?<=\d) (?=(?:%|ms|µs|s|[kMG]?B|LSB|dB|°C)(?!\w))", "\N{NO-BREAK SPACE}", text)
    parts = re.split(r"(?<=[_/@])(?=\w)|(?<=\.)(?=[A-Za-z])", text)
    return Markup("<wbr>").join(parts)


def embedded_json(data: Mapping[str, Any]) -> Markup:
    r"""Return JSON that can stand in a script element: no text in it can end the element.

    Example:
        >>> print(embedded_json({"name": "</script>&"}))
        {"name":"\u003c/script\u003e\u0026"}
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
