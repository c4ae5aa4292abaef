"""Never slower: what to do about a file that takes longer than float's.

The operators of both ONNX files are timed by the runtime's own profiler and summed by layer. Layers that
int8 makes slower are left in float, first the one that loses most, then more; each is timed against float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgecnn.devices.local import run_local
from edgecnn.judgement import Made
from edgecnn.making import Plan
from edgecnn.proof import TIMEOUT_S, read_images
from edgecnn.report.results import SpeedupFigures
from edgecnn.search.cures import in_words, quantizer_of, with_float_layers
from edgecnn.search.workbench import Trial, Workbench

MAX_NAMED = 5
"""Layers that eat the time, named in the report."""

COUNTS = (1, 2, 4, 8, 16, 32)
"""How many layers are left in float, one try each."""

RUNTIME = "(runtime)"
"""Stands for what the runtime put in between layers: transpositions, reorders."""


@dataclass(frozen=True)
class LayerTime:
    """One layer's operators in ONNX Runtime, for one image.

    Attributes:
        layer: path in the network, "features.0".
        int8_ms, float_ms: time in the compressed and in the float file.
    """

    layer: str
    int8_ms: float
    float_ms: float

    @property
    def lost_ms(self) -> float:
        """How much longer the compressed file's take."""
        return self.int8_ms - self.float_ms

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-ready."""
        return {"layer": self.layer, "int8_ms": self.int8_ms, "float_ms": self.float_ms}


@dataclass
class Hastened:
    """Where the search ended.

    Attributes:
        plan: the fastest found.
        changes: against the first plan, in words.
        is_met: whether no file is slower than float any more.
        slow_layers: of the first plan, what loses most first.
    """

    plan: Plan
    changes: list[str] = field(default_factory=list)
    is_met: bool = False
    slow_layers: list[LayerTime] = field(default_factory=list)


def slow_formats(speedup: Mapping[str, SpeedupFigures]) -> list[str]:
    """Return the formats whose file is slower than float."""
    return [name for name, figures in speedup.items() if figures.verdict == "slower"]


def hasten(bench: Workbench, plan: Plan, made: Made, speedup: Mapping[str, SpeedupFigures]) -> Hastened:
    """Look for a plan whose files are not slower than float.

    Args:
        bench: makes and measures plans.
        plan: the first, with a file slower than float.
        made: of `plan`.
        speedup: of `made`.
    """
    found = Hastened(plan)
    formats = list(speedup)
    best = Trial("as the recipe says", speedup=speedup, kept=True)
    bench.trials.append(best)
    if "onnx" in speedup:
        found.slow_layers = [time for time in layer_times(bench, made) if time.lost_ms > 0]
    for change, candidate in _candidates(plan, made, found.slow_layers):
        trial, _ = bench.try_speed(change, candidate, formats)
        if not trial.error and rank(trial.speedup) < rank(best.speedup):
            best = bench.keep(trial)
            found.plan, found.changes = candidate, [change]
        if not trial.error and not slow_formats(trial.speedup):
            break
    found.is_met = not slow_formats(best.speedup)
    return found


def rank(speedup: Mapping[str, SpeedupFigures]) -> tuple[int, float]:
    """Return what is to be small: how many files are slower than float, then how slow those below float are.

    Example:
        >>> rank({"onnx": SpeedupFigures(0.5, 0.4, 0.6), "tflite": SpeedupFigures(2.0, 1.9, 2.1)})
        (1, 0.6931471805599453)
    """
    lost = -sum(math.log(min(figures.ratio, 1.0)) for figures in speedup.values())
    return len(slow_formats(speedup)), lost


def _candidates(plan: Plan, made: Made, slow: Sequence[LayerTime]) -> list[tuple[str, Plan]]:
    """Return other plans, the smallest change first."""
    found = []
    if plan.align and made.activation_dtype == "uint8" and "onnx" in made.files:
        found.append(("ONNX channels left as narrow as they are", replace(plan, align=False)))
    if quantizer_of(plan) is None:
        return found
    layers = [time.layer for time in slow if time.layer != RUNTIME]
    counts = [count for count in COUNTS if count < len(layers)]
    prefixes = [layers[:count] for count in [*counts, len(layers)] if count]
    return [*found, *((in_words(prefix), with_float_layers(plan, prefix)) for prefix in prefixes)]


def layer_times(bench: Workbench, made: Made) -> list[LayerTime]:
    """Time both ONNX files operator by operator on this machine; what loses most comes first."""
    bench.maker.progress.start("which layers are slower than float", None)
    dataset, held_out = bench.images
    inputs, _ = read_images(dataset, held_out[:1])
    with bench.staged(made, ["onnx"]) as candidates:
        path = candidates[0].path.parent / "inputs.npy"
        np.save(path, np.asarray(inputs, np.float32))
        request = {
            "task": "latency",
            "artifacts": [candidate.to_request() for candidate in candidates],
            "inputs": str(path),
            "threads": bench.maker.options.threads,
            "min_runs": 10,
            "min_seconds": 0.0,
            "max_seconds": 10.0,
            "profile": True,
        }
        entries = run_local(request, TIMEOUT_S)["artifacts"]
    before, after = (_by_layer(entries[key]["profile"] or []) for key in ("float_onnx", "onnx"))
    times = [LayerTime(n, after.get(n, 0.0), before.get(n, 0.0)) for n in {**after, **before}]
    bench.maker.progress.finish()
    return sorted(times, key=lambda time: -time.lost_ms)


def _by_layer(profile: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum an ONNX Runtime profile by layer: nodes are called LAYER/OPERATOR by the writer.

    Example:
        >>> _by_layer([{"name": "stem/Conv_token_1", "total_ms": 3.0, "count": 2}])
        {'stem': 1.5}
    """
    found: dict[str, float] = {}
    for row in profile:
        layer, separator, _ = str(row["name"]).partition("/")
        name = layer if separator else RUNTIME
        found[name] = found.get(name, 0.0) + row["total_ms"] / max(row["count"], 1)
    return found
