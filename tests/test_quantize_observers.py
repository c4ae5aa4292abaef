"""Observers: which range each of them chooses, and that they forget nothing and need no more memory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecnn.errors import RecipeError
from edgecnn.quantize.observers import (
    OBSERVERS,
    EntropyObserver,
    Histogram,
    MinMaxObserver,
    MovingAverageObserver,
    MseObserver,
    PercentileObserver,
    make_observer,
    quantization_error,
)

HISTOGRAM_OBSERVERS = ("percentile", "mse", "entropy")


def gaussian(num: int = 60_000, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed))


def ranged(name: str, *batches: torch.Tensor) -> tuple[float, float]:
    observer = make_observer(name)
    for batch in batches:
        observer.observe(batch)
    return observer.range()


def test_min_max_covers_everything_and_zero() -> None:
    assert ranged("min_max", torch.tensor([1.0, 2.0]), torch.tensor([[0.5]])) == (0.0, 2.0)
    assert ranged("min_max", torch.tensor([-3.0, -2.0])) == (-3.0, 0.0)
    assert MinMaxObserver().range() == (0.0, 0.0)


def test_moving_average_by_hand() -> None:
    """Highs 10, 20, 30: 10 -> 10 + 1 = 11 -> 11 + 1.9 = 12.9; lows 0, -10, 0: 0 -> -1 -> -0.9."""
    observer = MovingAverageObserver()
    for low, high in ((0.0, 10.0), (-10.0, 20.0), (0.0, 30.0)):
        observer.observe(torch.tensor([low, high]))
    assert observer.range() == pytest.approx((-0.9, 12.9))
    assert MovingAverageObserver().range() == (0.0, 0.0)


def test_percentile_cuts_one_in_ten_thousand() -> None:
    """Of 60,000 values six are cut off at the top, or three at each end."""
    inside = torch.linspace(0.0, 1.0, 60_000)
    assert ranged("percentile", torch.cat([inside, torch.full((5,), 50.0)]))[1] == pytest.approx(
        1.0, abs=0.05
    )
    ends = torch.tensor([50.0, 50.0, -20.0, -20.0])
    low, high = ranged("percentile", torch.cat([inside, ends]))
    assert (low, high) == pytest.approx((0.0, 1.0), abs=0.05)
    assert PercentileObserver(100.0).range() == (0.0, 0.0)


def test_percentile_of_a_gaussian() -> None:
    """0.005 % lie beyond 3.89 sigma at each end."""
    low, high = ranged("percentile", *(gaussian(65_536, seed) for seed in range(20)))
    assert (low, high) == pytest.approx((-3.89, 3.89), abs=0.12)


def test_quantization_error_by_hand() -> None:
    """Levels 0, 2, 4, ..., 510: 3 is rounded to 4 (half to even), 511 saturates to 510."""
    centers, counts = np.array([3.0, 4.0, 511.0]), np.array([5.0, 100.0, 2.0])
    assert quantization_error(centers, counts, np.array([0.0]), np.array([510.0])).tolist() == [7.0]


def test_mse_clips_rare_outliers_and_nothing_of_a_uniform() -> None:
    """Two of +-60 among 60,000: 2 (60 - h)^2 + 60,000 (2 h / 255)^2 / 12 is least at h = 52."""
    low, high = ranged("mse", torch.cat([gaussian(), torch.tensor([60.0, -60.0])]))
    assert (low, high) == pytest.approx((-52.0, 52.0), abs=2.0)
    assert ranged("mse", torch.linspace(-1.0, 1.0, 60_000)) == pytest.approx((-1.0, 1.0), abs=0.02)
    assert ranged("mse", torch.linspace(0.0, 3.0, 60_000)) == pytest.approx((0.0, 3.0), abs=0.06)


def test_mse_beats_min_max_where_it_clips() -> None:
    values = torch.cat([gaussian(), torch.tensor([12.0])])
    observer = MseObserver()
    observer.observe(values)
    low, high = observer.range()
    exact, ones = values.double().numpy(), np.ones(len(values))
    chosen, full = quantization_error(
        exact, ones, np.array([low, float(values.min())]), np.array([high, float(values.max())])
    )
    assert high < 12.0
    assert chosen < full


def test_mse_is_not_led_by_one_image_in_hundreds() -> None:
    """One image of 256 has 100 times the others' values: its squared error alone would give it the range."""
    images = gaussian(256 * 200).reshape(256, 200)
    usual = ranged("mse", *images.split(16))
    images[77] *= 100.0
    low, high = ranged("mse", *images.split(16))
    assert (low, high) == pytest.approx(usual, rel=1.0)
    observer = MseObserver()
    observer.observe(images)
    assert observer.range() == pytest.approx((low, high), rel=1e-6)  # whatever the batches


def test_mse_weighs_an_image_by_its_mean_square() -> None:
    """Three images of 1 and one of 8, whose mean square is 64 times theirs: its values count for 1/64."""
    observer = MseObserver()
    observer.observe(torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [8.0, 8.0]]))
    centers, counts = observer.weighted()
    assert counts[np.abs(centers) < 2].sum() == 6.0
    assert counts[centers > 2].sum() == pytest.approx(2 / 64, rel=0.01)


def test_mse_says_where_values_are_not_finite() -> None:
    assert np.isinf(ranged("mse", torch.tensor([[1.0, 2.0], [np.inf, 0.0]]))[1])
    assert np.isnan(ranged("mse", torch.tensor([[1.0, 2.0]]), torch.tensor([[np.nan, 0.0]]))[1])


def test_entropy_keeps_a_gaussian_and_clips_far_outliers() -> None:
    low, high = ranged("entropy", *(gaussian(60_000, seed) for seed in range(4)))
    assert 3.5 < high < 5.2
    assert -5.2 < low < -3.5
    outliers = torch.cat([gaussian(), torch.tensor([40.0, -40.0])])
    assert ranged("entropy", outliers)[1] < 12.0


def test_entropy_is_not_led_by_the_zeros_of_relu() -> None:
    """Half of all values are 0 and held exactly: the range is that of the positive half, about 4 sigma."""
    relu = torch.relu(gaussian())
    high = ranged("entropy", relu)[1]
    assert high > 3.5
    assert high == ranged("entropy", relu[relu > 0])[1]


@pytest.mark.parametrize("num", [40, 320, 2_000])
def test_entropy_of_few_values_does_not_clip(num: int) -> None:
    """By chance alone a divergence of (bins - levels) / (2 n) is expected; that is taken off."""
    values = gaussian(num)
    low, high = ranged("entropy", values)
    assert high >= 0.8 * float(values.max())
    assert low <= 0.8 * float(values.min())


def test_entropy_of_nothing_but_zeros() -> None:
    assert ranged("entropy", torch.zeros(10)) == (0.0, 0.0)
    assert EntropyObserver().range() == (0.0, 0.0)


def test_a_histogram_that_grows_keeps_its_counts() -> None:
    histogram = Histogram()
    for reach in (1e-3, 1.0, 1e3, -1e4, 1e-6):
        histogram.observe(torch.linspace(0.0, reach, 101))
    assert histogram.zeros == 5.0
    assert histogram.counts.sum() == 500.0
    assert (histogram.low, histogram.high) == (-1e4, 1e3)
    assert histogram.width * 2048 == 2.0**14
    centers, counts = histogram.filled()
    assert counts.sum() == 505.0
    assert np.all(np.diff(centers) > 0)
    assert counts[centers == 0.0] == 5.0


def test_memory_is_fixed() -> None:
    histogram = Histogram()
    for seed in range(5):
        histogram.observe(gaussian(200_000, seed) * 10.0**seed)
    assert histogram.counts.shape == (4096,)
    assert [v for v in vars(histogram).values() if isinstance(v, np.ndarray)] == [histogram.counts]


def test_extremes_are_exact_however_many_values_are_sampled() -> None:
    values = gaussian(300_000)
    values[1] = 77.0
    values[2] = -55.0
    histogram = Histogram()
    histogram.observe(values)
    assert (histogram.low, histogram.high) == (-55.0, 77.0)
    assert histogram.counts.sum() <= 65_536


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    name=st.sampled_from(["min_max", *HISTOGRAM_OBSERVERS]),
)
def test_how_values_are_cut_into_batches_does_not_matter(
    values: list[float], cuts: list[int], name: str
) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    edges = sorted({0, len(x), *(min(c, len(x)) for c in cuts)})
    parts = [x[a:b] for a, b in itertools.pairwise(edges)]
    assert ranged(name, *(part[:, None] for part in parts)) == ranged(name, x[:, None])  # images of one value


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40),
    name=st.sampled_from(sorted(OBSERVERS)),
)
def test_every_range_holds_zero_and_lies_within_what_was_seen(values: list[float], name: str) -> None:
    low, high = ranged(name, torch.tensor(values, dtype=torch.float32))
    assert min(*values, 0.0) <= low <= 0.0 <= high <= max(*values, 0.0) or math.isclose(
        high, max(values), rel_tol=1e-6
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_a_value_that_is_not_finite_shows_in_the_range(name: str, bad: float) -> None:
    """Neither lost among the others nor, for infinity, a histogram that doubles without end."""
    low, high = ranged(name, torch.tensor([1.0, -1.0]), torch.tensor([0.5, bad]), torch.tensor([2.0]))
    assert not (math.isfinite(low) and math.isfinite(high))


def test_unknown_observer() -> None:
    with pytest.raises(RecipeError, match=r"observer is 'kl', expected one of min_max, moving_average"):
        make_observer("kl")
