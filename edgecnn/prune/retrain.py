"""Training inside pruning: between cuts, ahead of the cut of sparse learning, and with zeros that stay."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from edgecnn.errors import PassError
from edgecnn.graph.channels import Coupling
from edgecnn.model import Model
from edgecnn.pipeline import PassContext
from edgecnn.prune.masks import with_masks, without_masks
from edgecnn.prune.sparse_learning import GroupLasso
from edgecnn.train.data import TrainData
from edgecnn.train.loop import train
from edgecnn.train.settings import TrainSettings


@dataclass(frozen=True)
class Retraining:
    """Trains a network with the images of a run.

    Attributes:
        context: holds them.
        epochs: of each training.
        learning_rate: its peak.
        name: of the pass, for messages.
    """

    context: PassContext
    epochs: float
    learning_rate: float
    name: str

    def tune(self, model: Model, step: int) -> Model:
        """Return the network after training with labels, after cut number `step`."""
        return self._train(model, f"step_{step}", None)

    def sparse(self, model: Model, coupling: Coupling, strength: float) -> Model:
        """Return the network after training with the group lasso."""
        if self.epochs == 0:
            return model
        return self._train(model, "sparse", GroupLasso(model, coupling, strength))

    def masked(self, model: Model, names: Collection[str]) -> Model:
        """Return the network after training in which the zeros of the named weights stay zero."""
        return without_masks(self._train(with_masks(model, names), "masked", None))

    def _train(self, model: Model, stage: str, penalty: GroupLasso | None) -> Model:
        context = self.context
        if context.train is None or not context.train_indices:
            raise PassError(
                f"{self.name}: training needs labelled training images, found none",
                hint="give them with --train-data or --data, or do without (one_shot, epochs = 0)",
            )
        settings = TrainSettings(epochs=self.epochs, learning_rate=self.learning_rate)
        result = train(
            model,
            TrainData(context.train, context.train_indices, context.validation_indices, labelled=True),
            settings,
            seed=context.seed,
            penalty=penalty,
            checkpoint=None if context.checkpoints is None else context.checkpoints.stage(stage),
            progress=context.progress,
        )
        context.records.append({"pass": self.name, "kind": "training_curves", **result.curves.to_dict()})
        return result.model.with_warning(*result.warnings)
