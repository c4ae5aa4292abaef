"""Batches of images and the loss whose gradients say what a channel is worth.

    with labels:     loss = -sum_n log p(y_n | x_n)
    without labels:  loss = -sum_n log p(t_n | x_n),  t_n drawn from the network's own p(. | x_n)
    no class scores: loss = sum_n e_n . f(x_n) / s,   e_n ~ N(0, 1),  s = root mean square of f

The gradients of the last two have mean 0 over the draw, and their second moment is the Fisher information
(of a Gaussian around the output in the third), which is the curvature of the change that a cut makes to the
network's own answers. A loss against the network's own answers themselves would have no gradient at all.

Source: Kunstner et al. 2019, arXiv:1905.12558, section 2 (the Fisher information by sampled labels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils import _pytree as pytree

from edgecnn.data import Dataset, iterate_batches
from edgecnn.errors import DataError
from edgecnn.model import Model
from edgecnn.pipeline import Progress, SilentProgress

BATCH_VALUES = 32 * 3 * 64 * 64
"""A batch holds about this many input values: 32 images of 64x64, 2 of 224x224."""

MAX_BATCH = 32
"""Images in a batch at most: gradients are squared batch by batch, so many small ones say more."""

MAX_MACS = 2e12
"""MACs that scores, or trials, may cost: tens of seconds on one core. Fewer images are used for it."""


@dataclass(frozen=True)
class Samples:
    """Images that importance may look at.

    Attributes:
        dataset: gives float32 (n, c, h, w).
        indices: which images.
        labelled: use the dataset's labels.
        seed: of drawn labels.
        progress: told about every batch.
    """

    dataset: Dataset
    indices: tuple[int, ...]
    labelled: bool = False
    seed: int = 0
    progress: Progress = field(default_factory=SilentProgress)

    @property
    def uses_labels(self) -> bool:
        """Whether there are labels to use."""
        return self.labelled and self.dataset.labels is not None


def draw(indices: Sequence[int], count: int, seed: int) -> tuple[int, ...]:
    """Return `count` of the indices at random, or all of them in their order where there are no more.

    Example:
        >>> draw((3, 5, 8), 4, seed=0), len(set(draw(range(100), 4, seed=0)))
        ((3, 5, 8), 4)
    """
    if len(indices) <= count:
        return tuple(indices)
    chosen = np.random.default_rng(seed).choice(len(indices), count, replace=False)
    return tuple(int(indices[i]) for i in chosen)


def affordable(samples: Samples, macs_per_image: int, least: int) -> Samples:
    """Return as many of the images as MAX_MACS allow, but `least` at any rate.

    Args:
        samples: the images.
        macs_per_image: that will be spent on each; a backward pass costs two forward ones.
        least: images to keep however dear they are, where there are so many.
    """
    count = max(int(MAX_MACS / max(macs_per_image, 1)), least)
    return replace(samples, indices=samples.indices[:count])


def batch_size(model: Model) -> int:
    """Return how many images to run at once: few large ones, many small ones."""
    if model.fixed_batch is not None:
        return model.fixed_batch
    values = int(np.prod([size or 1 for size in model.spec.inputs[0].shape[1:]]))
    return int(np.clip(BATCH_VALUES // max(values, 1), 1, MAX_BATCH))


def batches(
    model: Model, samples: Samples, largest: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield (float32 (n, c, h, w), int64 (n,) or None).

    Args:
        model: that the batches are for.
        samples: the images.
        largest: images in a batch at most, in place of `batch_size`.

    Raises:
        DataError: if there are no images, or they hold NaN or infinite values.
    """
    size = batch_size(model) if largest is None or model.fixed_batch is not None else largest
    if not samples.indices:
        raise DataError(f"{samples.dataset.name}: found no images to judge channels by, expected at least 1")
    for images, labels in iterate_batches(samples.dataset, samples.indices, size):
        if not np.isfinite(images).all():
            raise DataError(f"{samples.dataset.name}: images hold NaN or infinite values after preprocessing")
        count = len(images)
        if model.fixed_batch is not None and count < size:  # repeats images to fill the batch
            images = np.resize(images, (size, *images.shape[1:]))
            labels = None if labels is None else np.resize(labels, size)
        given = torch.from_numpy(labels) if labels is not None and samples.uses_labels else None
        yield torch.from_numpy(np.ascontiguousarray(images)), given
        samples.progress.advance(count)


def output_loss(
    outputs: Any, labels: torch.Tensor | None, task: str, generator: torch.Generator
) -> torch.Tensor:
    """Return the loss summed over the images of a batch, a scalar.

    Args:
        outputs: what the graph returned.
        labels: int64 (n,) for the first output, or None.
        task: of the network; only "classification" and "segmentation" have class scores, along dimension 1.
        generator: of drawn labels.
    """
    flat = [value for value in pytree.tree_leaves(outputs) if isinstance(value, torch.Tensor)]
    if labels is not None and task == "classification":
        return functional.cross_entropy(flat[0], labels, reduction="sum")
    if task in ("classification", "segmentation") and all(v.dim() >= 2 and v.shape[1] > 1 for v in flat):
        return torch.stack([_drawn_loss(value, generator) for value in flat]).sum()
    total = flat[0].new_zeros(())
    for value in flat:
        noise = torch.randn(value.shape, generator=generator)
        total = total + (noise * value).sum() / value.detach().square().mean().sqrt().clamp_min(1e-12)
    return total


def _drawn_loss(scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the negative log likelihood of classes drawn from softmax(scores); scores (n, classes, ...)."""
    rows = scores.movedim(1, -1).reshape(-1, scores.shape[1])  # (n * positions, classes)
    drawn = torch.multinomial(rows.detach().softmax(1), 1, generator=generator)[:, 0]
    return functional.cross_entropy(rows, drawn, reduction="sum")
