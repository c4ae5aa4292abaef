"""Resize and crop: the part of a Preprocess that needs an image library.

With short side s = min(h, w), the image becomes (h * r / s, w * r / s) for r = resize_short, truncated
to whole pixels, then the central (height, width) is cut out at round((h - height) / 2), padded with
black where the image is smaller. These are the steps of torchvision's Resize and CenterCrop on Pillow
images, antialiased, so accuracies published for those hold here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgecnn.errors import DataError, MissingDependencyError
from edgecnn.runner.preprocess import Preprocess

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]


def import_pillow() -> Any:
    """Return Pillow's Image module.

    Raises:
        MissingDependencyError: if Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "reading and resizing images needs Pillow, which is not installed",
            hint="pip install 'edgecnn[torch]', or pip install pillow",
        ) from error
    return Image


def _to_mode(image: Image.Image, channel_order: str) -> Image.Image:
    """Return the image as 8-bit gray or RGB; 16-bit values keep their upper 8 bits."""
    mode = "L" if channel_order == "gray" else "RGB"
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255.
        values = np.asarray(image).astype(np.int64)
        image = import_pillow().fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise DataError("pixels are floating-point numbers, expected 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def resize_and_crop(image: Image.Image | Pixels, preprocess: Preprocess) -> Pixels:
    """Bring one image to the network's size and channels.

    Args:
        image: a Pillow image of any mode, or uint8 (h, w), (h, w, 1) or (h, w, 3).
        preprocess: says size, resize_short, interpolation, and gray or colour.

    Returns:
        uint8 (height, width, c), channels as RGB or gray.

    Raises:
        DataError: if the pixels are not 8 or 16 bit.
        MissingDependencyError: if Pillow is not installed.

    Example:
        >>> two_pixels = np.array([[0, 255]], np.uint8)
        >>> resize_and_crop(two_pixels, Preprocess((1, 1), channel_order="gray")).tolist()
        [[[128]]]
    """
    pillow = import_pillow()
    if isinstance(image, np.ndarray):
        opened: Image.Image = pillow.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    else:
        opened = image
    image = _to_mode(opened, preprocess.channel_order)
    resampling = getattr(pillow.Resampling, preprocess.interpolation.upper())
    height, width = preprocess.size
    if preprocess.resize_short is None:
        resized = image if image.size == (width, height) else image.resize((width, height), resampling)
    else:
        short, scale_to = min(image.size), preprocess.resize_short
        new_width, new_height = (scale_to * side // short for side in image.size)
        resized = (
            image
            if (new_width, new_height) == image.size
            else image.resize((max(new_width, 1), max(new_height, 1)), resampling)
        )
        left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
        if (left, top, resized.size) != (0, 0, (width, height)):
            resized = resized.crop((left, top, left + width, top + height))
    pixels = np.asarray(resized, np.uint8)
    return pixels.reshape(height, width, preprocess.num_channels)
