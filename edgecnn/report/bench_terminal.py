"""The bench report as tables on the terminal: how fast, by how much faster, how accurate, what to mind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecnn.report.bench_results import (
    EMULATED,
    BenchReport,
    BenchRun,
    BoardAccuracy,
    Comparison,
)
from edgecnn.report.numbers import bytes_text, ms_text, percent_text
from edgecnn.report.side_by_side import Row
from edgecnn.report.terminal import warnings_table
from edgecnn.runner.statistics import median

LONG_NS = 30 * 10**9
"""Runs of so much time also say how they changed."""

MAX_OPS = 10
"""Operators of a profile that are shown; the report has all."""


def print_bench(reports: Sequence[BenchReport], console: Console | None = None) -> None:
    """Print reports one after the other; `console` is stdout by default."""
    console = console or Console()
    for report in reports:
        console.print(render_bench(report))


def render_bench(report: BenchReport) -> RenderableType:
    """Return a report for a rich console; readable at 80 columns and without colour."""
    parts: list[RenderableType] = [Text(), _title(report), Text(), _runs(report.runs)]
    if any(run.taints for run in report.runs):
        parts.append(Text("* not to be relied on, see the warnings", style="dim"))
    if report.comparisons:
        parts += [Text(), _comparisons(report.comparisons, report.emulated)]
    if report.accuracy:
        parts += [Text(), _accuracy(report.accuracy, report.data)]
    long = [run for run in report.runs if run.samples_ns.total_ns >= LONG_NS]
    if long:
        parts += [Text(), _over_time(long)]
    for run in report.runs:
        if run.profile:
            parts += [Text(), _profile(run)]
    warnings = [text for text in report.warnings if text != EMULATED]
    if warnings:
        parts += [Text(), warnings_table(*warnings)]
    return Group(*parts)


def comparison_text(comparison: Comparison) -> str:
    """Return a comparison in words.

    Example:
        >>> comparison_text(Comparison("a", "b", 0.5, 0.4, 0.8, "slower"))
        '2.00x SLOWER (1.25 to 2.50)'
        >>> comparison_text(Comparison("a", "b", 1.01, 0.9, 1.1, "no difference"))
        'no difference (0.900 to 1.100)'
    """
    speedup, low, high = comparison.speedup, comparison.low, comparison.high
    word = f"{speedup:.2f}x"
    if comparison.verdict == "faster":
        word = f"{speedup:.2f}x faster"
    elif comparison.verdict == "slower":
        word = f"{1 / speedup:.2f}x SLOWER"
        low, high = (1 / high, 1 / low) if low and high else (None, None)
    elif comparison.verdict == "no difference":
        word = "no difference"
    else:
        word = f"{speedup:.2f}x, undecided"
    if low is None or high is None:
        return word
    decimals = 3 if abs(speedup - 1) < 0.1 else 2
    return f"{word} ({low:.{decimals}f} to {high:.{decimals}f})"


def _or_dash(value: float | None, text: Callable[[float | None], str]) -> str:
    """Return a figure as text, and in a table "-" where there is none."""
    return "-" if value is None else text(value)


def _grid(widths: Sequence[tuple[str, bool]]) -> Table:
    """Return a table without lines; each column is (header, is a number)."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for header, is_number in widths:
        table.add_column(header, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return table


def _title(report: BenchReport) -> Text:
    """Return what measured, and with what."""
    found: dict[str, Any] = report.environment
    text = Text(report.device, style="bold")
    machine = [found.get("board") or found.get("cpu"), found.get("isa"), _cores(found.get("num_cores"))]
    text.append("  " + ", ".join(str(part) for part in machine if part), style="not bold")
    software = [f"{name} {version}" for name, version in found.get("runtimes", {}).items()]
    software += [f"{word} {found[key]}" for key, word in (("python", "Python"),) if found.get(key)]
    software += [f"governor {found['governor']}"] if found.get("governor") else []
    software += [_degrees(found["temperature_c"])] if found.get("temperature_c") is not None else []
    if software:
        text.append("\n" + ", ".join(software), style="not bold")
    if report.emulated:
        text.append(f"\n{EMULATED}", style="bold yellow")
    return text


def _cores(count: Any) -> str:
    return f"{count} core{'s' if count != 1 else ''}" if count else ""


def _degrees(value: Any) -> str:
    return f"{value:.0f} °C"


def _runs(runs: Sequence[BenchRun]) -> Table:
    """How fast?"""
    table = _grid(
        [
            ("batch 1", False),
            ("threads", True),
            ("median", True),
            ("95 %", True),
            ("p90", True),
            ("load", True),
            ("memory", True),
            ("file", True),
        ]
    )
    for run in runs:
        name = run.key.rpartition("@")[0] or run.key
        if run.error is not None:
            table.add_row(
                name,
                str(run.threads),
                Text("failed", style="bold red"),
                "",
                "",
                "",
                "",
                bytes_text(run.size_bytes),
            )
            continue
        style = "yellow" if run.taints else "bold"
        mark = "*" if run.taints else ""
        load = (run.phases or {}).get("load_ms")
        table.add_row(
            name,
            str(run.threads),
            Text(_or_dash(run.median_ms, ms_text) + mark, style=style),
            _spread(run),
            _or_dash(run.p90_ms, ms_text),
            _or_dash(load, ms_text),
            _or_dash(run.peak_rss_bytes, bytes_text),
            bytes_text(run.size_bytes),
        )
    return table


def _spread(run: BenchRun) -> str:
    """Return the wider half of the median's interval in percent of the median."""
    if run.median_interval_ms is None or not run.median_ms:
        return "-"
    low, high = run.median_interval_ms
    half = 100 * max(high - run.median_ms, run.median_ms - low) / run.median_ms
    return f"±{half:.1f} %" if half < 100 else "> 100 %"


def _comparisons(comparisons: Sequence[Comparison], emulated: bool) -> Table:
    """By how much faster?"""
    table = _grid([("compared, in turns" + (", emulated" if emulated else ""), False), ("", False)])
    styles = {} if emulated else {"faster": "green", "slower": "bold red"}
    for entry in comparisons:
        verdict = Text(comparison_text(entry), style=styles.get(entry.verdict, "yellow"))
        table.add_row(f"{entry.candidate} against {entry.baseline}", verdict)
    return table


def _accuracy(entries: Sequence[BoardAccuracy], data: str | None) -> Table:
    """How accurate, and as here?"""
    table = _grid(
        [
            (f"accuracy on {data}" if data else "accuracy", False),
            ("images", True),
            ("top-1", True),
            ("top-5", True),
            ("as host", True),
            ("apart", True),
        ]
    )
    for entry in entries:
        apart = f"{entry.max_lsb} LSB" if entry.max_lsb is not None else f"{entry.max_difference:.1e}"
        table.add_row(
            entry.key,
            str(entry.num_samples),
            _or_dash(entry.top1, percent_text),
            _or_dash(entry.top5, percent_text),
            _or_dash(entry.agreement_with_host, percent_text),
            Text(apart, style="green" if entry.holds else "yellow"),
        )
    return table


def _over_time(runs: Sequence[BenchRun]) -> Table:
    """Does it stay so?"""
    columns = ("first quarter", "last quarter", "temperature", "frequency")
    table = _grid([("over time", False), *((name, True) for name in columns)])
    for run in runs:
        quarter = max(1, len(run.samples_ns) // 4)
        samples = run.samples_ns.array
        ends = [median(samples[:quarter]) / 1e6, median(samples[-quarter:]) / 1e6]
        ranges = [_range(run, "temperature_c", "°C"), _range(run, "frequency_mhz", "MHz")]
        table.add_row(run.key, *map(ms_text, ends), *ranges)
    return table


def _range(run: BenchRun, key: str, unit: str) -> str:
    """Return the smallest and the largest of a sensor over a run."""
    values = [float(sample[key]) for sample in run.trace if sample.get(key) is not None]
    if not values:
        return "-"
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _profile(run: BenchRun) -> Table:
    """Where does the time go?"""
    rows = sorted(run.profile or (), key=lambda row: -float(row["share"]))
    more = f", {MAX_OPS} of {len(rows)}" if len(rows) > MAX_OPS else ""
    table = _grid([(f"operators of {run.key}{more}", False), ("name", False), ("share", True)])
    for row in rows[:MAX_OPS]:
        table.add_row(str(row["op"]), Text(str(row["name"])[:40]), f"{100 * row['share']:.1f} %")
    return table


def print_rows(
    rows: Sequence[Row], names: tuple[str, str], warnings: Sequence[str], console: Console | None = None
) -> None:
    """Print two reports side by side; `console` is stdout by default.

    Args:
        rows: what `compare_reports` gave.
        names: of the reports.
        warnings: what it gave besides.
        console: where to.
    """
    console = console or Console()
    table = _grid([("", False), ("", False), ("first", True), ("second", True), ("change", True)])
    previous = ""
    for row in rows:
        change = Text(
            row.change, style="yellow" if row.is_worse else "green" if row.change != "same" else "dim"
        )
        title = Text("" if row.figure == previous else row.figure, style="bold")
        table.add_row(title, row.file, row.text(row.first), row.text(row.second), change)
        previous = row.figure
    head = Text(f"first   {names[0]}\nsecond  {names[1]}", overflow="fold")
    parts: list[RenderableType] = [Text(), head, Text(), table]
    if warnings:
        parts += [Text(), warnings_table(*warnings)]
    console.print(Group(*parts))
