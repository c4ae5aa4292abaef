"""Scales without ties: every runtime rounds every int8 addition to the same integer."""

from __future__ import annotations

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecnn.graph.build import build_program
from edgecnn.graph.program import Array, Op, Program
from edgecnn.quantize.ties import DENOMINATOR, mean_scale, offset_scale, tie_free_scale

LEVELS = np.arange(-255, 256)  # every q - zero_point that there can be


def sums(r_a: float, r_b: float) -> Array:
    """Exact sums of every pair in units of the output's scale, float64 (511, 511)."""
    return LEVELS[:, None] * np.float64(r_a) + LEVELS[None, :] * np.float64(r_b)


def distance_to_tie(values: Array) -> float:
    return float(np.abs(values - np.floor(values) - 0.5).min())


def in_float32(r_a: float, r_b: float) -> Array:
    """ONNX Runtime's: float32 products, then round half to even."""
    a, b = LEVELS.astype(np.float32)[:, None], LEVELS.astype(np.float32)[None, :]
    return np.rint(a * np.float32(r_a) + b * np.float32(r_b)).astype(np.int64)


def in_fixed_point(r_a: float, r_b: float) -> Array:
    """XNNPACK's: integer multipliers of 20 to 21 bits, add half, shift right."""
    shift = 20 - (int(np.frexp(np.float32(max(r_a, abs(r_b))))[1]) - 1)
    m_a, m_b = (int(np.rint(np.float64(np.float32(r)) * 2.0**shift)) for r in (r_a, r_b))
    return (LEVELS[:, None] * m_a + LEVELS[None, :] * m_b + (1 << (shift - 1))) >> shift


RATIOS = [(0.5, 0.5), (0.37, 0.91), (0.999, 0.0123), (1.0, 1.0), (0.25, 0.75), (0.731, 0.002), (0.1, -0.6)]


@pytest.mark.parametrize(("wanted_a", "wanted_b"), RATIOS)
def test_no_sum_of_two_int8_values_is_near_a_tie(wanted_a: float, wanted_b: float) -> None:
    scale_y = 0.0371
    fitted = [tie_free_scale(abs(r) * scale_y, scale_y) for r in (wanted_a, wanted_b)]
    r_a, r_b = (np.float64(s) / np.float64(np.float32(scale_y)) for s in fitted)
    r_b *= np.sign(wanted_b)
    assert distance_to_tie(sums(r_a, r_b)) > 0.9 / (2 * DENOMINATOR)
    assert np.array_equal(in_float32(r_a, r_b), in_fixed_point(r_a, r_b))
    assert np.array_equal(in_float32(r_a, r_b), np.rint(sums(r_a, r_b)).astype(np.int64))


def test_without_fitting_they_do_disagree() -> None:
    assert distance_to_tie(sums(0.5, 0.5)) == 0.0
    assert not np.array_equal(in_float32(0.5, 0.5), in_fixed_point(0.5, 0.5))


@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5, 0.99, 1.0])
def test_a_fitted_scale_grows_by_little(ratio: float) -> None:
    grown = tie_free_scale(ratio * 0.02, 0.02) / (ratio * 0.02)
    assert 1.0 - 1e-6 <= grown <= 1.0 + 1.0 / (DENOMINATOR * ratio) + 1e-6


@pytest.mark.parametrize(
    ("offset", "scale_y"), [(0.5, 1 / 255), (1.0, 0.05), (3.0, 0.0235), (1 / 256, 1 / 200)]
)
def test_adding_a_number_makes_no_tie(offset: float, scale_y: float) -> None:
    """hard_sigmoid: zero plus 1/2 in steps of 1/255 is 127.5, which one runtime rounds to 127, one to 128."""
    fitted = offset_scale(offset, scale_y)
    assert scale_y <= fitted <= scale_y * (1 + 1.5 * scale_y / (DENOMINATOR * offset)) + 1e-9
    values = np.array([tie_free_scale(0.7 * fitted, fitted) / fitted])[:, None] * LEVELS + offset / fitted
    assert distance_to_tie(values) > 0.9 / (2 * DENOMINATOR)


@pytest.mark.parametrize("count", [2, 4, 9, 16, 36, 49, 64, 144])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.7, 4.1])
def test_no_mean_is_a_tie(count: int, ratio: float) -> None:
    """float32 is exact to 4e-6 up to 128, so 2e-5 is far enough."""
    scale_y = mean_scale(1.0, 1.0 / ratio, count)
    assert scale_y >= np.float32(1.0 / ratio)
    totals = np.arange(-255 * count, 255 * count + 1) / count / np.float64(scale_y)
    assert distance_to_tie(totals) > 2e-5


def additions(program: Program) -> list[Op]:
    return [op for op in program.ops if op.kind in ("add", "sub")]


def op_distance(program: Program, op: Op) -> float:
    """How near to a tie any pair of values of an addition comes."""
    y = np.float64(program.tensors[op.output].quant.scale)
    parts = []
    for name in op.inputs:
        tensor = program.tensors[name]
        q = (
            tensor.data.astype(np.int64).reshape(-1) - tensor.quant.zero_point
            if tensor.is_constant
            else LEVELS
        )
        parts.append(np.unique(q) * np.float64(tensor.quant.scale) / y)
    signs = (1, -1 if op.kind == "sub" else 1)
    return distance_to_tie(signs[0] * parts[0][:, None] + signs[1] * parts[1][None, :])


@pytest.mark.parametrize(
    "name",
    [
        "residual",
        "preactivation",
        "option_a",
        "hard_swish",
        "se_linear",
        "learned_scale",
        "arithmetic",
        "cbam",
    ],
)
def test_additions_of_whole_networks(name: str) -> None:
    """Residual chains, where each sum is the next one's operand; numbers; learned offsets; subtractions."""
    program = nets.quantized_program(name)
    found = {op.layer: op_distance(program, op) for op in additions(program)}
    assert found
    assert min(found.values()) > 1e-4, found


def test_a_value_with_prescribed_parameters_among_the_operands() -> None:
    def forward(net: nets.Net, x: Tensor) -> Tensor:
        y = net.stem(x)
        return net.last(torch.sigmoid(y) + y * 0.5)

    torch.manual_seed(0)
    net = nets.Net({"stem": nn.Conv2d(3, 4, 3), "last": nn.Conv2d(4, 2, 1)}, forward).eval()
    model = nets.QuantizeStatic().run(nets.prepare(nets.as_model(net)), nets.context())
    program = build_program(model)
    (addition,) = additions(program)
    fixed = program.tensors[addition.inputs[0]].quant
    assert (float(fixed.scale), fixed.zero_point) == (1 / 256, -128)
    assert op_distance(program, addition) > 1e-4


def test_one_value_read_by_two_additions_is_fitted_to_the_later() -> None:
    def forward(net: nets.Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.c(torch.relu(y + net.b(y)) + y)

    torch.manual_seed(1)
    convs = {n: nn.Conv2d(3, 3, 3, padding=1) for n in "abc"}
    model = nets.prepare(nets.as_model(nets.Net(convs, forward).eval()))
    program = build_program(nets.QuantizeStatic().run(model, nets.context()))
    assert op_distance(program, additions(program)[-1]) > 1e-4


class ProductThenMean(nn.Module):
    """hard_swish in front of a global average, as MobileNetV3 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, stride=3), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.hardswish(self.first(x))
        return self.last(nn.functional.adaptive_avg_pool2d(y, 1)).flatten(1)


@pytest.mark.parametrize("seed", range(3))
def test_a_mean_is_fitted_to_the_final_scale_of_a_product(seed: int) -> None:
    torch.manual_seed(seed)
    model = nets.prepare(nets.as_model(ProductThenMean().eval()))
    program = build_program(nets.QuantizeStatic().run(model, nets.context()))
    (mean,) = [op for op in program.ops if op.kind == "mean"]
    scales = [program.tensors[name].quant.scale for name in (mean.inputs[0], mean.output)]
    sums = np.arange(-255 * 16, 255 * 16 + 1)
    values = sums * (np.float64(scales[0]) / np.float64(scales[1])) / 16
    assert distance_to_tie(values) > 1e-4
