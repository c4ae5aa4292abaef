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
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import numpy as np
import numpy.typing as npt

MIN_SAMPLES_P90 = 64
MIN_SAMPLES_P99 = 662
CONFIDENCE = 0.95

Numbers = Union[Sequence[float], npt.NDArray[Any]]

MERGED_PARTS = 16
SORTED_AT_ONCE = 1 << 18
"""Samples whose sorting stays in the cache."""


def median(values: Numbers) -> float:
    """Return the middle value, or the mean of the two middle ones.

    Raises:
        ValueError: if there are no values.

    Example:
        >>> median([3, 1, 2]), median([4, 1, 2, 3])
        (2.0, 2.5)
    """
    if len(values) == 0:
        raise ValueError("median of no values")
    half = len(values) // 2
    if len(values) % 2:
        return float(np.partition(values, half)[half])
    below, above = np.partition(values, (half - 1, half))[half - 1 : half + 1]
    return float(below + above) / 2.0


def percentile(values: Numbers, percent: float) -> float:
    """Return the nearest-rank percentile: the smallest value with at least `percent` % at or below it.

    Raises:
        ValueError: if there are no values.

    Example:
        >>> percentile(list(range(1, 11)), 90), percentile([5, 7], 50)
        (9.0, 5.0)
    """
    if len(values) == 0:
        raise ValueError("percentile of no values")
    rank = percent_rank(len(values), percent) - 1
    return float(np.partition(values, rank)[rank])


def percent_rank(num_samples: int, percent: float) -> int:
    """Return the rank of a percentile, counted from 1.

    Example:
        >>> percent_rank(10, 90), percent_rank(2, 50)
        (9, 1)
    """
    return max(1, math.ceil(num_samples * percent / 100.0 - 1e-9))


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


def median_interval(values: Numbers) -> Optional[Tuple[float, float]]:
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


@dataclass(frozen=True)
class Distribution:
    """All samples of a run without their order: exact, and small even where they are millions.

    Latencies are whole numbers of ns, so that those of T ns together have at most sqrt(2 T) different values.

    Attributes:
        values: the different values, ascending, (k,).
        ends: how many samples are not above each value, (k,).

    Example:
        >>> d = Distribution.of([3, 1, 3, 2])
        >>> d.values.tolist(), d.ends.tolist(), d.median(), d.percentile(25), d.count_above(2)
        ([1, 2, 3], [1, 2, 4], 2.5, 1.0, 2)
    """

    values: npt.NDArray[Any]
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, samples: Numbers) -> "Distribution":
        """Return that of samples, at least one.

        Raises:
            ValueError: if there is none.
        """
        array = np.asarray(samples)
        starts = range(0, len(array), SORTED_AT_ONCE)
        return cls.gather(array[start : start + SORTED_AT_ONCE] for start in starts)

    def scaled(self, factor: float) -> "Distribution":
        """Return that of all samples multiplied by a factor above 0."""
        return Distribution(self.values * factor, self.ends)

    @classmethod
    def gather(cls, chunks: Iterable[npt.NDArray[Any]]) -> "Distribution":
        """Return that of all samples of some arrays, which need not be in memory together.

        Raises:
            ValueError: if there is no sample.
        """
        values, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        parts: List[Tuple[npt.NDArray[Any], npt.NDArray[np.int64]]] = []
        for chunk in chunks:
            parts.append(np.unique(chunk, return_counts=True))
            if len(parts) == MERGED_PARTS:
                values, counts = _merge([(values, counts), *parts])
                parts = []
        values, counts = _merge([(values, counts), *parts])
        if len(values) == 0:
            raise ValueError("no samples to summarize")
        return cls(values, np.cumsum(counts))

    @property
    def num_samples(self) -> int:
        """How many there are."""
        return int(self.ends[-1])

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How often each value occurs, (k,)."""
        return np.diff(self.ends, prepend=0)

    @property
    def total(self) -> float:
        """The sum of all samples."""
        return float((self.values * self.counts).sum())

    def ranked(self, rank: int) -> float:
        """Return the sample that is number `rank` of the sorted ones, counted from 1."""
        return float(self.values[np.searchsorted(self.ends, rank)])

    def median(self) -> float:
        """Return the middle sample, or the mean of the two middle ones."""
        half = self.num_samples // 2
        above = self.ranked(half + 1)
        return above if self.num_samples % 2 else (self.ranked(half) + above) / 2.0

    def percentile(self, percent: float) -> float:
        """Return the nearest-rank percentile."""
        return self.ranked(percent_rank(self.num_samples, percent))

    def median_interval(self) -> Optional[Tuple[float, float]]:
        """Return the 95 % confidence interval of the median, or None below 6 samples."""
        k = median_rank(self.num_samples)
        return None if k is None else (self.ranked(k), self.ranked(self.num_samples + 1 - k))

    def count_above(self, limit: float) -> int:
        """Return how many samples are larger."""
        index = int(np.searchsorted(self.values, limit, side="right"))
        return self.num_samples - (int(self.ends[index - 1]) if index else 0)


def _merge(
    parts: Sequence[Tuple[npt.NDArray[Any], npt.NDArray[np.int64]]],
) -> Tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return values and counts of several (values, counts)."""
    values, places = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    counts = np.bincount(places.reshape(-1), np.concatenate([part[1] for part in parts]), len(values))
    return values, counts.astype(np.int64)


def summarize(samples_ns: Numbers) -> Dict[str, Any]:
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
    return summarize_distribution(Distribution.of(samples_ns), drift_of(samples_ns))


def drift_of(samples_ns: Numbers) -> Optional[float]:
    """Return the median of the last quarter over that of the first, or None below 8 samples.

    Example:
        >>> drift_of([10] * 6 + [12, 12]), drift_of([10] * 7)
        (1.2, None)
    """
    quarter = drift_quarter(len(samples_ns))
    if quarter == 0:
        return None
    return ratio_of_medians(median(samples_ns[-quarter:]), median(samples_ns[:quarter]))


def summarize_distribution(found: Distribution, drift: Optional[float]) -> Dict[str, Any]:
    """Return what `summarize` does, of samples whose order only the drift knows."""
    num_samples = found.num_samples
    lower, upper = found.percentile(25), found.percentile(75)
    interval = found.median_interval()
    return {
        "num_samples": num_samples,
        "min_ms": found.ranked(1) / 1e6,
        "median_ms": found.median() / 1e6,
        "median_interval_ms": None if interval is None else [interval[0] / 1e6, interval[1] / 1e6],
        "iqr_ms": (upper - lower) / 1e6,
        "mean_ms": found.total / num_samples / 1e6,
        "max_ms": found.ranked(num_samples) / 1e6,
        "p90_ms": found.percentile(90) / 1e6 if num_samples >= MIN_SAMPLES_P90 else None,
        "p99_ms": found.percentile(99) / 1e6 if num_samples >= MIN_SAMPLES_P99 else None,
        "num_outliers": found.count_above(upper + 3.0 * (upper - lower)),
        "drift": drift,
    }


def drift_quarter(num_samples: int) -> int:
    """Return how many samples at each end tell the drift; 0 below 8 samples, where none does."""
    quarter = num_samples // 4
    return quarter if quarter >= 2 else 0


def ratio_of_medians(later_ns: float, earlier_ns: float) -> float:
    """Return how many times as slow the later one is."""
    return later_ns / max(earlier_ns, 1.0)


def compare(baseline: Iterable[Numbers], candidate: Iterable[Numbers]) -> Dict[str, Any]:
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
    pairs = zip(baseline, candidate)  # noqa: B905 - 3.9
    ratios = [ratio_of_medians(median(a), median(b)) for a, b in pairs if len(a) and len(b)]
    if not ratios:
        raise ValueError("no pair of blocks to compare")
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
