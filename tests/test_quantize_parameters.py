"""From ranges to scales and integers: numbers by hand, and properties over many inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecnn.graph.program import QuantParams
from edgecnn.quantize.parameters import (
    activation_parameters,
    mean_shift,
    quantize_bias,
    quantize_weight,
    weight_scales,
    widen_for_bias,
)

INT32_MAX = 2**31 - 1


def test_activation_parameters_by_hand() -> None:
    """[-1, 3] in 255 steps: scale 4/255, zero point round(-128 + 255/4) = -64."""
    scale, zero_point = activation_parameters(-1.0, 3.0)
    assert (scale, zero_point) == (float(np.float32(4 / 255)), -64)
    assert activation_parameters(0.5, 2.55) == activation_parameters(0.0, 2.55), "zero is always covered"
    assert activation_parameters(0.0, 2.55)[1] == -128
    assert activation_parameters(-2.55, 0.0)[1] == 127
    assert activation_parameters(0.0, 0.0) == (2.0**-8, -128)


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 0.0), st.floats(0.0, 1e6), st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20))
def test_zero_is_exact_and_rounding_costs_half_a_step(low: float, high: float, places: list[float]) -> None:
    scale, zero_point = activation_parameters(low, high)
    quant = QuantParams(np.asarray(scale, np.float32), zero_point)
    assert scale > 0
    assert -128 <= zero_point <= 127
    assert quant.dequantize(quant.quantize(np.zeros(1, np.float32)))[0] == 0.0
    held_low, held_high = scale * (-128 - zero_point), scale * (127 - zero_point)
    assert held_low <= low + scale * 0.501
    assert held_high >= high - scale * 0.501
    x = np.clip(low + np.array(places) * (high - low), held_low, held_high).astype(np.float32)
    error = np.abs(quant.dequantize(quant.quantize(x)).astype(np.float64) - x)
    assert error.max() <= scale * 0.5001


def test_weight_scales_by_hand() -> None:
    weight = np.array([[1.27, -0.3], [-2.54, 0.1]], np.float32)
    np.testing.assert_allclose(weight_scales(weight, 0, minimize_mse=False), [0.01, 0.02], rtol=1e-6)
    np.testing.assert_allclose(weight_scales(weight, 1, minimize_mse=False), [0.02, 0.3 / 127], rtol=1e-6)
    seven = weight_scales(weight, 0, num_bits=7, minimize_mse=False)
    np.testing.assert_allclose(seven, [1.27 / 63, 2.54 / 63], rtol=1e-6)
    q = quantize_weight(weight, seven, 0, num_bits=7)
    assert q.tolist() == [[63, -15], [-63, 2]]
    assert np.abs(q).max() <= 63


def test_mse_weight_scales_never_cost_more() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 256, 3, 3)).astype(np.float32)

    def errors(scales: np.ndarray) -> np.ndarray:
        q = quantize_weight(weight, scales, 0)
        return ((q * scales.reshape(-1, 1, 1, 1) - weight) ** 2).sum(axis=(1, 2, 3))

    plain, best = weight_scales(weight, 0, minimize_mse=False), weight_scales(weight, 0)
    assert np.all(errors(best) <= errors(plain) * (1 + 1e-6))
    assert np.any(best < plain)


def test_dead_and_tiny_channels() -> None:
    weight = np.zeros((4, 3), np.float32)
    weight[0], weight[1], weight[2] = 1.0, 3.0, 1e-38
    scales = weight_scales(weight, 0, minimize_mse=False)
    assert np.isfinite(scales).all()
    assert scales[3] == pytest.approx(np.mean([1.0, 3.0, 0.0]) / 127)
    assert scales[2] == pytest.approx(3.0 * 2.0**-24 / 127)
    assert quantize_weight(weight, scales, 0)[2:].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert (weight_scales(np.zeros((2, 5), np.float32), 0) > 0).all()


def test_a_tiny_channel_with_a_big_bias_fits_into_int32() -> None:
    """bias / (scale_x scale_w) would be 1e12; the scale is widened to keep it at 2^30."""
    scales, bias = np.array([1e-9, 0.01], np.float32), np.array([10.0, -10.0], np.float32)
    widened = widen_for_bias(scales, bias, 0.01)
    assert widened[1] == scales[1]
    assert widened[0] == pytest.approx(10.0 / (0.01 * 2**30))
    q = quantize_bias(bias, (np.float32(0.01) * widened).astype(np.float32))
    assert abs(int(q[0])) == pytest.approx(2**30, rel=1e-6)
    assert q[1] == -100_000
    assert widen_for_bias(scales, None, 0.01) is scales


@settings(max_examples=100, deadline=None)
@given(
    bias=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8),
    scale_x=st.floats(2.0**-24, 1e3),
    exponent=st.integers(-30, 2),
)
def test_no_bias_overflows_with_all_products_beside_it(
    bias: list[float], scale_x: float, exponent: int
) -> None:
    """4,608 products of at most 127 * 255 (512 channels, 3x3) are 1.5e8; the bias leaves 2^30."""
    values = np.array(bias, np.float32)
    scales = widen_for_bias(np.full(len(bias), 2.0**exponent, np.float32), values, scale_x)
    q = quantize_bias(values, (np.float32(scale_x) * scales).astype(np.float32)).astype(np.int64)
    assert np.abs(q).max() + 4608 * 127 * 255 <= INT32_MAX
    found = q * np.float64(np.float32(scale_x)) * scales
    assert np.all(np.abs(found - values) <= np.float64(scale_x) * scales * 0.51 + np.abs(values) * 1e-6)


def test_quantized_bias_saturates() -> None:
    assert quantize_bias(np.array([1e30], np.float32), np.array([1e-9], np.float32))[0] == INT32_MAX


def test_mean_shift_by_hand() -> None:
    """Two groups of one channel: the first output reads the mean 10, the second 100, over a kernel of two."""
    error = np.array([[[0.1, 0.2]], [[0.0, -0.5]]])
    np.testing.assert_allclose(mean_shift(error, np.array([10.0, 100.0]), 2), [3.0, -50.0])
