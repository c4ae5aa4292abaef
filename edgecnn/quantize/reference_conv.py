"""Convolution, transposed convolution and fully connected layers of the NumPy reference.

Quantized:

    acc[c]     = sum_k (q_x[k] - zero_point_x) * q_w[c, k] + q_b[c]            exact
    multiplier = float32(float32(s_x * s_w[c]) / s_y)
    q_y[c]     = clamp(round_half_even(float32(acc[c]) * multiplier[c]) + zero_point_y, q_lo, q_hi)

Padding adds real zeros. This is what onnxruntime's MLAS and XNNPACK compute, bit for bit. The sum runs
through BLAS in floating point and is exact all the same: every partial sum is an integer of magnitude at
most max|q_x - zero_point_x| * sum_k |q_w[c, k]| + |q_b[c]|, and float32 holds all integers up to 2^24,
float64 up to 2^53.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", arXiv:1712.05877, equations 4 and 7; the multiplier stays in float32 rather than fixed point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgecnn.graph.program import Array, QuantParams
from edgecnn.quantize.reference_call import Call, clamp_real, float_scale, to_levels
from edgecnn.quantize.saturation import in_runtime_order, is_depthwise, lost_by_saturation

_CHUNK_VALUES = 1 << 20
"""Columns of so many values are unfolded at a time: few enough to stay in cache."""


@dataclass(frozen=True)
class _Geometry:
    """Stride, padding (top, left, bottom, right), dilation and groups of a convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def output_size(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Return (h_out, w_out) for an input of `size` (h, w)."""
        top, left, bottom, right = self.padding
        height = (size[0] + top + bottom - self.dilation[0] * (kernel[0] - 1) - 1) // self.stride[0] + 1
        width = (size[1] + left + right - self.dilation[1] * (kernel[1] - 1) - 1) // self.stride[1] + 1
        return height, width


def conv2d(call: Call) -> Array:
    """Compute conv2d: x (n, c_in, h, w) -> (n, c_out, h_out, w_out)."""
    geometry = _Geometry(
        stride=call.attribute("stride", (1, 1)),
        padding=call.attribute("padding", (0, 0, 0, 0)),
        dilation=call.attribute("dilation", (1, 1)),
        groups=call.attribute("groups", 1),
    )
    return _convolution(call, call.arrays[0], call.arrays[1], geometry)


def conv_transpose2d(call: Call) -> Array:
    """Compute conv_transpose2d: x (n, c_in, h, w) -> (n, c_out, h_out, w_out).

    It is a convolution of stride 1 with the flipped kernel over x with stride - 1 zeros between its
    values and dilation * (k - 1) - padding zeros around it.
    """
    x, w = call.arrays[:2]
    groups = call.attribute("groups", 1)
    (stride_h, stride_w), dilation = call.attribute("stride", (1, 1)), call.attribute("dilation", (1, 1))
    top, left, bottom, right = call.attribute("padding", (0, 0, 0, 0))
    extra_h, extra_w = call.attribute("output_padding", (0, 0))
    c_in, c_per_group, k_h, k_w = w.shape
    w = w.reshape(groups, c_in // groups, c_per_group, k_h, k_w)
    w = w.transpose(0, 2, 1, 3, 4).reshape(groups * c_per_group, c_in // groups, k_h, k_w)[..., ::-1, ::-1]

    n, _, height, width = x.shape
    zero = call.quant(0).zero_point if call.is_quantized else 0
    spread = np.full((n, c_in, (height - 1) * stride_h + 1, (width - 1) * stride_w + 1), zero, x.dtype)
    spread[..., ::stride_h, ::stride_w] = x
    reach_h, reach_w = dilation[0] * (k_h - 1), dilation[1] * (k_w - 1)
    around = (reach_h - top, reach_w - left, reach_h - bottom + extra_h, reach_w - right + extra_w)
    crop_top, crop_left, crop_bottom, crop_right = (max(-side, 0) for side in around)
    spread = spread[..., crop_top : spread.shape[2] - crop_bottom, crop_left : spread.shape[3] - crop_right]
    padding = (max(around[0], 0), max(around[1], 0), max(around[2], 0), max(around[3], 0))
    return _convolution(call, spread, w, _Geometry((1, 1), padding, dilation, groups))


def linear(call: Call) -> Array:
    """Compute linear: x (..., c_in) times w (c_out, c_in) transposed -> (..., c_out)."""
    x, w = call.arrays[:2]
    b = call.arrays[2] if len(call.arrays) > 2 else None
    clamp = call.attribute("clamp")
    if not call.is_quantized:
        y = np.matmul(x, w.T)
        return clamp_real(y if b is None else y + b, clamp)
    quant_x, quant_w = call.quant(0), call.quant(1)
    dtype = _exact_dtype(w, b, quant_x)
    acc = np.matmul(x.astype(dtype) - dtype(quant_x.zero_point), w.T.astype(dtype))
    if b is not None:
        acc += b.astype(dtype)
    if call.saturates and call.output_quant.num_bits == 8:
        raw = (x.astype(np.int32) + 128).reshape(-1, x.shape[-1])  # (rows, c_in)
        acc -= lost_by_saturation(raw.T, w).T.reshape(acc.shape)
    multiplier = _multiplier(quant_x, quant_w, call.output_quant, w.shape[0])
    return to_levels(acc.astype(np.float32) * multiplier, call.output_quant, clamp)


def _convolution(call: Call, x: Array, w: Array, geometry: _Geometry) -> Array:
    """Convolve x (n, c_in, h, w) with w (c_out, c_in/groups, k_h, k_w), a few images at a time."""
    saturates = call.saturates and call.op.kind == "conv2d" and call.is_quantized
    saturates = saturates and call.output_quant.num_bits == 8 and not is_depthwise(w, geometry.groups)
    b = call.arrays[2] if len(call.arrays) > 2 else None
    clamp = call.attribute("clamp")
    c_out, c_per_group, k_h, k_w = w.shape
    size = geometry.output_size(x.shape[2:], (k_h, k_w))
    dtype: type[np.floating] = np.float32
    zero_point, multiplier = 0, None
    if call.is_quantized:
        dtype, zero_point = _exact_dtype(w, b, call.quant(0)), call.quant(0).zero_point
        multiplier = _multiplier(call.quant(0), call.quant(1), call.output_quant, c_out)[:, None, None]
    weight = w.astype(dtype)
    bias = None if b is None else b.astype(dtype)[:, None, None]

    held = np.float32 if multiplier is None else call.output_quant.dtype
    y = np.empty((x.shape[0], c_out, *size), held)
    column_values = x.shape[1] * max(k_h * k_w * size[0] * size[1], 1)
    step = max(1, _CHUNK_VALUES // max(column_values, 1))
    for start in range(0, x.shape[0], step):
        padded = _padded(x[start : start + step], geometry.padding, zero_point, dtype)
        if c_per_group == 1 and geometry.groups > 1:
            acc = _depthwise_sums(padded, weight, geometry, size)
        else:
            acc = _grouped_sums(padded, weight, geometry, size)
        if bias is not None:
            acc += bias
        if saturates:
            acc -= _lost(padded + dtype(zero_point + 128), w, geometry, size)
        if multiplier is None:
            y[start : start + step] = clamp_real(acc, clamp)
        else:
            scaled = acc.astype(np.float32, copy=False)
            scaled *= multiplier
            y[start : start + step] = to_levels(scaled, call.output_quant, clamp)
    return y


def _padded(x: Array, padding: tuple[int, int, int, int], zero_point: int, dtype: type[np.floating]) -> Array:
    """Return x - zero_point with zeros around: (n, c, top + h + bottom, left + w + right) of `dtype`."""
    top, left, bottom, right = padding
    n, c, height, width = x.shape
    if not any(padding):
        return np.asarray(np.subtract(x, dtype(zero_point), dtype=dtype))
    padded = np.zeros((n, c, top + height + bottom, left + width + right), dtype)
    np.subtract(x, dtype(zero_point), out=padded[:, :, top : top + height, left : left + width], dtype=dtype)
    return padded


def _grouped_sums(x: Array, w: Array, geometry: _Geometry, size: tuple[int, int]) -> Array:
    """Return exact sums (n, c_out, h_out, w_out) of padded x, as one matrix product per image and group."""
    n, c_in, groups = x.shape[0], x.shape[1], geometry.groups
    c_out, c_per_group, k_h, k_w = w.shape
    height, width = size
    if (k_h, k_w) == (1, 1):
        columns = np.ascontiguousarray(_window(x, 0, 0, geometry, size))
    else:
        columns = np.empty((n, c_in, k_h, k_w, height, width), x.dtype)
        for i in range(k_h):
            for j in range(k_w):
                columns[:, :, i, j] = _window(x, i, j, geometry, size)
    columns = columns.reshape(n, groups, c_per_group * k_h * k_w, height * width)  # (n, g, k, h_out * w_out)
    rows = w.reshape(groups, c_out // groups, c_per_group * k_h * k_w)  # (g, c_out/g, k)
    return np.asarray(np.matmul(rows, columns)).reshape(n, c_out, height, width)


def _depthwise_sums(x: Array, w: Array, geometry: _Geometry, size: tuple[int, int]) -> Array:
    """Return exact sums (n, c_out, h_out, w_out) of padded x where each group is one channel."""
    c_out, _, k_h, k_w = w.shape
    if c_out != x.shape[1]:
        x = np.repeat(x, c_out // x.shape[1], axis=1)
    acc = np.zeros((x.shape[0], c_out, *size), x.dtype)
    product = np.empty_like(acc)
    for i in range(k_h):
        for j in range(k_w):
            np.multiply(_window(x, i, j, geometry, size), w[:, 0, i, j, None, None], out=product)
            acc += product
    return acc


def _lost(x: Array, w: Array, geometry: _Geometry, size: tuple[int, int]) -> Array:
    """Return what saturating sums lose, int64 (n, c_out, h_out, w_out), of padded x as uint8 values."""
    n, c_out, groups = len(x), w.shape[0], geometry.groups
    c_per_group, k_h, k_w = w.shape[1:]
    lost = np.empty((n, c_out, *size), np.int64)
    rows = in_runtime_order(w).reshape(groups, c_out // groups, -1)  # (g, c_out/g, k)
    for group in range(groups):
        own = x[:, group * c_per_group : (group + 1) * c_per_group]
        windows = [_window(own, i, j, geometry, size) for i in range(k_h) for j in range(k_w)]
        columns = np.stack(windows).transpose(0, 2, 1, 3, 4).reshape(rows.shape[2], -1)  # (k, n * positions)
        found = lost_by_saturation(columns, rows[group]).reshape(-1, n, *size)
        lost[:, group * (c_out // groups) : (group + 1) * (c_out // groups)] = found.swapaxes(0, 1)
    return lost


def _window(x: Array, row: int, column: int, geometry: _Geometry, size: tuple[int, int]) -> Array:
    """Return what kernel position (row, column) meets: a view (n, c, h_out, w_out) of padded x."""
    top, left = row * geometry.dilation[0], column * geometry.dilation[1]
    stride_h, stride_w = geometry.stride
    return x[
        :,
        :,
        top : top + (size[0] - 1) * stride_h + 1 : stride_h,
        left : left + (size[1] - 1) * stride_w + 1 : stride_w,
    ]


def _exact_dtype(w: Array, b: Array | None, quant_x: QuantParams) -> type[np.floating]:
    """Return float32 where it holds every partial sum exactly, else float64; w is (c_out, ...)."""
    reach = max(quant_x.high - quant_x.zero_point, quant_x.zero_point - quant_x.low)
    bound = np.abs(w.reshape(w.shape[0], -1).astype(np.int16)).sum(axis=1, dtype=np.int64) * reach
    if b is not None:
        bound = bound + np.abs(b.astype(np.int64))
    return np.float32 if bound.max(initial=0) < 1 << 24 else np.float64


def _multiplier(quant_x: QuantParams, quant_w: QuantParams, quant_y: QuantParams, c_out: int) -> Array:
    """Return float32(float32(s_x * s_w[c]) / s_y), shape (c_out,).

    A grouped conv_transpose2d has c_out/groups scales, which repeat for each group.
    """
    scale_w = np.asarray(quant_w.scale, np.float32).reshape(-1)
    scale_w = np.tile(scale_w, c_out // scale_w.size)
    product = float_scale(quant_x) * scale_w
    return np.asarray(product / float_scale(quant_y), np.float32)
