"""When channels go: all at once, in steps with training between, or after a penalty has made them small.

    one_shot          score, choose, compensate, cut
    iterative         the same `steps` times, each to the same share of what the step before left, with
                      `epochs_between` epochs of training after every cut but the last
    sparse_learning   `epochs_between` epochs of training with the group lasso, then one cut

What is left after step i of n is left^(i / n) of the whole, so that every step costs the network about as
much. The last step aims at what the original network's target leaves, exactly.

Source: Li et al. 2017, arXiv:1608.08710, section 3.4 (prune and retrain iteratively); for sparse learning,
Fang et al. 2023, arXiv:2301.12900, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edgecnn.graph.channels import Coupling, couple_channels, macs_and_params
from edgecnn.graph.nodes import aten
from edgecnn.model import Model
from edgecnn.prune.allocate import Allocation, Limits, Target, choose_channels
from edgecnn.prune.compensate import Compensation, compensate, gather_moments, reestimate
from edgecnn.prune.groups import cuttable
from edgecnn.prune.importance import DATA_DRIVEN, Normalization, Question, Scores, score_channels
from edgecnn.prune.samples import Samples
from edgecnn.prune.sensitivity import Curve, measure_sensitivity, sensitivity_scores
from edgecnn.prune.surgery import cut_channels, inexact_reasons, verify_cut

Schedule = Literal["one_shot", "iterative", "sparse_learning"]

Retrain = Callable[[Model, int], Model]
"""Trains a network between two steps; the number is that of the step just taken, from 0."""


@dataclass(frozen=True)
class CutSettings:
    """How one cut is decided and made.

    Attributes:
        importance: a name in IMPORTANCES.
        normalization: how scores of different groups are made comparable.
        allocation: how many channels go where.
        limits: floors and rounding.
        compensation: what is won back in the weights.
        reestimate: count batch-norm statistics again after the cut.
        seed: of everything random.
    """

    importance: str = "l2"
    normalization: Normalization = "auto"
    allocation: Allocation = "uniform"
    limits: Limits = field(default_factory=Limits)
    compensation: Compensation = "none"
    reestimate: bool = True
    seed: int = 0

    @property
    def needs_images(self) -> bool:
        """Whether a cut looks at images."""
        return (
            self.importance in DATA_DRIVEN
            or self.allocation == "sensitivity"
            or self.compensation != "none"
            or self.reestimate
        )


@dataclass(frozen=True)
class Cut:
    """A network after a cut, and what was decided.

    Attributes:
        model: the cut network.
        coupling: of the network before.
        scores: that the channels were chosen by.
        removed: channel ids.
        macs: before, after.
        params: before, after.
        curves: per group, where the allocation measured them.
        error: largest difference between the outputs of the cut network and of the network with those
            channels at zero, relative to the outputs' range.
        inexact: why the two differ where they may; empty where they must not.
    """

    model: Model
    coupling: Coupling
    scores: Scores
    removed: frozenset[int]
    macs: tuple[int, int]
    params: tuple[int, int]
    curves: tuple[Curve, ...] = ()
    error: float = 0.0
    inexact: tuple[str, ...] = ()

    def removed_by_group(self) -> dict[str, int]:
        """Return group name -> channels removed."""
        return {
            group.name: sum(channel in self.removed for channel in group.channels)
            for group in self.coupling.groups
        }


def count_nodes(model: Model) -> int:
    """Return how many operators a file of the network has, about: batch norms are folded there."""
    left_out = {aten.batch_norm.default, aten.dropout.default}
    return sum(n.op == "call_function" and n.target not in left_out for n in model.graph.graph.nodes)


def cut_once(model: Model, target: Target, settings: CutSettings, samples: Samples | None) -> Cut:
    """Score, choose, compensate and cut.

    Args:
        model: the network, left as it is.
        target: how much is to go, of this network.
        settings: how.
        samples: images, needed where `settings.needs_images`.

    Raises:
        PassError: if nothing can be cut, the target is out of reach, or the cut network does not compute what
            the network with those channels at zero does.
    """
    coupling = couple_channels(model)
    scores = score_channels(
        Question(model, coupling, samples, settings.seed), settings.importance, settings.normalization
    )
    chosen_by, curves = scores, []
    if settings.allocation == "sensitivity" and samples is not None:
        curves = measure_sensitivity(model, coupling, scores, samples)
        chosen_by = sensitivity_scores(curves, scores)
    removed = choose_channels(coupling, chosen_by, target, settings.allocation, settings.limits)
    prepared = model
    if settings.compensation != "none" and samples is not None and removed:
        moments = gather_moments(model, coupling, samples, second=settings.compensation == "reconstruct")
        prepared = compensate(model, coupling, removed, moments)
    cut, error = model, 0.0
    if removed:
        cut = cut_channels(prepared, coupling, removed)
        error = verify_cut(prepared, coupling, removed, cut)
    if settings.reestimate and samples is not None and removed:
        cut = reestimate(cut, samples)
    before, after = macs_and_params(coupling, frozenset()), macs_and_params(coupling, removed)
    macs, params = (before[0], after[0]), (before[1], after[1])
    inexact = inexact_reasons(coupling, removed)
    return Cut(cut, coupling, scores, removed, macs, params, tuple(curves), error, inexact)


def cut_in_steps(
    model: Model,
    target: Target,
    settings: CutSettings,
    samples: Samples | None,
    steps: int,
    retrain: Retrain | None,
) -> list[Cut]:
    """Cut in `steps` steps with training between them; each cut starts where the one before ended.

    Args:
        model: the network, left as it is.
        target: how much is to go in all, of this network.
        settings: how each step is made.
        samples: images, needed where `settings.needs_images`.
        steps: cuts, at least 1.
        retrain: trains between two steps; None leaves it out.

    Returns:
        The cuts in order; the last one's model is the result.
    """
    cuts: list[Cut] = []
    present = model
    limits = settings.limits
    for step in range(steps):
        own_limits = replace(limits, floor=limits.floor ** (1 / steps)) if limits.floor > 0 else limits
        own_target = _step_target(target, step, steps, cuts, present)
        cut = cut_once(present, own_target, replace(settings, limits=own_limits), samples)
        cuts.append(cut)
        present = cut.model
        if retrain is not None and step + 1 < steps:
            present = retrain(present, step)
    return cuts


def _step_target(target: Target, step: int, steps: int, cuts: list[Cut], present: Model) -> Target:
    """Return the target of one step, relative to the network it starts from."""
    share = (step + 1) / steps
    if target.kind == "ratio":
        total = _total(cuts[0].coupling if cuts else couple_channels(present))
        left = total - sum(len(cut.removed) for cut in cuts)
        wanted = total * (1 - target.value) ** share
        return replace(target, value=max(0.0, 1 - wanted / left) if left else 0.0)
    if target.kind == "size_mb":
        whole = target.spent(cuts[0].coupling if cuts else couple_channels(present))
        return replace(target, value=whole * (target.value / whole) ** share if whole else target.value)
    first, last = _spent(target, cuts)
    return replace(target, value=target.value**share * first / last)


def _total(coupling: Coupling) -> int:
    return sum(len(group.channels) for group in cuttable(coupling))


def _spent(target: Target, cuts: list[Cut]) -> tuple[float, float]:
    """Return the bounded quantity of the original network and of the present one."""
    if not cuts:
        return 1.0, 1.0
    first = target.amount(cuts[0].macs[0], cuts[0].params[0])
    return first, target.amount(cuts[-1].macs[1], cuts[-1].params[1])


def describe_groups(cuts: list[Cut]) -> list[dict[str, Any]]:
    """Return a JSON-ready line per group of the original network: width before and after, why frozen."""
    gone: dict[str, int] = {}
    for cut in cuts:
        for name, count in cut.removed_by_group().items():
            gone[name] = gone.get(name, 0) + count
    first = cuts[0]
    lines = []
    for group in first.coupling.groups:
        scores = first.scores.get(group.index)
        lines.append(
            {
                "name": group.name,
                "channels": group.size,
                "channels_left": max(group.size - gone.get(group.name, 0), 0),
                "layers": sorted({m.layer.split(" ")[0] for m in group.members if m.role in ("out", "in")}),
                "frozen": group.frozen,
                "scores": None if scores is None else [float(f"{value:.4g}") for value in scores],
            }
        )
    return lines


def describe_layers(cuts: list[Cut]) -> list[dict[str, Any]]:
    """Return a JSON-ready line per convolution or linear layer: output channels before and after."""
    last = cuts[-1]
    left: dict[str, tuple[int, int]] = {}
    for layer in last.coupling.layers:
        alone = replace(last.coupling, layers=(layer,), tensors={})
        width = sum(channel not in last.removed for channel in layer.output_channels)
        left[layer.layer] = (width, macs_and_params(alone, last.removed)[0])
    return [
        {
            "layer": layer.layer,
            "channels": len(layer.output_channels),
            "channels_left": left.get(layer.layer, (None, None))[0],
            "macs": layer.macs,
            "macs_left": left.get(layer.layer, (None, None))[1],
        }
        for layer in cuts[0].coupling.layers
    ]
