"""Groups of channels as a table on the terminal, and as a drawing of what ties layers together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgecnn.report.numbers import count_text, percent_text
from edgecnn.report.svg import Canvas, shorten, text_width

ROW, COLUMN = 18.0, 16.0
"""px of a layer's row and of a group's column."""

STYLE = """
svg { background: #fff; font-family: system-ui, sans-serif; }
text { font-size: 12px; fill: #1a1d21; } .tick { fill: #6b7280; } .grid { stroke: #e9ecef; }
.s0 { --c: #4b5563; } .s1 { --c: #2563eb; } .s2 { --c: #c2410c; } .s3 { --c: #0f766e; }
.s4 { --c: #7c3aed; } .s5 { --c: #b45309; } .s6 { --c: #be185d; } .s7 { --c: #4d7c0f; }
.open { --c: #9ca3af; } path { fill: none; } .line { stroke: var(--c); stroke-width: 2; }
.line.open { stroke-dasharray: 2 3; } .mark { fill: var(--c); stroke: #fff; stroke-width: 1; }
.ring { fill: #fff; stroke: var(--c); stroke-width: 2; }
"""
"""Of a drawing that stands alone; those on a report's page have the page's."""

MAKES, READS = "out", "in"


def print_groups(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `edgecnn.prunability` found out; `console` is stdout by default."""
    console = console or Console()
    title = Text(str(found["name"]), style="bold")
    title.append(
        f"  {count_text(found['params'])} params, {count_text(found['macs'])} MACs", style="not bold"
    )
    console.print(title)
    share = percent_text(found["prunable_fraction"], 1)
    console.print(f"{share} of the parameters are in channels that can be cut", highlight=False)
    for reason, params in sorted(found["frozen_reasons"].items(), key=lambda item: -item[1]):
        console.print(f"  {count_text(params)} parameters are not: {reason}", markup=False, highlight=False)
    sensitivity = found.get("sensitivity")
    if sensitivity:
        console.print(_explained(sensitivity), highlight=False)
    console.print(_table(found, sensitivity))
    for text in found.get("warnings", ()):
        console.print(Text(f"warning   {text}"))


def _explained(sensitivity: Mapping[str, Any]) -> str:
    """Say what the last columns are."""
    num, source = sensitivity["num_samples"], sensitivity["source"]
    how = f"{sensitivity['importance']} decides what goes first"
    if sensitivity["top1"] is not None:
        whole = percent_text(sensitivity["top1"], 1)
        return f"top-1 on {num} images of {source} with a part of one group silent ({how}); whole: {whole}"
    return f"agreement with the whole network on {num} images of {source}, a part of one group silent ({how})"


def _table(found: Mapping[str, Any], sensitivity: Mapping[str, Any] | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("group", overflow="fold")
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    shares = sensitivity["groups"][0]["shares"] if sensitivity and sensitivity["groups"] else []
    for share in shares:
        table.add_column(f"-{100 * share:.0f} %", justify="right", no_wrap=True)
    if not shares:
        table.add_column("made by -> read by", overflow="fold")
    measured = {entry["name"]: entry for entry in (sensitivity or {}).get("groups", [])}
    for group in found["groups"]:
        cells = [_share(group[key], found[key]) for key in ("macs", "params")]
        row = [str(group["name"]), str(group["channels"]), *cells]
        if shares:
            row += _figures(measured.get(group["name"]), len(shares))
        else:
            row.append(f"frozen: {group['frozen']}" if group["frozen"] else _members(group["members"]))
        table.add_row(*map(Text, row), style="dim" if group["frozen"] else None)
    return table


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _figures(entry: Mapping[str, Any] | None, count: int) -> list[str]:
    """Return the best figure there is for each share: accuracy, else agreement, else SQNR."""
    if entry is None:
        return ["-"] * count
    for key in ("top1", "agreement"):
        if all(value is not None for value in entry[key]):
            return [f"{100 * value:.1f} %" for value in entry[key]]
    return ["-" if value is None else f"{value:.1f} dB" for value in entry["sqnr_db"]]


def _members(members: Sequence[Mapping[str, Any]]) -> str:
    """Return which layers make a group's channels and which read them, the first few of each."""
    texts = []
    for role in (MAKES, READS):
        layers = list(dict.fromkeys(str(m["layer"]) for m in members if m["role"] == role))
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        texts.append(", ".join(layers[:3]) + more)
    return " -> ".join(text or "nothing" for text in texts)


def draw_groups(found: Mapping[str, Any]) -> str:
    """Return an SVG file: a row for each layer, and for each group a line through the layers it ties.

    A full dot makes the group's channels, a ring reads them; a group that cannot be cut is dashed and grey.
    Groups that share no row stand above each other.

    Args:
        found: of `edgecnn.prunability.inspect_groups`.
    """
    layers = list(dict.fromkeys(found["layers"]))
    rows = {layer: index for index, layer in enumerate(layers)}
    spans = []
    for group in found["groups"]:
        marks = sorted({(rows[m["layer"]], m["role"]) for m in group["members"] if m["layer"] in rows})
        if marks:
            spans.append((marks[0][0], marks[-1][0], group, marks))
    spans.sort(key=lambda span: (span[0], span[1]))
    columns: list[int] = []
    placed = []
    for first, last, group, marks in spans:
        column = next((i for i, end in enumerate(columns) if end < first), len(columns))
        columns[column : column + 1] = [last]
        placed.append((column, group, marks))
    left = min(max((text_width(layer) for layer in layers), default=0) + 16, 320.0)
    top = 46.0
    canvas = Canvas(
        max(left + COLUMN * (len(columns) + 1) + 10, 560.0),
        top + ROW * len(layers) + 8,
        f"Groups of channels of {found['name']}",
    )
    canvas.text((0, 14), f"{found['name']}: layers from top to bottom, one line for each group of channels")
    canvas.text((0, 32), "dot: makes the channels; ring: reads them; dashed: cannot be cut", "tick")
    for layer, row in rows.items():
        y = top + ROW * row + ROW / 2
        canvas.line((left - 6, y), (canvas.width, y), "grid")
        canvas.text((left - 12, y + 4), shorten(layer, left - 14), anchor="end", tip=layer)
    for index, (column, group, marks) in enumerate(placed):
        _draw_group(canvas, (left + COLUMN * (column + 0.5), top), group, marks, index)
    drawing = canvas.render()
    size = f'width="{canvas.width:.0f}" height="{canvas.height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
    return drawing.replace("<svg ", head, 1).replace("</title>", f"</title><style>{STYLE}</style>", 1) + "\n"


def _draw_group(
    canvas: Canvas,
    place: tuple[float, float],
    group: Mapping[str, Any],
    marks: Sequence[tuple[int, str]],
    index: int,
) -> None:
    """Draw one group's line and marks; `place` is its column and the first row's upper edge."""
    x, top = place
    style = "open" if group["frozen"] else f"s{1 + index % 7}"
    ys = {row: top + ROW * row + ROW / 2 for row, _ in marks}
    canvas.line((x, min(ys.values())), (x, max(ys.values())), f"line {style}")
    why = f", frozen: {group['frozen']}" if group["frozen"] else ""
    tip = f"{group['name']}: {group['channels']} channels{why}"
    for row, y in ys.items():
        makes = any(role != READS for other, role in marks if other == row)
        reads = any(role == READS for other, role in marks if other == row)
        if makes:
            canvas.circle((x, y), 5, f"mark {style}", tip)
        elif reads:
            canvas.circle((x, y), 4, f"ring {style}", tip)
