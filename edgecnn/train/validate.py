"""How good the network is on images that it is not trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from edgecnn.train.network import TrainingNetwork
from edgecnn.train.objective import Batch, Objective


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
        loss: mean of the objective over the images.
        accuracy: top-1 (per pixel for segmentation), a fraction; None without labels or classes.
    """

    loss: float
    accuracy: float | None

    def is_better_than(self, other: Validation | None) -> bool:
        """Return whether the accuracy, or where it is equal or unknown the loss, is better."""
        if other is None:
            return True
        if self.accuracy is not None and other.accuracy is not None and self.accuracy != other.accuracy:
            return self.accuracy > other.accuracy
        return self.loss < other.loss


@torch.no_grad()
def validate(
    network: TrainingNetwork, objective: Objective, batches: Iterable[Batch], is_classifier: bool
) -> Validation:
    """Judge the network in eval mode; it is in training mode again afterwards."""
    total = loss_sum = correct = judged = 0.0
    network.set_training(False)
    try:
        for batch in batches:
            outputs, tapped = network(batch.inputs)
            count = len(batch.inputs)
            loss_sum += float(objective(outputs, batch, tapped)) * count
            total += count
            if is_classifier and batch.targets is not None and not batch.targets.is_floating_point():
                hits = outputs[0].argmax(1) == batch.targets
                correct += float(hits.sum())
                judged += hits.numel()
    finally:
        network.set_training(True)
    return Validation(loss_sum / max(total, 1), correct / judged if judged else None)
