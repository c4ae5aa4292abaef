"""Are these images at all? What no BatchNorm is needed for: blank, flat, repeated, scaled otherwise, noise.

The inputs are taken back to pixel values p = (x * std + mean) / scale, which should lie in 0..255. Noise is
told by the correlation of horizontal neighbours, over positions of all images, their means taken out:

    r = sum (p_i - m) (p_{i+1} - m) / sqrt(sum (p_i - m)^2 sum (p_{i+1} - m)^2)

around 0.9 and more in photographs, 0.6 and more in small drawings, 0 in noise.

Source: Field 1987, Relations between the statistics of natural images and the response properties of cortical
cells, J. Opt. Soc. Am. A 4 (neighbouring pixels of natural images are alike).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgecnn.runner.preprocess import Preprocess

MIN_CORRELATION = 0.15
TOO_LARGE, TOO_SMALL = 1000.0, 1.5
"""Pixel values beyond the first, or all below the second, were scaled once too little or once too often."""

FLAT = 0.5
"""Standard deviation in pixel values below which an image is one colour."""

_ADVICE = "scales calibrated on it are useless"


def to_pixels(preprocess: Preprocess, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return pixel values 0..255 (n, c, h, w) in the network's channel order.

    Example:
        >>> to_pixels(Preprocess((1, 1), scale=0.5), np.ones((1, 3, 1, 1), np.float32)).ravel().tolist()
        [2.0, 2.0, 2.0]
    """
    mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    return np.asarray((inputs * std + mean) / np.float32(preprocess.scale), np.float32)


def suspect_images(preprocess: Preprocess, inputs: npt.NDArray[np.float32], name: str) -> list[str]:
    """Say what is wrong with calibration images, as far as they show it themselves.

    Args:
        preprocess: that made `inputs`.
        inputs: float32 (n, c, h, w).
        name: of the source, for the messages.

    Returns:
        At most one warning: what was found, and what was expected.
    """
    found = _suspect_values(preprocess, inputs)
    return [f"{name}: {found}; {_ADVICE}"] if found else []


def _suspect_values(preprocess: Preprocess, inputs: npt.NDArray[np.float32]) -> str:
    """Tell values that no pixels have; return what was found and expected, or nothing."""
    if not np.isfinite(inputs).all():
        count = int((~np.isfinite(inputs).all(axis=(1, 2, 3))).sum())
        return f"{count} of {len(inputs)} images hold NaN or infinite values, expected pixels 0..255"
    pixels = to_pixels(preprocess, inputs)
    low, high = float(pixels.min()), float(pixels.max())
    if max(abs(low), abs(high)) < FLAT:
        return f"all {len(pixels)} images are black (every pixel 0), expected pixels 0..255"
    if high - low < FLAT:
        return f"every pixel of {len(pixels)} images is {low:.0f}, expected photographs or drawings"
    reach = f"pixels reach from {low:.4g} to {high:.4g}, expected 0..255"
    if max(-low, high) > TOO_LARGE:
        return f"{reach}: the inputs seem to be 0..255 where 0..1 or a normalized range was meant"
    if low > -FLAT and high < TOO_SMALL:
        return f"{reach}: they seem to be scaled to 0..1 already, and are scaled again"
    return _suspect_content(pixels)


def _suspect_content(pixels: npt.NDArray[np.float32]) -> str:
    """Tell flat images, one image repeated, and noise."""
    flat = int((pixels.std(axis=(2, 3)).max(axis=1) < FLAT).sum())
    if flat > len(pixels) // 2:
        return f"{flat} of {len(pixels)} images are one colour, expected photographs or drawings"
    if len(pixels) > 1 and bool((pixels == pixels[:1]).all()):
        return f"all {len(pixels)} images are the same one, expected different ones"
    correlation = neighbour_correlation(pixels)
    if correlation is not None and correlation < MIN_CORRELATION:
        return (
            f"the images look like noise (neighbouring pixels correlate by {abs(correlation):.2f}, "
            "photographs by 0.9), expected images like those of training"
        )
    return ""


def neighbour_correlation(pixels: npt.NDArray[Any]) -> float | None:
    """Return the correlation of horizontal neighbours, None where there are too few pixels.

    Args:
        pixels: (n, c, h, w).

    Example:
        >>> round(neighbour_correlation(np.tile(np.arange(8.0), (1, 1, 8, 1))), 3)
        1.0
    """
    if pixels.shape[3] < 8 or pixels.shape[2] < 8:
        return None
    left, right = pixels[..., :-1].astype(np.float64), pixels[..., 1:].astype(np.float64)
    left, right = (side - side.mean(axis=(2, 3), keepdims=True) for side in (left, right))
    norm = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum()) / norm if norm > 0 else None
