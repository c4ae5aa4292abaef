"""How an image becomes the network's input: one description for calibration, evaluation and the board.

    x[n, c, h, w] = (image[n, h, w, order(c)] * scale - mean[c]) / std[c]

The geometry (resize, crop) needs an image library and happens where images are decoded; the
arithmetic is here, so that a board repeats it exactly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Dict, Optional, Tuple

import numpy as np


@dataclass(frozen=True)
class Preprocess:
    """Image geometry and arithmetic ahead of a network.

    Attributes:
        size: (height, width) of the network's input, in pixels.
        resize_short: the shorter side is resized to this many pixels before the center crop;
            None resizes straight to `size`.
        channel_order: "rgb", "bgr" or "gray".
        scale: factor on the raw pixel values (0..255), usually 1/255.
        mean: per channel, subtracted after scaling, in the network's channel order.
        std: per channel, divided by after subtracting.
        interpolation: "bilinear" or "bicubic".
        source: where the values come from ("timm", "user", "default: imagenet" ...), for the report.

    Example:
        >>> p = Preprocess(size=(1, 1), channel_order="gray", mean=(0.5,), std=(0.5,))
        >>> float(p.apply(np.full((1, 1, 1, 1), 255, np.uint8))[0, 0, 0, 0])
        1.0
    """

    size: Tuple[int, int]
    resize_short: Optional[int] = None
    channel_order: str = "rgb"
    scale: float = 1.0 / 255.0
    mean: Tuple[float, ...] = (0.0, 0.0, 0.0)
    std: Tuple[float, ...] = (1.0, 1.0, 1.0)
    interpolation: str = "bilinear"
    source: str = "default"

    @property
    def num_channels(self) -> int:
        """Channels of the network's input."""
        return 1 if self.channel_order == "gray" else 3

    def apply(self, images: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """Turn pixels into the network's input.

        Args:
            images: uint8 (n, h, w, c) with h, w equal to `size`, channels as RGB or gray.

        Returns:
            float32 (n, c, h, w).

        Raises:
            ValueError: if the shape does not fit this description.
        """
        expected = (*self.size, self.num_channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images have shape {images.shape}, expected (n, {', '.join(map(str, expected))})"
            )
        if self.channel_order == "bgr":
            images = images[..., ::-1]
        mean = np.asarray(self.mean, np.float32)
        std = np.asarray(self.std, np.float32)
        x = (images.astype(np.float32) * np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))  # (n, h, w, c) -> (n, c, h, w)

    def to_dict(self) -> Dict[str, Any]:
        """Return a JSON-ready dict, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> "Preprocess":
        """Build from the dict that `to_dict` gave (lists become tuples)."""
        arguments: Dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**arguments)
