"""Honest summaries of latency samples.

The median's interval comes from order statistics: with n samples sorted as x_1 <= ... <= x_n and the
largest k for which P(Binomial(n, 1/2) <= k - 1) <= (1 - confidence) / 2, the true median lies in
[x_k, x_(n+1-k)] with at least that confidence, whatever the distribution. Samples in a row are
correlated, so two artifacts are compared on the medians of interleaved blocks instead:

    r_i = median(baseline block i) / median(candidate block i)        speedup = median(r)

A percentile needs enough samples beyond it to mean anything: p90 from 64 samples, p99 from 662, the
counts LoadGen's early stopping asks for at 99 % confidence. Nothing is ever removed as an outlier.

**Source** David, Nagaraja: Order Statistics (2003), section 7.1; Reddi et al.: MLPerf Inference
Benchmark, arXiv:1911.02549, section on the number of queries.
"""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

MIN_SAMPLES_P90 = 64
MIN_SAMPLES_P99 = 662
CONFIDENCE = 0.95


def median(values: Sequence[float]) -> float:
    """Return the middle value, or the mean of the two middle ones.

    Raises:
        ValueError: if there are no values.

    Example:
        >>> median([3, 1, 2]), median([4, 1, 2, 3])
        (2.0, 2.5)
    """
    if not values:
        raise ValueError("median of no values")
    ordered = sorted(values)
    half = len(ordered) // 2
    return float(ordered[half]) if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2.0


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: the smallest value with at least `percent` % at or below it.

    Raises:
        ValueError: if there are no values.

    Example:
        >>> percentile(list(range(1, 11)), 90), percentile([5, 7], 50)
        (9.0, 5.0)
    """
    if not values:
        raise ValueError("percentile of no values")
    rank = max(1, math.ceil(len(values) * percent / 100.0 - 1e-9))
    return float(sorted(values)[rank - 1])


def median_rank(num_samples: int, confidence: float = CONFIDENCE) -> Optional[int]:
    """Return k, counted from 1, of the interval [x_k, x_(n+1-k)]; None when n is too small for one.

    Example:
        >>> median_rank(5), median_rank(6), median_rank(10), median_rank(100)
        (None, 1, 2, 40)
    """
    tail = (1.0 - confidence) / 2.0
    if num_samples > 1000:  # the normal approximation, rounded outwards
        return max(1, math.floor((num_samples - 1.96 * math.sqrt(num_samples)) / 2.0))
    cumulative, k = 0, 0
    limit = tail * 2.0**num_samples
    while k < num_samples // 2:
        cumulative += math.comb(num_samples, k)
        if cumulative > limit:
            break
        k += 1
    return k or None


def median_interval(values: Sequence[float]) -> Optional[Tuple[float, float]]:
    """Return the 95 % confidence interval of the median, or None below 6 values.

    Example:
        >>> median_interval([5, 1, 4, 2, 6, 3])
        (1.0, 6.0)
    """
    k = median_rank(len(values))
    if k is None:
        return None
    ordered = sorted(values)
    return float(ordered[k - 1]), float(ordered[len(ordered) - k])


def summarize(samples_ns: Sequence[int]) -> Dict[str, Any]:
    """Summarize latencies.

    Args:
        samples_ns: nanoseconds in the order they were measured, at least one.

    Returns:
        `num_samples`; `min_ms`, `median_ms`, `iqr_ms`, `mean_ms`, `max_ms`; `median_interval_ms` (low, high)
        or None below 6 samples; `p90_ms` and `p99_ms`, None below 64 and 662 samples; `num_outliers`,
        samples above p75 + 3 IQR, counted and kept; `drift`, the median of the last quarter over that of
        the first, None below 8 samples.

    Raises:
        ValueError: if there are no samples.

    Example:
        >>> s = summarize([1_000_000, 3_000_000, 2_000_000, 4_000_000])
        >>> s["median_ms"], s["min_ms"], s["iqr_ms"], s["p90_ms"]
        (2.5, 1.0, 2.0, None)
    """
    if not samples_ns:
        raise ValueError("no samples to summarize")
    num_samples = len(samples_ns)
    lower, upper = percentile(samples_ns, 25), percentile(samples_ns, 75)
    interval = median_interval(samples_ns)
    fence = upper + 3.0 * (upper - lower)
    return {
        "num_samples": num_samples,
        "min_ms": min(samples_ns) / 1e6,
        "median_ms": median(samples_ns) / 1e6,
        "median_interval_ms": None if interval is None else [interval[0] / 1e6, interval[1] / 1e6],
        "iqr_ms": (upper - lower) / 1e6,
        "mean_ms": sum(samples_ns) / num_samples / 1e6,
        "max_ms": max(samples_ns) / 1e6,
        "p90_ms": percentile(samples_ns, 90) / 1e6 if num_samples >= MIN_SAMPLES_P90 else None,
        "p99_ms": percentile(samples_ns, 99) / 1e6 if num_samples >= MIN_SAMPLES_P99 else None,
        "num_outliers": sum(1 for sample in samples_ns if sample > fence),
        "drift": _drift(samples_ns),
    }


def compare(baseline: Sequence[Sequence[int]], candidate: Sequence[Sequence[int]]) -> Dict[str, Any]:
    """Compare two artifacts measured in interleaved blocks.

    Args:
        baseline: latencies in ns, one sequence per block, block i beside the candidate's block i.
        candidate: the same of the artifact compared with it.

    Returns:
        `speedup` (above 1: the candidate is faster), `interval` (low, high; None below 6 pairs),
        `num_pairs` and `verdict`: "faster", "slower", "no difference" (the interval includes 1) or
        "undecided" (no interval).

    Raises:
        ValueError: if there is no pair of blocks.

    Example:
        >>> compare([[20, 20, 26]] * 6, [[10, 9, 10]] * 6)["speedup"]
        2.0
        >>> compare([[10], [12]] * 3, [[12], [10]] * 3)["verdict"]
        'no difference'
    """
    pairs = [(a, b) for a, b in zip(baseline, candidate) if len(a) and len(b)]  # noqa: B905 - 3.9
    if not pairs:
        raise ValueError("no pair of blocks to compare")
    ratios: List[float] = [median(a) / max(median(b), 1.0) for a, b in pairs]
    interval = median_interval(ratios)
    if interval is None:
        verdict = "undecided"
    elif interval[0] <= 1.0 <= interval[1]:
        verdict = "no difference"
    else:
        verdict = "faster" if interval[0] > 1.0 else "slower"
    return {
        "speedup": median(ratios),
        "interval": None if interval is None else list(interval),
        "num_pairs": len(ratios),
        "verdict": verdict,
    }


def _drift(samples_ns: Sequence[int]) -> Optional[float]:
    quarter = len(samples_ns) // 4
    if quarter < 2:
        return None
    return median(samples_ns[-quarter:]) / max(median(samples_ns[:quarter]), 1.0)
