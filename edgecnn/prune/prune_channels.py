"""The pass `prune_channels`: whole channels are really gone, the network is smaller in every runtime.

    couple channels -> score them -> choose how many go where -> compensate -> cut -> count statistics again

See `importance` (what a channel is worth), `allocate` (how many go where), `schedule` (when), `compensate`
(what is won back without training) and `surgery` (how they are cut).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from edgecnn.errors import PassError, RecipeError
from edgecnn.graph.channels import couple_channels
from edgecnn.graph.nodes import layer_name
from edgecnn.model import Model
from edgecnn.pipeline import Need, PassContext
from edgecnn.prune.allocate import Kind, Limits, Target
from edgecnn.prune.groups import cuttable, nothing_prunable
from edgecnn.prune.retrain import Retraining
from edgecnn.prune.samples import Samples, draw
from edgecnn.prune.schedule import (
    Cut,
    CutSettings,
    count_nodes,
    cut_in_steps,
    cut_once,
    describe_groups,
    describe_layers,
)

DEFAULT_RATIO = 0.5

FLOAT_BYTES = 4.0
"""Of a weight in float32."""

KERNEL_SHARE = 1 / 8
"""Of a group's width, that goes at a time at most where the target chooses: docs/pruning.md says why."""


@dataclass(frozen=True)
class PruneChannels:
    """Pass: remove channels, along with everything that stands and falls with them.

    At most one of ratio, macs_left, params_left and size_mb; with none of them ratio is 0.5.

    Attributes:
        ratio: share of the channels that can be cut to remove, 0 <= ratio < 1.
        macs_left: share of the multiply-accumulates that may remain (0.476 for 2.1 times fewer).
        params_left: share of the parameters that may remain.
        size_mb: size of the larger file, about; 1 MB = 1,000,000 bytes. `compress` warns where it is missed.
        bytes_per_weight: what a weight takes in the file: 1 for int8, 2 for float16, 4 for float32. With 0,
            `compress` sets it by the passes that follow; elsewhere it is 4.
        importance: what a channel is worth: l1, l2, bn_scale, taylor, fpgm, lamp, obd, activation or random.
        normalization: how scores of different groups are compared: auto, none, mean or max.
        allocation: how many channels go where: uniform, global, cost_aware or sensitivity.
        schedule: one_shot, iterative or sparse_learning.
        steps: cuts of the iterative schedule.
        epochs_between: epochs of training between those cuts, or ahead of the cut in sparse learning.
        learning_rate: of that training.
        regularization: strength of the group lasso in sparse learning.
        floor: share of every layer's channels that stays at least; one channel always does.
        round_to: each group's remaining width is a multiple of it, where it can be. With 0 it follows from
            the target: kernel_width in wide groups, a lower power of two in narrow ones (`KERNEL_SHARE` of
            their width at most), and lower still where nothing else reaches what is asked for.
        kernel_width: channels that the target's kernels compute at a time; `compress` sets it where round_to
            is 0.
        num_samples: images that importance, sensitivity, compensation and statistics look at, at most.
        compensation: what is won back in the weights: none, mean or reconstruct.
        reestimate: count batch-norm statistics again after the cut.

    Source: Fang et al. 2023 (DepGraph), arXiv:2301.12900; He et al. 2017, arXiv:1707.06168 (reconstruct).
    """

    ratio: float | None = None
    macs_left: float | None = None
    params_left: float | None = None
    size_mb: float | None = None
    bytes_per_weight: float = 0.0
    importance: Literal["l1", "l2", "bn_scale", "taylor", "fpgm", "lamp", "obd", "activation", "random"] = (
        "taylor"
    )
    normalization: Literal["auto", "none", "mean", "max"] = "auto"
    allocation: Literal["uniform", "global", "cost_aware", "sensitivity"] = "cost_aware"
    schedule: Literal["one_shot", "iterative", "sparse_learning"] = "one_shot"
    steps: int = 3
    epochs_between: float = 0.5
    learning_rate: float = 0.01
    regularization: float = 5e-4
    floor: float = 0.1
    round_to: int = 0
    kernel_width: int = 16
    num_samples: int = 256
    compensation: Literal["none", "mean", "reconstruct"] = "reconstruct"
    reestimate: bool = True

    name: ClassVar[str] = "prune_channels"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CALIBRATION})

    def check(self) -> None:
        """Check the parameters.

        Raises:
            RecipeError: naming the parameter, what was found and what was expected.
        """
        given = [
            kind
            for kind in ("ratio", "macs_left", "params_left", "size_mb")
            if getattr(self, kind) is not None
        ]
        if len(given) > 1:
            raise RecipeError(f"{' and '.join(given)} are given, expected one of them")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            hint = "a ratio of 1 leaves nothing" if self.ratio == 1 else None
            raise RecipeError(f"ratio is {self.ratio:g}, expected 0 <= ratio < 1", hint=hint)
        for name in ("macs_left", "params_left"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise RecipeError(
                    f"{name} is {value:g}, expected 0 < {name} <= 1", hint="it is the share that remains"
                )
        rules = (
            ("floor", 0 <= self.floor < 1, "0 <= floor < 1"),
            ("round_to", self.round_to >= 0, "at least 1, or 0 for what suits the target"),
            ("kernel_width", self.kernel_width >= 1, "at least 1"),
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("steps", self.steps >= 1, "at least 1"),
            ("epochs_between", self.epochs_between >= 0, "0 or more"),
            ("learning_rate", self.learning_rate > 0, "a number above 0"),
            ("regularization", self.regularization >= 0, "0 or more"),
            (
                "bytes_per_weight",
                self.bytes_per_weight >= 0,
                "a number above 0, or 0 for what the recipe makes",
            ),
            ("size_mb", self.size_mb is None or self.size_mb > 0, "a number above 0"),
        )
        for name, holds, expected in rules:
            if not holds:
                raise RecipeError(f"{name} is {getattr(self, name)}, expected {expected}")

    def requires(self, model: Model) -> None:
        """Refuse a quantized graph and one of which nothing can be cut."""
        for node in model.graph.graph.nodes:
            if "quantized_decomposed" in str(node.target):
                raise PassError(
                    f"{layer_name(node)} is quantized", hint="put prune_channels ahead of quantize_static"
                )
        coupling = couple_channels(model)
        if not cuttable(coupling):
            raise nothing_prunable(coupling)

    def run(self, model: Model, context: PassContext) -> Model:
        """Return the network without the channels; appends a record to `context.records`.

        Raises:
            PassError: if the target is out of reach, or training is asked for without training images.
        """
        self.check()
        samples = self._samples(context)
        settings = self._settings(context.seed)
        target = self._target(model)
        if self.schedule == "one_shot":
            cuts = [cut_once(model, target, settings, samples)]
        else:
            training = Retraining(context, self.epochs_between, self.learning_rate, self.name)
            if self.schedule == "iterative":
                retrain = training.tune if self.epochs_between > 0 else None
                cuts = cut_in_steps(model, target, settings, samples, self.steps, retrain)
            else:
                sparse = training.sparse(model, couple_channels(model), self.regularization)
                cuts = [cut_once(sparse, target, settings, samples)]
        warnings = self._warnings(cuts, samples)
        context.records.append(self._record(cuts, samples, warnings))
        return cuts[-1].model.with_warning(*warnings)

    def ensures(self, before: Model, after: Model) -> None:
        """Check that inputs and outputs are as they were, and that no parameter was added."""
        if before.spec != after.spec:
            raise PassError("prune_channels changed the network's inputs or outputs")
        sizes = [sum(p.numel() for p in m.graph.parameters()) for m in (before, after)]
        if sizes[1] > sizes[0]:
            raise PassError(f"prune_channels left {sizes[1]:,} parameters of {sizes[0]:,}")

    def _target(self, model: Model) -> Target:
        kinds: tuple[Kind, ...] = ("ratio", "macs_left", "params_left", "size_mb")
        for kind in kinds:
            value = getattr(self, kind)
            if value is not None:
                return Target(kind, value, self.bytes_per_weight or FLOAT_BYTES, count_nodes(model))
        return Target("ratio", DEFAULT_RATIO)

    def _settings(self, seed: int) -> CutSettings:
        return CutSettings(
            self.importance,
            self.normalization,
            self.allocation,
            self._limits(),
            self.compensation,
            self.reestimate,
            seed,
        )

    def _limits(self) -> Limits:
        if self.round_to:
            return Limits(self.floor, self.round_to)
        return Limits(self.floor, self.kernel_width, KERNEL_SHARE)

    def _samples(self, context: PassContext) -> Samples:
        """Return the images: training images with labels where there are, else those of the calibration."""
        dataset = context.train
        # training images may stand in the order of their classes, calibration images are mixed already
        indices = draw(context.train_indices, self.num_samples, context.seed)
        if dataset is None or not indices:
            dataset, indices = context.calibration, context.calibration_indices
        if dataset is None:
            raise PassError("prune_channels needs calibration images, found none")
        labelled = dataset.labels is not None
        return Samples(dataset, indices[: self.num_samples], labelled, context.seed, context.progress)

    def _warnings(self, cuts: list[Cut], samples: Samples) -> list[str]:
        """Return what the user should know."""
        found = []
        frozen = cuts[0].coupling.frozen_reasons
        params = max(cuts[0].params[0], 1)
        if cuts[0].coupling.prunable_fraction < 0.5:
            listed = sorted(frozen.items(), key=lambda item: -item[1])[:3]
            reasons = "; ".join(f"{count / params:.0%} {reason}" for reason, count in listed)
            share = f"{cuts[0].coupling.prunable_fraction:.0%}"
            found.append(f"prune_channels: only {share} of the parameters can be cut ({reasons})")
        if self.reestimate and len(samples.indices) < MIN_STATISTICS:
            found.append(
                f"prune_channels: batch-norm statistics come from {len(samples.indices)} images, "
                f"{MIN_STATISTICS} or more are better"
            )
        inexact = dict.fromkeys(reason for cut in cuts for reason in cut.inexact)
        if inexact:
            found.append(
                f"prune_channels: {' and '.join(inexact)}, so a channel that is gone is not one that is "
                f"zero: the outputs of the two differ by {max(cut.error for cut in cuts):.1%} of their range"
            )
        if not any(cut.removed for cut in cuts):
            target = self._target(cuts[0].model)
            widest = max(group.size for group in cuttable(cuts[0].coupling))
            found.append(
                f"prune_channels: {target.kind} {target.value:g} removes no channel (the widest group has "
                f"{widest}, round_to is {self.round_to or 'that of the target'})"
            )
        return found

    def _record(self, cuts: list[Cut], samples: Samples, warnings: list[str]) -> dict[str, Any]:
        """Return what was done, JSON-ready."""
        target = self._target(cuts[0].model)
        first, last = cuts[0], cuts[-1]
        return {
            "pass": self.name,
            "kind": "pruning",
            "target": {target.kind: target.value},
            "importance": self.importance,
            "allocation": self.allocation,
            "schedule": self.schedule,
            "round_to": self.round_to or f"{self.kernel_width} or less",
            "labels_used": samples.uses_labels
            and (self.importance == "taylor" or self.allocation == "sensitivity"),
            "num_samples": len(samples.indices),
            "macs": [first.macs[0], last.macs[1]],
            "params": [first.params[0], last.params[1]],
            "channels": [
                sum(group.size for group in first.coupling.groups),
                sum(g.size for g in first.coupling.groups) - sum(len(cut.removed) for cut in cuts),
            ],
            "zeroed_error": max(cut.error for cut in cuts),
            "inexact_reasons": list(dict.fromkeys(reason for cut in cuts for reason in cut.inexact)),
            "prunable_fraction": first.coupling.prunable_fraction,
            "frozen_reasons": dict(first.coupling.frozen_reasons),
            "groups": describe_groups(cuts),
            "layers": describe_layers(cuts),
            "sensitivity": [
                {"group": c.name, "shares": list(c.shares), "damage": list(c.damage)} for c in first.curves
            ],
            "warnings": warnings,
        }


MIN_STATISTICS = 64
"""Images below which counted statistics are called poor."""
