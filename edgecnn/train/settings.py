"""What the training loop can be told, and the checks of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from edgecnn.errors import PassError

Optimizer = Literal["sgd", "adamw"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Loss = Literal["auto", "cross_entropy", "bce", "focal", "mse", "mae", "huber"]

AUGMENTATIONS = ("flip", "crop", "rotation", "colour", "noise")
"""What `augment` may name; they are applied in this order."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training run.

    Attributes:
        epochs: passes over the training images, may be a fraction.
        optimizer: "sgd" (momentum, see `nesterov`) or "adamw".
        learning_rate: its peak, after the warm-up; falls to 0 as a cosine.
        momentum: of SGD; beta1 of AdamW.
        nesterov: whether SGD looks ahead.
        weight_decay: not applied to biases and normalization layers.
        batch_size: images per step, of all processes together.
        warmup_epochs: epochs of linear rise from 0 to learning_rate.
        ema_decay: None, or the decay per step of an average of the weights, which is then the result.
        label_smoothing: share of the target spread over all classes, in [0, 1).
        clip_norm: None, or the largest norm of all gradients together.
        precision: "auto" is bfloat16 where the processor or GPU computes it, else float32.
        loss: "auto" is cross_entropy for classifiers and segmentation, mse for anything else.
        augment: names out of AUGMENTATIONS; "auto" is flip and crop for colour images, crop alone for gray
            ones (a mirrored digit is none), nothing where labels are per pixel.
        mixup: alpha of the Beta distribution of mixup, 0 for none.
        cutmix: alpha of the Beta distribution of cutmix, 0 for none; with both, one of them at random.
        batch_norm_batches: batches to re-estimate the BatchNorm statistics with at the end, 0 for none.
        patience: None, or stop after so many validations without a gain, and keep the best weights.
        validation_fraction: share of the training images set aside to validate on, where none are given.
        max_steps: None, or stop after so many steps; the schedule is that of the steps really taken.

    Example:
        >>> TrainSettings(epochs=2.5).steps(num_images=1000)
        18
    """

    epochs: float = 4.0
    optimizer: Optimizer = "sgd"
    learning_rate: float = 0.02
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    batch_size: int = 128
    warmup_epochs: float = 0.1
    ema_decay: float | None = None
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    precision: Precision = "auto"
    loss: Loss = "auto"
    augment: tuple[str, ...] = ("auto",)
    mixup: float = 0.0
    cutmix: float = 0.0
    batch_norm_batches: int = 0
    patience: int | None = None
    validation_fraction: float = 0.0
    max_steps: int | None = None

    def check(self) -> None:
        """Check every value.

        Raises:
            PassError: naming the setting, what was found and what was expected.
        """
        for name, kind in (("optimizer", Optimizer), ("precision", Precision), ("loss", Loss)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise PassError(f"{name} is {value!r}, expected one of {', '.join(get_args(kind))}")
        unknown = [name for name in self.augment if name not in ("auto", *AUGMENTATIONS)]
        if unknown:
            expected = ", ".join(AUGMENTATIONS)
            raise PassError(f"augment names {unknown[0]!r}, expected auto or some of {expected}")
        self._check_ranges()

    def _check_ranges(self) -> None:
        rules = (
            ("epochs", 0.0, math.inf, "a number above 0", False),
            ("learning_rate", 0.0, math.inf, "a number above 0", False),
            ("momentum", 0.0, 1.0, "0 <= momentum < 1", True),
            ("weight_decay", 0.0, math.inf, "0 or more", True),
            ("batch_size", 0, math.inf, "at least 1", False),
            ("warmup_epochs", 0.0, math.inf, "0 or more", True),
            ("ema_decay", 0.0, 1.0, "a number between 0 and 1", False),
            ("label_smoothing", 0.0, 1.0, "0 <= label_smoothing < 1", True),
            ("clip_norm", 0.0, math.inf, "a number above 0", False),
            ("mixup", 0.0, math.inf, "0 or more", True),
            ("cutmix", 0.0, math.inf, "0 or more", True),
            ("batch_norm_batches", 0, math.inf, "0 or more", True),
            ("patience", 0, math.inf, "at least 1", False),
            ("validation_fraction", 0.0, 1.0, "0 <= validation_fraction < 1", True),
            ("max_steps", 0, math.inf, "at least 1", False),
        )
        for name, low, high, expected, closed in rules:
            value = getattr(self, name)
            if value is None:
                continue
            if not (low < value < high or (closed and value == low)):  # NaN fails too
                raise PassError(f"{name} is {value}, expected {expected}")

    def steps_per_epoch(self, num_images: int) -> int:
        """Return the steps of one pass over the images; an unfinished last batch is left out."""
        return max(num_images // self.batch_size, 1)

    def steps(self, num_images: int) -> int:
        """Return the steps of the whole run, at least 1."""
        total = max(round(self.epochs * self.steps_per_epoch(num_images)), 1)
        return total if self.max_steps is None else min(total, self.max_steps)
