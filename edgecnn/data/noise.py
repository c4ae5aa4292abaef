"""Noise that resembles photographs: made-up images start from it, and some networks tell no more."""

from __future__ import annotations

import numpy as np

from edgecnn.data.arrays import ArrayDataset
from edgecnn.data.geometry import Pixels
from edgecnn.errors import DataError
from edgecnn.runner.preprocess import Preprocess

PRIOR_MEAN, PRIOR_STD = 0.45, 0.25
"""What the usual normalisation takes to mean 0 and variance 1."""


def check_num_images(num_images: int) -> None:
    """Raise DataError if a number of images is not positive."""
    if num_images < 1:
        raise DataError(f"asked for {num_images} synthetic images, expected at least 1")


def noise_images(preprocess: Preprocess, num_images: int, seed: int) -> ArrayDataset:
    """Make unlabelled noise with the spectrum, brightness and contrast of photographs.

    Args:
        preprocess: of the network.
        num_images: how many, at least 1.
        seed: of the noise.

    Returns:
        Images without labels, with a warning.

    Raises:
        DataError: if num_images is not positive.

    Example:
        >>> noise_images(Preprocess((8, 8)), 4, seed=0).inputs([0, 1]).shape
        (2, 3, 8, 8)
    """
    check_num_images(num_images)
    message = (
        "no data given, no BatchNorm and no classes to learn from: calibrated and judged on "
        f"{num_images} images of noise, so value ranges are a guess and accuracy is unmeasured and "
        "probably lost; do not ship this file, give --data with about 100 real images"
    )
    pixels = natural_noise(preprocess, num_images, seed)
    return ArrayDataset("noise images", pixels, preprocess, warnings=(message,))


def natural_noise(preprocess: Preprocess, num_images: int, seed: int) -> Pixels:
    """Return uint8 (n, h, w, c) noise whose amplitude falls as 1/f, colours mostly gray.

    **Source**: D. J. Field, Relations between the statistics of natural images and the response
    properties of cortical cells, J. Opt. Soc. Am. A 4, 1987: amplitude spectra of photographs fall as 1/f.
    """
    height, width = preprocess.size
    channels = preprocess.num_channels
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1.0
    images = np.empty((num_images, height, width, channels), np.uint8)
    for index in range(num_images):
        white = rng.standard_normal((channels + 1, height, width))
        pink = np.fft.irfft2(np.fft.rfft2(white) / frequency, s=(height, width))
        pink -= pink.mean((1, 2), keepdims=True)
        pink /= pink.std((1, 2), keepdims=True) + 1e-12
        mixed = np.sqrt(0.85) * pink[:1] + np.sqrt(0.15) * pink[1:]  # gray part and colours: (c, h, w)
        level = PRIOR_MEAN + rng.normal(0.0, 0.1, (channels, 1, 1))
        contrast = PRIOR_STD * np.exp(rng.normal(0.0, 0.3))
        colours = np.clip(level + contrast * mixed, 0.0, 1.0)
        images[index] = np.rint(colours * 255.0).astype(np.uint8).transpose(1, 2, 0)
    return images
