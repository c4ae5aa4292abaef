"""The page of a bench run: what one device said, and how far its word can be relied on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from edgecnn.report.bench_plots import Naming, latency_section, operator_section, pareto_figures, run_section
from edgecnn.report.bench_results import EMULATED, BenchReport, BenchRun, Comparison
from edgecnn.report.numbers import (
    NOT_MEASURED,
    bytes_text,
    ms_text,
    percent_text,
    points_text,
    range_text,
    ratio_text,
)
from edgecnn.report.page import (
    PARETO_TEXT,
    Block,
    Cell,
    Figure,
    Note,
    Part,
    Section,
    Tile,
    TileRow,
    cost_row,
    environment_tables,
    size_row,
    speed_row,
    table,
    without_empty,
)
from edgecnn.report.plots import Bar, Ratio, bars, forest

MAX_ROWS = 3
"""Figures of one tile; the others are further down the page."""


def bench_part(report: BenchReport) -> Part:
    """Return the part of the page that one device fills."""
    naming = Naming(report)
    whole = [run for run in report.runs if run.median_ms is not None]
    sections = [
        latency_section(whole, naming),
        _comparison_section(report, naming),
        run_section(whole, naming),
        _accuracy_section(report, naming),
        _phases_section(whole, naming),
        _resources_section(report, naming),
        operator_section(whole, naming),
        _files_section(report, naming),
        Section("Environment", environment_tables(report.environment)),
    ]
    tiles = (
        Tile("Smaller" if report.comparisons else "Size", _few(_size_rows(report, naming))),
        Tile("Faster" if report.comparisons else "Latency", _few(_speed_rows(report, naming))),
        Tile("Cost", _few(_cost_rows(report, naming))),
        Tile("Trust", _few(_trust_rows(report))),
    )
    # the banner says that it is emulated, and what a run says of itself is said below under its label
    said = {EMULATED, *(f"{run.key}: {text}" for run in report.runs for text in (*run.taints, run.error))}
    warnings = [text for text in report.warnings if text not in said]
    warnings += [f"{naming.label(run)}: {run.error}" for run in report.runs if run.error]
    warnings += [f"{naming.label(run)}: {taint}" for run in report.runs for taint in run.taints]
    return Part(
        kicker="edgecnn bench",
        heading=report.device,
        facts=_facts(report),
        tiles=tiles,
        sections=without_empty(sections),
        warnings=tuple(dict.fromkeys(warnings)),
        banner=EMULATED[:1].upper() + EMULATED[1:] if report.emulated else "",
    )


def devices_part(reports: Sequence[BenchReport]) -> Part:
    """Return the part that sets several devices side by side: the median of each file on each."""
    medians: dict[str, dict[int, BenchRun]] = {}
    for index, report in enumerate(reports):
        naming = Naming(report)
        for run in report.runs:
            medians.setdefault(naming.label(run), {})[index] = run
    rows = [
        (label, *(_median(reports[i], runs.get(i)) for i in range(len(reports))))
        for label, runs in medians.items()
    ]
    section = Section("Median latency", (table(("file", *(report.device for report in reports)), rows),))
    return Part("edgecnn bench", f"{len(reports)} devices", (), (), (section,))


def _median(report: BenchReport, run: BenchRun | None) -> Cell | str:
    """Return a median as a table shows it; of an emulated board none."""
    if run is None:
        return NOT_MEASURED
    if run.error is not None:
        return Cell("broke", "bad", tip=run.error)
    if report.emulated:
        return Cell("emulated", "warn", tip=EMULATED)
    return Cell(ms_text(run.median_ms), "warn" if run.taints else "", tip="; ".join(run.taints))


def _facts(report: BenchReport) -> tuple[str, ...]:
    """Return board, CPU, runtimes and how it was measured, as far as they are known."""
    found = [report.environment.get(key) for key in ("board", "cpu", "isa")]
    found += [f"{run.runtime} {run.runtime_version}".strip() for run in report.runs if run.runtime]
    threads = sorted({run.threads for run in report.runs})
    if threads:
        counts = ", ".join(map(str, threads))
        found.append(f"{counts} thread{'s' if threads != [1] else ''}")
    found += ["batch 1", f"data {report.data}" if report.data else None]
    return tuple(dict.fromkeys(str(fact) for fact in found if fact))


def _few(rows: Iterable[TileRow]) -> tuple[TileRow, ...]:
    found = tuple(rows)
    if len(found) <= MAX_ROWS:
        return found or (TileRow(NOT_MEASURED, tone="unknown"),)
    more = TileRow(f"{len(found) - MAX_ROWS + 1} more", detail="further down the page", tone="unknown")
    return (*found[: MAX_ROWS - 1], more)


def _first_comparisons(report: BenchReport) -> list[tuple[Comparison, BenchRun, BenchRun]]:
    """Return the comparisons at the first number of threads, with their runs."""
    runs = {run.key: run for run in report.runs}
    found = [
        (c, runs[c.baseline], runs[c.candidate])
        for c in report.comparisons
        if c.baseline in runs and c.candidate in runs
    ]
    return [entry for entry in found if entry[1].threads == found[0][1].threads]


def _size_rows(report: BenchReport, naming: Naming) -> Iterable[TileRow]:
    for _, baseline, candidate in _first_comparisons(report):
        yield size_row(baseline.size_bytes, candidate.size_bytes, naming.file(candidate))
    if not report.comparisons:
        for run in {naming.file(run): run for run in report.runs}.values():
            yield TileRow(bytes_text(run.size_bytes), naming.file(run))


def _speed_rows(report: BenchReport, naming: Naming) -> Iterable[TileRow]:
    if report.emulated:
        yield TileRow(NOT_MEASURED, detail="an emulated board says nothing about speed", tone="unknown")
        return
    for comparison, baseline, candidate in _first_comparisons(report):
        detail = f"{ms_text(baseline.median_ms)} → {ms_text(candidate.median_ms)}"
        interval = (comparison.low, comparison.high)
        yield speed_row(comparison.speedup, interval, comparison.verdict, naming.file(candidate), detail)
    if not report.comparisons:
        for run in report.runs:
            if run.error is not None:
                yield TileRow("broke", naming.label(run), run.error, "bad")
            else:
                yield TileRow(ms_text(run.median_ms), naming.label(run), naming.interval(run))


def _cost_rows(report: BenchReport, naming: Naming) -> Iterable[TileRow]:
    baseline = naming.baseline
    top1 = {entry.key: entry.top1 for entry in report.accuracy}
    before = top1.get(baseline) if baseline is not None else None
    for entry in report.accuracy:
        if entry.top1 is None:
            yield TileRow(percent_text(entry.agreement_with_host), entry.key, "same top-1 as on the host")
        elif before is not None and entry.key != baseline:
            yield cost_row(before, entry.top1, entry.key)
        elif before is None:
            yield TileRow(percent_text(entry.top1), entry.key, f"top-1 of {entry.num_samples} images")
    if not report.accuracy:
        yield TileRow(NOT_MEASURED, detail="no data was given", tone="unknown")


def _trust_rows(report: BenchReport) -> Iterable[TileRow]:
    broken = sum(1 for run in report.runs if run.error)
    tainted = sum(1 for run in report.runs if run.taints)
    if report.emulated:
        yield TileRow("emulated", detail="its times say nothing about speed", tone="warn")
    if broken:
        yield TileRow(
            f"{broken} of {len(report.runs)}",
            detail="no number is given for them",
            tone="bad",
            unit="runs broke",
        )
    if tainted:
        yield TileRow(
            f"{tainted} of {len(report.runs)}",
            detail="the warnings say why",
            tone="warn",
            unit="runs tainted",
        )
    if report.runs and not broken and not tainted and not report.emulated:
        detail = "nothing throttled, drifted or shared the CPU"
        yield TileRow("clean", detail=detail, tone="good")
    different = sum(1 for entry in report.accuracy if not entry.holds)
    if different:
        yield TileRow(
            f"{different} of {len(report.accuracy)}", "", "not the host's outputs", "bad", "files differ"
        )
    elif report.accuracy:
        yield TileRow("same outputs", detail="as on the host, within the contract", tone="good")


def _comparison_section(report: BenchReport, naming: Naming) -> Section:
    """Return ratios around 1; of an emulated board none, since they would be read as speed."""
    title = "Comparison"
    if report.emulated:
        return Section(title, (Note(f"No ratio is shown ({EMULATED})."),))
    runs = {run.key: run for run in report.runs}
    found = [c for c in report.comparisons if c.baseline in runs and c.candidate in runs]
    if not found:
        return Section(title, (Note("Nothing was compared: give a second file, or --baseline."),))
    ratios = [
        Ratio(
            naming.label(runs[c.candidate]),
            naming.series(runs[c.candidate]),
            c.speedup,
            c.low,
            c.high,
            c.verdict,
        )
        for c in found
    ]
    rows = []
    for c in found:
        tone = {"faster": "good", "slower": "bad"}.get(c.verdict, "warn")
        interval = NOT_MEASURED if c.low is None or c.high is None else range_text(c.low, c.high, 4)
        names = (naming.label(runs[c.candidate]), naming.label(runs[c.baseline]))
        rows.append((*names, Cell(c.verdict, tone), ratio_text(c.speedup), interval, str(c.num_pairs)))
    columns = ("file", "against", "verdict", "speed-up", "95 % interval", "pairs")
    lead = (
        "Timed in turns (ABBA), each block in a process of its own. An interval with 1 in it: no difference."
    )
    caption = "The line is the 95 % interval of the ratio; a hollow dot decided nothing."
    plot = Figure(partial(forest, ratios), caption=caption, is_wide=True)
    return Section(title, (plot, table(columns, rows, num_texts=3)), lead)


def _accuracy_section(report: BenchReport, naming: Naming) -> Section:
    if not report.accuracy:
        return Section("Accuracy on the device", (Note("No labelled images were given (--data)."),))
    blocks: list[Block] = list(pareto_figures(report, naming))
    before = next((entry.top1 for entry in report.accuracy if entry.key == naming.baseline), None)
    rows = []
    for entry in report.accuracy:
        change = None if entry.top1 is None or before is None else 100 * (entry.top1 - before)
        rows.append(
            (
                entry.key,
                percent_text(entry.top1),
                "–" if entry.key == naming.baseline else points_text(change),
                percent_text(entry.top5),
                percent_text(entry.agreement_with_host),
                "–" if entry.max_lsb is None else f"{entry.max_lsb} LSB",
                NOT_MEASURED if entry.cosine is None else f"{entry.cosine:.6f}",
                Cell("holds", "good") if entry.holds else Cell("differs", "bad", tip=entry.note),
            )
        )
    columns = ("file", "top-1", "change", "top-5", "same top-1 as host", "differs by", "cosine", "contract")
    blocks.append(table(columns, rows))
    blocks += [Note(f"{entry.key}: {entry.note}") for entry in report.accuracy if entry.note]
    lead = f"{report.accuracy[0].num_samples} images, on the device, with the files' own preprocessing."
    return Section(
        "Accuracy on the device", tuple(blocks), f"{lead} {PARETO_TEXT}" if len(blocks) > 1 else lead
    )


def _phases_section(runs: list[BenchRun], naming: Naming) -> Section:
    keys = ("import_ms", "load_ms", "first_ms", "warmup_ms")
    rows = [
        (naming.label(run), *(ms_text((run.phases or {}).get(key)) for key in keys), ms_text(run.median_ms))
        for run in runs
    ]
    columns = ("file", "import", "load", "first inference", "warm-up", "steady median")
    lead = "A cold start is import, load and first inference together; the plots show the steady state."
    return Section("Phases", (table(columns, rows) if rows else Note(NOT_MEASURED),), lead)


def _resources_section(report: BenchReport, naming: Naming) -> Section:
    files = {naming.file(run): run for run in reversed(report.runs)}
    sizes = [
        Bar(name, naming.series(run), run.size_bytes, bytes_text(run.size_bytes))
        for name, run in reversed(files.items())
    ]
    memory = [
        Bar(naming.label(run), naming.series(run), run.peak_rss_bytes, bytes_text(run.peak_rss_bytes))
        for run in report.runs
        if run.peak_rss_bytes is not None
    ]
    blocks: list[Block] = [Figure(partial(bars, sizes, "Sizes of the files"), "File size")] if sizes else []
    if memory:
        caption = "Largest resident memory of a fresh process, less what its imports took."
        blocks.append(Figure(partial(bars, memory, "Peak memory"), "Peak memory", caption))
    else:
        blocks.append(Note("Peak memory was not measured."))
    device = [
        Bar(
            naming.label(run),
            naming.series(run),
            run.device_memory_bytes,
            bytes_text(run.device_memory_bytes),
        )
        for run in report.runs
        if run.device_memory_bytes is not None
    ]
    if device:
        blocks.append(Figure(partial(bars, device, "Peak memory of the GPU"), "Peak memory of the GPU"))
    return Section("Size and memory", tuple(blocks))


def _files_section(report: BenchReport, naming: Naming) -> Section:
    rows = []
    for run in report.runs:
        delegate = run.delegate or {}
        covered = delegate.get("delegated_ops"), delegate.get("total_ops"), delegate.get("partitions")
        rows.append(
            (
                naming.label(run),
                run.path,
                Cell(run.sha256[:12], mono=True, tip=run.sha256),
                f"{run.runtime} {run.runtime_version}".strip() or "not known",
                str(run.threads),
                "–" if None in covered else f"{covered[0]} of {covered[1]} in {covered[2]}",
            )
        )
    columns = ("file", "path", "sha256", "runtime", "threads", "delegated operators")
    return Section("Files", (table(columns, rows, num_texts=4),))
