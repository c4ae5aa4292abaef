"""From ranges and weights to scales, zero points and integers.

    activation   scale = (high - low) / 255      zero_point = round(-128 - low / scale)
    weight       scale[c] = t[c] / q_max         q_max = 2^(bits-1) - 1, zero_point 0
    bias         q = round(b / (scale_x * scale_w[c]))

Source: Jacob et al. 2018, arXiv:1712.05877, equations 1 to 11; Nagel et al. 2021, arXiv:2106.08295,
section 3.1 (weights by MSE).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_SMALLEST_SCALE = 2.0**-24
_SMALLEST_REACH = 2.0**-60
_LARGEST_BIAS = float(2**30)


def activation_parameters(low: float, high: float) -> tuple[float, int]:
    """Return (scale, zero_point) so that [-128, 127] covers [low, high] and 0 is exact.

    Example:
        >>> activation_parameters(0.0, 25.5)
        (0.10000000149011612, -128)
        >>> activation_parameters(-1.0, 1.55)[1]
        -28
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32(max((high - low) / 255.0, _SMALLEST_SCALE)))
    if high == low:
        scale = 2.0**-8
    zero_point = int(np.clip(np.rint(-128.0 - low / scale), -128, 127))
    return scale, zero_point


def weight_scales(weight: Floats, axis: int, *, num_bits: int = 8, minimize_mse: bool = True) -> Floats:
    """Return one scale per output channel.

    Args:
        weight: any shape, output channels along `axis`.
        axis: of the output channels.
        num_bits: 8, or 7 where u8 * s8 pair sums saturate.
        minimize_mse: shrink each channel's range where that lowers its squared error.

    Returns:
        float32 (channels,), all positive. A channel of zeros gets the layer's mean scale; none is below
        2^-24 of the largest, which a kernel could not tell from zero.
    """
    q_max = 2.0 ** (num_bits - 1) - 1.0
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64)  # (c_out, k)
    reach = np.abs(rows).max(axis=1)
    best = reach.copy()
    if minimize_mse:
        lowest = np.full(len(rows), np.inf)
        for factor in np.linspace(1.0, 0.6, 41):
            scale = np.maximum(factor * reach / q_max, 1e-30)[:, None]
            q = np.clip(np.rint(rows / scale), -q_max, q_max)
            error = ((rows - q * scale) ** 2).sum(axis=1)
            better = error < lowest
            best[better], lowest[better] = factor * reach[better], error[better]
    alive = best > 0
    fallback = float(best[alive].mean()) if alive.any() else q_max * 2.0**-8
    best = np.where(alive, best, fallback)
    best = np.maximum(best, max(best.max() * 2.0**-24, _SMALLEST_REACH))
    scales: Floats = (best / q_max).astype(np.float32)
    return scales


def widen_for_bias(scales: Floats, bias: Floats | None, scale_x: float) -> Floats:
    """Return scales large enough for every bias to fit into int32 with room for the products.

    A channel with tiny weights and a large bias (a nearly dead batch-norm channel) would overflow otherwise.
    """
    if bias is None:
        return scales
    needed = np.abs(bias.astype(np.float64)) / (scale_x * _LARGEST_BIAS)
    widened: Floats = np.maximum(scales.astype(np.float64), needed).astype(np.float32)
    return widened


def quantize_weight(weight: Floats, scales: Floats, axis: int, *, num_bits: int = 8) -> npt.NDArray[np.int8]:
    """Return round(weight / scale) clamped to the symmetric range.

    Example:
        >>> quantize_weight(np.array([[0.5, -1.0]], np.float32), np.array([0.25], np.float32), 0).tolist()
        [[2, -4]]
    """
    q_max = 2 ** (num_bits - 1) - 1
    shape = [1] * weight.ndim
    shape[axis] = -1
    q = np.rint(weight.astype(np.float32) / scales.reshape(shape))
    clamped: npt.NDArray[np.int8] = np.clip(q, -q_max, q_max).astype(np.int8)
    return clamped


def quantize_bias(bias: Floats, bias_scale: Floats) -> npt.NDArray[np.int32]:
    """Return round(bias / bias_scale) as int32, with bias_scale = scale_x * scale_w in float32.

    Example:
        >>> quantize_bias(np.array([1.0, -0.3], np.float32), np.array([0.5, 0.1], np.float32)).tolist()
        [2, -3]
    """
    q = np.rint(bias.astype(np.float64) / bias_scale.astype(np.float64))
    return np.clip(q, -(2**31) + 1, 2**31 - 1).astype(np.int32)


def mean_shift(error: Doubles, input_mean: Doubles, groups: int) -> Doubles:
    """Return the mean output error that a weight error causes, per output channel.

    Args:
        error: w_quantized - w, float64 (c_out, c_in/groups, k) with the kernel flattened.
        input_mean: mean input per channel, float64 (c_in,).
        groups: of the convolution.

    Returns:
        float64 (c_out,): sum over inputs and kernel of error * mean.

    Source: arXiv:1906.04721, equation 17 (the empirical mean in place of the clipped normal's).

    Example:
        >>> mean_shift(np.full((1, 2, 1), 0.5), np.array([1.0, 3.0]), 1).tolist()
        [2.0]
    """
    c_out, per_group = error.shape[0], error.shape[1]
    means = input_mean.reshape(groups, per_group)[
        np.repeat(np.arange(groups), c_out // groups)
    ]  # (c_out, c_in/g)
    shift: Doubles = (error.sum(axis=2) * means).sum(axis=1)
    return shift
