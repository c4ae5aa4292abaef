"""Never slower: what to do about a file that takes longer than float's.

The layers of the format whose file is slow are timed, in int8 and in float (`layer_time`). Those that int8
makes slower are left in float, first the one that loses most, then more; each try is timed against float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from edgecnn.errors import EdgeCNNError
from edgecnn.judgement import Made
from edgecnn.making import Plan
from edgecnn.quantize.float_layers import layer_names
from edgecnn.report.results import SpeedupFigures
from edgecnn.search.cures import Cure, in_words, quantizer_of, with_float_layers
from edgecnn.search.layer_time import LayerTime, layer_times, order_of_loss
from edgecnn.search.workbench import Trial, Workbench

MAX_NAMED = 5
"""Layers that eat the time, named in the report."""

COUNTS = (1, 2, 4, 8, 16, 32)
"""How many layers are left in float, one try each."""

CLEARLY = 1.05
"""Factor by which a slow file has to gain for a change to be worth it."""

MAX_SIZE_SHARE = 0.75
"""Of a float file's size: one that is hardly smaller and hardly faster is no reason to quantize."""


@dataclass
class Hastened:
    """Where the search ended.

    Attributes:
        plan: the fastest found.
        changes: against the first plan, in words.
        is_met: whether no file is slower than float any more.
        slow_layers: of the first plan, by format slower than float, what loses most first.
    """

    plan: Plan
    changes: list[str] = field(default_factory=list)
    is_met: bool = False
    slow_layers: dict[str, list[LayerTime]] = field(default_factory=dict)


def slow_formats(speedup: Mapping[str, SpeedupFigures], *, must_be_faster: bool = False) -> list[str]:
    """Return the formats whose file is slower than float, or not faster where it must be.

    Example:
        >>> speedup = {"onnx": SpeedupFigures(0.5, 0.4, 0.6), "tflite": SpeedupFigures(1.01, 0.9, 1.1)}
        >>> slow_formats(speedup), slow_formats(speedup, must_be_faster=True)
        (['onnx'], ['onnx', 'tflite'])
    """
    enough = ("faster",) if must_be_faster else ("faster", "no difference")
    return [name for name, figures in speedup.items() if figures.verdict not in enough]


def hasten(
    bench: Workbench,
    plan: Plan,
    made: Made,
    speedup: Mapping[str, SpeedupFigures],
    *,
    must_be_faster: bool = False,
) -> Hastened:
    """Look for a plan whose files are not slower than float.

    Args:
        bench: makes and measures plans.
        plan: the first, with a file slower than float.
        made: of `plan`.
        speedup: of `made`.
        must_be_faster: as fast as float is not enough.
    """

    def slow_ones(figures: Mapping[str, SpeedupFigures]) -> list[str]:
        return slow_formats(figures, must_be_faster=must_be_faster)

    found = Hastened(plan)
    formats = list(speedup)
    best = speedup
    bench.trials.append(Trial("as the recipe says", speedup=speedup))
    slow = slow_ones(speedup)
    times = {name: _layer_times(bench, made, name) for name in slow}
    found.slow_layers = {name: [t for t in layers if t.lost_ms > 0] for name, layers in times.items()}
    for change, candidate in _candidates(plan, made, slow, order_of_loss(times)):
        trial, _ = bench.try_speed(change, candidate, formats)
        if trial.size_share is not None and trial.size_share > MAX_SIZE_SHARE:
            break  # more layers in float make it larger still
        if not trial.error and is_better(trial.speedup, best, must_be_faster=must_be_faster):
            bench.keep(trial)
            best, found.plan, found.changes = trial.speedup, candidate, [change]
        if not slow_ones(best):
            break
    found.is_met = not slow_ones(best)
    return found


def is_better(
    found: Mapping[str, SpeedupFigures],
    before: Mapping[str, SpeedupFigures],
    *,
    must_be_faster: bool = False,
) -> bool:
    """Return whether files slower than float gained, by more than noise, and no other lost.

    Where none is slower any more another one may have lost, if they gained more together. With
    `must_be_faster` a file that is not faster counts as slower.

    Example:
        >>> slow, less_slow = SpeedupFigures(0.5, 0.4, 0.6), SpeedupFigures(0.8, 0.7, 0.9)
        >>> is_better({"onnx": less_slow}, {"onnx": slow}), is_better({"onnx": slow}, {"onnx": slow})
        (True, False)
    """
    slow = slow_formats(before, must_be_faster=must_be_faster)
    if any(name not in found for name in before):
        return False  # too few runs for an interval tell nothing
    if not slow_formats(found, must_be_faster=must_be_faster):
        return math.prod(found[n].ratio for n in before) > CLEARLY * math.prod(
            s.ratio for s in before.values()
        )
    kept = all(name in slow or found[name].high >= before[name].low for name in before)
    return kept and all(found[name].ratio > CLEARLY * before[name].ratio for name in slow)


def _layer_times(bench: Workbench, made: Made, file_format: str) -> list[LayerTime]:
    """Time the layers of one format's files; where that fails, say so among the tries."""
    try:
        return layer_times(bench, made, file_format)
    except EdgeCNNError as error:
        bench.trials.append(Trial(f"which layers of the {file_format} file are slow", error=error.message))
        return []


def _candidates(plan: Plan, made: Made, slow: Sequence[str], in_order: Sequence[str]) -> list[Cure]:
    """Return other plans, the smallest change first.

    Args:
        plan: the first.
        made: of it.
        slow: formats whose file is slower than float.
        in_order: layers that int8 makes slower there, what loses most first.
    """
    found = []
    if plan.align and made.activation_dtype == "uint8" and "onnx" in slow:
        found.append(("ONNX channels left as narrow as they are", replace(plan, align=False)))
    if quantizer_of(plan) is None:
        return found
    known = {name.split(" (")[0] for name in layer_names(made.loaded)}
    layers = [layer for layer in in_order if layer in known]
    counts = [count for count in COUNTS if count < len(layers)]
    prefixes = [layers[:count] for count in [*counts, len(layers)] if count]
    return [*found, *((in_words(prefix), with_float_layers(plan, prefix)) for prefix in prefixes)]
