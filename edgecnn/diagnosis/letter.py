"""Every check on one network, in the order in which one would act on them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from edgecnn.data.objectives import has_classes
from edgecnn.devices.kernels import kernels_for
from edgecnn.devices.profile import load_device
from edgecnn.diagnosis.expectation import expect_size, expect_speedup
from edgecnn.diagnosis.finding import LEVELS, Finding
from edgecnn.diagnosis.ranges import Range, estimate_ranges, measure_ranges
from edgecnn.diagnosis.structure import (
    find_channels,
    find_delegate_breaks,
    find_float_kernels,
    find_gates,
    find_islands,
    find_lone_batch_norms,
    find_swishes,
    find_unsupported,
    has_depthwise,
    without_islands,
)
from edgecnn.diagnosis.values import (
    find_concat_ranges,
    find_not_finite,
    find_range_outliers,
    find_weight_outliers,
)
from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.build import build_program
from edgecnn.graph.cost import layer_costs
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.graph.inference_form import to_inference_form
from edgecnn.graph.program import Program
from edgecnn.graph.shapes import infer_shapes
from edgecnn.images import check_calibration, open_images
from edgecnn.load import LoadOptions, load_model
from edgecnn.lower.activations import DecomposeActivations
from edgecnn.lower.averages import AveragesToConvolutions
from edgecnn.model import Model
from edgecnn.pipeline import PassContext
from edgecnn.preflight import refuse_quantized, suspect_channels
from edgecnn.proof import read_images

NUM_IMAGES, NUM_RANGED = 64, 16
"""Images compared with BatchNorm's memory, and those run through all layers for their ranges, at most."""


def diagnose(
    source: Any, options: LoadOptions | None = None, *, data: Any = None, target: str = "local_cpu"
) -> dict[str, Any]:
    """Say what int8 would do to a network, without compressing it.

    Args:
        source: whatever `load_model` takes.
        options: how to load it.
        data: whatever `edgecnn.data.open_dataset` takes, to measure ranges; None takes BatchNorm statistics.
        target: device profile.

    Returns:
        JSON-ready: name, target, isa, kernels, ranges_from, findings (check, level, title, layers, why,
        action), size (float_bytes, int8_bytes), speedup (class, like, onnx, tflite, measured, notes), seconds
        and warnings; size and speedup are None where an operator has no lowering.

    Raises:
        PassError: if the network is quantized already.
        DataError: if the images do not fit.
        DeviceError: if there is no such profile.
    """
    started = time.perf_counter()
    device = load_device(target)
    model = load_model(source, options or LoadOptions())
    refuse_quantized(model)
    images = _images(model, data)
    warnings = [*model.warnings, *suspect_channels(model)]
    if images is not None:
        warnings += check_calibration(model, images, data if isinstance(data, str) else "the data")
    found, program, ranges_from = _examine(model, images, device.isa)
    size = speedup = None
    if program is not None:
        macs = sum(cost.macs for cost in layer_costs(program))
        kind = _kind({finding.check for finding in found}, model)
        size, speedup = expect_size(program), expect_speedup(kind, device.isa, macs)
    kernels = kernels_for(device.isa)
    return {
        "name": model.spec.name,
        "target": device.name,
        "isa": device.isa,
        "kernels": kernels.to_dict(),
        "ranges_from": ranges_from,
        "findings": [f.to_dict() for f in sorted(found, key=lambda f: LEVELS.index(f.level))],
        "size": size,
        "speedup": speedup,
        "seconds": time.perf_counter() - started,
        "warnings": warnings,
    }


def _kind(checks: set[str], model: Model) -> str:
    """Return the class of networks whose speed-up is to be expected."""
    if "float_islands" in checks:
        return "islands"
    if checks & {"swish", "squeeze_excitation"}:
        return "gated"
    return "depthwise" if has_depthwise(model) else "plain"


def _images(model: Model, data: Any) -> Any:
    """Return a few preprocessed images, float32 (n, c, h, w), spread over the data; None without data."""
    if data is None:
        return None
    dataset = open_images(model, data)
    order = np.random.default_rng(0).permutation(len(dataset))[:NUM_IMAGES]
    return read_images(dataset, [int(index) for index in order])[0]


def _examine(model: Model, images: Any, isa: str) -> tuple[list[Finding], Program | None, str]:
    """Return the findings, the float Program that would be quantized and where ranges come from."""
    try:
        model = to_inference_form(model)
    except UnsupportedOpError as error:
        return [_no_file(error)], None, "nothing: the network has no form for files"
    nodes, shapes = list(model.graph.graph.nodes), infer_shapes(model)
    found = [
        *find_unsupported(nodes, shapes),
        *find_swishes(nodes),
        *find_gates(nodes, shapes),
        *find_lone_batch_norms(nodes),
    ]
    folded = FoldBatchNorm().run(model, PassContext())
    inner_shapes = infer_shapes(folded)
    ranges, ranges_from = _ranges(folded, inner_shapes, images)
    found += find_range_outliers(ranges, ranges_from)
    inner = list(folded.graph.graph.nodes)
    found += find_concat_ranges(inner, ranges, inner_shapes, ranges_from)
    if not ranges:
        found.append(_no_ranges(model))
    try:
        lowered = AveragesToConvolutions().run(
            DecomposeActivations().run(folded, PassContext()), PassContext()
        )
        program = build_program(lowered)
        lowered_shapes = infer_shapes(lowered)
        found += find_islands(lowered, lowered_shapes)
    except UnsupportedOpError as error:
        if not any(f.level == "problem" for f in found):
            found.append(_no_file(error))
        return found, None, ranges_from
    found += [*find_not_finite(program), *find_weight_outliers(program)]
    in_int8 = without_islands(program, lowered, lowered_shapes)
    found += [*find_float_kernels(in_int8), *find_delegate_breaks(in_int8), *find_channels(program, isa)]
    return found, program, ranges_from


def _no_file(error: UnsupportedOpError) -> Finding:
    hint = error.hint or "change the network there"
    return Finding("unsupported", "problem", error.message, (), "neither file can be written", hint)


def _ranges(folded: Model, shapes: dict[str, Any], images: Any) -> tuple[dict[Any, Range], str]:
    """Measure ranges where there are images, else take them from BatchNorm."""
    if images is not None and len(images) >= (folded.fixed_batch or 1):
        some = images[: folded.fixed_batch or NUM_RANGED]
        return measure_ranges(folded, some), f"{len(some)} images"
    ranges = estimate_ranges(folded, shapes)
    return ranges, "BatchNorm statistics" if ranges else "nothing: no BatchNorm, no data"


def _no_ranges(model: Model) -> Finding:
    source = (
        "images made up to look like its classes to the network, which costs SqueezeNet 1.1 three points"
        if has_classes(model)
        else "noise, and the files are useless"
    )
    return Finding(
        "no_statistics",
        "warning",
        "no BatchNorm and no data",
        (),
        f"nothing tells the ranges of activations: without --data, scales come from {source}",
        "give images with --data, here and to `edgecnn compress`",
    )
