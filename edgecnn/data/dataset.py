"""The Dataset: images as a network's inputs, read only when asked for, and how they are split and batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from edgecnn.errors import DataError

Inputs = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@runtime_checkable
class Dataset(Protocol):
    """Images with or without labels, ready for a network.

    Attributes:
        name: the source as the user wrote it, for messages and the report.
        labels: int64 (n,), the index of the right class for each image, or None.
        class_names: name of each class by index, or None where they are unknown.
        warnings: what the user should know; may grow while images are read.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def labels(self) -> Labels | None: ...  # noqa: D102

    @property
    def class_names(self) -> tuple[str, ...] | None: ...  # noqa: D102

    @property
    def warnings(self) -> tuple[str, ...]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def inputs(self, indices: Sequence[int]) -> Inputs:
        """Return the images as float32 (n, c, h, w), through the Preprocess; keeps nothing of them.

        Raises:
            DataError: if one of them cannot be read.
        """
        ...


@runtime_checkable
class SkippingDataset(Dataset, Protocol):
    """A Dataset that may leave out images which turn out to be unreadable while they are decoded."""

    def readable_inputs(self, indices: Sequence[int]) -> tuple[Inputs, list[int]]:
        """Return (float32 (m, c, h, w), the m <= n indices that could be read, in the order given).

        Raises:
            DataError: if too many images of the whole set are unreadable.
        """
        ...


@dataclass(frozen=True)
class Split:
    """Indices to calibrate on and to judge on.

    Attributes:
        calibration: images that may shape the compressed network.
        held_out: images that only judge it.
        warnings: set when the two overlap or are smaller than asked for.
    """

    calibration: tuple[int, ...]
    held_out: tuple[int, ...]
    warnings: tuple[str, ...] = ()


def require_labels(dataset: Dataset, purpose: str) -> Labels:
    """Return the dataset's labels.

    Args:
        dataset: any dataset.
        purpose: what needs them ("accuracy"), for the message.

    Raises:
        DataError: if it has none.
    """
    if dataset.labels is None:
        raise DataError(
            f"{dataset.name}: {purpose} needs labels, found {len(dataset)} images without any",
            hint="use one subfolder per class, or an .npz with the keys images and labels",
        )
    return dataset.labels


def _stratified_order(num_images: int, labels: Labels | None, seed: int) -> npt.NDArray[np.int64]:
    """Return a permutation whose every prefix holds the classes in about their proportions, int64 (n,)."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(num_images).astype(np.int64)
    if labels is None:
        return order
    # The j-th of a class's n_c images, in random order, stands at (j + u) / n_c of the way, u in [0, 1).
    position = np.empty(num_images, np.float64)
    shuffled = labels[order]
    for value in np.unique(shuffled):
        members = np.flatnonzero(shuffled == value)
        position[members] = (np.arange(len(members)) + rng.random(len(members))) / len(members)
    return order[np.argsort(position, kind="stable")]


def split_indices(dataset: Dataset, num_calibration: int, num_held_out: int, seed: int) -> Split:
    """Choose images to calibrate on and others to judge on.

    The two are disjoint, hold the classes in the dataset's proportions where there are labels, and
    depend on nothing but the dataset and the seed. A set too small for both is shared out in the
    proportion asked for; of a set of one image both get that one.

    Args:
        dataset: any dataset.
        num_calibration: images to calibrate on, at least 1.
        num_held_out: images to judge on, 0 for none.
        seed: of the shuffle.

    Returns:
        The indices of both and warnings.

    Raises:
        DataError: if the dataset is empty or a number is out of range.

    Example:
        >>> from edgecnn.data import noise_images
        >>> from edgecnn.runner.preprocess import Preprocess
        >>> four = noise_images(Preprocess((2, 2)), num_images=4, seed=0)
        >>> split = split_indices(four, 3, 1, seed=0)
        >>> sorted(split.calibration + split.held_out)
        [0, 1, 2, 3]
    """
    total = len(dataset)
    if num_calibration < 1 or num_held_out < 0:
        raise DataError(
            f"{dataset.name}: asked for {num_calibration} calibration and {num_held_out} held-out images, "
            "expected at least 1 and 0"
        )
    if total == 0:
        raise DataError(f"{dataset.name}: found no images, expected at least 1")
    if total == 1 and num_held_out:
        message = (
            f"{dataset.name}: one image only; it is calibrated on and judged on, so nothing here says "
            "how the network does on other images"
        )
        return Split((0,), (0,), (message,))
    wanted = num_calibration + num_held_out
    warnings: tuple[str, ...] = ()
    if wanted > total:
        asked = f"{num_calibration} calibration and {num_held_out} held-out images"
        if num_held_out:
            num_calibration = min(max(round(total * num_calibration / wanted), 1), total - 1)
            num_held_out = total - num_calibration
        else:
            num_calibration = total
        message = (
            f"{dataset.name}: {total} images, fewer than the {asked} asked for; "
            f"using {num_calibration} and {num_held_out}"
        )
        warnings = (message,)
    order = tuple(int(index) for index in _stratified_order(total, dataset.labels, seed))
    return Split(order[:num_calibration], order[num_calibration:][:num_held_out], warnings)


def _read_batch(dataset: Dataset, indices: list[int]) -> tuple[Inputs, Labels | None]:
    if isinstance(dataset, SkippingDataset):
        inputs, indices = dataset.readable_inputs(indices)
    else:
        inputs = dataset.inputs(indices)
    labels = dataset.labels
    return inputs, None if labels is None else labels[indices]


def iterate_batches(
    dataset: Dataset, indices: Sequence[int], batch_size: int
) -> Iterator[tuple[Inputs, Labels | None]]:
    """Yield the chosen images batch by batch, reading one batch ahead in a thread.

    At most two batches are in memory, whatever the number of images. Unreadable images that the
    dataset tolerates are left out of their batch. Closing the iterator, an error or Ctrl-C ends the
    thread after the batch that it is reading.

    Args:
        dataset: any dataset.
        indices: which images, in order.
        batch_size: images per batch; the last may be smaller.

    Yields:
        (float32 (n, c, h, w), int64 (n,) or None).

    Raises:
        DataError: if images cannot be read.
    """
    if batch_size < 1:
        raise DataError(f"batch size is {batch_size}, expected at least 1")
    chunks = [
        [int(index) for index in indices[start : start + batch_size]]
        for start in range(0, len(indices), batch_size)
    ]
    if not chunks:
        return
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="edgecnn-data")
    try:
        pending = executor.submit(_read_batch, dataset, chunks[0])
        for chunk in [*chunks[1:], None]:
            batch = pending.result()
            if chunk is not None:
                pending = executor.submit(_read_batch, dataset, chunk)
            if len(batch[0]):
                yield batch
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
