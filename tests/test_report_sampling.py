"""The standard error of a drop: by hand, by McNemar's counts, and from real predictions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgecnn.proof import Predictions
from edgecnn.report.sampling import drop_error, drop_text, images_needed, unproven_text


def test_the_error_by_hand() -> None:
    """4 images, one of them lost: 1/4 +- sqrt((1/4 - 1/16) / 4) = sqrt(3) / 8."""
    assert drop_error(1, 0, 4) == pytest.approx(100 * math.sqrt(3) / 8)
    assert drop_error(1, 1, 8) == pytest.approx(100 * math.sqrt(2 / 8 / 8))
    assert drop_error(0, 0, 500) == 0.0


def test_the_error_is_that_of_the_differences() -> None:
    """28 of 2,000 images lost and 33 gained: a drop of -0.25 points."""
    differences = np.repeat([1, -1, 0], [28, 33, 1939])
    assert drop_error(28, 33, 2000) == pytest.approx(100 * differences.std() / math.sqrt(2000))
    assert drop_text(-0.25, drop_error(28, 33, 2000), 2000) == "-0.25 +- 0.39 points on 2,000 images"
    assert drop_text(0.5, None, 100) == "0.50 points on 100 images"


def test_how_many_images_would_show_it() -> None:
    """0.25 is 0.05 below a budget of 0.3, an eighth of 0.4: 64 times as many images."""
    assert images_needed(0.25, 0.4, 2000, 0.3) == 128_000
    assert images_needed(0.3, 0.4, 2000, 0.3) is None
    text = "measured 0.25 +- 0.40 points on 2,000 images: some 128,000 would be needed to show it"
    assert unproven_text(0.25, 0.4, 2000, 0.3) == text
    assert unproven_text(0.3, 0.4, 2000, 0.3).endswith("no number of images would show it")
    assert unproven_text(-0.25, 0.39, 2000, 0.3) == ""
    assert unproven_text(0.4, 0.1, 2000, 0.3) == "", "missed, which is said elsewhere"
    assert unproven_text(0.25, None, 2000, 0.3) == ""


def test_images_lost_and_gained_are_counted_chunk_by_chunk() -> None:
    found = Predictions()
    right = {"float": np.array([True, True, False, False]), "int8": np.array([True, False, True, False])}
    found.count_changed(right, "float")
    found.count_changed({"float": np.array([True]), "int8": np.array([False])}, "float")
    assert found.changed == {"float": (0, 0), "int8": (2, 1)}
