"""A data source written in Python: `package.module:factory`, called without arguments."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecnn.data.arrays import (
    ArrayDataset,
    InputsDataset,
    already_preprocessed,
    check_inputs_shape,
    check_labels,
    check_pixels,
)
from edgecnn.data.dataset import Dataset, Inputs, Labels
from edgecnn.data.geometry import resize_and_crop
from edgecnn.errors import DataError, EdgeCNNError
from edgecnn.runner.preprocess import Preprocess

_PIL_MODULE = "PIL."


def call_factory(spec: str) -> Any:
    """Import and call `package.module:factory`, the current directory first on the path.

    Raises:
        DataError: if the import, the look-up or the call fails; the cause is chained.
    """
    module_name, _, attribute = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
        return target() if callable(target) else target
    except EdgeCNNError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(
            f"data source {spec}: the factory raised {what}",
            hint="it is called without arguments, from the current directory",
        ) from error


def to_array(values: Any) -> npt.NDArray[Any]:
    """Return a NumPy array of an array, a tensor on any device, or nested numbers."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":
            values = values.float()
    return np.asarray(values)


class SequenceDataset:
    """A sequence of images or (image, label), such as a torch Dataset, read by index when asked for.

    An image is a Pillow image or uint8 (h, w, c), which go through the Preprocess, or a float
    (c, h, w), which is taken as already preprocessed.

    Args:
        name: the source, for messages.
        items: the sequence. Without an attribute `targets` or `labels` it is read once for the labels.
        preprocess: of the network.
        class_count: classes the network tells apart, or None where unknown.

    Raises:
        DataError: if it is empty or its labels do not fit.
    """

    class_names: tuple[str, ...] | None = None

    def __init__(
        self, name: str, items: Sequence[Any], preprocess: Preprocess, *, class_count: int | None = None
    ) -> None:
        self.name = name
        self._items = items
        self._preprocess = preprocess
        if len(items) == 0:
            raise DataError(f"{name}: found no images, expected at least 1")
        self._labelled = _is_pair(items[0])
        self.labels: Labels | None = self._read_labels(class_count) if self._labelled else None
        first = items[0][0] if self._labelled else items[0]
        is_input = not _is_pillow(first) and to_array(first).dtype != np.uint8
        self.warnings: tuple[str, ...] = (already_preprocessed(name),) if is_input else ()

    def _read_labels(self, class_count: int | None) -> Labels:
        labels: Any = None
        for attribute in ("targets", "labels"):
            values = getattr(self._items, attribute, None)
            if values is not None and not callable(values) and len(values) == len(self._items):
                labels = to_array(values)
                break
        if labels is None:
            labels = [int(self._items[index][1]) for index in range(len(self._items))]
        return check_labels(self.name, labels, len(self._items), class_count)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._items)

    def inputs(self, indices: Sequence[int]) -> Inputs:
        """Return the images as float32 (n, c, h, w).

        Raises:
            DataError: if an item is no image or has another shape than the network's input.
        """
        found = [self._input(self._items[int(index)]) for index in indices]
        shape = (0, self._preprocess.num_channels, *self._preprocess.size)
        return np.stack(found) if found else np.empty(shape, np.float32)

    def _input(self, item: Any) -> Inputs:
        image = item[0] if self._labelled else item
        if not _is_pillow(image):
            image = to_array(image)
            if image.dtype != np.uint8:
                check_inputs_shape(self.name, image.shape, self._preprocess)
                return np.asarray(image, np.float32)
            image = check_pixels(self.name, image[None])[0]
        pixels = resize_and_crop(image, self._preprocess)
        return np.asarray(self._preprocess.apply(pixels[None])[0], np.float32)


def _is_pillow(value: Any) -> bool:
    return type(value).__module__.startswith(_PIL_MODULE)


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2


def _from_iterable(
    name: str, items: Iterable[Any], preprocess: Preprocess, class_count: int | None
) -> ArrayDataset | InputsDataset | SequenceDataset:
    """Read an iterable of batches (a DataLoader) or of single items through once and keep it."""
    listed = list(items)
    if not listed:
        raise DataError(f"{name}: found no images, expected at least 1")
    first = listed[0][0] if _is_pair(listed[0]) else listed[0]
    if _is_pillow(first) or to_array(first).ndim != 4:
        return SequenceDataset(name, listed, preprocess, class_count=class_count)
    labelled = _is_pair(listed[0])
    batches = [to_array(item[0] if labelled else item) for item in listed]
    labels = np.concatenate([np.atleast_1d(to_array(item[1])) for item in listed]) if labelled else None
    return from_arrays(name, np.concatenate(batches), labels, preprocess, class_count)


def from_arrays(
    name: str, images: Any, labels: Any, preprocess: Preprocess, class_count: int | None
) -> ArrayDataset | InputsDataset:
    """Make a Dataset of arrays: uint8 (n, h, w, c), or float (n, c, h, w) already preprocessed.

    Raises:
        DataError: if they do not fit.
    """
    images = to_array(images)
    labels = None if labels is None else to_array(labels)
    if images.dtype.kind == "f" and images.ndim == 4:
        return InputsDataset(name, images, preprocess, labels=labels, class_count=class_count)
    return ArrayDataset(name, images, preprocess, labels=labels, class_count=class_count)


def from_python(name: str, value: Any, preprocess: Preprocess, *, class_count: int | None = None) -> Dataset:
    """Make a Dataset of whatever Python code returned.

    Args:
        name: the source, for messages.
        value: a Dataset, an array, (images, labels), a sequence of items (read by index when asked for),
            or an iterable of items or batches (kept in memory). An item is an image or (image, label).
        preprocess: of the network.
        class_count: classes the network tells apart, or None where unknown.

    Raises:
        DataError: if it is none of these, or does not fit.
    """
    if isinstance(value, Dataset):
        if value.labels is not None:
            check_labels(name, value.labels, len(value), class_count)
        return value
    if isinstance(value, np.ndarray) or hasattr(value, "detach"):
        return from_arrays(name, value, None, preprocess, class_count)
    if isinstance(value, tuple) and len(value) == 2 and hasattr(value[0], "shape"):
        return from_arrays(name, value[0], value[1], preprocess, class_count)
    try:
        if (
            hasattr(value, "__getitem__")
            and hasattr(value, "__len__")
            and not isinstance(value, (str, bytes, dict))
        ):
            first = value[0][0] if len(value) and _is_pair(value[0]) else value[0] if len(value) else None
            if first is None or _is_pillow(first) or to_array(first).ndim < 4:
                return SequenceDataset(name, value, preprocess, class_count=class_count)
        if isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict)):
            return _from_iterable(name, value, preprocess, class_count)
    except EdgeCNNError:
        raise
    except Exception as error:
        raise DataError(f"{name}: reading the images raised {type(error).__name__}: {error}") from error
    raise DataError(
        f"{name}: got a {type(value).__name__}, expected a Dataset, uint8 images (n, h, w, c), "
        "(images, labels), or an iterable of images or (image, label)"
    )
