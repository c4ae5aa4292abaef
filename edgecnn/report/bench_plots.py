"""The sections of a bench page that are mostly plots, and the names and colours of its runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from edgecnn.report.bench_results import BenchReport, BenchRun
from edgecnn.report.numbers import interval_ms_text, ms_text, percent_text, time_axis
from edgecnn.report.page import Block, Figure, Note, Section, Table, table
from edgecnn.report.plots import MAX_DOTS, Bar, Dot, Samples, bars, distributions, scatter, sweep
from edgecnn.report.timeline import Moment, timeline
from edgecnn.runner.sensors import NOT_THROTTLED, Sample, throttling

NUM_COLOURS = 8
MAX_OPERATORS = 15


class Naming:
    """Names and colours of a report's runs: one colour per file, grey for the baseline.

    Attributes:
        baseline: the file that the others are compared with, or None.
    """

    def __init__(self, report: BenchReport) -> None:
        self._many_threads = len({run.threads for run in report.runs}) > 1
        self._emulated = report.emulated
        bases = {run.key: self.file(run) for run in report.runs}
        first = report.comparisons[0].baseline if report.comparisons else None
        self.baseline = None if first is None else bases.get(first, first)
        others = [name for name in dict.fromkeys(bases.values()) if name != self.baseline]
        self._series = {name: 1 + index % (NUM_COLOURS - 1) for index, name in enumerate(others)}

    def file(self, run: BenchRun) -> str:
        """Return the key of a run's file: its own without the threads."""
        return run.key.removesuffix(f"@{run.threads}")

    def label(self, run: BenchRun) -> str:
        """Return a run's name, with its threads where they vary."""
        if not self._many_threads:
            return self.file(run)
        return f"{self.file(run)}, {run.threads} thread{'s' if run.threads > 1 else ''}"

    def series(self, run: BenchRun) -> int:
        """Return the number of a run's colour."""
        return self.series_of(self.file(run))

    def series_of(self, file: str) -> int:
        """Return the number of a file's colour."""
        return self._series.get(file, 0)

    def interval(self, run: BenchRun) -> str:
        """Return the interval of a run's median in words."""
        return f"95 % interval {interval_ms_text(run.median_interval_ms)}"


def latency_section(runs: Sequence[BenchRun], naming: Naming) -> Section:
    """Return distributions, the sweep over threads and the table of percentiles."""
    rows = [_samples(run, naming) for run in runs if run.samples_ns]
    blocks: list[Block] = []
    if rows:
        caption = (
            "Histogram; box: quartiles, its dark part the 95 % interval of the median; line: 5th to 95th "
            "percentile; dots: outliers, above p75 + 3 IQR. Those beyond the axis are counted, never removed."
        )
        blocks.append(Figure(partial(distributions, rows), caption=caption, is_wide=True))
    blocks += _sweep_figures(runs, naming)
    blocks.append(_latency_table(runs, naming) if runs else Note("Latency was not measured."))
    return Section("Latency", tuple(blocks))


def _samples(run: BenchRun, naming: Naming) -> Samples:
    interval = None
    if run.median_interval_ms is not None:
        interval = (run.median_interval_ms[0], run.median_interval_ms[1])
    values = run.samples_ns.array / 1e6
    times = [float(moment["t_s"]) for moment in run.trace if moment.get("t_s") is not None]
    span = max(times) - min(times) if times else None
    spread = run.samples_ns.distribution.scaled(1e-6)
    return Samples(naming.label(run), naming.series(run), values, interval, span, spread)


def _sweep_figures(runs: Sequence[BenchRun], naming: Naming) -> Iterable[Figure]:
    """Return the sweep over threads, if there was one."""
    lines: dict[str, list[Dot]] = {}
    for run in sorted(runs, key=lambda run: run.threads):
        if run.median_ms is not None:
            low, high = run.median_interval_ms or (None, None)
            dot = Dot(naming.file(run), naming.series(run), run.threads, run.median_ms, low, high)
            lines.setdefault(naming.file(run), []).append(dot)
    if len({dot.x for line in lines.values() for dot in line}) > 1:
        figures = list(lines.values())
        yield Figure(partial(sweep, figures), "Threads", is_wide=True)


def _latency_table(runs: Sequence[BenchRun], naming: Naming) -> Table:
    rows = []
    for run in runs:
        few = "too few runs"
        rare = [few if value is None else ms_text(value) for value in (run.p90_ms, run.p99_ms)]
        figures = (ms_text(run.min_ms), ms_text(run.iqr_ms), *rare)
        counts = f"{len(run.samples_ns):,} in {len(run.block_lengths)}"
        rows.append(
            (
                naming.label(run),
                ms_text(run.median_ms),
                interval_ms_text(run.median_interval_ms),
                *figures,
                counts,
            )
        )
    columns = ("file", "median", "95 % interval", "min", "IQR", "p90", "p99", "runs in blocks")
    found = table(columns, rows)
    caption = "p90 needs 64 runs and p99 662; no run is ever removed."
    return Table(found.columns, found.rows, caption=caption)


def run_section(runs: Sequence[BenchRun], naming: Naming) -> Section:
    """Return every latency over the time of the run, with temperature, clock and throttling."""
    timed = [run for run in runs if len(run.samples_ns) > 1]
    if not timed:
        return Section("Over the run", (Note("Latency was not measured."),))
    rows = [_samples(run, naming) for run in timed]
    traces = [_trace(run) for run in timed]
    moments = [moment for trace in traces for moment in trace]
    num = max(len(row.values_ms) for row in rows)
    caption = (
        "Each file's clock counts only its own processes. A triangle at the top is a run beyond the axis."
    )
    if num > MAX_DOTS:
        size = -(-num // (MAX_DOTS // 2))
        caption += f" Of long runs each group of up to {size} is shown by its median and its slowest."
    throttled = [
        row.label for row, trace in zip(rows, traces, strict=True) if any(m.throttled for m in trace)
    ]
    if throttled:
        caption += f" Red: the board throttled while it ran {', '.join(throttled)}."
    if not any(moment.temperature_c is not None for moment in moments):
        caption += " Temperature was not measured."
    plot = Figure(partial(timeline, rows, traces), caption=caption, is_wide=True)
    return Section("Over the run", (plot,))


def _trace(run: BenchRun) -> list[Moment]:
    """Return what the board said during a run, from its start."""
    known = [moment for moment in run.trace if moment.get("t_s") is not None]
    found: list[Moment] = []
    bits = _since_boot(next((m["throttled"] for m in known if m.get("throttled")), NOT_THROTTLED))
    for moment in known:
        word = moment.get("throttled")
        what = throttling([Sample(0, None, None, bits), Sample(0, None, None, word)]) if word else []
        bits = _since_boot(word) if word else bits
        seconds = float(moment["t_s"]) - float(known[0]["t_s"])
        found.append(
            Moment(seconds, moment.get("temperature_c"), moment.get("frequency_mhz"), ", ".join(what) or None)
        )
    return found


def _since_boot(word: str) -> str:
    """Return throttle flags with only what has been since boot, so that the next ones tell what is new.

    Example:
        >>> _since_boot("0x50005"), _since_boot("cooling cpu=2")
        ('0x50000', '0x0')
    """
    try:
        return hex(int(word, 16) & 0xF0000)
    except ValueError:
        return NOT_THROTTLED


def pareto_figures(report: BenchReport, naming: Naming) -> Iterable[Figure]:
    """Return top-1 against latency and against size, where at least two files have both."""
    runs = {naming.file(run): run for run in reversed(report.runs)}
    known = [
        (e.key, 100 * e.top1, runs[e.key]) for e in report.accuracy if e.top1 is not None and e.key in runs
    ]
    factor, unit = time_axis(max((run.median_ms or 0.0 for _, _, run in known), default=0.0))
    by_latency = [
        Dot(key, naming.series_of(key), factor * run.median_ms, top1)
        for key, top1, run in known
        if run.median_ms is not None
    ]
    by_size = [Dot(key, naming.series_of(key), run.size_bytes / 1e6, top1) for key, top1, run in known]
    if len(by_latency) > 1 and not report.emulated:
        yield Figure(
            partial(scatter, by_latency, f"median latency, {unit}", "top-1, %"), "Accuracy against latency"
        )
    if len(by_size) > 1:
        yield Figure(partial(scatter, by_size, "size, MB", "top-1, %"), "Accuracy against size")


def operator_section(runs: Sequence[BenchRun], naming: Naming) -> Section:
    """Return where the time goes, operator by operator, of each file at its first number of threads."""
    blocks: list[Block] = []
    for run in {naming.file(run): run for run in reversed(runs) if run.profile}.values():
        entries = sorted(run.profile or (), key=lambda entry: -(entry.get("share") or 0.0))
        shown = entries[:MAX_OPERATORS]
        rows = []
        for entry in shown:
            share = entry.get("share") or 0.0
            mean = ms_text((entry.get("total_ms") or 0.0) / max(entry.get("count") or 1, 1))
            name = str(entry.get("name") or "")
            kind = str(entry.get("op") or "unknown")
            label = f"{kind}  {name}" if name and name != kind else kind
            text = f"{mean} · {percent_text(share, 1)}"
            rows.append(Bar(label, naming.series(run), share, text, f"{label}: {text}"))
        rest = entries[MAX_OPERATORS:]
        caption = "Mean time of a call and share of all operators; the profiler slows them down."
        if rest:
            left = sum(entry.get("share") or 0.0 for entry in rest)
            caption += f" {len(rest)} more operators take {percent_text(left, 1)}."
        plot = partial(bars, rows, f"Share of time by operator, {naming.label(run)}")
        blocks.append(Figure(plot, naming.label(run), caption))
    blocks.reverse()
    return Section("Operators", tuple(blocks) or (Note("No profile was taken, or the runtime has none."),))
