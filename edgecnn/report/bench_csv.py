"""Bench reports as CSV, one row per run; figures that were not measured are empty."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from edgecnn.report.bench_results import BenchReport, BenchRun

COLUMNS = (
    "device", "emulated", "key", "path", "sha256", "size_bytes", "runtime", "runtime_version", "threads",
    "num_samples", "median_ms", "median_low_ms", "median_high_ms", "min_ms", "iqr_ms", "p90_ms", "p99_ms",
    "import_ms", "load_ms", "first_ms", "warmup_ms", "peak_rss_bytes", "speedup", "speedup_low",
    "speedup_high", "verdict", "top1", "top5", "agreement_with_host", "max_lsb", "taints", "error",
)  # fmt: skip


def render_csv(reports: Sequence[BenchReport]) -> str:
    """Return the CSV of reports, with a header; lines end in CR LF as RFC 4180 has it.

    Args:
        reports: of one or several devices.
    """
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, COLUMNS)
    writer.writeheader()
    for report in reports:
        writer.writerows(_row(report, run) for run in report.runs)
    return stream.getvalue()


def _row(report: BenchReport, run: BenchRun) -> dict[str, Any]:
    low, high = run.median_interval_ms or (None, None)
    row: dict[str, Any] = {
        name: getattr(run, name) for name in COLUMNS if hasattr(run, name) and name not in ("taints",)
    }
    row |= dict(run.phases or {})
    row |= {
        "device": report.device,
        "emulated": report.emulated,
        "num_samples": len(run.samples_ns) or None,
        "median_low_ms": low,
        "median_high_ms": high,
        "taints": "; ".join(run.taints),
    }
    comparison = next((c for c in report.comparisons if c.candidate == run.key), None)
    if comparison is not None:
        row |= {
            "speedup": comparison.speedup,
            "speedup_low": comparison.low,
            "speedup_high": comparison.high,
            "verdict": comparison.verdict,
        }
    accuracy = next((a for a in report.accuracy if a.path == run.path), None)
    if accuracy is not None:
        row |= {name: getattr(accuracy, name) for name in ("top1", "top5", "agreement_with_host", "max_lsb")}
    return {name: row.get(name) for name in COLUMNS}
