"""Budgets held against reports: one check per budget and figure; a figure that is missing fails.

The board's word counts: where bench reports are given beside that of `compress`, latency is theirs alone, and
speed-up and drop too where a baseline was named. A speed-up is held against the lower end of its interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from edgecnn.report.bench_results import EMULATED, BenchReport, BenchRun
from edgecnn.report.misses import largest_drop
from edgecnn.report.reading import FoundReport
from edgecnn.report.results import Report


@dataclass(frozen=True)
class Budgets:
    """What is asked for; None for nothing.

    Attributes:
        max_drop: percentage points of top-1 against float (or the baseline).
        max_latency_ms: median of each file.
        max_size_mb: of each file, 1 MB = 1,000,000 bytes.
        min_speedup: against float (or the baseline).
    """

    max_drop: float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    min_speedup: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked for."""
        return all(getattr(self, entry.name) is None for entry in fields(self))


@dataclass(frozen=True)
class Check:
    """One budget held against one figure.

    Attributes:
        source: name of the report.
        name: what was checked.
        passed: whether it is within the budget.
        message: figure and budget, or why there is no figure.
    """

    source: str
    name: str
    passed: bool
    message: str

    @property
    def line(self) -> str:
        """The check in one line.

        Example:
            >>> Check("report.json", "onnx size", True, "0.07 MB, at most 0.1 MB").line
            'ok    onnx size: 0.07 MB, at most 0.1 MB (report.json)'
        """
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.name}: {self.message} ({self.source})"


def run_checks(reports: Sequence[FoundReport], budgets: Budgets) -> list[Check]:
    """Hold budgets against reports.

    Args:
        reports: of `compress` and `bench`.
        budgets: at least one is set.

    Returns:
        At least one check for every budget that is set.
    """
    checks: list[Check] = []
    has_bench = any(isinstance(found.report, BenchReport) for found in reports)
    has_compress = any(isinstance(found.report, Report) for found in reports)
    for found in reports:
        report = found.report
        if isinstance(report, Report):
            checks += _compress_checks(found.name, report, budgets, with_latency=not has_bench)
            continue
        checks += _bench_checks(found.name, report, budgets)
        if report.baseline is not None or not has_compress:
            checks += _against_first(found.name, report, budgets)
    speedups = any(check.name.endswith("speed-up") for check in checks)
    if budgets.min_speedup is not None and not speedups and has_compress:
        for found in reports:
            if isinstance(found.report, Report):
                checks += _compress_speedups(found.name, found.report, budgets.min_speedup)
    if budgets.max_drop is not None and not any(check.name.endswith("top-1 drop") for check in checks):
        checks.append(
            _missing(reports[0].name, "top-1 drop", "no report has accuracy of float and of a file")
        )
    if budgets.min_speedup is not None and not any(check.name.endswith("speed-up") for check in checks):
        checks.append(_missing(reports[0].name, "speed-up", "no report compares a file with another"))
    return checks


def _missing(source: str, name: str, why: str) -> Check:
    return Check(source, name, passed=False, message=f"not measured: {why}")


def _at_most(source: str, name: str, value: float, limit: float, unit: str, note: str = "") -> Check:
    message = f"{value:.4g} {unit}, at most {limit:g} {unit}{note}"
    return Check(source, name, passed=value <= limit, message=message)


def _compress_checks(source: str, report: Report, budgets: Budgets, *, with_latency: bool) -> Iterator[Check]:
    """Check what `compress` found."""
    if budgets.max_drop is not None:
        drop = largest_drop(report)
        if drop is None:
            yield _missing(source, "top-1 drop", "the run had no labelled images")
        else:
            note = "" if report.accuracy else " (no labels: as many images as answer otherwise than float)"
            yield _at_most(source, "top-1 drop", round(drop, 9), budgets.max_drop, "points", note)
    for name, artifact in report.artifacts.items():
        if budgets.max_size_mb is not None:
            yield _at_most(source, f"{name} size", artifact.size_bytes / 1e6, budgets.max_size_mb, "MB")
        if with_latency and budgets.max_latency_ms is not None:
            figures = None if report.latency is None else report.latency.of(name)
            if report.environment.get("emulated"):
                yield Check(source, f"{name} latency", passed=False, message=EMULATED)
            elif figures is None:
                yield _missing(source, f"{name} latency", "the run did not time it")
            else:
                yield _at_most(source, f"{name} latency", figures.median_ms, budgets.max_latency_ms, "ms")


def _compress_speedups(source: str, report: Report, limit: float) -> Iterator[Check]:
    for name in report.artifacts:
        speedup = None if report.latency is None else report.latency.speedup.get(name)
        if report.environment.get("emulated"):
            yield Check(source, f"{name} speed-up", passed=False, message=EMULATED)
        elif speedup is None:
            yield _missing(source, f"{name} speed-up", "the run did not time it against float")
        else:
            yield _speedup(source, name, (speedup.ratio, speedup.low, speedup.high), limit)


def _bench_checks(source: str, report: BenchReport, budgets: Budgets) -> Iterator[Check]:
    """Check latency and size; a named baseline is what others are held against, not itself."""
    runs = [run for run in report.runs if report.baseline is None or run.path != _path(report)]
    for run in runs or report.runs:
        if budgets.max_latency_ms is not None:
            yield _bench_latency(source, report, run, budgets.max_latency_ms)
    if budgets.max_size_mb is not None:
        sizes = {run.key.partition("@")[0]: run.size_bytes / 1e6 for run in runs or report.runs}
        for key, size in sizes.items():
            yield _at_most(source, f"{key} size", size, budgets.max_size_mb, "MB")


def _against_first(source: str, report: BenchReport, budgets: Budgets) -> Iterator[Check]:
    """Check what compares a file with the baseline, or with the first where none was named."""
    if budgets.min_speedup is not None:
        yield from _bench_speedups(source, report, budgets.min_speedup)
    if budgets.max_drop is not None and len(report.accuracy) > 1:
        yield from _bench_drops(source, report, budgets.max_drop)


def _path(report: BenchReport) -> str | None:
    """Return the baseline's path."""
    return next((run.path for run in report.runs if run.key.partition("@")[0] == report.baseline), None)


def _bench_latency(source: str, report: BenchReport, run: BenchRun, limit: float) -> Check:
    name = f"{run.key} on {report.device} latency"
    if run.median_ms is None:
        return _missing(source, name, f"the run broke: {run.error}")
    if report.emulated:
        return Check(source, name, passed=False, message=EMULATED)
    kinds = dict.fromkeys(text.partition(":")[0] for text in run.taints)
    note = f", tainted: {', '.join(kinds)}" if kinds else ""
    return _at_most(source, name, run.median_ms, limit, "ms", note)


def _bench_speedups(source: str, report: BenchReport, limit: float) -> Iterator[Check]:
    for entry in report.comparisons:
        name = f"{entry.candidate} on {report.device}"
        if report.emulated:
            yield Check(source, f"{name} speed-up", passed=False, message=EMULATED)
        elif entry.low is None or entry.high is None:
            yield _missing(source, f"{name} speed-up", "an interval needs 6 pairs of blocks")
        else:
            yield _speedup(source, name, (entry.speedup, entry.low, entry.high), limit)


def _speedup(source: str, name: str, found: tuple[float, float, float], limit: float) -> Check:
    ratio, low, high = found
    message = f"{ratio:.3g}x ({low:.3g} to {high:.3g}), at least {limit:g}x"
    return Check(source, f"{name} speed-up", passed=low >= limit, message=message)


def _bench_drops(source: str, report: BenchReport, limit: float) -> Iterator[Check]:
    """Check top-1 on the device against the first file's."""
    first = report.accuracy[0]
    for entry in report.accuracy[1:]:
        name = f"{entry.key} on {report.device} top-1 drop"
        if first.top1 is None or entry.top1 is None:
            yield _missing(source, name, "the images have no labels")
        else:
            drop = 100 * (first.top1 - entry.top1)
            yield _at_most(source, name, drop, limit, "points", f" against {first.key}")
