"""Never slower: what to do about a file that takes longer than float's.

The operators of both ONNX files are timed by the runtime's own profiler and summed by layer. Layers that
int8 makes slower are left in float, first the one that loses most, then more; each is timed against float.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgecnn.devices.local import run_local
from edgecnn.graph.program import Program
from edgecnn.judgement import Made
from edgecnn.making import Plan
from edgecnn.proof import TIMEOUT_S, read_images
from edgecnn.quantize.float_layers import layer_names
from edgecnn.report.results import SpeedupFigures
from edgecnn.search.cures import Cure, in_words, quantizer_of, with_float_layers
from edgecnn.search.workbench import Trial, Workbench

MAX_NAMED = 5
"""Layers that eat the time, named in the report."""

COUNTS = (1, 2, 4, 8, 16, 32)
"""How many layers are left in float, one try each."""

RUNTIME = "(runtime)"
"""Stands for what is in between layers: transpositions, reorders, quantize and dequantize."""

CLEARLY = 1.05
"""Factor by which a slow file has to gain for a change to be worth it."""

MAX_SIZE_SHARE = 0.75
"""Of a float file's size: one that is hardly smaller and hardly faster is no reason to quantize."""

_ADDED = re.compile(r"^fused |(_token_\d+|_nchwc|_bn_fused)+$")
"""What ONNX Runtime's optimizations add to the name of a node or of the value it makes."""


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
    best = speedup
    bench.trials.append(Trial("as the recipe says", speedup=speedup))
    if "onnx" in speedup:
        found.slow_layers = [time for time in layer_times(bench, made) if time.lost_ms > 0]
    for change, candidate in _candidates(plan, made, found.slow_layers):
        trial, _ = bench.try_speed(change, candidate, formats)
        if trial.size_share is not None and trial.size_share > MAX_SIZE_SHARE:
            break  # more layers in float make it larger still
        if not trial.error and is_better(trial.speedup, best):
            bench.keep(trial)
            best, found.plan, found.changes = trial.speedup, candidate, [change]
        if not slow_formats(best):
            break
    found.is_met = not slow_formats(best)
    return found


def is_better(found: Mapping[str, SpeedupFigures], before: Mapping[str, SpeedupFigures]) -> bool:
    """Return whether files slower than float gained, by more than noise, and no other lost.

    Where none is slower any more another one may have lost, if they gained more together.

    Example:
        >>> slow, less_slow = SpeedupFigures(0.5, 0.4, 0.6), SpeedupFigures(0.8, 0.7, 0.9)
        >>> is_better({"onnx": less_slow}, {"onnx": slow}), is_better({"onnx": slow}, {"onnx": slow})
        (True, False)
    """
    slow = slow_formats(before)
    if any(name not in found for name in before):
        return False  # too few runs for an interval tell nothing
    if not slow_formats(found):
        return math.prod(found[n].ratio for n in before) > CLEARLY * math.prod(
            s.ratio for s in before.values()
        )
    kept = all(name in slow or found[name].high >= before[name].low for name in before)
    return kept and all(found[name].ratio > CLEARLY * before[name].ratio for name in slow)


def _candidates(plan: Plan, made: Made, slow: Sequence[LayerTime]) -> list[Cure]:
    """Return other plans, the smallest change first."""
    found = []
    if plan.align and made.activation_dtype == "uint8" and "onnx" in made.files:
        found.append(("ONNX channels left as narrow as they are", replace(plan, align=False)))
    if quantizer_of(plan) is None:
        return found
    known = {name.split(" (")[0] for name in layer_names(made.loaded)}
    layers = [time.layer for time in slow if time.layer in known]
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
    places = _places(made.float_program) | _places(made.program)
    before, after = (_by_layer(entries[key]["profile"] or [], places) for key in ("float_onnx", "onnx"))
    times = [LayerTime(n, after.get(n, 0.0), before.get(n, 0.0)) for n in {**after, **before}]
    bench.maker.progress.finish()
    return sorted(times, key=lambda time: -time.lost_ms)


def _places(program: Program) -> dict[str, str]:
    """Return value -> path of the layer that makes it, and each path as it is."""
    layers = [op for op in program.ops if " (" in op.layer and not op.kind.endswith("quantize")]
    made_by = {op.output: op.layer.split(" (")[0] for op in layers}
    return {**made_by, **{path: path for path in made_by.values()}}


def _by_layer(profile: Sequence[Mapping[str, Any]], places: Mapping[str, str]) -> dict[str, float]:
    """Sum an ONNX Runtime profile by layer.

    The writer calls nodes LAYER/OPERATOR; the runtime names some that it makes after the value they give.

    Example:
        >>> rows = [("stem/Conv_token_1", 3.0), ("conv2d_nchwc", 1.0), ("fused stem/Relu", 2.0), ("C", 4.0)]
        >>> profile = [{"name": name, "median_ms": ms} for name, ms in rows]
        >>> _by_layer(profile, {"stem": "stem", "conv2d": "body.0"})
        {'stem': 5.0, 'body.0': 1.0, '(runtime)': 4.0}
    """
    found: dict[str, float] = {}
    for row in profile:
        bare = _ADDED.sub("", _ADDED.sub("", str(row["name"])))
        name = places.get(bare.partition("/")[0], RUNTIME)
        found[name] = found.get(name, 0.0) + row["median_ms"]
    return found
