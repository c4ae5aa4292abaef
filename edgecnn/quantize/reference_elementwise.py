"""Element-wise operators of the NumPy reference, softmax, and the changes between float and int8.

Quantized, with d = q - zero_point (exact in float32) and every scale ratio rounded to float32:

    add, sub     q_y = round_half_even(d_a * (s_a / s_y) +- d_b * (s_b / s_y)) + zero_point_y
    mul          q_y = round_half_even(d_a * d_b * (s_a * s_b / s_y)) + zero_point_y
    requantize   q_y = round_half_even(d_x * (s_x / s_y)) + zero_point_y          (clamp bounds it further)
    f(x)         q_y = quantize(f(dequantize(q_x))), one table of 256 entries (sigmoid, tanh, leaky_relu,
                 hard_swish, hard_sigmoid)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgecnn.graph.program import Array
from edgecnn.quantize.reference_call import (
    Call,
    centered,
    clamp_levels,
    clamp_real,
    float_scale,
    scale_ratio,
    to_levels,
)


def add(call: Call) -> Array:
    """Compute a + b, broadcast as in NumPy."""
    return _sum(call, sign=1.0)


def sub(call: Call) -> Array:
    """Compute a - b, broadcast as in NumPy."""
    return _sum(call, sign=-1.0)


def _sum(call: Call, sign: float) -> Array:
    """Compute a + sign * b."""
    a, b = call.arrays
    clamp = call.attribute("clamp")
    if not call.is_quantized:
        return clamp_real(a + np.float32(sign) * b, clamp)
    quant_y = call.output_quant
    left = centered(a, call.quant(0)) * scale_ratio(call.quant(0), quant_y)
    right = centered(b, call.quant(1)) * (np.float32(sign) * scale_ratio(call.quant(1), quant_y))
    return to_levels(left + right, quant_y, clamp)


def mul(call: Call) -> Array:
    """Compute a * b, broadcast as in NumPy."""
    a, b = call.arrays
    clamp = call.attribute("clamp")
    if not call.is_quantized:
        return clamp_real(a * b, clamp)
    quant_a, quant_b, quant_y = call.quant(0), call.quant(1), call.output_quant
    multiplier = float_scale(quant_a) * float_scale(quant_b) / float_scale(quant_y)
    return to_levels(centered(a, quant_a) * centered(b, quant_b) * multiplier, quant_y, clamp)


def clamp(call: Call) -> Array:
    """Bound x by the attribute `clamp`; between unlike parameters it also requantizes."""
    (x,) = call.arrays
    if not call.is_quantized:
        return np.array(clamp_real(x, call.attribute("clamp")))
    quant_x, quant_y = call.quant(0), call.output_quant
    if float_scale(quant_x) == float_scale(quant_y) and quant_x.zero_point == quant_y.zero_point:
        low, high = clamp_levels(call.attribute("clamp"), quant_y)
        return np.asarray(np.clip(x, low, high), quant_y.dtype)
    return requantize(call)


def requantize(call: Call) -> Array:
    """Express x in the output's scale and zero point."""
    scaled = centered(call.arrays[0], call.quant(0)) * scale_ratio(call.quant(0), call.output_quant)
    return to_levels(scaled, call.output_quant, call.attribute("clamp"))


def quantize(call: Call) -> Array:
    """Turn float32 x into int8."""
    return call.output_quant.quantize(call.arrays[0])


def dequantize(call: Call) -> Array:
    """Turn int8 x into float32."""
    return call.quant(0).dequantize(call.arrays[0])


def leaky_relu(call: Call) -> Array:
    """Compute x where x >= 0, negative_slope * x elsewhere."""
    slope = np.float32(call.attribute("negative_slope", 0.01))
    return _by_table(call, lambda x: np.where(x >= 0, x, x * slope))


def sigmoid(call: Call) -> Array:
    """Compute 1 / (1 + exp(-x))."""
    return _by_table(call, _sigmoid)


def tanh(call: Call) -> Array:
    """Compute the hyperbolic tangent."""
    return _by_table(call, np.tanh)


def hard_swish(call: Call) -> Array:
    """Compute x * hard_sigmoid(x)."""
    return _by_table(call, lambda x: x * _hard_sigmoid(x))


def hard_sigmoid(call: Call) -> Array:
    """Compute clamp(x / 6 + 1/2, 0, 1)."""
    return _by_table(call, _hard_sigmoid)


def softmax(call: Call) -> Array:
    """Compute exp(x) / sum(exp(x)) along `axis`."""
    (x,) = call.arrays
    if call.is_quantized:
        return call.output_quant.quantize(_softmax(call.quant(0).dequantize(x), call.attribute("axis", -1)))
    return _softmax(x, call.attribute("axis", -1))


def _by_table(call: Call, function: Callable[[Array], Array]) -> Array:
    """Apply a float32 function, to integers through a table of all its values."""
    (x,) = call.arrays
    if not call.is_quantized:
        return function(x)
    quant = call.quant(0)
    levels = np.arange(quant.low, quant.high + 1, dtype=np.int32)
    table = call.output_quant.quantize(function(quant.dequantize(levels)))
    return np.take(table, x.astype(np.int32) - quant.low)


def _sigmoid(x: Array) -> Array:
    # exp(-|x|) never overflows; the two branches are the same function
    decay = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, np.float32(1), decay) / (np.float32(1) + decay))


def _hard_sigmoid(x: Array) -> Array:
    return np.asarray(np.clip(x * np.float32(1 / 6) + np.float32(0.5), np.float32(0), np.float32(1)))


def _softmax(x: Array, axis: int) -> Array:
    exponentials = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=axis, keepdims=True))
