"""Which budgets a report misses, in words, and what is known of a drop where there are no labels."""

from __future__ import annotations

from edgecnn.report.numbers import percent_text
from edgecnn.report.results import Report
from edgecnn.report.sampling import drop_text


def _not_faster(report: Report) -> list[str]:
    """Say which files are not shown to be faster than float."""
    known = {} if report.latency is None or report.environment.get("emulated") else report.latency.speedup
    misses = []
    for name in report.artifacts:
        if name not in known:
            misses.append(f"{name} latency was not measured against float, it must be faster")
        elif known[name].verdict != "faster":
            how = "is slower than" if known[name].verdict == "slower" else "takes as long as"
            misses.append(f"{name} {how} float ({known[name].ratio:.2f} times its speed), it must be faster")
    return misses


def _without_labels(report: Report) -> str:
    """Say what is known without labels: how often a file gives float's answer, which bounds the drop.

    Of images on which both answer alike, neither gains nor loses, so |drop| <= 1 - agreement.
    """
    known = [value for value in report.agreement.values() if value is not None]
    if not known or report.data.synthetic:  # made-up images say nothing about real ones
        return ""
    return (
        f"; without labels only agreement with float is known, {percent_text(min(known), 1)}: on the "
        f"images judged, top-1 can move by {100 * (1 - min(known)):.3g} points at most"
    )


def held_without_labels(report: Report, max_drop: float) -> str:
    """Say what an accuracy budget was held against where no image has a label, "" where some have."""
    if report.accuracy is not None:
        return ""
    known = _without_labels(report).removeprefix("; ")
    return f"a drop of {max_drop:g} points was asked for: {known or 'nothing tells it without real images'}"


def largest_drop(report: Report) -> float | None:
    """Return the drop in points of top-1, without labels the most that it can be; None if nothing tells."""
    if report.accuracy is not None:
        return report.accuracy.drop_points
    known = [value for value in report.agreement.values() if value is not None]
    return None if not known or report.data.synthetic else 100.0 * (1.0 - min(known))


def budget_misses(
    report: Report,
    max_drop: float | None,
    max_latency_ms: float | None,
    max_size_mb: float | None,
    *,
    must_be_faster: bool = False,
) -> list[str]:
    """Return each budget that a report misses, in words; a figure that was not measured misses its budget.

    Args:
        report: of a run.
        max_drop: percentage points of top-1; without labels the most that it can be counts.
        max_latency_ms: median of each compressed file.
        max_size_mb: of each compressed file, 1 MB = 1,000,000 bytes.
        must_be_faster: every file must be faster than float.
    """
    misses = []
    drop = largest_drop(report)
    if max_drop is not None and (drop is None or drop > max_drop + 1e-9):
        if report.accuracy is None:
            misses.append(
                f"accuracy was not measured, the budget is a drop of {max_drop:g} points"
                + _without_labels(report)
            )
        else:
            found = report.accuracy
            counted = drop_text(found.drop_points, found.drop_error_points, found.num_samples)
            misses.append(f"accuracy drops by {drop:.4g} points, the budget is {max_drop:g} ({counted})")
    if must_be_faster:
        misses += _not_faster(report)
    for name, artifact in report.artifacts.items():
        figures = None if report.latency is None else report.latency.of(name)
        if report.environment.get("emulated"):
            figures = None
        if max_latency_ms is not None and figures is None:
            misses.append(f"{name} latency was not measured, the budget is {max_latency_ms:g} ms")
        elif max_latency_ms is not None and figures is not None and figures.median_ms > max_latency_ms:
            misses.append(f"{name} takes {figures.median_ms:.4g} ms, the budget is {max_latency_ms:g} ms")
        if max_size_mb is not None and artifact.size_bytes > max_size_mb * 1e6:
            misses.append(f"{name} is {artifact.size_bytes / 1e6:.4g} MB, the budget is {max_size_mb:g} MB")
    return misses
