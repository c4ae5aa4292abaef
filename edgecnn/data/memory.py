"""Decoded images kept in memory, so that small sets are decoded once and not in every epoch.

A Dataset hands out inputs x = (pixel * scale - mean) / std as float32. Where that can be undone exactly,
pixel = rint((x * std + mean) / scale), the images are kept as uint8, a quarter of the size; else as float32.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgecnn.data.dataset import Dataset, Inputs, Labels, SkippingDataset
from edgecnn.runner.preprocess import Preprocess

MAX_BYTES = 4 << 30
"""Kept at most, however large the machine."""

_SHARE_OF_FREE = 0.25
_READ_AT_ONCE = 256


def affordable_bytes() -> int:
    """Return how much memory images may take: a quarter of what is free, at most MAX_BYTES."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows does not say
        return MAX_BYTES // 4
    return min(int(free * _SHARE_OF_FREE), MAX_BYTES)


class MemoryImages:
    """A Dataset that remembers the images of another one, as many as fit.

    Args:
        dataset: any dataset.
        preprocess: of the network, which says how to undo the arithmetic.
        max_bytes: memory for images; by default `affordable_bytes()`. What does not fit is read each time.

    Example:
        >>> from edgecnn.data import noise_images
        >>> images = MemoryImages(noise_images(Preprocess((4, 4)), 2, seed=0), Preprocess((4, 4)))
        >>> bool((images.inputs([1]) == images.inputs([1])).all()), images.bytes_per_image
        (True, 48)
    """

    def __init__(self, dataset: Dataset, preprocess: Preprocess, max_bytes: int | None = None) -> None:
        self.dataset = dataset
        self._preprocess = preprocess
        self._max_bytes = affordable_bytes() if max_bytes is None else max_bytes
        self._slots = np.full(len(dataset), -1, np.int64)
        self._used = 0
        self._store: npt.NDArray[np.uint8] | npt.NDArray[np.float32] | None = None
        self._unreadable: set[int] = set()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Name of the dataset."""
        return self.dataset.name

    @property
    def labels(self) -> Labels | None:
        """Labels of the dataset."""
        return self.dataset.labels

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Class names of the dataset."""
        return self.dataset.class_names

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of the dataset."""
        return self.dataset.warnings

    @property
    def bytes_per_image(self) -> int:
        """What one kept image takes; 0 before the first was read."""
        return 0 if self._store is None else int(self._store[:1].nbytes)

    @property
    def num_kept(self) -> int:
        """How many images are kept now."""
        return self._used

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def inputs(self, indices: Sequence[int]) -> Inputs:
        """Return the images as float32 (n, c, h, w), bit for bit as the dataset gives them.

        Raises:
            DataError: if one cannot be read.
        """
        return self._gather(indices)

    def readable_inputs(self, indices: Sequence[int]) -> tuple[Inputs, list[int]]:
        """Return (float32 (m, c, h, w), the m <= n indices that could be read).

        Raises:
            DataError: if too many cannot, or one where the dataset tolerates none.
        """
        if not isinstance(self.dataset, SkippingDataset):
            return self.inputs(indices), [int(index) for index in indices]
        with self._lock:
            unknown = [int(i) for i in indices if self._slots[i] < 0 and int(i) not in self._unreadable]
        kept: list[int] = []
        for start in range(0, len(unknown), _READ_AT_ONCE):
            inputs, read = self.dataset.readable_inputs(unknown[start : start + _READ_AT_ONCE])
            self._keep(inputs, read)
            kept.extend(read)
        self._unreadable.update(set(unknown) - set(kept))
        readable = [int(index) for index in indices if int(index) not in self._unreadable]
        return self.inputs(readable), readable

    def _gather(self, indices: Sequence[int]) -> Inputs:
        wanted = np.asarray([int(index) for index in indices], np.int64)
        missing = wanted[self._slots[wanted] < 0]
        fresh: Inputs | None = None
        if len(missing):
            fresh = self.dataset.inputs(missing.tolist())
            self._keep(fresh, missing.tolist())
            if len(missing) == len(wanted):
                return fresh
        kept = self._slots[wanted]
        if fresh is None:
            return self._inputs_of(kept)
        found = np.empty((len(wanted), *fresh.shape[1:]), np.float32)
        is_fresh = np.isin(wanted, missing)
        found[is_fresh] = fresh
        found[~is_fresh] = self._inputs_of(kept[~is_fresh])
        return found

    def _inputs_of(self, slots: npt.NDArray[np.int64]) -> Inputs:
        if self._store is None:
            return self.dataset.inputs([])
        chosen = self._store[slots]
        if chosen.dtype == np.uint8:
            return np.asarray(self._preprocess.apply(chosen), np.float32)
        return np.asarray(chosen, np.float32)

    def _keep(self, inputs: Inputs, indices: Sequence[int]) -> None:
        """Remember images that were just read, as far as there is room."""
        with self._lock:
            pixels = self._pixels(inputs)
            if self._store is None and len(inputs):
                example = inputs if pixels is None else pixels
                room = max(self._max_bytes // max(example[:1].nbytes, 1), 0)
                capacity = min(len(self.dataset), room)
                self._store = np.empty((capacity, *example.shape[1:]), example.dtype)
            if self._store is None:
                return
            values = pixels if self._store.dtype == np.uint8 else inputs
            if values is None:
                return
            for value, index in zip(values, indices, strict=True):
                if self._used >= len(self._store):
                    return
                if self._slots[index] < 0:
                    self._store[self._used] = value
                    self._slots[index] = self._used
                    self._used += 1

    def _pixels(self, inputs: Inputs) -> npt.NDArray[np.uint8] | None:
        """Return uint8 (n, h, w, c) from which the Preprocess makes exactly these inputs, or None."""
        preprocess = self._preprocess
        if inputs.shape[1:] != (preprocess.num_channels, *preprocess.size):
            return None
        mean = np.asarray(preprocess.mean, np.float32)
        std = np.asarray(preprocess.std, np.float32)
        values = np.rint((inputs.transpose(0, 2, 3, 1) * std + mean) / np.float32(preprocess.scale))
        if not ((values >= 0) & (values <= 255)).all():
            return None
        pixels = values.astype(np.uint8)
        if preprocess.channel_order == "bgr":
            pixels = np.ascontiguousarray(pixels[..., ::-1])
        return pixels if np.array_equal(preprocess.apply(pixels), inputs) else None
