"""Scales and slopes for which both runtimes compute the same leaky ReLU.

    y_q = floor((k_p d + 128) / 256) + z_y   where d = x_q - z_x >= 0      k_p = round(256 s_x / s_y)
    y_q = floor((k_n d + 128) / 256) + z_y   elsewhere                     k_n = round(256 slope s_x / s_y)

is XNNPACK's: the ratios have 8 bits, and half-way goes up. ONNX Runtime and the reference look up a table
that is computed in float and rounded half to even. With

    s_x / s_y = k_p / 256 (1 + e)      slope' = (k_n - e |k_n|) / (256 s_x / s_y)      e = 2^-18

XNNPACK finds the same k_p and k_n, and in float every tie is moved up by more than float32 rounds, while no
other value, at least 1/256 away from a tie, passes one: 255 e < 1/256. All compute the same integers.

The slope moves by at most half a 256th of an output step per input step, as it did in XNNPACK before; k_p is
the one of the largest 2.5 % that moves it least (25 / 250 for 0.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import fx

from edgecnn.graph.nodes import argument, aten
from edgecnn.quantize.annotate import Slots
from edgecnn.quantize.fitting import Fitting

STEPS = 256
"""XNNPACK's multipliers are whole multiples of 1/256."""

UPWARD = 2.0**-18
"""By which share values are moved up, so that what is half-way is rounded up in float too."""

SOURCE_SLOPE = "slope_before_quantization"
"""Where a node's meta keeps the slope that it had."""

_GROWTH = 0.025


def slope_of(node: fx.Node) -> float:
    """Return the slope of a leaky ReLU for negative values."""
    return float(argument(node, 1, "negative_slope", 0.01))


def leaky_output_scale(scale_x: float, scale_y: float, slope: float, *, nearest: bool = False) -> float:
    """Return a scale from `scale_y` to 2.5 % above it, or the nearest, at which s_x / s_y is k_p / 256.

    Example: at 250 / 256 a slope of 0.1 is 25 / 256.
        >>> [round(256.0 / leaky_output_scale(1.0, 1.0, slope), 2) for slope in (0.1, 0.2)]
        [250.0, 255.0]
    """
    most = STEPS * scale_x / scale_y
    largest = max(round(most) if nearest else math.floor(most * (1.0 + 1e-6)), 1)
    smallest = largest if nearest else max(math.ceil(most / (1.0 + _GROWTH)), 1)
    candidates = range(largest, min(smallest, largest) - 1, -1)
    k = min(candidates, key=lambda k: (round(abs(slope * k - round(slope * k)), 9), -k))
    return float(np.float32(STEPS * scale_x / (k * (1.0 + UPWARD))))


def leaky_input_scale(scale_x: float, scale_y: float, *, nearest: bool = False) -> float:
    """Return the smallest scale not below `scale_x`, or the nearest, with s_x / s_y = k_p / 256.

    Example:
        >>> round(256.0 * leaky_input_scale(0.4, 1.0), 2)
        103.0
    """
    least = STEPS * scale_x / scale_y
    k = max(round(least) if nearest else math.ceil(least * (1.0 - 1e-6)), 1)
    return float(np.float32(k * (1.0 + UPWARD) * scale_y / STEPS))


def exact_slope(scale_x: float, scale_y: float, slope: float) -> float:
    """Return the slope next to `slope` that XNNPACK's 8 bits hold, moved so that ties go up.

    One too flat for them, below 1/512 of an output step per input step, stays: XNNPACK leaves it to TFLite.

    Example:
        >>> round(exact_slope(1.0, 1.0, 0.1) * 256, 3), exact_slope(1.0, 1.0, 0.001)
        (26.0, 0.001)
    """
    k = round(STEPS * slope * scale_x / scale_y)
    if k == 0:
        return slope
    return (k - abs(k) * UPWARD) * scale_y / (STEPS * scale_x)


def fit_output(fitting: Fitting, node: fx.Node) -> None:
    """Fit the scale of a leaky ReLU's output, where it is free, to its input's."""
    y, x = fitting.slots.root(node), _input_root(fitting.slots, node)
    if x is None or x is y or not fitting.is_free(y):
        return
    scale_x, scale_y = fitting.scale(x), fitting.scale(y)
    fitting.settle(x)
    fitting.settle(y, leaky_output_scale(scale_x, scale_y, slope_of(node), nearest=fitting.nearest))


def fit_input(fitting: Fitting, node: fx.Node) -> None:
    """Fit the scale of a leaky ReLU's input to its output's, where that is bound by what reads it."""
    y, x = fitting.slots.root(node), _input_root(fitting.slots, node)
    if x is None or fitting.is_free(y) or not fitting.is_free(x):
        return
    fitting.settle(x, leaky_input_scale(fitting.scale(x), fitting.scale(y), nearest=fitting.nearest))


def write_slopes(
    graph: fx.GraphModule, slots: Slots, parameters: Mapping[fx.Node, tuple[float, int]]
) -> None:
    """Give every leaky ReLU that is computed in int8 the slope that both runtimes hold.

    Args:
        graph: that of the slots, or a copy of it with the same names; changed in place.
        slots: of the float graph.
        parameters: (scale, zero_point) of every value that has a slot.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    for held in slots.held:
        x = _input_root(slots, held)
        if x is None:
            continue
        node, slope = nodes[held.name], slope_of(held)
        node.meta.setdefault(SOURCE_SLOPE, slope)
        slope = exact_slope(parameters[x][0], parameters[held][0], float(node.meta[SOURCE_SLOPE]))
        node.args = (node.args[0], slope, *node.args[2:])
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "negative_slope"}


def _input_root(slots: Slots, node: fx.Node) -> fx.Node | None:
    """Return the slot that a leaky ReLU reads, None for anything else, and for one in float."""
    source = node.args[0] if node.args else None
    is_leaky = node.target is aten.leaky_relu.default
    if not is_leaky or node in slots.floats.nodes or not isinstance(source, fx.Node):
        return None
    return slots.root(source) if source in slots.parent else None
