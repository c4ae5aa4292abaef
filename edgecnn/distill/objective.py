"""What a student minimises: its labels, its teacher's outputs and its teacher's features, weighed together.

    loss = (1 - alpha) hard(student, labels) + alpha sum over methods of weight * difference(student, teacher)

Without labels alpha is 1: the student learns from the teacher alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from edgecnn.distill.losses import (
    attention_loss,
    attention_map,
    decoupled_loss,
    hint_loss,
    logits_loss,
    value_loss,
)
from edgecnn.distill.pairing import Pair
from edgecnn.distill.teacher import Answers, Teacher
from edgecnn.errors import PassError
from edgecnn.model import ModelSpec
from edgecnn.train.objective import Batch, Objective

Method = Literal["logits", "dkd", "feature", "attention"]
METHODS: tuple[Method, ...] = get_args(Method)
INNER: tuple[Method, ...] = ("feature", "attention")
"""Methods that compare inner values, so need pairs of nodes."""


@dataclass(frozen=True)
class Terms:
    """Which differences count, and how much.

    Attributes:
        methods: any of METHODS; "logits" and "dkd" exclude each other.
        alpha: share of the teacher in the loss, in (0, 1]; the labels have the rest.
        temperature: T of "logits" and "dkd".
        beta: weight, in "dkd", of the part about the classes other than the right one.
        feature_weight: of the mean hint loss over all pairs.
        attention_weight: of the mean attention loss over all pairs.
    """

    methods: tuple[Method, ...] = ("logits",)
    alpha: float = 0.5
    temperature: float = 4.0
    beta: float = 2.0
    feature_weight: float = 1.0
    attention_weight: float = 10.0

    def check(self) -> None:
        """Check every value.

        Raises:
            PassError: naming the parameter, what was found and what was expected.
        """
        known = ", ".join(METHODS)
        if isinstance(self.methods, str) or not self.methods:
            raise PassError(f"methods is {self.methods!r}, expected a list of one or more of {known}")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise PassError(f"methods names {unknown[0]!r}, expected some of {known}")
        if len(set(self.methods)) < len(self.methods):
            raise PassError(f"methods is {', '.join(self.methods)}, expected each one once")
        if "logits" in self.methods and "dkd" in self.methods:
            raise PassError("methods names logits and dkd, expected one of the two: both compare the outputs")
        if not 0.0 < self.alpha <= 1.0:
            raise PassError(
                f"alpha is {self.alpha}, expected 0 < alpha <= 1", hint="without a teacher use fine_tune"
            )
        for name in ("temperature", "beta", "feature_weight", "attention_weight"):
            value = getattr(self, name)
            if not 0.0 < value < float("inf"):
                raise PassError(f"{name} is {value}, expected a number above 0")


class DistillationLoss:
    """The objective of a training run with a teacher.

    Args:
        terms: what counts.
        teacher: whose answers to learn; its taps are the teacher's side of `pairs`.
        spec: of the student; says which outputs are scores of classes.
        hard: loss of the labels, or None to do without them.
        pairs: of nodes, for "feature" and "attention".
        seed: of the regressors' first weights.
    """

    def __init__(
        self,
        terms: Terms,
        teacher: Teacher,
        spec: ModelSpec,
        hard: Objective | None = None,
        pairs: Sequence[Pair] = (),
        seed: int = 0,
    ) -> None:
        self._terms = terms
        self._teacher = teacher
        self._classes = spec.outputs[0].shape[1] if gives_scores(spec) else None
        self._hard = hard
        self._taps = tuple(pair.student.node for pair in pairs)
        self._regressors = _regressors(pairs, seed) if "feature" in terms.methods else None

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the student's nodes whose values are wanted."""
        return self._taps

    def modules(self) -> nn.Module | None:
        """Return the regressors r of "feature", to be trained with the student."""
        return self._regressors

    def __call__(self, outputs: tuple[Tensor, ...], batch: Batch, tapped: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of one batch, a scalar."""
        answers = self._teacher.ask(batch.inputs, None if batch.augmented else batch.indices)
        soft = self.difference(outputs, answers, tapped, batch.targets)
        if self._hard is None or batch.targets is None:
            return soft
        hard = self._hard(outputs, batch, tapped)
        return (1.0 - self._terms.alpha) * hard + self._terms.alpha * soft

    def difference(
        self,
        outputs: tuple[Tensor, ...],
        answers: Answers,
        tapped: Mapping[str, Tensor],
        targets: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted differences between student and teacher, a scalar.

        Args:
            outputs: of the student.
            answers: of the teacher; a feature of two dimensions is an attention map already.
            tapped: the student's values by node name.
            targets: labels (n,) or probabilities (n, classes), used by "dkd" only; None takes the classes
                that the teacher prefers.
        """
        terms, losses = self._terms, []
        if "logits" in terms.methods or "dkd" in terms.methods:
            compared = [
                self._compare(mine, other, targets)
                for mine, other in zip(outputs, answers.outputs, strict=True)
            ]
            losses.append(torch.stack(compared).mean())
        features = [tapped[name].float() for name in self._taps]
        if self._regressors is not None:
            hints = [
                hint_loss(regressor(mine), other)
                for regressor, mine, other in zip(
                    self._regressors.children(), features, answers.features, strict=True
                )
            ]
            losses.append(terms.feature_weight * torch.stack(hints).mean())
        if "attention" in terms.methods:
            maps = [other if other.dim() == 2 else attention_map(other) for other in answers.features]
            attention = [
                attention_loss(attention_map(mine), other) for mine, other in zip(features, maps, strict=True)
            ]
            losses.append(terms.attention_weight * torch.stack(attention).mean())
        return torch.stack(losses).sum()

    def _compare(self, student: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
        """Return the difference of one output."""
        terms = self._terms
        if self._classes is None or student.shape[1] != self._classes:  # numbers, or a head of another kind
            return value_loss(student, teacher)
        if "dkd" not in terms.methods:
            return logits_loss(student, teacher, terms.temperature)
        if targets is None:
            labels = teacher.argmax(1)
        else:
            labels = targets.argmax(1) if targets.is_floating_point() else targets
        return decoupled_loss(student, teacher, labels, terms.temperature, terms.beta)


def gives_scores(spec: ModelSpec) -> bool:
    """Return whether a network's first output is scores of classes, per image or per pixel."""
    return spec.task in ("classification", "segmentation")


def _regressors(pairs: Sequence[Pair], seed: int) -> nn.ModuleList:
    """Return a 1x1 convolution per pair, from the student's channels to the teacher's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(
            nn.Conv2d(pair.student.channels, pair.teacher.channels, 1, bias=False) for pair in pairs
        )
