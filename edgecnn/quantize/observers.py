"""Observers: from the values seen in calibration to the range [low, high] that int8 should cover.

All are streaming and need a fixed amount of memory, whatever the number and size of the batches.

    min_max          every value seen
    moving_average   m <- m + (batch extreme - m) / 10
    percentile       cuts 0.01 % of the values off, split between both ends
    mse              minimizes  sum_i n_i w_i (x_i - dequantize(quantize(x_i)))^2  over the histogram,
                     w_i < 1 for images whose values are larger than others'
    entropy          minimizes the Kullback-Leibler divergence of the 8-bit histogram from the full one

Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1 (moving average); Migacz 2017, "8-bit inference with
TensorRT", and Miller 1955, "Note on the bias of information estimates" (entropy); Nagel et al. 2021,
arXiv:2106.08295, section 3.1 (mse).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from edgecnn.errors import RecipeError

Float64s = npt.NDArray[np.float64]

_NUM_BINS = 4096
_MAX_SAMPLED = 1 << 16
_STEPS = 100
_SMALLEST_EXPONENT = -100


class Observer(Protocol):
    """Sees values batch by batch, then says which range to cover."""

    def observe(self, x: torch.Tensor) -> None:
        """Take note of a batch of values, of any shape."""

    def range(self) -> tuple[float, float]:
        """Return (low, high), low <= 0 <= high."""


class MinMaxObserver:
    """Covers every value seen.

    Example:
        >>> o = MinMaxObserver(); o.observe(torch.tensor([0.5, 2.0])); o.observe(torch.tensor([-1.0]))
        >>> o.range()
        (-1.0, 2.0)
    """

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0

    def observe(self, x: torch.Tensor) -> None:
        """Take note of a batch of values, of any shape."""
        low, high = (float(v) for v in torch.aminmax(x))
        self.low, self.high = _extended(self.low, self.high, low, high)

    def range(self) -> tuple[float, float]:
        """Return (low, high), low <= 0 <= high."""
        return self.low, self.high


class MovingAverageObserver:
    """Follows each batch's extremes by a tenth of the distance.

    Example:
        >>> o = MovingAverageObserver()
        >>> o.observe(torch.tensor([0.0, 1.0])); o.observe(torch.tensor([0.0, 2.0]))
        >>> o.range()
        (0.0, 1.1)
    """

    def __init__(self) -> None:
        self.extremes: tuple[float, float] | None = None

    def observe(self, x: torch.Tensor) -> None:
        """Take note of a batch of values, of any shape."""
        low, high = (float(v) for v in torch.aminmax(x))
        if self.extremes is None:
            self.extremes = (low, high)
        else:
            self.extremes = (
                self.extremes[0] + 0.1 * (low - self.extremes[0]),
                self.extremes[1] + 0.1 * (high - self.extremes[1]),
            )

    def range(self) -> tuple[float, float]:
        """Return (low, high), low <= 0 <= high."""
        low, high = self.extremes or (0.0, 0.0)
        return min(low, 0.0), max(high, 0.0)


def _extended(low: float, high: float, other_low: float, other_high: float) -> tuple[float, float]:
    """Return the range that covers both; NaN where a value was NaN, which `min` and `max` would lose."""
    if math.isnan(other_low) or math.isnan(low):
        return math.nan, math.nan
    return min(low, other_low), max(high, other_high)


class Histogram:
    """Counts over a range that grows by doubling: bins of one width, as many below zero as above.

    The width is a power of two, so that neither it nor a count depends on how the values were cut into
    batches. Exact zeros, of which relu makes many and which int8 holds exactly, are counted apart. At most
    65,536 evenly spaced values of a batch are counted; the extremes are exact.

    Attributes:
        counts: float64 (4096,), bin i covers [(i - 2048) width, (i - 2047) width).
        zeros: values that are 0, not in `counts`.
        width: of a bin, 0 before the first value that is not zero.
        low, high: extremes seen; NaN or infinite if a value was, nothing is counted from then on.

    Example: 1.0 needs a reach of 2.
        >>> h = Histogram(); h.observe(torch.tensor([0.0, 1.0, 1.0]))
        >>> h.zeros, h.width, float(h.counts[3072])
        (1.0, 0.0009765625, 2.0)
    """

    def __init__(self) -> None:
        self.counts: Float64s = np.zeros(_NUM_BINS)
        self.zeros = 0.0
        self.width = 0.0
        self.low = 0.0
        self.high = 0.0

    def observe(self, x: torch.Tensor, step: int | None = None) -> None:
        """Count a batch of values, of any shape; `step` counts every so many, by default as many as fit."""
        values = x.detach().reshape(-1)
        low, high = (float(v) for v in torch.aminmax(values))
        self.low, self.high = _extended(self.low, self.high, low, high)
        if not self.is_finite:
            return
        sampled = values[:: step or _sampling_step(values.numel())]
        zeros = float((sampled == 0).sum())
        self.zeros += zeros
        reach = max(-low, high)
        if reach == 0.0:
            return
        self._cover(reach)
        half = _NUM_BINS // 2
        index = torch.floor(sampled / self.width).to(torch.int64) + half
        self.counts += torch.bincount(index.clamp_(0, _NUM_BINS - 1), minlength=_NUM_BINS).numpy()
        self.counts[half] -= zeros

    def _cover(self, reach: float) -> None:
        """Make the bins as wide as values up to `reach`, exclusive of the next power of two, need."""
        width = 2.0 ** max(math.frexp(reach)[1], _SMALLEST_EXPONENT) / (_NUM_BINS // 2)
        if self.width == 0.0:
            self.width = width
        while self.width < width:
            self._double()

    @property
    def is_finite(self) -> bool:
        """Whether no value was NaN or infinite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def _double(self) -> None:
        quarter = _NUM_BINS // 4
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros(_NUM_BINS)
        self.counts[quarter : 3 * quarter] = merged
        self.width *= 2.0

    def filled(self) -> tuple[Float64s, Float64s]:
        """Return (centers, counts) of the bins that hold anything, in order, and of 0 if it was seen."""
        index = np.flatnonzero(self.counts)
        centers = np.clip((index - _NUM_BINS // 2 + 0.5) * self.width, self.low, self.high)
        counts = self.counts[index]
        if self.zeros:
            place = int(np.searchsorted(centers, 0.0))
            centers, counts = np.insert(centers, place, 0.0), np.insert(counts, place, self.zeros)
        return centers, counts


def _sampling_step(num_values: int) -> int:
    """Return how far apart the values are that are counted: odd, so as not to walk along one image column."""
    return -(-num_values // _MAX_SAMPLED) | 1


class HistogramObserver:
    """What the observers below share: a histogram, from which each chooses a range in its own way."""

    def __init__(self) -> None:
        self.histogram = Histogram()

    def observe(self, x: torch.Tensor) -> None:
        """Take note of a batch of values, of any shape."""
        self.histogram.observe(x)

    def range(self) -> tuple[float, float]:
        """Return (low, high), low <= 0 <= high."""
        if self.histogram.width == 0.0 or not self.histogram.is_finite:
            return self.histogram.low, self.histogram.high
        return self.choose(*self.histogram.filled())

    def choose(self, centers: Float64s, counts: Float64s) -> tuple[float, float]:  # noqa: ARG002
        """Return (low, high) for the filled bins of the histogram: here, all of them."""
        return self.histogram.low, self.histogram.high


class PercentileObserver(HistogramObserver):
    """Cuts the rarest 0.01 % of the values off, half at each end (all at the top where none is negative)."""

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        self.percentile = percentile

    def choose(self, centers: Float64s, counts: Float64s) -> tuple[float, float]:
        """Return (low, high) for the filled bins of the histogram."""
        share = np.cumsum(counts) / counts.sum()
        cut = 1.0 - self.percentile / 100.0
        two_sided = self.histogram.low < 0.0
        upper = 1.0 - (cut / 2 if two_sided else cut)
        last = min(int(np.searchsorted(share, upper)), len(centers) - 1)
        high = float(centers[last]) + self.histogram.width / 2
        low = float(centers[np.searchsorted(share, cut / 2)]) - self.histogram.width / 2 if two_sided else 0.0
        return max(min(low, 0.0), self.histogram.low), min(max(high, 0.0), self.histogram.high)


def quantization_error(centers: Float64s, counts: Float64s, lows: Float64s, highs: Float64s) -> Float64s:
    """Return the summed squared error of 8-bit quantization for each candidate range.

    Args:
        centers: (bins,) values.
        counts: (bins,) how often each was seen.
        lows: (candidates,), at most 0.
        highs: (candidates,), at least 0.

    Returns:
        (candidates,) sum_i n_i (x_i - s (clamp(round(x_i / s) + z, -128, 127) - z))^2.

    Example: levels 0, 1, ..., 255 hold 3 exactly and clip 256 to 255.
        >>> x, n = np.array([3.0, 256.0]), np.array([5.0, 2.0])
        >>> quantization_error(x, n, np.array([0.0]), np.array([255.0]))
        array([2.])
    """
    scale = np.maximum((highs - lows) / 255.0, 1e-30)[:, None]
    zero_point = np.rint(-128.0 - lows[:, None] / scale)
    q = np.clip(np.rint(centers[None, :] / scale) + zero_point, -128, 127)
    error: Float64s = ((centers[None, :] - scale * (q - zero_point)) ** 2 * counts[None, :]).sum(axis=1)
    return error


class MseObserver:
    """Shrinks the range where clipping rare values costs less than coarser steps for all others.

    Now and then one image in hundreds makes activations a hundred times as large as all others do. Its
    squared error would outweigh theirs, and they be left a few levels. So images are counted apart by the
    power of two that their values reach, each histogram as fine as its images need, and an error weighs

        w = min(1, E / E_k)      E_k = mean square of the images of that power, E of the median image

    so that no image counts for more than the error relative to its own size would. Dimension 0 of a batch is
    images; a vector is one.
    """

    def __init__(self) -> None:
        self.histograms: dict[int, Histogram] = {}
        self.num_images: dict[int, int] = {}

    def observe(self, x: torch.Tensor) -> None:
        """Take note of a batch of values, (n, ...) or one vector."""
        images = x.detach().reshape(1 if x.dim() < 2 else len(x), -1)
        reaches = torch.maximum(images.amax(1), -images.amin(1))  # NaN or infinite where a value is
        exponents = torch.frexp(reaches).exponent.clamp(min=_SMALLEST_EXPONENT)
        if not bool(torch.isfinite(reaches).all()):
            exponents = torch.zeros_like(exponents)  # one histogram takes note of that
        step = _sampling_step(images.numel())
        for exponent in sorted(set(exponents.tolist())):
            chosen = torch.nonzero(exponents == exponent).reshape(-1)
            same = images if len(chosen) == len(images) else images.index_select(0, chosen)
            self.histograms.setdefault(exponent, Histogram()).observe(same, step)
            self.num_images[exponent] = self.num_images.get(exponent, 0) + len(chosen)

    def range(self) -> tuple[float, float]:
        """Return (low, high), low <= 0 <= high."""
        low, high = 0.0, 0.0
        for histogram in self.histograms.values():
            low, high = _extended(low, high, histogram.low, histogram.high)
        if not (math.isfinite(low) and math.isfinite(high)) or low == high:
            return low, high
        centers, counts = self.weighted()
        low, high = self._start(centers, counts, low, high)
        return _least_error(centers, counts, low, high)

    def weighted(self) -> tuple[Float64s, Float64s]:
        """Return (centers, weighted counts) of all filled bins, exponent by exponent."""
        order = sorted(self.histograms)
        filled = [self.histograms[k].filled() for k in order]
        energies = [float((c * c * n).sum() / max(n.sum(), 1.0)) for c, n in filled]
        images = np.cumsum([self.num_images[k] for k in order])
        median = energies[int(np.searchsorted(images, images[-1] / 2))]
        weights = [min(1.0, median / e) if median > 0.0 < e else 1.0 for e in energies]
        centers = np.concatenate([c for c, _ in filled])
        return centers, np.concatenate([w * n for w, (_, n) in zip(weights, filled, strict=True)])

    def _start(self, centers: Float64s, counts: Float64s, low: float, high: float) -> tuple[float, float]:
        """Return the range to shrink: the whole, or twice the best power of two that the images reach."""
        reaches = np.ldexp(1.0, np.array(sorted(self.histograms), np.int64))
        lows, highs = np.maximum(-reaches, low), np.minimum(reaches, high)
        best = float(reaches[np.argmin(quantization_error(centers, counts, lows, highs))])
        return max(low, -2.0 * best), min(high, 2.0 * best)


def _least_error(centers: Float64s, counts: Float64s, low: float, high: float) -> tuple[float, float]:
    """Return the range within (low, high) of the least error, down to a fifth of each end."""
    lowest, highest, factors = low, high, np.linspace(1.0, 0.2, _STEPS)
    for _ in range(2 if low < 0.0 < high else 1):
        if high > 0.0:
            highs = factors * highest
            high = float(highs[np.argmin(quantization_error(centers, counts, np.full(_STEPS, low), highs))])
        if low < 0.0:
            lows = factors * lowest
            low = float(lows[np.argmin(quantization_error(centers, counts, lows, np.full(_STEPS, high)))])
    return low, high


class EntropyObserver(HistogramObserver):
    """Picks the range whose 8-bit histogram stays closest to the full one in Kullback-Leibler divergence.

    Zeros are left out: int8 holds them exactly in every range, but smoothed over the neighbouring bins of
    their level they would dwarf everything else, and a range be chosen for how it cuts them off.
    """

    def choose(self, centers: Float64s, counts: Float64s) -> tuple[float, float]:
        """Return (low, high) for the filled bins of the histogram."""
        low, high = self.histogram.low, self.histogram.high
        centers, counts = centers[centers != 0.0], counts[centers != 0.0]
        if len(centers) == 0:
            return low, high
        factors = np.linspace(1.0, 0.2, _STEPS)
        divergences = [_divergence(centers, counts, f * low, f * high) for f in factors]
        best = float(factors[int(np.argmin(divergences))])
        return best * low, best * high


def _divergence(centers: Float64s, counts: Float64s, low: float, high: float) -> float:
    """Return KL(p || q), less what it would be of samples for which p = q.

    p is the clipped histogram, q spreads each of 256 levels over its filled bins. Smoothing n samples from
    `bins` to `levels` free numbers makes a divergence of (bins - levels) / (2 n) by chance alone (Miller
    1955), which would favour clipping, the more so the fewer the samples.
    """
    clipped = np.clip(centers, low, high)
    level = np.rint((clipped - low) / max(high - low, 1e-30) * 255.0).astype(np.int64)
    inside = (centers >= low) & (centers <= high)
    mass = np.bincount(level, weights=np.where(inside, counts, 0.0), minlength=256)
    bins = np.bincount(level, weights=inside.astype(np.float64), minlength=256)
    p = np.where(inside, counts, 0.0)
    first, last = np.flatnonzero(inside)[[0, -1]] if inside.any() else (0, 0)
    p[first] += counts[centers < low].sum()
    p[last] += counts[centers > high].sum()
    q = np.where(inside, mass[level] / np.maximum(bins[level], 1.0), 0.0)
    p, q = p / max(p.sum(), 1e-30), q / max(q.sum(), 1e-30)
    keep = p > 0
    chance = (np.count_nonzero(inside) - np.count_nonzero(bins)) / (2.0 * max(counts.sum(), 1.0))
    return float((p[keep] * np.log(p[keep] / np.maximum(q[keep], 1e-12))).sum() - chance)


OBSERVERS: dict[str, Callable[[], Observer]] = {
    "min_max": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MseObserver,
    "entropy": EntropyObserver,
}


def make_observer(name: str) -> Observer:
    """Return a fresh observer.

    Raises:
        RecipeError: for a name that is none.
    """
    if name not in OBSERVERS:
        raise RecipeError(f"observer is {name!r}, expected one of {', '.join(OBSERVERS)}")
    return OBSERVERS[name]()
