"""report.html: one page that needs nothing else, for people; a program reads the JSON embedded in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edgecnn import __version__
from edgecnn.report.bench_page import bench_part, devices_part
from edgecnn.report.bench_results import BenchReport
from edgecnn.report.compress_page import compress_part
from edgecnn.report.page import render_page
from edgecnn.report.results import Report
from edgecnn.report.schema import to_values

MAX_EMBEDDED = 50_000
"""Samples in the page's JSON; of more, every k-th of each run stays and "samples_kept_every" says k."""


def render_html(reports: Sequence[BenchReport], compress_report: Report | None = None) -> str:
    """Return the page of what devices said, and of the compress run that made their files.

    Args:
        reports: one for each device, at least one.
        compress_report: shown below them.

    Raises:
        ValueError: if there is nothing to show.
        DataError: if a figure is not finite.
    """
    parts = [] if len(reports) < 2 else [devices_part(reports)]
    parts += [bench_part(report) for report in reports]
    parts += [] if compress_report is None else [compress_part(compress_report)]
    if not parts:
        raise ValueError("no report to render")
    data = {
        "bench": [_embedded(report) for report in reports],
        "compress": None if compress_report is None else to_values(compress_report),
    }
    return render_page(f"{parts[0].heading}, edgecnn", parts, data, __version__)


def render_compress_html(report: Report) -> str:
    """Return the page of a compress run.

    Args:
        report: figures that are None are shown as not measured.

    Raises:
        DataError: if a figure is not finite.
    """
    return render_html([], report)


def _embedded(report: BenchReport) -> dict[str, Any]:
    """Return a report's values, thinned out where its samples would make the page too large."""
    step = -(-sum(len(run.samples_ns) for run in report.runs) // MAX_EMBEDDED)
    if step <= 1:
        values: dict[str, Any] = to_values(report)
        return values
    kept = [run.samples_ns[::step] for run in report.runs]
    runs = [
        replace(run, samples_ns=samples, block_lengths=(len(samples),))
        for run, samples in zip(report.runs, kept, strict=True)
    ]
    return {**to_values(replace(report, runs=tuple(runs))), "samples_kept_every": step}
