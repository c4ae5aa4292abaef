"""The 1,797 handwritten digits that come with scikit-learn: data for a first try, without a download.

**Source**: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998 (its test set, 8x8 pixels of 0..16).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgecnn.data.arrays import ArrayDataset
from edgecnn.errors import DataError, MissingDependencyError
from edgecnn.runner.preprocess import Preprocess

NUM_TRAIN = 1437
"""Samples 0 to 1436 are the training part, the other 360 the test part."""

_PARTS = {"": slice(None), "train": slice(NUM_TRAIN), "test": slice(NUM_TRAIN, None)}


def open_digits(part: str, preprocess: Preprocess, *, class_count: int | None = None) -> ArrayDataset:
    """Open the digits, stretched to 0..255 and resized bilinearly to the network's size.

    Args:
        part: "" for all 1,797, "train" for the first 1,437, "test" for the last 360.
        preprocess: of the network; its resize_short and interpolation play no part.
        class_count: classes the network tells apart, or None where unknown.

    Raises:
        DataError: if the part is unknown or the network has fewer than 10 classes.
        MissingDependencyError: if scikit-learn is not installed.

    Example:
        >>> len(open_digits("test", Preprocess((28, 28), channel_order="gray", mean=(0.0,), std=(1.0,))))
        360
    """
    if part not in _PARTS:
        raise DataError(f"digits has no part '{part}', expected digits, digits:train or digits:test")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "the digits come with scikit-learn, which is not installed",
            hint="pip install 'edgecnn[torch]', or pip install scikit-learn",
        ) from error
    bunch = load_digits()
    chosen = _PARTS[part]
    images = np.rint(bunch.images[chosen] * (255.0 / 16.0)).astype(np.uint8)  # (n, 8, 8)
    return ArrayDataset(
        f"digits:{part}" if part else "digits",
        images,
        replace(preprocess, resize_short=None, interpolation="bilinear"),
        labels=bunch.target[chosen],
        class_count=class_count,
        class_names=tuple(str(digit) for digit in range(10)),
    )
