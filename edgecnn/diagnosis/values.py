"""What weights and ranges say: what is not finite, dead, exploding, out of proportion."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from edgecnn.diagnosis.finding import Finding, unique
from edgecnn.diagnosis.ranges import Range
from edgecnn.diagnosis.structure import weight_arrays
from edgecnn.graph.nodes import aten, layer_name
from edgecnn.graph.program import Program

MOST_CONCAT_RATIO = 8.0
"""Ranges that differ by more leave the narrowest input of a concat fewer than 32 of 256 levels."""

OUTLIER_RATIO = 16.0
"""A channel this many times as wide as the median one leaves half of all channels fewer than 16 levels."""

EXPLODING = 1e4
"""Magnitudes above are no activations of a network that was trained well."""

_LAYERS = frozenset({aten.conv2d.default, aten.conv2d.padding, aten.conv_transpose2d.input})
_RELUS = frozenset({aten.relu.default, aten.relu6.default})


def find_not_finite(program: Program) -> list[Finding]:
    """Name layers with NaN or infinite values, from which nothing can be calibrated."""
    bad = [
        op.layer
        for op in program.ops
        for name in op.inputs
        if (data := program.tensors[name].data) is not None
        and data.dtype.kind == "f"
        and not np.isfinite(data).all()
    ]
    if not bad:
        return []
    return [
        Finding(
            "not_finite",
            "problem",
            "weights that are NaN or infinite",
            unique(bad),
            "every output of the network is NaN or arbitrary, in float too",
            "train again, or take an earlier checkpoint: this one is broken",
        )
    ]


def find_weight_outliers(program: Program) -> list[Finding]:
    """Name layers some of whose channels of weights stand far out, and channels that are all zero."""
    wide, dead = [], []
    for op, weights in weight_arrays(program):
        largest = np.abs(weights.reshape(len(weights), -1)).max(axis=1)
        alive = largest[largest > 0]
        if len(alive) < len(largest):
            dead.append(f"{op.layer.partition(' (')[0]} ({len(largest) - len(alive)} of {len(largest)})")
        if len(alive) and largest.max() > OUTLIER_RATIO * np.median(alive):
            wide.append(op.layer)
    found = []
    if dead:
        found.append(
            Finding(
                "dead_weights",
                "note",
                "channels whose weights are all zero",
                tuple(dead),
                "they compute a constant and cost as much as the others",
                "`edgecnn compress --prune 0.1 --int8` removes such channels first",
            )
        )
    if wide:
        found.append(
            Finding(
                "weight_outliers",
                "note",
                "weight channels far larger than the others",
                unique(wide),
                "with one scale for all channels the small ones would round to nothing",
                "nothing to do: edgecnn gives each channel its own scale (per_channel weights)",
            )
        )
    return found


def find_range_outliers(ranges: dict[fx.Node, Range], source: str) -> list[Finding]:
    """Name activations with outlier, dead or exploding channels.

    Args:
        ranges: of the folded graph's values.
        source: where they come from, for the texts.
    """
    wide, dead, exploding, zero = [], [], [], []
    for node, found in ranges.items():
        if not (np.isfinite(found.low).all() and np.isfinite(found.high).all()):
            exploding.append(layer_name(node))
            continue
        width = found.width
        if node.target in _LAYERS and width.max() > EXPLODING:
            exploding.append(layer_name(node))
        if node.target in _RELUS:
            silent = int((found.high <= 0).sum())
            if silent == len(width):
                zero.append(layer_name(node))
            elif silent:
                dead.append(f"{layer_name(node).partition(' (')[0]} ({silent} of {len(width)})")
        if node.target in _LAYERS and len(width) > 4 and width.max() > OUTLIER_RATIO * np.median(width) > 0:
            wide.append(f"{layer_name(node).partition(' (')[0]} ({width.max() / np.median(width):.0f}x)")
    return _range_findings(wide, dead, list(unique(exploding)), list(unique(zero)), source)


def _range_findings(
    wide: list[str], dead: list[str], exploding: list[str], zero: list[str], source: str
) -> list[Finding]:
    texts = (
        (
            "exploding",
            "problem",
            f"values beyond {EXPLODING:g}, infinite or NaN",
            exploding,
            "one scale must span them, so ordinary values round to zero",
            "check the preprocess and the training: running variances near 0 do this",
        ),
        (
            "zero_range",
            "warning",
            "whole activations that stay zero",
            zero,
            "nothing passes there: the layers behind compute constants, and no scale can be calibrated",
            "check the preprocess; if it is right, the branch is dead and can be left out of the network",
        ),
        (
            "outlier_channels",
            "warning",
            "channels far wider than the median one",
            wide,
            f"one scale per tensor: beyond {OUTLIER_RATIO:g}x half of all channels keep fewer than 16 levels",
            'try a recipe with "equalize" behind fold_batch_norm, which moves scale into the next layer',
        ),
        (
            "dead_channels",
            "note",
            "channels that are never above zero",
            dead,
            "they cost as much as the others and give nothing",
            "`edgecnn compress --prune 0.1 --int8` removes such channels first",
        ),
    )
    return [
        Finding(
            check,
            level,
            f"{title} ({source})",
            tuple(layers),
            why,
            action,
        )
        for check, level, title, layers, why, action in texts
        if layers
    ]


def find_concat_ranges(
    nodes: list[fx.Node], ranges: dict[fx.Node, Range], shapes: dict[str, Any], source: str
) -> list[Finding]:
    """Name concats whose inputs have ranges so different that one scale serves them badly."""
    layers, unknown = [], []
    for node in nodes:
        if node.target is not aten.cat.default or node.name not in shapes:
            continue
        parts: Any = node.args[0]
        if not all(part in ranges for part in parts):
            unknown.append(layer_name(node))
            continue
        extents = [ranges[part].extent for part in parts]
        if min(extents) > 0 and max(extents) > MOST_CONCAT_RATIO * min(extents):
            levels = max(int(256 * min(extents) / max(extents)), 1)
            layers.append(f"{layer_name(node).partition(' (')[0]} ({levels} of 256 levels)")
    found = []
    if layers:
        found.append(
            Finding(
                "concat_ranges",
                "warning",
                f"concats whose inputs have mismatched ranges ({source})",
                tuple(layers),
                "all inputs of a concat share one scale, so the narrowest keeps few levels",
                "where they only lead out (a detector's boxes beside its scores) they are joined in float, "
                "each from its own scale; elsewhere scale the narrow one up in the network",
            )
        )
    if unknown:
        found.append(
            Finding(
                "concat_ranges_unknown",
                "note",
                "concats whose ranges BatchNorm does not tell",
                unique(unknown),
                "inputs of very different range share one scale badly",
                "give --data to have them measured",
            )
        )
    return found
