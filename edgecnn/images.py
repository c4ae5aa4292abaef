"""The images of a run: the user's, shared out between calibration and judgement, or made up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgecnn.data import Dataset, Split, open_dataset, split_indices
from edgecnn.load import check_against_batch_norm
from edgecnn.model import Model
from edgecnn.pipeline import Progress
from edgecnn.proof import read_images

MAX_EVALUATED, MAX_EVALUATED_UNLABELLED = 2000, 256
"""Held-out images that accuracy, or without labels agreement alone, is measured on, at most."""

SYNTHETIC_CALIBRATION, SYNTHETIC_HELD_OUT = 24, 8
"""Made-up images to calibrate on and to judge by, where there is no data."""


@dataclass(frozen=True)
class Images:
    """Where the calibration and the proof take their images from."""

    dataset: Dataset
    split: Split
    synthetic: bool


class _Steps:
    """Tells a Progress about steps that are counted as (done, total); the total is known at the first one."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.done = 0

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` of `total` steps are done."""
        if self.done == 0:
            self.progress.start("no data given: make images up from the network, steps", total)
        self.progress.advance(done - self.done)
        self.done = done


def choose_images(model: Model, data: Any, num_samples: int, seed: int, progress: Progress) -> Images:
    """Open the data, or make images up from the network."""
    spec = model.spec
    if data is None:
        from edgecnn.data.synthetic import distill_images

        wanted = min(num_samples, SYNTHETIC_CALIBRATION) + SYNTHETIC_HELD_OUT
        progress.start("no data given: make images up from the network", None)
        dataset: Dataset = distill_images(model, wanted, seed, _Steps(progress))
        progress.finish()
        held = min(SYNTHETIC_HELD_OUT, max(len(dataset) // 4, 1))
        return Images(dataset, split_indices(dataset, len(dataset) - held, held, seed), True)
    classified = spec.task == "classification"
    dataset = open_dataset(
        data,
        spec.preprocess,
        class_count=spec.outputs[0].shape[1] if classified else None,
        labels=spec.labels if classified else None,
    )
    calibration = min(num_samples, max(len(dataset) // 2, 1))  # a small set is shared half and half
    most = MAX_EVALUATED if dataset.labels is not None else MAX_EVALUATED_UNLABELLED
    held_out = min(most, max(len(dataset) - calibration, 1))
    return Images(dataset, split_indices(dataset, calibration, held_out, seed), False)


def check_preprocess(model: Model, images: Images) -> list[str]:
    """Compare the calibration images with what the first batch norm saw in training."""
    if images.synthetic:
        return []
    return check_against_batch_norm(model, read_images(images.dataset, images.split.calibration[:32])[0])
