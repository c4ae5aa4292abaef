"""Images that are already in memory: uint8 pixels, or inputs that somebody preprocessed before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecnn.data.dataset import Inputs, Labels
from edgecnn.data.geometry import Pixels, resize_and_crop
from edgecnn.errors import DataError
from edgecnn.runner.preprocess import Preprocess


def check_labels(name: str, labels: Any, num_images: int, class_count: int | None) -> Labels:
    """Return labels as int64 (n,).

    Args:
        name: the source, for messages.
        labels: integers, (n,) or (n, 1).
        num_images: the n to expect.
        class_count: classes the network tells apart, or None where unknown.

    Raises:
        DataError: if shape, type, number or range do not fit.

    Example:
        >>> check_labels("x.npz", [[1], [0]], num_images=2, class_count=2).tolist()
        [1, 0]
    """
    values = np.asarray(labels)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(
            f"{name}: labels have shape {values.shape}, expected ({num_images},)",
            hint="one class index per image; for one-hot rows use labels.argmax(axis=1)",
        )
    if len(values) != num_images:
        raise DataError(f"{name}: found {len(values)} labels for {num_images} images, expected one each")
    if values.dtype.kind not in "iu":
        raise DataError(
            f"{name}: labels are {values.dtype}, expected integers",
            hint="class indices counted from 0, for example labels.astype(np.int64)",
        )
    values = values.astype(np.int64)
    wrong = np.flatnonzero((values < 0) | (False if class_count is None else values >= class_count))
    if len(wrong):
        top = (
            "and up"
            if class_count is None
            else f"to {class_count - 1}, as the network has {class_count} classes"
        )
        raise DataError(
            f"{name}: {len(wrong)} of {num_images} labels are out of range, the first is "
            f"labels[{wrong[0]}] = {values[wrong[0]]}, expected 0 {top}",
            hint="labels count from 0; is this the data set that the network was trained for?",
        )
    return values


def check_pixels(name: str, images: npt.NDArray[Any]) -> Pixels:
    """Return images as uint8 (n, h, w, c), c 1 or 3.

    Raises:
        DataError: if type or shape do not fit.
    """
    if images.dtype != np.uint8:
        scaled = " (values * 255, rounded, if they lie in 0..1)" if images.dtype.kind == "f" else ""
        raise DataError(
            f"{name}: images are {images.dtype}, expected uint8 pixels 0..255",
            hint=f"store the pixels before normalisation as uint8{scaled}; edgecnn normalises them",
        )
    if images.ndim == 3:
        images = images[..., None]  # (n, h, w) -> (n, h, w, 1)
    if images.ndim != 4:
        raise DataError(f"{name}: images have shape {images.shape}, expected (n, h, w, c) or (n, h, w)")
    if images.shape[3] not in (1, 3):
        channels_first = images.shape[1] in (1, 3)
        raise DataError(
            f"{name}: images have shape {images.shape}, expected (n, h, w, c) with c 1 or 3",
            hint="channels come last: images.transpose(0, 2, 3, 1)" if channels_first else None,
        )
    if 0 in images.shape:
        raise DataError(f"{name}: images have shape {images.shape}, expected at least one image of one pixel")
    return images


class ArrayDataset:
    """uint8 images in memory; images of another size than the network's are resized and cropped.

    Args:
        name: the source, for messages.
        images: uint8 (n, h, w, c) with c 1 or 3, or (n, h, w).
        preprocess: of the network. Images that have its size already are taken as they are.
        labels: integers (n,), or None.
        class_count: classes the network tells apart, or None where unknown.
        class_names: name of each class by index, or None.
        warnings: to carry along.

    Raises:
        DataError: if images or labels do not fit.

    Example:
        >>> data = ArrayDataset("two", np.full((2, 4, 4), 255, np.uint8), Preprocess((4, 4)), labels=[0, 1])
        >>> data.inputs([1]).shape, float(data.inputs([1]).max())
        ((1, 3, 4, 4), 1.0)
    """

    def __init__(
        self,
        name: str,
        images: npt.NDArray[Any],
        preprocess: Preprocess,
        *,
        labels: Any = None,
        class_count: int | None = None,
        class_names: tuple[str, ...] | None = None,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.class_names = class_names
        self._images = check_pixels(name, images)
        self._preprocess = preprocess
        self.labels: Labels | None = (
            None if labels is None else check_labels(name, labels, len(self._images), class_count)
        )
        self.warnings: tuple[str, ...] = warnings + self._notes()

    def _notes(self) -> tuple[str, ...]:
        found, wanted = self._images.shape[1:], (*self._preprocess.size, self._preprocess.num_channels)
        notes = []
        if found[:2] != wanted[:2]:
            sizes = f"{found[0]}x{found[1]} pixels, resized to the network's {wanted[0]}x{wanted[1]}"
            notes.append(f"{self.name}: images are {sizes}")
        if found[2] != wanted[2]:
            kinds = {1: "gray", 3: "colour"}
            notes.append(f"{self.name}: {kinds[found[2]]} images for a {kinds[wanted[2]]} network, converted")
        return tuple(notes)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def inputs(self, indices: Sequence[int]) -> Inputs:
        """Return the images as float32 (n, c, h, w), through the Preprocess."""
        preprocess = self._preprocess
        chosen = self._images[list(indices)]
        if chosen.shape[1:] != (*preprocess.size, preprocess.num_channels):
            at_size = chosen.shape[1:3] == preprocess.size
            geometry = Preprocess(preprocess.size, None, preprocess.channel_order) if at_size else preprocess
            pixels = [resize_and_crop(image, geometry) for image in chosen]
            chosen = (
                np.stack(pixels)
                if pixels
                else np.empty((0, *preprocess.size, preprocess.num_channels), np.uint8)
            )
        return np.asarray(preprocess.apply(chosen), np.float32)


class InputsDataset:
    """Network inputs in memory, preprocessed by somebody else.

    Args:
        name: the source, for messages.
        inputs: float (n, c, h, w).
        preprocess: of the network; only its size and channels are compared.
        labels: integers (n,), or None.
        class_count: classes the network tells apart, or None where unknown.

    Raises:
        DataError: if inputs or labels do not fit, or values are not finite.

    Example:
        >>> data = InputsDataset("mine", np.ones((2, 1, 4, 4)), Preprocess((4, 4), channel_order="gray"))
        >>> data.inputs([0]).dtype, len(data.warnings)
        (dtype('float32'), 1)
    """

    class_names: tuple[str, ...] | None = None

    def __init__(
        self,
        name: str,
        inputs: npt.NDArray[Any],
        preprocess: Preprocess,
        *,
        labels: Any = None,
        class_count: int | None = None,
    ) -> None:
        self.name = name
        check_inputs_shape(name, inputs.shape[1:], preprocess)
        if len(inputs) == 0:
            raise DataError(f"{name}: found no images, expected at least 1")
        self._inputs: Inputs = inputs.astype(np.float32, copy=False)
        finite = np.isfinite(self._inputs).all(axis=(1, 2, 3))
        if not finite.all():
            first = int(np.argmin(finite))
            raise DataError(
                f"{name}: {int((~finite).sum())} inputs hold NaN or infinity, the first is input {first}"
            )
        self.labels: Labels | None = (
            None if labels is None else check_labels(name, labels, len(inputs), class_count)
        )
        self.warnings: tuple[str, ...] = (already_preprocessed(name),)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._inputs)

    def inputs(self, indices: Sequence[int]) -> Inputs:
        """Return a copy of the inputs as float32 (n, c, h, w)."""
        return self._inputs[list(indices)]


def already_preprocessed(name: str) -> str:
    """Return the warning for inputs that do not go through the Preprocess."""
    return (
        f"{name}: floating-point inputs are taken as already preprocessed; "
        "the preprocessing stored with the files was not applied to them"
    )


def check_inputs_shape(name: str, shape: tuple[int, ...], preprocess: Preprocess) -> None:
    """Check the (c, h, w) of preprocessed inputs against the network's.

    Raises:
        DataError: if they differ.
    """
    expected = (preprocess.num_channels, *preprocess.size)
    if shape != expected:
        raise DataError(
            f"{name}: floating-point inputs have shape {('n', *shape)}, expected {('n', *expected)}".replace(
                "'", ""
            ),
            hint="give the network's own input (n, c, h, w), or uint8 images (n, h, w, c) of any size",
        )
