"""The accuracy guard: from the cheapest cure to the dearest, until the files are within the budget.

    observer -> equalization -> bias correction -> AdaRound, BRECQ -> layers in float -> training -> int16

A cure that helps is kept and the next builds on it. The cheap ones go on until the drop and one standard
error are within the budget, since a few images cannot tell; the dear ones follow where the measured drop is
not. int16 activations, which no CPU computes fast, are kept where the files are not slower than float, or
where nobody asks how fast they are. Without labels the budget bounds disagreement with float instead: of the
images on which both answer alike neither gains nor loses, so |drop| <= 1 - agreement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from edgecnn.graph.cost import layer_costs
from edgecnn.judgement import Made
from edgecnn.making import Plan, summarize
from edgecnn.pipeline import run_passes
from edgecnn.proof import read_images
from edgecnn.quantize.sensitivity import LayerNoise, layer_sensitivity, pareto
from edgecnn.report.sampling import unproven_text
from edgecnn.search.cures import (
    QUANTIZER,
    Cure,
    bias_corrections,
    equalization,
    in_words,
    is_static,
    observers,
    roundings,
    training,
    wide_activations,
    with_float_layers,
)
from edgecnn.search.workbench import Trial, Workbench

CHEAP: tuple[Callable[[Plan], list[Cure]], ...] = (observers, equalization, bias_corrections, roundings)
"""Cures that cost no latency, cheapest first."""

MAX_FLOAT_SHARE = 0.5
"""Of the multiply-accumulates that may be left in float: beyond it a float file is the better answer."""

SENSITIVITY_MACS = 3e11
MIN_IMAGES, MAX_IMAGES = 8, 64
"""What looking for the layers that hurt may cost, and on how many images it is done."""


@dataclass
class Guarded:
    """Where the guard ended.

    Attributes:
        plan: the best found.
        changes: against the first plan, in words.
        is_met: whether the budget is.
        advice: what it would take, where it is not met.
        note: where it is met as measured, but not with one standard error.
    """

    plan: Plan
    changes: list[str] = field(default_factory=list)
    is_met: bool = False
    advice: str = ""
    note: str = ""


def loss_of(trial: Trial) -> float:
    """Return the drop in points, without labels the most that it can be, infinite if nothing was measured."""
    if trial.drop_points is not None:
        return trial.drop_points
    return math.inf if trial.agreement is None else 100.0 * (1.0 - trial.agreement)


def bound_of(trial: Trial) -> float:
    """Return the drop in points and one standard error."""
    return loss_of(trial) + (trial.drop_error or 0.0)


class Guard:
    """Looks for a plan within the budget.

    Args:
        bench: makes and measures plans.
        plan: the first, whose files miss the budget.
        max_drop: percentage points of top-1.
    """

    def __init__(self, bench: Workbench, plan: Plan, max_drop: float) -> None:
        self._bench, self._max_drop = bench, max_drop
        self._found = Guarded(plan)
        self._best: tuple[Trial, Made] | None = None
        self._wide = ""

    def run(self) -> Guarded:
        """Return the first plan within the budget, or the best."""
        found, bench = self._found, self._bench
        if not is_static(found.plan):
            found.advice = "only recipes that quantize statically are searched"
            return found
        trial, made = bench.try_accuracy("as the recipe says", found.plan)
        if made is None:
            found.advice = trial.error
            return found
        self._best = (bench.keep(trial), made)
        for cures in CHEAP:
            if self._is_shown():
                break
            self._try_each(cures(found.plan))
        cheap, changes = found.plan, list(found.changes)
        if not self._is_met():
            self._leave_in_float()
        if not self._is_met() and bench.can_train:
            self._train(cheap, changes)
        if not self._is_met() and bench.may_widen:
            self._widen(cheap, changes)
        found.is_met = self._is_met()
        if not found.is_met:
            found.advice = self._advice()
        best = self._best[0]
        if best.drop_points is not None:
            found.note = unproven_text(best.drop_points, best.drop_error, best.num_samples, self._max_drop)
        return found

    def _is_shown(self) -> bool:
        return self._best is not None and bound_of(self._best[0]) <= self._max_drop + 1e-9

    def _is_met(self) -> bool:
        return self._best is not None and loss_of(self._best[0]) <= self._max_drop + 1e-9

    def _rank(self, trial: Trial) -> tuple[float, float]:
        """Return what is to be small: the drop, then disagreement with float."""
        return round(loss_of(trial), 9), 1.0 - (trial.agreement or 0.0)

    def _try_each(self, cures: list[Cure]) -> None:
        """Try alternatives to one another; keep the best of them if it helps."""
        best: tuple[Trial, Made, Cure] | None = None
        for change, plan in cures:
            trial, made = self._bench.try_accuracy(change, plan)
            if made is not None and (best is None or self._rank(trial) < self._rank(best[0])):
                best = (trial, made, (change, plan))
            if made is not None and bound_of(trial) <= self._max_drop + 1e-9:
                break
        if best is not None and self._best is not None and self._rank(best[0]) < self._rank(self._best[0]):
            self._accept(*best)

    def _accept(self, trial: Trial, made: Made, cure: Cure) -> None:
        self._best = (self._bench.keep(trial), made)
        self._found.changes.append(cure[0])
        self._found.plan = cure[1]

    def _leave_in_float(self) -> None:
        """Leave more and more of the layers that hurt most for what they cost in float."""
        plan, before, points = self._found.plan, list(self._found.changes), self._points()
        for layers, share in points:
            if share > MAX_FLOAT_SHARE:
                return
            words = in_words([layer.layer for layer in layers])
            cure = (words, with_float_layers(plan, [layer.name for layer in layers]))
            self._try_each([cure])
            if self._found.plan == cure[1]:  # a longer list of layers takes the place of a shorter one
                self._found.changes = [*before, words]
            if self._is_met():
                return

    def _train(self, cheap: Plan, changes: list[str]) -> None:
        """Train with the rounding: all layers in int8 again, then with those in float that helped."""
        mixed = self._found.plan
        for plan in [cheap] if mixed == cheap else [cheap, mixed]:
            (cure,) = training(plan)
            self._try_each([cure])
            if self._found.plan == cure[1]:  # training takes the place of layers in float
                self._found.changes = [*changes, cure[0]]
            if self._is_met():
                return

    def _widen(self, cheap: Plan, changes: list[str]) -> None:
        """Make all activations int16, unless that makes a file slower than float."""
        for words, plan in wide_activations(cheap):
            trial, made = self._bench.try_accuracy(words, plan)
            if made is None or loss_of(trial) > self._max_drop + 1e-9:
                return
            factor = self._bench.times_slower(words, plan)
            if factor is None or factor <= 1.0:
                self._accept(trial, made, (words, plan))
                self._found.changes = [*changes, words]
            else:
                latency = f"{factor:.2g} times float's" if math.isfinite(factor) else "too long to be timed"
                self._wide = f"; {words} lose {loss_of(trial):.3g} points, at a latency {latency}"

    def _points(self) -> list[tuple[list[LayerNoise], float]]:
        """Return lists of layers to leave in float, each with its share of the MACs, the shortest first."""
        if self._best is None:
            return []
        made, prepared, maker = self._best[1], self._bench.prepared, self._bench.maker
        passes = self._found.plan.passes
        place = [step.name for step in passes].index(QUANTIZER)
        float_model = run_passes(
            prepared.start, passes, prepared.context, summarize, start=prepared.num_done, stop=place
        )
        images, indices = prepared.images.dataset, prepared.images.split.calibration
        inputs, _ = read_images(images, indices[: _num_images(made)])
        layers = layer_sensitivity(float_model, made.compressed, inputs, maker.progress)
        found = pareto(float_model, made.compressed, inputs, layers, maker.progress)
        by_name = {layer.name: layer for layer in layers}
        return [([by_name[name] for name in p["float_layers"]], p["float_macs_share"]) for p in found[1:]]

    def _advice(self) -> str:
        loss = loss_of(self._best[0]) if self._best else math.inf
        text = f"the best of {len(self._bench.trials)} tries loses {loss:.3g} points"
        untried = "" if self._bench.can_train else "; images to train on (--train-data) would let it train"
        return text + untried + self._wide


def _num_images(made: Made) -> int:
    """Return on how many images the layers that hurt are looked for."""
    macs = sum(cost.macs for cost in layer_costs(made.program))
    return int(np.clip(SENSITIVITY_MACS / max(len(made.program.ops) * macs, 1), MIN_IMAGES, MAX_IMAGES))
