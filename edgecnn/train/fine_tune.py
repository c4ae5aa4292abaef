"""Train a network further on labelled images: after pruning, or for other images than it was trained on.

w <- w - lr(s) * g,    g the gradient of the loss against the labels (`edgecnn.train.losses`)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from edgecnn.errors import PassError
from edgecnn.model import Model
from edgecnn.pipeline import Need, PassContext
from edgecnn.train.data import TrainData
from edgecnn.train.loop import train
from edgecnn.train.settings import TrainSettings


def settings_of(step: Any) -> TrainSettings:
    """Return the TrainSettings among the fields of a pass."""
    return TrainSettings(**{field.name: getattr(step, field.name) for field in fields(TrainSettings)})


def require_trainable(model: Model) -> None:
    """Check that a model is one that can be trained: float, with parameters, batch norms not folded.

    Raises:
        PassError: if it is quantized or has no parameters.
    """
    if any("quantized_decomposed" in str(node.target) for node in model.graph.graph.nodes):
        raise PassError(f"{model.spec.name} is quantized, expected a float network", hint="train it first")
    if not any(parameter.is_floating_point() for parameter in model.graph.parameters()):
        raise PassError(
            f"{model.spec.name} has no trainable parameters",
            hint="train it before its batch norms are folded",
        )


@dataclass(frozen=True)
class FineTune(TrainSettings):
    """Pass: train on labelled images; the graph stays, its weights change.

    Source: He et al. 2019, Bag of Tricks for Image Classification, arXiv:1812.01187, sections 3 and 5.
    """

    __doc__ = (__doc__ or "") + "\n" + (TrainSettings.__doc__ or "").partition("Attributes:")[2]

    name: ClassVar[str] = "fine_tune"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TRAIN})

    def requires(self, model: Model) -> None:
        """Refuse a quantized network."""
        require_trainable(model)

    def run(self, model: Model, context: PassContext) -> Model:
        """Return the trained network."""
        if context.train is None:
            raise PassError(
                f"{self.name}: this run has no training images", hint="give --train-data or --data"
            )
        data = TrainData(context.train, context.train_indices, context.validation_indices)
        checkpoint = None if context.checkpoints is None else context.checkpoints.stage("train")
        result = train(
            model,
            data,
            settings_of(self),
            seed=context.seed,
            checkpoint=checkpoint,
            progress=context.progress,
        )
        context.records.append({"pass": self.name, "kind": "training_curves", **result.curves.to_dict()})
        return result.model.with_warning(*result.warnings)

    def ensures(self, before: Model, after: Model) -> None:
        """Check that the graph is the same but for its weights."""
        if len(before.graph.graph.nodes) != len(after.graph.graph.nodes):
            raise PassError(f"{before.spec.name}: fine-tuning changed the graph, expected the same nodes")
        for name, parameter in after.graph.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise PassError(f"{before.spec.name}: {name} holds NaN or infinity after fine-tuning")
