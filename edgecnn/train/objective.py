"""What a training step is given and what it minimizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, fx, nn

Penalty = Callable[[fx.GraphModule], Tensor]
"""Gives what is added to the loss, (), from the graph in training; its parameters have the model's names."""


@dataclass(frozen=True)
class Batch:
    """The images of one step, on the device that trains.

    Attributes:
        inputs: float32 (n, c, h, w), augmented.
        targets: labels int64 (n,) or (n, h, w), soft targets (n, classes), numbers, or None where unlabelled.
        indices: int64 (n,) of the images in their dataset, on the CPU.
        step: from 0; -1 outside training (validation).
        augmented: whether the images differ from the dataset's.
    """

    inputs: Tensor
    targets: Tensor | None
    indices: Tensor
    step: int
    augmented: bool


class Objective(Protocol):
    """What training minimizes: a loss of the network's outputs, and of values inside it.

    Attributes:
        taps: names of graph nodes whose values it wants.
    """

    @property
    def taps(self) -> tuple[str, ...]: ...  # noqa: D102

    def modules(self) -> nn.Module | None:
        """Return further trainable parameters, or None; they are trained and checkpointed with the rest."""

    def __call__(self, outputs: tuple[Tensor, ...], batch: Batch, tapped: Mapping[str, Tensor]) -> Tensor:
        """Return the loss, float32 (), mean over the batch.

        Args:
            outputs: of the network, float32, in the order of the ModelSpec.
            batch: the images.
            tapped: node name -> value, float32.
        """
        ...
