"""Pooling, reductions, resizing and data movement of the NumPy reference.

All but mean keep the quantization parameters of their input, so they work on raw int8 values:

    avg_pool2d, mean   q_y = round_half_even(sum(q_x - zero_point_x) * (s_x / (count * s_y))) + zero_point_y
    avg_pool2d that leaves padding out   q_y = round_half_away_from_zero(sum(q_x) / count)
    resize, bilinear   q_y = floor(interpolate(q_x) + 1/2), with weights of 11 bits (see graph.interpolation)
    the others         the same values, moved or compared
"""

from __future__ import annotations

import math

import numpy as np

from edgecnn.graph.interpolation import WEIGHT_BITS, integer_weights, interpolation
from edgecnn.graph.program import Array, QuantParams
from edgecnn.graph.windows import leaves_padding_out
from edgecnn.quantize.reference_call import Call, float_scale, to_levels

Positions = tuple[Array, Array, Array]
"""First and second source position and weight of the second, as `interpolation` gives them."""


def max_pool2d(call: Call) -> Array:
    """Compute max_pool2d: x (n, c, h, w) -> (n, c, h_out, w_out); padding never wins."""
    (x,) = call.arrays
    fill = call.quant(0).low if call.is_quantized else -np.inf
    y: Array | None = None
    for window in _windows(x, call, fill):
        y = window.copy() if y is None else np.maximum(y, window, out=y)
    return x if y is None else y


def avg_pool2d(call: Call) -> Array:
    """Compute avg_pool2d: x (n, c, h, w) -> (n, c, h_out, w_out).

    With count_include_pad the divisor is the kernel's area, else how many values are not padding.
    """
    (x,) = call.arrays
    kernel = call.attribute("kernel")
    values = x if not call.is_quantized else x.astype(np.int32) - call.quant(0).zero_point
    total = sum(_windows(values, call, 0), start=np.zeros((), values.dtype))
    count: Array | int = kernel[0] * kernel[1]
    if not call.attribute("count_include_pad", True):
        ones = np.ones((1, 1, *x.shape[2:]), np.int32)
        count = np.asarray(sum(_windows(ones, call, 0), start=np.zeros((), np.int32)))  # (1, 1, h_out, w_out)
    if not call.is_quantized:
        return np.asarray(total / np.asarray(count, np.float32), np.float32)
    before, after = call.quant(0), call.output_quant
    same = before.scale == after.scale and before.zero_point == after.zero_point and x.dtype == np.int8
    if same and leaves_padding_out(call.op, x.shape[2:], total.shape[2:]):
        levels = total + count * before.zero_point
        return np.asarray(np.sign(levels) * ((2 * np.abs(levels) + count) // (2 * count)), np.int8)
    return _averaged(total, count, call.quant(0), call.output_quant)


def mean(call: Call) -> Array:
    """Compute the mean over `axes`."""
    (x,) = call.arrays
    axes, keepdim = tuple(call.attribute("axes")), bool(call.attribute("keepdim", False))
    if not call.is_quantized:
        return np.asarray(x.mean(axis=axes, keepdims=keepdim, dtype=np.float32))
    count = math.prod(x.shape[axis] for axis in axes)
    total = x.sum(axis=axes, keepdims=keepdim, dtype=np.int64) - count * call.quant(0).zero_point
    return _averaged(total, count, call.quant(0), call.output_quant)


def amax(call: Call) -> Array:
    """Compute the maximum over `axes`."""
    axes, keepdim = tuple(call.attribute("axes")), bool(call.attribute("keepdim", False))
    return np.asarray(call.arrays[0].max(axis=axes, keepdims=keepdim))


def concat(call: Call) -> Array:
    """Join the inputs along `axis`."""
    return np.concatenate(call.arrays, axis=call.attribute("axis"))


def slice_axis(call: Call) -> Array:
    """Take x[start:stop:step] along `axis`."""
    (x,) = call.arrays
    index = [slice(None)] * x.ndim
    index[call.attribute("axis")] = slice(
        call.attribute("start", 0), call.attribute("stop"), call.attribute("step", 1)
    )
    return x[tuple(index)]


def gather(call: Call) -> Array:
    """Pick `indices` along `axis`."""
    return np.asarray(np.take(call.arrays[0], call.attribute("indices"), axis=call.attribute("axis")))


def pad(call: Call) -> Array:
    """Put the real number `value` around x, (before, after) per dimension, or x mirrored at its edges."""
    (x,) = call.arrays
    if call.attribute("mode") == "reflect":
        return np.pad(x, call.attribute("pads"), mode="reflect")
    value = np.full((), call.attribute("value", 0.0), np.float32)
    fill = call.output_quant.quantize(value) if call.is_quantized else value
    return np.pad(x, call.attribute("pads"), constant_values=fill)


def reshape(call: Call) -> Array:
    """Give x (n, ...) another shape, the batch kept first."""
    (x,) = call.arrays
    return x.reshape(x.shape[0], *call.attribute("shape")[1:])


def transpose(call: Call) -> Array:
    """Permute the dimensions of x."""
    return np.transpose(call.arrays[0], call.attribute("perm"))


def resize(call: Call) -> Array:
    """Resize x (n, c, h, w) to (n, c, *size).

    "nearest" takes the value at floor(i * h / h_out), as PyTorch's "nearest" does; "bilinear" samples at
    (i + 0.5) * h / h_out - 0.5 (not below 0), or with align_corners at i * (h - 1) / (h_out - 1).
    """
    (x,) = call.arrays
    height, width = call.attribute("size")
    if call.attribute("mode") == "nearest":
        rows = np.arange(height) * x.shape[2] // height
        columns = np.arange(width) * x.shape[3] // width
        return x[:, :, rows[:, None], columns]
    align_corners = bool(call.attribute("align_corners", False))
    vertical = interpolation(x.shape[2], height, align_corners)
    horizontal = interpolation(x.shape[3], width, align_corners)
    if call.is_quantized:
        return _interpolated_levels(x, vertical, horizontal)
    return _interpolated(x, vertical, horizontal, np.float32(1))


def _interpolated_levels(x: Array, vertical: Positions, horizontal: Positions) -> Array:
    """Return x interpolated in exact integers, rounded half up."""
    down, across = integer_weights(vertical[2]), integer_weights(horizontal[2])
    wide = np.int32 if x.dtype == np.int8 else np.int64
    one = wide(1 << WEIGHT_BITS)
    total = _interpolated(x.astype(wide), (*vertical[:2], down), (*horizontal[:2], across), one)
    half = wide(1 << (2 * WEIGHT_BITS - 1))
    return np.asarray((total + half) >> (2 * WEIGHT_BITS), x.dtype)


def _interpolated(x: Array, vertical: Positions, horizontal: Positions, one: np.generic) -> Array:
    """Return x (n, c, h, w) interpolated along h, then w, with weights in units of 1 / `one`."""
    (top, bottom, down), (left, right, across) = vertical, horizontal
    rows = x[:, :, top] * (one - down)[:, None] + x[:, :, bottom] * down[:, None]
    return np.asarray(rows[..., left] * (one - across) + rows[..., right] * across)


def _averaged(total: Array, count: Array | int, quant_x: QuantParams, quant_y: QuantParams) -> Array:
    """Return the int8 mean of exact sums `total` over `count` values each."""
    ratio = float_scale(quant_x) / float_scale(quant_y)
    return to_levels(total.astype(np.float32) * (ratio / np.asarray(count, np.float32)), quant_y)


def _windows(x: Array, call: Call, fill: float) -> list[Array]:
    """Return what each kernel position of a pooling meets: views (n, c, h_out, w_out) of padded x."""
    (k_h, k_w), (stride_h, stride_w) = call.attribute("kernel"), call.attribute("stride")
    dilation_h, dilation_w = call.attribute("dilation", (1, 1))
    top, left, bottom, right = call.attribute("padding", (0, 0, 0, 0))
    if top or left or bottom or right:
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    height = (x.shape[2] - dilation_h * (k_h - 1) - 1) // stride_h + 1
    width = (x.shape[3] - dilation_w * (k_w - 1) - 1) // stride_w + 1
    return [
        x[
            :,
            :,
            i * dilation_h : i * dilation_h + (height - 1) * stride_h + 1 : stride_h,
            j * dilation_w : j * dilation_w + (width - 1) * stride_w + 1 : stride_w,
        ]
        for i in range(k_h)
        for j in range(k_w)
    ]
