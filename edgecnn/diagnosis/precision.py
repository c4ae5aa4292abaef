"""Which layers int8 hurts, and what leaving some in float would bring: `inspect --int8 --sensitivity`.

The network is quantized in memory and run layer by layer; no file is written and nothing is timed.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from edgecnn.graph.build import build_program
from edgecnn.graph.cost import layer_costs
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.images import open_or_make_up
from edgecnn.load import LoadOptions, load_model
from edgecnn.lower.activations import DecomposeActivations
from edgecnn.lower.averages import AveragesToConvolutions
from edgecnn.model import Model
from edgecnn.pipeline import PassContext, Progress, SilentProgress
from edgecnn.preflight import refuse_quantized
from edgecnn.proof import read_images
from edgecnn.quantize.sensitivity import layer_sensitivity, pareto
from edgecnn.quantize.static import QuantizeStatic

NUM_CALIBRATION, MADE_UP = 128, 16
MOST_IMAGES, LEAST_IMAGES = 64, 4

MAX_COST = 6e9
"""All trials together may compute about so many values, a minute's worth; fewer images are used for it."""
MACS_PER_VALUE = 16
"""Multiply-accumulates that take as long as quantizing one value."""


def inspect_precision(
    source: Any,
    options: LoadOptions | None = None,
    *,
    data: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure each layer alone in int8, and more and more of them left in float.

    Args:
        source: whatever `load_model` takes.
        options: how to load it.
        data: whatever `edgecnn.data.open_dataset` takes; None makes a few images up.
        progress: told about every layer.

    Returns:
        JSON-ready: source, num_calibration, num_samples, seconds, layers (of `layer_sensitivity`, the
        noisiest first) and points (of `pareto`, with "layers": what people call the names in "float_layers").

    Raises:
        PassError: if the network is quantized already.
        DataError: if the images do not fit.
    """
    started, progress = time.perf_counter(), progress or SilentProgress()
    model = load_model(source, options or LoadOptions())
    refuse_quantized(model)
    dataset = open_or_make_up(model, data, MADE_UP, progress)
    folded = _prepared(model)
    order = [int(i) for i in np.random.default_rng(0).permutation(len(dataset))]
    judged = order[: _affordable(folded)]
    kept_apart = order[len(judged) :][:NUM_CALIBRATION]
    calibration = kept_apart if len(kept_apart) >= len(judged) else order[:NUM_CALIBRATION]
    context = PassContext(dataset, tuple(calibration), progress=progress)
    quantized = QuantizeStatic().run(folded, context)
    inputs, _ = read_images(dataset, judged)
    layers = layer_sensitivity(folded, quantized, inputs, progress)
    points = pareto(folded, quantized, inputs, layers, progress)
    called = {entry.name: entry.layer for entry in layers}
    return {
        "source": dataset.name,
        "num_calibration": len(calibration),
        "num_samples": len(inputs),
        "layers": [entry.to_dict() for entry in layers],
        "points": [{**point, "layers": [called[n] for n in point["float_layers"]]} for point in points],
        "seconds": time.perf_counter() - started,
    }


def _prepared(model: Model) -> Model:
    """Return the network as `compress --int8` quantizes it."""
    for step in (FoldBatchNorm(), DecomposeActivations(), AveragesToConvolutions()):
        model = step.run(model, PassContext())
    return model


def _affordable(folded: Model) -> int:
    """Return how many images are judged on: every layer is run twice."""
    program = build_program(folded)
    values = sum(int(np.prod(program.tensors[op.output].shape[1:])) for op in program.ops)
    cost = max(values + sum(c.macs for c in layer_costs(program)) / MACS_PER_VALUE, 1)
    trials = 2 * len(program.ops) + 10
    count = int(np.clip(MAX_COST / (trials * cost), LEAST_IMAGES, MOST_IMAGES))
    batch = folded.fixed_batch or 1
    return max(count // batch, 1) * batch
