"""The images of a training run: which they are, in which order they come, and how a batch is made of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from edgecnn.data.augment import Augmentation
from edgecnn.data.dataset import Dataset, SkippingDataset
from edgecnn.errors import DataError, PassError
from edgecnn.model import ModelSpec
from edgecnn.train.objective import Batch
from edgecnn.train.seeds import stream
from edgecnn.train.settings import AUGMENTATIONS, TrainSettings

_MOVING = frozenset({"flip", "crop", "rotation"})


@dataclass(frozen=True)
class TrainData:
    """The images of a training run.

    Attributes:
        dataset: any dataset; its labels may be int64 (n,), (n, h, w) per pixel, or numbers.
        indices: images to train on.
        validation: images that only judge, disjoint from `indices`; may be empty.
        labelled: whether the labels are used.
    """

    dataset: Dataset
    indices: tuple[int, ...]
    validation: tuple[int, ...] = ()
    labelled: bool = True


def check_data(data: TrainData, spec: ModelSpec, needs_labels: bool) -> None:
    """Check that the images can train this network.

    Raises:
        DataError: if there are none, labels are missing, or a label is no class of the network.
    """
    name = data.dataset.name
    if not data.indices:
        raise DataError(f"{name}: found no training images, expected at least 1")
    overlap = set(data.indices) & set(data.validation)
    if overlap:
        raise DataError(f"{name}: image {min(overlap)} is in the training and in the validation part")
    labels = data.dataset.labels if data.labelled else None
    if labels is None:
        if needs_labels:
            raise DataError(
                f"{name}: fine-tuning needs labels, found {len(data.indices)} images without any",
                hint="use one subfolder per class, or distil from a teacher, which needs no labels",
            )
        return
    if spec.task == "other" or labels.dtype.kind == "f":
        return
    classes = spec.outputs[0].shape[1] or 0
    used = labels[[*data.indices, *data.validation]]
    wrong = used[(used < 0) | (used >= classes)] if classes > 1 else used[:0]
    if wrong.size:
        raise DataError(
            f"{name}: found the label {int(wrong.flat[0])}, expected 0 to {classes - 1}, as the network "
            f"{spec.name} has {classes} classes",
            hint="is this the data set that the network was trained for?",
        )


def choose_augmentation(settings: TrainSettings, data: TrainData, spec: ModelSpec) -> tuple[str, ...]:
    """Return the augmentations by name, "auto" replaced by what it stands for.

    Mirrored, the digits teach a network what it will not see: LeNet-5 was tuned back to 96 % without the flip
    and to 87 % with it.

    Raises:
        PassError: if images would move away from labels per pixel.
    """
    labels = data.dataset.labels if data.labelled else None
    per_pixel = labels is not None and labels.ndim > 1
    usual: tuple[str, ...] = () if per_pixel else ("flip", "crop")
    if spec.preprocess.num_channels == 1:
        usual = tuple(name for name in usual if name != "flip")
    wanted = {*settings.augment, *(usual if "auto" in settings.augment else ())}
    names = tuple(name for name in AUGMENTATIONS if name in wanted)
    moving = [name for name in names if name in _MOVING]
    moving += [name for name in ("mixup", "cutmix") if getattr(settings, name) > 0]
    if per_pixel and moving:
        raise PassError(
            f"{data.dataset.name}: {moving[0]} moves images, whose labels per pixel stay where they are",
            hint='set augment = ["colour", "noise"] or leave it empty',
        )
    return names


def hold_out(data: TrainData, fraction: float, seed: int) -> TrainData:
    """Set a share of the training images aside for validation, unless there are some already.

    Returns:
        The same data where validation images are given or `fraction` is 0.

    Example:
        >>> from edgecnn.data import noise_images
        >>> from edgecnn.runner.preprocess import Preprocess
        >>> images = noise_images(Preprocess((2, 2)), 10, seed=0)
        >>> split = hold_out(TrainData(images, tuple(range(10)), labelled=False), 0.2, seed=0)
        >>> len(split.indices), len(split.validation)
        (8, 2)
    """
    count = min(round(fraction * len(data.indices)), len(data.indices) - 1)
    if data.validation or count < 1:
        return data
    order = stream(seed, "split", 0).permutation(len(data.indices))
    held = sorted(data.indices[i] for i in order[:count])
    kept = sorted(data.indices[i] for i in order[count:])
    return replace(data, indices=tuple(kept), validation=tuple(held))


@dataclass(frozen=True)
class BatchMaker:
    """Makes the batch of any step, which depends on the seed and the step alone.

    Attributes:
        data: which images.
        augmentation: what is done to them.
        seed: of the order and the augmentation.
        batch_size: images per step, of all processes together.
        num_classes: for the soft targets of mixup.
        device: where the batch goes.
        rank: number of this process, from 0.
        world: number of processes; each makes its share of the batch.
        whole: whether the network takes batches of exactly batch_size only.
    """

    data: TrainData
    augmentation: Augmentation
    seed: int
    batch_size: int
    num_classes: int
    device: torch.device
    rank: int = 0
    world: int = 1
    whole: bool = False

    def indices(self, step: int) -> list[int]:
        """Return which images this process trains on in `step`."""
        per_epoch = max(len(self.data.indices) // self.batch_size, 1)
        epoch, position = divmod(step, per_epoch)
        order = stream(self.seed, "order", epoch).permutation(len(self.data.indices))
        whole = order[position * self.batch_size : (position + 1) * self.batch_size]
        share = whole[self.rank :: self.world]
        return [self.data.indices[i] for i in share]

    def batch(self, step: int) -> Batch:
        """Return the batch of a training step."""
        x, indices = read_inputs(self.data.dataset, self.indices(step))
        inputs, targets = self._to_device(x), self.targets(indices)
        rng = stream(self.seed, "augment", step, self.rank)
        augmentation = self.augmentation
        if augmentation.names:
            inputs = augmentation.apply(inputs, rng)
        if augmentation.mixes:
            if targets is not None and not targets.is_floating_point():
                is_class = self.num_classes > 1
                targets = (functional.one_hot(targets, self.num_classes) if is_class else targets).float()
            inputs, targets = augmentation.mix(inputs, targets, rng)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        return Batch(inputs, targets, torch.tensor(indices), step, augmentation.changes)

    def plain(self, indices: Sequence[int]) -> Batch:
        """Return images as they are, to judge the network on."""
        x, kept = read_inputs(self.data.dataset, indices)
        inputs = self._to_device(x).contiguous(memory_format=torch.channels_last)
        return Batch(inputs, self.targets(kept), torch.tensor(kept), -1, False)

    def targets(self, indices: Sequence[int]) -> Tensor | None:
        """Return the labels of images on the device, or None."""
        labels: npt.NDArray[Any] | None = self.data.dataset.labels if self.data.labelled else None
        if labels is None:
            return None
        chosen = np.asarray(labels)[list(indices)]
        if chosen.dtype.kind == "f":
            chosen = chosen.astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray(chosen)).to(self.device)

    def _to_device(self, x: npt.NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(x).to(self.device)

    def steps(self, first: int, last: int) -> Generator[Batch, None, None]:
        """Yield the batches of steps first to last - 1, the next one being made in a thread meanwhile."""
        if first >= last:
            return
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="edgecnn-train")
        try:
            pending = executor.submit(self.batch, first)
            for step in range(first, last):
                batch = pending.result()
                if step + 1 < last:
                    pending = executor.submit(self.batch, step + 1)
                yield batch
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def plain_batches(self, indices: Sequence[int]) -> Iterator[Batch]:
        """Yield batches of images as they are, in order, the last one smaller (or left out, if `whole`)."""
        for start in range(0, len(indices), self.batch_size):
            chunk = indices[start : start + self.batch_size]
            if len(chunk) == self.batch_size or not self.whole:
                yield self.plain(chunk)


def read_inputs(dataset: Dataset, indices: Sequence[int]) -> tuple[npt.NDArray[np.float32], list[int]]:
    """Return inputs and the indices of those that could be read.

    Raises:
        DataError: if none could.
    """
    listed = [int(index) for index in indices]
    if not isinstance(dataset, SkippingDataset):
        return dataset.inputs(listed), listed
    x, kept = dataset.readable_inputs(listed)
    if not kept:
        raise DataError(f"{dataset.name}: none of the {len(listed)} images of a batch can be read")
    return x, kept
