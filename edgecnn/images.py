"""The images of a run: the user's, shared out between training, calibration and judgement, or made up.

No image that judges the result is trained on or calibrated on. Of one source, when it must also train:

    held out      at most MAX_EVALUATED, at most a quarter
    calibration   as many as the recipe asks for, at most an eighth
    validation    at most MAX_VALIDATION, at most a twentieth
    training      all others
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgecnn.data import Dataset, Split, open_dataset, split_indices
from edgecnn.data.dataset import Inputs, SkippingDataset
from edgecnn.errors import DataError
from edgecnn.load import check_against_batch_norm, suspect_images
from edgecnn.model import Model
from edgecnn.pipeline import Need, Pass, Progress
from edgecnn.proof import read_images

MAX_EVALUATED, MAX_EVALUATED_UNLABELLED = 2000, 256
"""Held-out images that accuracy, or without labels agreement alone, is measured on, at most."""

MAX_VALIDATION = 1000
"""Images that follow a training's progress, at most."""

MIN_TRAINED = 16
"""A source with fewer images is not shared out for training."""

NUM_CHECKED = 64
"""Calibration images that are compared with what the network saw in training, at most."""

SYNTHETIC_CALIBRATION, SYNTHETIC_HELD_OUT = 24, 8
"""Made-up images to calibrate on and to judge by, where there is no data."""


@dataclass(frozen=True)
class TrainImages:
    """Images to train on, and others of the same source to follow the training with."""

    dataset: Dataset
    indices: tuple[int, ...]
    validation: tuple[int, ...]


@dataclass(frozen=True)
class Images:
    """Where calibration, training and proof take their images from."""

    dataset: Dataset
    split: Split
    synthetic: bool
    train: TrainImages | None = None


@dataclass(frozen=True)
class Sources:
    """What the user named.

    Attributes:
        data: to judge on and to calibrate on, or None.
        train_data: to train on; None takes what judgement and calibration leave of `data`.
    """

    data: Any = None
    train_data: Any = None

    @property
    def is_one(self) -> bool:
        """Whether one source serves everything."""
        if self.data is None or self.train_data is None or self.data is self.train_data:
            return True
        if not all(isinstance(source, (str, Path)) for source in (self.data, self.train_data)):
            return False
        first, second = Path(self.data), Path(self.train_data)
        return first == second or (first.exists() and second.exists() and first.samefile(second))

    @property
    def main(self) -> Any:
        """What is judged on: the data, else what there is to train on."""
        return self.train_data if self.data is None else self.data


class _Unlabelled:
    """A Dataset without its labels, which say nothing about a network that does not classify images."""

    labels: None = None

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.name = dataset.name
        self.class_names = dataset.class_names

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know."""
        return self._dataset.warnings

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._dataset)

    def inputs(self, indices: Sequence[int]) -> Inputs:
        """Return the images as float32 (n, c, h, w)."""
        return self._dataset.inputs(indices)


class _SkippingUnlabelled(_Unlabelled):
    """The same of a Dataset that may leave images out."""

    _dataset: SkippingDataset

    def readable_inputs(self, indices: Sequence[int]) -> tuple[Inputs, list[int]]:
        """Return the images that could be read and their indices."""
        return self._dataset.readable_inputs(indices)


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


def choose_images(
    model: Model,
    sources: Sources,
    passes: Sequence[Pass],
    seed: int,
    progress: Progress,
    *,
    may_train: bool = False,
) -> Images:
    """Open the data and share it out, or make images up from the network.

    Args:
        model: its preprocess, classes and labels say how images are read.
        sources: what the user named.
        passes: what they need decides who gets how many.
        seed: of the shuffle.
        progress: told about images that are made up.
        may_train: images to train on are taken even if no pass trains: the accuracy guard may.

    Raises:
        DataError: if a source does not fit the network, or a pass needs images or labels that are missing.
    """
    num_samples = max((getattr(step, "num_samples", None) or 0 for step in passes), default=0) or 1
    trainer = next((step for step in passes if is_trained(step)), None)
    if trainer is None and sources.train_data is not None and not may_train:
        raise DataError(
            f"there are images to train on, {_name(sources.train_data)}, but no pass of the recipe trains",
            hint="add --prune, --distill, --qat or --max-drop, or leave --train-data out",
        )
    if sources.main is None:
        _refuse_missing(passes)
        made_up = _make_up(model, num_samples, seed, progress)
        return (
            made_up if trainer is None else replace(made_up, train=_to_train(model, passes, seed, progress))
        )
    dataset = open_images(model, sources.main)
    if sources.is_one:
        if trainer is not None:
            _check_trainable(model, trainer, passes, dataset)
            return _share_out(dataset, num_samples, seed)
        calibration = min(num_samples, max(len(dataset) // 2, 1))  # a small set is shared half and half
        held_out = min(_most(dataset), max(len(dataset) - calibration, 1))
        return Images(dataset, split_indices(dataset, calibration, held_out, seed), False)
    train = open_images(model, sources.train_data)
    if trainer is not None:
        _check_trainable(model, trainer, passes, train)
    calibration = min(num_samples, max(len(dataset) // 2, 1))
    held_out = min(_most(dataset), max(len(dataset) - calibration, 1))
    split = split_indices(dataset, calibration, held_out, seed)
    judges = min(MAX_VALIDATION, max(len(train) // 20, 1))
    own = split_indices(train, judges, len(train) - judges, seed)
    return Images(dataset, split, False, TrainImages(train, own.held_out, own.calibration))


def is_trained(step: Pass) -> bool:
    """Return whether a pass trains the network; pruning does in every schedule but one_shot."""
    in_between = getattr(step, "schedule", "one_shot") != "one_shot"
    return in_between or bool(step.needs & {Need.TRAIN, Need.TRAIN_IMAGES})


def open_images(model: Model, source: Any) -> Dataset:
    """Open a source as images for a network.

    Args:
        model: its preprocess, classes and labels say how images are read.
        source: whatever `edgecnn.data.open_dataset` takes.

    Raises:
        DataError: if the source is missing, damaged, or does not fit the network.
    """
    spec = model.spec
    if spec.task == "classification":
        return open_dataset(source, spec.preprocess, class_count=spec.outputs[0].shape[1], labels=spec.labels)
    opened = open_dataset(source, spec.preprocess)
    return _SkippingUnlabelled(opened) if isinstance(opened, SkippingDataset) else _Unlabelled(opened)


def open_or_make_up(model: Model, source: Any, wanted: int, progress: Progress) -> Dataset:
    """Open a source, or make `wanted` images up from the network where there is none."""
    if source is not None:
        return open_images(model, source)
    from edgecnn.data.synthetic import distill_images

    progress.start("no data given: make images up from the network", None)
    dataset: Dataset = distill_images(model, wanted, 0, lambda *_: None)
    progress.finish()
    return dataset


def _most(dataset: Dataset) -> int:
    return MAX_EVALUATED if dataset.labels is not None else MAX_EVALUATED_UNLABELLED


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"


def _make_up(model: Model, num_samples: int, seed: int, progress: Progress) -> Images:
    """Make images up from the network's batch-norm statistics."""
    from edgecnn.data.synthetic import distill_images

    wanted = min(num_samples, SYNTHETIC_CALIBRATION) + SYNTHETIC_HELD_OUT
    progress.start("no data given: make images up from the network", None)
    dataset: Dataset = distill_images(model, wanted, seed, _Steps(progress))
    progress.finish()
    held = min(SYNTHETIC_HELD_OUT, max(len(dataset) // 4, 1))
    return Images(dataset, split_indices(dataset, len(dataset) - held, held, seed), True)


def _to_train(model: Model, passes: Sequence[Pass], seed: int, progress: Progress) -> TrainImages:
    """Make up images for passes that learn from a teacher and need no labels."""
    from edgecnn.distill.synthetic import synthesize_images

    wanted = max(getattr(step, "synthetic_images", 0) for step in passes)
    dataset = synthesize_images(model, wanted, seed, progress)
    return TrainImages(dataset, tuple(range(len(dataset))), ())


def _refuse_missing(passes: Sequence[Pass]) -> None:
    """Raise if a pass trains, made-up images without labels are not enough, and there are no others."""
    for step in passes:
        if is_trained(step) and not hasattr(step, "synthetic_images"):
            alone = "; --prune alone, without --epochs, trains nothing" if Need.TRAIN in step.needs else ""
            raise DataError(
                f"the pass {step.name} trains the network, and there are no images to train on",
                hint=f"give them with --data or --train-data{alone}",
            )


def _check_trainable(model: Model, trainer: Pass, passes: Sequence[Pass], dataset: Dataset) -> None:
    """Raise if a source has too few images or lacks the labels that a pass needs."""
    needing = [step.name for step in passes if Need.TRAIN in step.needs]
    if needing and model.spec.task != "classification":
        raise DataError(
            f"{needing[0]} learns from labels of images, which say nothing about {model.spec.name}, a "
            f"network of task {model.spec.task!r}",
            hint="--distill learns from the original network's answers instead, without labels",
        )
    if len(dataset) < MIN_TRAINED:
        raise DataError(
            f"{dataset.name}: {len(dataset)} images, expected at least {MIN_TRAINED} for {trainer.name}",
            hint="give more images with --train-data, or leave training out with --epochs 0",
        )
    if needing and dataset.labels is None:
        raise DataError(
            f"{dataset.name}: {needing[0]} needs labels, found {len(dataset)} images without any",
            hint="use one subfolder per class; --distill learns from the original network without labels",
        )


def _share_out(dataset: Dataset, num_samples: int, seed: int) -> Images:
    """Share one source out between all four uses."""
    total = len(dataset)
    held_out = min(_most(dataset), total // 4)
    calibration = min(num_samples, max(total // 8, 1))
    judges = calibration + min(MAX_VALIDATION, max(total // 20, 1))
    whole = split_indices(dataset, total - held_out, held_out, seed)
    pool = whole.calibration
    split = Split(pool[:calibration], whole.held_out, whole.warnings)
    train = TrainImages(dataset, pool[judges:], pool[calibration:judges])
    return Images(dataset, split, False, train)


def check_preprocess(model: Model, images: Images) -> list[str]:
    """Check the calibration images by themselves and against what the BatchNorms saw in training."""
    if images.synthetic:
        return []
    indices = images.split.calibration[:NUM_CHECKED]
    return check_calibration(model, read_images(images.dataset, indices)[0], images.dataset.name)


def check_calibration(model: Model, inputs: Inputs, name: str = "the data") -> list[str]:
    """Say what is wrong with images before a network is calibrated on them.

    Args:
        model: with the preprocess that made `inputs`.
        inputs: float32 (n, c, h, w).
        name: of the source.

    Returns:
        Warnings: what was found and what was expected. Images that show it themselves come first, and where
        they do, BatchNorm is not asked as well,
        but for the scale of noise.
    """
    found = suspect_images(model.spec.preprocess, inputs, name)
    if found and "noise" not in found[0]:
        return found
    return found + check_against_batch_norm(model, inputs, only_scale=bool(found))
