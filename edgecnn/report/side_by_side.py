"""Two reports side by side: the same figures of the same files, and what changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgecnn.errors import DataError
from edgecnn.report.bench_results import EMULATED, BenchReport
from edgecnn.report.numbers import bytes_text, digits, ms_text, percent_text, points_text
from edgecnn.report.reading import FoundReport
from edgecnn.report.results import Report

LOWER_IS_BETTER = ("bytes", "ms", "lsb")

FIGURES = (
    ("median latency", "median_ms", "ms"),
    ("p90 latency", "p90_ms", "ms"),
    ("memory", "peak_rss_bytes", "bytes"),
)
"""Of a bench run: title, attribute and unit."""


@dataclass(frozen=True)
class Row:
    """One figure of both reports.

    Attributes:
        figure: "size", "median latency" and so on.
        file: format, or key of a run.
        unit: "bytes", "ms", "fraction", "lsb" or "dB".
        first: of the first report; None where it was not measured.
        second: of the second report.
        is_comparable: False for latencies of different devices or thread counts: no change is given.
    """

    figure: str
    file: str
    unit: str
    first: float | None
    second: float | None
    is_comparable: bool = True

    @property
    def change(self) -> str:
        """What changed, in words.

        Example:
            >>> Row("size", "onnx", "bytes", 1000, 500).change
            '-50.0 %'
            >>> Row("top-1", "onnx", "fraction", 0.9, 0.91).change
            '+1.00 points'
        """
        if self.first is None or self.second is None or not self.is_comparable:
            return ""
        if self.first == self.second:
            return "same"
        if self.unit == "fraction":
            return points_text(100 * (self.second - self.first))
        if self.unit in ("bytes", "ms") and self.first > 0:
            return f"{100 * (self.second / self.first - 1):+.1f} %"
        return f"{self.second - self.first:+.3g}"

    @property
    def is_worse(self) -> bool:
        """Whether the second is worse."""
        if self.first is None or self.second is None or not self.is_comparable:
            return False
        return self.second > self.first if self.unit in LOWER_IS_BETTER else self.second < self.first

    def text(self, value: float | None) -> str:
        """Return a value with its unit; "-" for none."""
        if value is None:
            return "-"
        if self.unit == "fraction":
            return percent_text(value)
        if self.unit == "ms":
            return ms_text(value)
        if self.unit == "bytes":
            return bytes_text(value)
        return f"{value:.0f} LSB" if self.unit == "lsb" else f"{digits(value)} {self.unit}"


def compare_reports(
    first: FoundReport, second: FoundReport, *, across_devices: bool = False
) -> tuple[list[Row], list[str]]:
    """Put two reports of one kind side by side.

    Args:
        first: the earlier one.
        second: of the same kind.
        across_devices: show latencies of different devices too, without a change.

    Returns:
        The rows, and warnings.

    Raises:
        DataError: if one is of compress and one of bench, or latencies are of different devices.
    """
    a, b = first.report, second.report
    devices = device_of(a), device_of(b)
    if isinstance(a, BenchReport) and isinstance(b, BenchReport):
        timed = bool(a.runs and b.runs)
    elif isinstance(a, Report) and isinstance(b, Report):
        timed = a.latency is not None and b.latency is not None
    else:
        raise DataError(
            f"{first.name} and {second.name} are not of the same kind: one is of bench, one is not"
        )
    same = devices[0] == devices[1]
    if timed and not same and not across_devices:
        raise DataError(
            f"latency on {devices[0]} and on {devices[1]} cannot be compared",
            hint="--across-devices shows both without a difference",
        )
    if isinstance(a, Report) and isinstance(b, Report):
        return list(_compress_rows(a, b, same=same)), _warnings(devices, timed=timed)
    if isinstance(a, BenchReport) and isinstance(b, BenchReport):
        emulated = [f"{found.name}: {EMULATED}" for found, r in ((first, a), (second, b)) if r.emulated]
        return list(_bench_rows(a, b, same=same and not emulated)), [
            *_warnings(devices, timed=timed),
            *emulated,
        ]
    return [], []


def device_of(report: Report | BenchReport) -> str:
    """Return what a report's latencies were measured on: the machine's name and its processor."""
    machine = report.environment.get("board") or report.environment.get("cpu") or "an unknown machine"
    return f"{report.device} ({machine})" if isinstance(report, BenchReport) else str(machine)


def _warnings(devices: tuple[str, str], *, timed: bool) -> list[str]:
    if not timed:
        return []
    if devices[0] != devices[1]:
        return [f"latencies are of {devices[0]} and of {devices[1]}"]
    return [
        "latencies of separate runs differ by a few percent on their own; `edgecnn bench A B` times in turns"
    ]


def _row(figure: str, file: str, unit: str, values: Sequence[float | None], *, same: bool = True) -> Row:
    first, second = values
    return Row(figure, file, unit, first, second, same)


def _compress_rows(a: Report, b: Report, *, same: bool) -> Iterator[Row]:
    keys = list(dict.fromkeys([*a.artifacts, *b.artifacts]))
    for key in keys:
        sizes = [r.artifacts[key].size_bytes if key in r.artifacts else None for r in (a, b)]
        yield _row("size", key, "bytes", sizes)
    for key in ("float_onnx", "onnx", "float_tflite", "tflite"):
        figures = [None if r.latency is None else r.latency.of(key) for r in (a, b)]
        threads = {f.threads for f in figures if f is not None}
        if threads:
            medians = [None if f is None else f.median_ms for f in figures]
            yield _row("median latency", key, "ms", medians, same=same and len(threads) == 1)
    if a.accuracy is not None or b.accuracy is not None:
        floats = [None if r.accuracy is None else r.accuracy.float_top1 for r in (a, b)]
        yield _row("top-1", "float", "fraction", floats)
        for key in keys:
            top1 = [None if r.accuracy is None else r.accuracy.top1(key) for r in (a, b)]
            yield _row("top-1", key, "fraction", top1)
    for key in keys:
        yield _row("agreement with float", key, "fraction", [r.agreement.get(key) for r in (a, b)])
    for key in keys:
        yield _row("SQNR", key, "dB", [r.sqnr_db.get(key) for r in (a, b)])
    for pair in dict.fromkeys([*a.parity, *b.parity]):
        found = [r.parity.get(pair) for r in (a, b)]
        lsb = [None if parity is None else parity.max_lsb for parity in found]
        yield _row("parity", pair.replace("_", " "), "lsb", lsb)


def _bench_rows(a: BenchReport, b: BenchReport, *, same: bool) -> Iterator[Row]:
    runs = [{run.key: run for run in report.runs} for report in (a, b)]
    for figure, name, unit in FIGURES:
        for key in dict.fromkeys([*runs[0], *runs[1]]):
            found = [side.get(key) for side in runs]
            threads = {run.threads for run in found if run is not None}
            values = [None if run is None else getattr(run, name) for run in found]
            yield _row(figure, key, unit, values, same=same and len(threads) == 1)
    sizes = [{run.key.partition("@")[0]: run.size_bytes for run in report.runs} for report in (a, b)]
    for key in dict.fromkeys([*sizes[0], *sizes[1]]):
        yield _row("size", key, "bytes", [side.get(key) for side in sizes])
    accuracies = [{entry.key: entry for entry in report.accuracy} for report in (a, b)]
    for figure, name in (("top-1", "top1"), ("same class as host", "agreement_with_host")):
        for key in dict.fromkeys([*accuracies[0], *accuracies[1]]):
            entries = [side.get(key) for side in accuracies]
            values = [None if entry is None else getattr(entry, name) for entry in entries]
            yield _row(figure, key, "fraction", values)
