"""From what the runner gave, block by block, to the runs and comparisons of a BenchReport."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.errors import RunnerError
from edgecnn.report.bench_results import BenchRun, Comparison, split_blocks
from edgecnn.report.latencies import Latencies
from edgecnn.runner.samples import Int64Array, unpack_json
from edgecnn.runner.statistics import compare, drift_of, median, median_interval, summarize_distribution
from edgecnn.runner.taints import drift_taint

PHASES = ("import_ms", "load_ms", "first_ms", "warmup_ms")


@dataclass(frozen=True)
class BenchFile:
    """A file to be measured.

    Attributes:
        key: unique among the files of a report.
        path: on this host.
        sha256: of its bytes.
        size_bytes: of its bytes.
    """

    key: str
    path: Path
    sha256: str
    size_bytes: int


def build_run(
    file: BenchFile,
    key: str,
    threads: int,
    results: Sequence[Mapping[str, Any]],
    error: str | None = None,
    profile: Sequence[Mapping[str, Any]] | None = None,
) -> BenchRun:
    """Put the blocks of one file together.

    Args:
        file: what was measured.
        key: of the run.
        threads: inside an operator.
        results: the runner's entry of the file, one per process, in order; each process is one block. A
            single process keeps the blocks it made itself.
        error: why the run broke; then no number is given, whatever the blocks before it said.
        profile: operators, from a process of its own.

    Raises:
        RunnerError: if the samples of a block are damaged.
    """
    known = results[0] if results else {}
    head = (file.sha256, file.size_bytes, known.get("runtime", ""), known.get("runtime_version", ""), threads)
    if error is not None or not results:
        return BenchRun(key, str(file.path), *head, error=error or "no block was measured")
    blocks = [_samples(entry, key) for entry in results]
    samples = np.concatenate(blocks)
    if len(results) == 1:
        blocks = split_blocks(samples, known["block_lengths"])
    latencies = Latencies(samples)
    summary = summarize_distribution(latencies.distribution, drift_of(samples))
    return BenchRun(
        key,
        str(file.path),
        *head,
        samples_ns=latencies,
        block_lengths=tuple(map(len, blocks)),
        median_ms=summary["median_ms"],
        median_interval_ms=_interval(blocks, summary),
        p90_ms=summary["p90_ms"],
        p99_ms=summary["p99_ms"],
        iqr_ms=summary["iqr_ms"],
        min_ms=summary["min_ms"],
        phases=_phases(results),
        peak_rss_bytes=_peak(results),
        device_memory_bytes=max((e.get("device_memory_bytes") or 0 for e in results), default=0) or None,
        profile=None if profile is None else tuple(dict(row) for row in profile),
        delegate=known.get("delegate"),
        trace=_trace(results),
        curve=tuple(known.get("curve") or ()) if len(results) == 1 else (),
        taints=_taints(results, summary["drift"]),
    )


def build_comparison(baseline: BenchRun, candidate: BenchRun) -> Comparison | None:
    """Compare two runs measured in interleaved blocks; None if one of them broke."""
    if baseline.error is not None or candidate.error is not None:
        return None
    found = compare(baseline.blocks_ns, candidate.blocks_ns)
    low, high = found["interval"] or (None, None)
    return Comparison(
        baseline.key, candidate.key, found["speedup"], low, high, found["verdict"], found["num_pairs"]
    )


def _samples(entry: Mapping[str, Any], key: str) -> Int64Array:
    """Return the raw latencies of one process in ns."""
    try:
        return unpack_json(entry["samples_ns"])
    except ValueError as error:
        raise RunnerError(f"{key}: the runner's result is damaged: {error}", hint="run again") from error


def _phases(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the median of each phase over the processes."""
    values = {
        name: [e["phases"][name] for e in results if (e.get("phases") or {}).get(name) is not None]
        for name in PHASES
    }
    return {name: median(found) if found else None for name, found in values.items()}


def _peak(results: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the largest peak over the baseline of its own process."""
    peaks = [
        entry["peak_rss_bytes"] - entry["baseline_rss_bytes"]
        for entry in results
        if entry.get("peak_rss_bytes") is not None and entry.get("baseline_rss_bytes") is not None
    ]
    return max(0, *peaks) if peaks else None


def _trace(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Join the traces of the processes; the pauses between them are left out."""
    joined: list[dict[str, Any]] = []
    offset = 0.0
    for entry in results:
        trace = entry.get("trace") or []
        joined += [{**sample, "t_s": offset + sample["t_s"]} for sample in trace]
        offset = joined[-1]["t_s"] if joined else 0.0
    return tuple(joined)


def _taints(results: Sequence[Mapping[str, Any]], drift: float | None) -> tuple[str, ...]:
    """Return each kind of taint once, the first as an example, with the number of processes it is in.

    Drift is of the whole run: within one short block of many it would only be noise.
    """
    found: dict[str, list[str]] = {}
    for entry in results:
        kinds: dict[str, str] = {}
        for text in (*(entry.get("taints") or ()), *(entry.get("warnings") or ())):
            kinds.setdefault(text.partition(":")[0], text)
        for kind, text in kinds.items():
            found.setdefault(kind, []).append(text)
    total = len(results)
    if total > 1:
        found.pop("drifted", None)
        taint = drift_taint(drift)
        found.update({"drifted": [taint] * total} if taint else {})
    return tuple(
        texts[0] if len(texts) == total else f"{texts[0]} (in {len(texts)} of {total} processes)"
        for texts in found.values()
    )


def _interval(blocks: Sequence[Int64Array], summary: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Return the median's interval in ms from the blocks' medians, since samples in a row are alike.

    Args:
        blocks: latencies in ns.
        summary: of all of them; its interval is taken below 6 blocks.
    """
    found = median_interval([median(block) for block in blocks if len(block)])
    if found is None:
        pooled = summary["median_interval_ms"]
        return None if pooled is None else tuple(pooled)
    middle_ms = summary["median_ms"]
    return min(found[0] / 1e6, middle_ms), max(found[1] / 1e6, middle_ms)
