"""Random changes to training images, each drawn from a generator that the caller gives.

    flip       mirror left to right, probability 1/2
    crop       pad by an eighth of the size with black, cut the size out again at a random place
    rotation   by an angle in [-15, 15] degrees, black around
    colour     brightness, contrast and saturation by factors in [0.8, 1.2], hue by up to 0.03 turns
    noise      Gaussian, standard deviation up to 0.03 of the range
    mixup      x = l * x_i + (1 - l) * x_j,  t = l * t_i + (1 - l) * t_j,  l ~ Beta(a, a)
    cutmix     a rectangle of x_j in x_i, t mixed by the areas, area share 1 - l, l ~ Beta(a, a)

Images come as the network's inputs and go back as such; colour, rotation and noise work on the pixels in
[0, 1] that the Preprocess is undone to. The arithmetic of rotation and colour is kornia's; the draws are not,
since kornia's own come from PyTorch's global generator, which a resumed run could not repeat.

Source: Zhang et al. 2018, arXiv:1710.09412, equation 1 (mixup); Yun et al. 2019, arXiv:1905.04899,
equations 1 and 2 (cutmix).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgecnn.errors import MissingDependencyError
from edgecnn.runner.preprocess import Preprocess

MAX_DEGREES = 15.0
MAX_FACTOR = 0.2
MAX_HUE_TURNS = 0.03
MAX_NOISE = 0.03
_CROP_SHARE = 8
_NEEDS_KORNIA = frozenset({"rotation", "colour"})
_IN_PIXELS = frozenset({"rotation", "colour", "noise"})


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images.

    Attributes:
        names: some of flip, crop, rotation, colour, noise.
        preprocess: of the network.
        mixup: alpha, 0 for none.
        cutmix: alpha, 0 for none.
    """

    names: tuple[str, ...]
    preprocess: Preprocess
    mixup: float = 0.0
    cutmix: float = 0.0

    def check(self) -> None:
        """Check that what the augmentations need is installed.

        Raises:
            MissingDependencyError: if it is not.
        """
        if _NEEDS_KORNIA & set(self.names):
            _import_kornia()

    @property
    def changes(self) -> bool:
        """Whether images are changed at all."""
        return bool(self.names) or self.mixes

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other, so that targets are too."""
        return self.mixup > 0 or self.cutmix > 0

    def apply(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """Return changed images.

        Args:
            x: network inputs (n, c, h, w), left as they are.
            rng: all draws come from it.

        Returns:
            (n, c, h, w).
        """
        if "flip" in self.names:
            x = _flip(x, rng)
        if "crop" in self.names:
            x = _crop(x, self._black(x), rng)
        if _IN_PIXELS & set(self.names):
            x = self._in_pixels(x, rng)
        return x

    def mix(
        self, x: Tensor, targets: Tensor | None, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Mix images, and their targets in the same proportions.

        Args:
            x: (n, c, h, w).
            targets: (n, classes), or None for unlabelled images.
            rng: all draws come from it.

        Returns:
            Images and targets of the same shapes.
        """
        use_cutmix = self.cutmix > 0 and (self.mixup <= 0 or rng.random() < 0.5)
        alpha = self.cutmix if use_cutmix else self.mixup
        share = float(rng.beta(alpha, alpha))
        partner = torch.from_numpy(rng.permutation(len(x))).to(x.device)
        if use_cutmix:
            x, share = _cut_and_paste(x, x[partner], share, rng)
        else:
            x = share * x + (1.0 - share) * x[partner]
        if targets is not None:
            targets = share * targets + (1.0 - share) * targets[partner]
        return x, targets

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of pixels in [0, 1], (1, c, 1, 1) each: x = (p - mean) / std."""
        unit = 255.0 * self.preprocess.scale
        mean = torch.tensor(self.preprocess.mean, dtype=x.dtype, device=x.device).reshape(1, -1, 1, 1) / unit
        std = torch.tensor(self.preprocess.std, dtype=x.dtype, device=x.device).reshape(1, -1, 1, 1) / unit
        return mean, std

    def _black(self, x: Tensor) -> Tensor:
        mean, std = self._statistics(x)
        return -mean / std

    def _in_pixels(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        mean, std = self._statistics(x)
        pixels = x * std + mean
        swap = self.preprocess.channel_order == "bgr"
        pixels = pixels.flip(1) if swap else pixels
        if "rotation" in self.names:
            pixels = _rotate(pixels, rng)
        if "colour" in self.names:
            pixels = _recolour(pixels, rng)
        if "noise" in self.names:
            pixels = _add_noise(pixels, rng)
        pixels = pixels.clamp(0.0, 1.0)
        pixels = pixels.flip(1) if swap else pixels
        return (pixels - mean) / std


def _flip(x: Tensor, rng: np.random.Generator) -> Tensor:
    chosen = torch.from_numpy(rng.random(len(x)) < 0.5).to(x.device)
    return torch.where(chosen.reshape(-1, 1, 1, 1), x.flip(3), x)


def _crop(x: Tensor, black: Tensor, rng: np.random.Generator) -> Tensor:
    n, c, height, width = x.shape
    top, left = -(-height // _CROP_SHARE), -(-width // _CROP_SHARE)
    padded = black.expand(n, c, height + 2 * top, width + 2 * left).clone()
    padded[:, :, top : top + height, left : left + width] = x
    rows = torch.from_numpy(rng.integers(0, 2 * top + 1, n)).to(x.device)
    columns = torch.from_numpy(rng.integers(0, 2 * left + 1, n)).to(x.device)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (n, c, 2 top + 1, 2 left + 1, h, w)
    return windows[torch.arange(n, device=x.device), :, rows, columns]  # (n, c, h, w)


def _draw(rng: np.random.Generator, low: float, high: float, like: Tensor) -> Tensor:
    """Return (n,) uniform draws."""
    return torch.from_numpy(rng.uniform(low, high, len(like)).astype(np.float32)).to(like.device)


def _import_kornia() -> Any:
    try:
        import kornia
    except ImportError as error:
        raise MissingDependencyError(
            "rotation and colour augmentation need kornia, which is not installed",
            hint="pip install 'edgecnn[train]', or leave them out of augment",
        ) from error
    return kornia


def _rotate(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    kornia = _import_kornia()
    angles = _draw(rng, -MAX_DEGREES, MAX_DEGREES, pixels)
    rotated: Tensor = kornia.geometry.transform.rotate(pixels, angles)
    return rotated


def _recolour(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    enhance = _import_kornia().enhance
    low, high = 1.0 - MAX_FACTOR, 1.0 + MAX_FACTOR
    pixels = enhance.adjust_brightness_accumulative(pixels, _draw(rng, low, high, pixels))
    pixels = enhance.adjust_contrast_with_mean_subtraction(pixels, _draw(rng, low, high, pixels))
    if pixels.shape[1] == 3:
        pixels = enhance.adjust_saturation_with_gray_subtraction(pixels, _draw(rng, low, high, pixels))
        turns = _draw(rng, -MAX_HUE_TURNS, MAX_HUE_TURNS, pixels)
        pixels = enhance.adjust_hue(pixels, turns * (2.0 * math.pi))
    return pixels


def _add_noise(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    noise = torch.randn(pixels.shape, generator=generator).to(pixels.device)
    return pixels + noise * _draw(rng, 0.0, MAX_NOISE, pixels).reshape(-1, 1, 1, 1)


def _cut_and_paste(x: Tensor, other: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Return x with a rectangle of `other`, and the share of x that is left."""
    height, width = x.shape[2:]
    side = math.sqrt(1.0 - share)
    center_row, center_column = int(rng.integers(height)), int(rng.integers(width))
    half_rows, half_columns = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(center_row - half_rows, 0), min(center_row + half_rows, height)
    left, right = max(center_column - half_columns, 0), min(center_column + half_columns, width)
    x = x.clone()
    x[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
    return x, 1.0 - (bottom - top) * (right - left) / (height * width)
