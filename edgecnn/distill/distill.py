"""The pass `distill`: train the network to answer as its teacher does.

    loss = (1 - alpha) hard(student, labels) + alpha sum over methods of weight * difference(student, teacher)

The losses are those of `edgecnn.distill.losses`, the pairs of inner values those of
`edgecnn.distill.pairing`, the loop that of fine-tuning. The teacher is the network as it was loaded, or any
other that takes the same images and gives the same outputs. Labels are not needed: without them the teacher
is all there is to learn.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from edgecnn.data.memory import MemoryImages
from edgecnn.distill.losses import attention_map
from edgecnn.distill.objective import INNER, DistillationLoss, Method, Terms, gives_scores
from edgecnn.distill.pairing import Pair, pair_stages
from edgecnn.distill.teacher import Teacher, check_teacher
from edgecnn.errors import PassError
from edgecnn.model import Model
from edgecnn.pipeline import Need, PassContext
from edgecnn.train.data import TrainData
from edgecnn.train.fine_tune import require_trainable, settings_of
from edgecnn.train.loop import train
from edgecnn.train.losses import SupervisedLoss, choose_loss
from edgecnn.train.precision import choose_device, choose_precision
from edgecnn.train.settings import TrainSettings


@dataclass(frozen=True)
class Distill(TrainSettings):
    """Pass: knowledge distillation, from the network as it was loaded or from another teacher.

    Source: Hinton et al. 2015, arXiv:1503.02531 (logits); Zhao et al. 2022, arXiv:2203.08679 (dkd); Romero et
    al. 2015, arXiv:1412.6550 (feature); Zagoruyko and Komodakis 2017, arXiv:1612.03928 (attention).

    Attributes:
        methods: what is compared: "logits" (outputs), "dkd" (outputs, the right class and the others apart),
            "feature" (values at the ends of stages, through a trained 1x1 convolution), "attention" (where
            those values are large); "logits" and "dkd" exclude each other. Outputs that are no scores of
            classes are compared by their values.
        alpha: share of the teacher in the loss, above 0, at most 1; the labels have the rest. Where there are
            none it is 1.
        temperature: of "logits" and "dkd".
        beta: weight, in "dkd", of the part about the classes other than the right one.
        feature_weight: of "feature".
        attention_weight: of "attention".
        hard_labels: False leaves labels out even where there are some.
        cache_mb: memory for the teacher's answers, which are computed once where no augmentation changes the
            images; 0 computes them in the loop. 1 MB = 1,000,000 bytes.
        synthetic_images: how many to make up from the teacher's BatchNorm statistics where there are no
            images at all.
        The others are those of `edgecnn.train.settings.TrainSettings`.
    """

    __doc__ = (__doc__ or "") + (TrainSettings.__doc__ or "").partition("Attributes:\n")[2]

    methods: tuple[Method, ...] = ("logits",)
    alpha: float = 0.5
    temperature: float = 4.0
    beta: float = 2.0
    feature_weight: float = 1.0
    attention_weight: float = 10.0
    hard_labels: bool = True
    cache_mb: float = 1024.0
    synthetic_images: int = 256

    name: ClassVar[str] = "distill"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TRAIN_IMAGES, Need.TEACHER})

    def check(self) -> None:
        """Check the parameters.

        Raises:
            PassError: naming the parameter, what was found and what was expected.
        """
        super().check()
        self._terms().check()
        if not 0.0 <= self.cache_mb < float("inf"):
            raise PassError(f"cache_mb is {self.cache_mb}, expected 0 or more")
        if self.synthetic_images < 1:
            raise PassError(f"synthetic_images is {self.synthetic_images}, expected at least 1")

    def requires(self, model: Model) -> None:
        """Refuse a quantized graph, and methods that the outputs do not fit."""
        require_trainable(model)
        if "dkd" in self.methods and not gives_scores(model.spec):
            found = model.spec.outputs[0].shape
            raise PassError(
                f"methods names dkd, which compares scores of classes, and {model.spec.name} gives {found}",
                hint='use methods = ["logits"], which compares such outputs by their values',
            )

    def run(self, model: Model, context: PassContext) -> Model:
        """Return the trained model."""
        if context.train is None or context.teacher is None:
            raise PassError("distill needs training images and a teacher network, found none")
        check_teacher(model, context.teacher)
        kept = isinstance(context.train, MemoryImages)
        images = context.train if kept else MemoryImages(context.train, model.spec.preprocess)
        labelled = self.hard_labels and context.train.labels is not None
        data = TrainData(images, context.train_indices, context.validation_indices, labelled)
        pairs = pair_stages(model, context.teacher) if set(self.methods) & set(INNER) else ()
        teacher = self._make_teacher(model, context.teacher, pairs)
        if self._sees_each_image_as_it_is(len(data.indices)):
            shown = (*data.indices, *data.validation)
            teacher.remember(images, shown, limit_mb=self.cache_mb, progress=context.progress)
        hard = SupervisedLoss(choose_loss(self.loss, model.spec), self.label_smoothing) if labelled else None
        terms = self._terms() if labelled else replace(self._terms(), alpha=1.0)
        result = train(
            model,
            data,
            settings_of(self),
            seed=context.seed,
            objective=DistillationLoss(terms, teacher, model.spec, hard, pairs, context.seed),
            checkpoint=None if context.checkpoints is None else context.checkpoints.stage("train"),
            progress=context.progress,
        )
        described = self._describe(context.teacher, terms, pairs, teacher.remembers)
        curves = {"pass": self.name, "kind": "training_curves", **result.curves.to_dict()}
        context.records.extend((described, curves))
        return result.model.with_warning(*result.warnings)

    def ensures(self, before: Model, after: Model) -> None:
        """Check that the graph is the same and its weights are finite."""
        if before.graph.code != after.graph.code:
            raise PassError("the graph after distill is not the graph before it")
        for name, tensor in after.graph.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise PassError(f"{name} holds NaN or infinity after distill")

    def _terms(self) -> Terms:
        return Terms(**{field.name: getattr(self, field.name) for field in fields(Terms)})

    def _make_teacher(self, student: Model, teacher: Model, pairs: tuple[Pair, ...]) -> Teacher:
        """Return the teacher, which makes maps of its features where nothing else is asked of them."""
        device = choose_device()
        return Teacher(
            teacher,
            student,
            tuple(pair.teacher.node for pair in pairs),
            None if "feature" in self.methods else attention_map,
            choose_precision(self.precision, device, student),
            device,
        )

    def _sees_each_image_as_it_is(self, num_images: int) -> bool:
        """Return whether the teacher's answers can be kept, and asking about every image once pays."""
        changed = bool(self.augment) or self.mixup > 0 or self.cutmix > 0
        all_are_asked = self.steps(num_images) >= self.steps_per_epoch(num_images)
        return self.cache_mb > 0 and not changed and all_are_asked

    def _describe(
        self, teacher: Model, terms: Terms, pairs: tuple[Pair, ...], remembered: str | None
    ) -> dict[str, Any]:
        """Return what the report says about the teacher."""
        return {
            "pass": self.name,
            "kind": "distillation",
            "teacher": teacher.spec.name,
            "methods": list(terms.methods),
            "alpha": terms.alpha,
            "labels": terms.alpha < 1.0,
            "pairs": [
                {
                    "student": pair.student.node,
                    "teacher": pair.teacher.node,
                    "size": list(pair.student.size),
                    "channels": [pair.student.channels, pair.teacher.channels],
                }
                for pair in pairs
            ],
            "remembered": remembered,
        }
