"""Products without ties, also where what reads them binds their scale: the same integers in both runtimes."""

from __future__ import annotations

import math

import mixing
import nets
import numpy as np
import onnx_session
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tflite_session import TfliteSession
from torch import Tensor, nn

from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.tflite import to_tflite
from edgecnn.graph.build import build_program
from edgecnn.graph.program import BATCH, Array, Op, Program, QuantParams
from edgecnn.graph.program import Tensor as Described
from edgecnn.quantize.reference import run_program
from edgecnn.quantize.ties import factor_scale, product_scale

LEVELS = np.arange(-128, 128)
PRODUCTS = np.unique(np.outer(np.arange(256), np.arange(256)))
"""Every (a_q - z_a) (b_q - z_b) that there can be, but for its sign."""


def distance_to_tie(ratio: float) -> float:
    """How near to half-way any product of two int8 values comes, of those that do not saturate."""
    values = PRODUCTS * np.float64(ratio)
    values = values[values < 256.0]
    return float(np.abs(values - np.floor(values) - 0.5).min())


def test_scales_by_hand() -> None:
    """1/256 is 16 / 4096, between the odd 4095 and 4097; 1/100 is 41 / 4100, and 41 / 4101 above it."""
    assert product_scale(1 / 256, 1.0, 1.0) == float(np.float32(4097 / 4096))
    assert factor_scale(1.0, 1 / 256, 1.0) == float(np.float32(4096 / 4095))
    assert product_scale(0.1, 0.1, 1.0) == pytest.approx(4101 / 4100, rel=1e-7)
    assert factor_scale(0.1, 0.1, 1.0) == pytest.approx(0.1 * 4100 / 4099, rel=1e-7)
    assert product_scale(0.1, 0.1, 1.0003, nearest=True) == pytest.approx(4101 / 4100, rel=1e-7)
    assert product_scale(0.1, 0.1, 0.9996, nearest=True) == pytest.approx(4099 / 4100, rel=1e-7)
    assert distance_to_tie(1 / 256) == 0.0
    assert distance_to_tie(16 / 4097) == pytest.approx(0.5 / 4097)


POSITIVE = st.floats(1e-4, 10.0)


@settings(max_examples=200, deadline=None)
@given(POSITIVE, POSITIVE, st.floats(1 / 2000, 4.0), st.booleans())
def test_no_product_is_near_a_tie(scale_a: float, scale_b: float, ratio: float, nearest: bool) -> None:
    """D is at most 4095 + 0.5 / ratio + 2 or so; float32 scales move a product by 128 * 3 * 2^-24 at most."""
    scale_y = scale_a * scale_b / ratio
    least_distance = 0.5 / (4097 + 0.5 / ratio) - 256 * 2.0**-24
    written = product_scale(scale_a, scale_b, scale_y, nearest=nearest)
    assert distance_to_tie(scale_a * scale_b / written) >= least_distance
    read = factor_scale(scale_a, scale_b, scale_y, nearest=nearest)
    assert distance_to_tie(read * scale_b / scale_y) >= least_distance
    for grown in (written / scale_y, read / scale_a):
        assert 1.0 - (5e-4 if nearest else 2e-6) <= grown <= 1.0 + 1e-3


def test_a_range_is_covered_whatever_the_scales() -> None:
    """A ratio below 1/4095, of small factors: D is larger, the scale no smaller."""
    assert product_scale(0.001, 0.01, 1.0) == pytest.approx(1.00001, abs=1e-7)


def one_product(a: QuantParams, b: QuantParams, y: QuantParams) -> Program:
    """All pairs of levels, multiplied."""
    shape = (BATCH, len(LEVELS) ** 2)
    tensors = {name: Described(name, shape) for name in ("a", "b", "y")}
    for name, quant in (("a", a), ("b", b), ("y", y)):
        tensors[f"{name}_q"] = Described(f"{name}_q", shape, "int8", quant)
    ops = (
        Op("quantize", ("a",), "a_q"),
        Op("quantize", ("b",), "b_q"),
        Op("mul", ("a_q", "b_q"), "y_q", {}, "net"),
        Op("dequantize", ("y_q",), "y"),
    )
    return Program("net", ("a", "b"), (("y", "y"),), tensors, ops)


def results_of(program: Program, feeds: dict[str, Array]) -> list[Array]:
    """What the reference, LiteRT and ONNX Runtime (uint8, int8) give for the only output."""
    found = [run_program(program, feeds), TfliteSession(to_tflite(program)).run(feeds)]
    found += [
        onnx_session.run(to_onnx(program, OnnxOptions(activation_dtype=t)), feeds) for t in ("uint8", "int8")
    ]
    return [next(iter(values.values())) for values in found]


def results(a: QuantParams, b: QuantParams, y: QuantParams) -> list[Array]:
    """The same of all pairs of levels."""
    program = one_product(a, b, y)
    first, second = (levels.reshape(1, -1) for levels in np.meshgrid(LEVELS, LEVELS))
    return results_of(program, {"a": a.dequantize(first), "b": b.dequantize(second)})


# of layer2.2 of ResNet-RS-50, whose addition binds 0.0080853...
SE = (0.012852015905082226, 1 / 256, 0.008085357956588268)


@pytest.mark.parametrize(("zero_a", "zero_y"), [(3, -15), (-128, 77), (0, 0)])
def test_all_pairs_in_both_runtimes(zero_a: int, zero_y: int) -> None:
    for scales in (SE, (0.02, 1 / 256, 0.02), (0.013, 0.031, 0.0004), (0.01, 0.01, 0.0051)):
        scale_a, scale_b, scale_y = scales
        fits = (
            (scale_a, product_scale(scale_a, scale_b, scale_y)),
            (factor_scale(scale_a, scale_b, scale_y), scale_y),
        )
        for fitted_a, fitted_y in fits:
            a, b = QuantParams(np.float32(fitted_a), zero_a), QuantParams(np.float32(scale_b), -128)
            expected, *found = results(a, b, QuantParams(np.float32(fitted_y), zero_y))
            for values in found:
                np.testing.assert_array_equal(values, expected)


def test_without_fitting_they_do_disagree() -> None:
    scale_a, scale_b, scale_y = (np.float32(scale) for scale in (0.02, 1 / 256, 0.02 / 3.0))
    expected, *found = results(QuantParams(scale_a, 3), QuantParams(scale_b, -128), QuantParams(scale_y, -15))
    assert any((values != expected).any() for values in found)


def op_distance(program: Program, op: Op) -> float:
    a, b, y = (program.tensors[name].quant for name in (*op.inputs, op.output))
    return distance_to_tie(np.float64(a.scale) * np.float64(b.scale) / np.float64(y.scale))


class Gated(nn.Module):
    """Squeeze and excite in front of a shortcut, as in ResNet-RS and VoVNet; a learned factor at the end."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.squeeze, self.gate = nn.Conv2d(8, 8, 1), gate
        self.factor = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.one(x)
        x = torch.relu(y * self.gate(self.squeeze(y.mean((2, 3), keepdim=True))) + x)
        return x + self.two(x) * self.factor


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid()], ids=["sigmoid", "hard_sigmoid"])
def test_a_product_that_an_addition_reads(gate: nn.Module) -> None:
    """The addition binds its scale: a factor is fitted, the factor's mean to that, the gate keeps its 1/2."""
    torch.manual_seed(0)
    program = build_program(mixing.leave(nets.prepare(nets.as_model(Gated(gate).eval()))))
    products = [op for op in program.ops if op.kind == "mul"]
    assert len(products) >= 2, "the gate, and the learned factor"
    assert min(op_distance(program, op) for op in products) > 1e-4
    (mean,) = [op for op in program.ops if op.kind == "mean"]
    x, y = (float(program.tensors[name].quant.scale) for name in (mean.inputs[0], mean.output))
    totals = np.arange(-255 * 144, 255 * 144 + 1) / 144 * (x / y)
    assert float(np.abs(totals - np.floor(totals) - 0.5).min()) > 2e-5
    for op in program.ops:
        if op.kind == "add":
            ratios = [_ratio(program, name, op.output) * 2047 for name in op.inputs]
            assert ratios == pytest.approx([round(ratio) for ratio in ratios], abs=0.05), op
    feeds = {program.inputs[0]: nets.held_out(16)}
    expected, *found = results_of(program, feeds)
    for values in found:
        np.testing.assert_array_equal(values, expected)


def _ratio(program: Program, name: str, output: str) -> float:
    """The step by which one level of an operand, or a number as a whole, moves a sum."""
    tensor, scale_y = program.tensors[name], float(program.tensors[output].quant.scale)
    levels = math.fabs(float(tensor.data)) if tensor.is_constant and tensor.data.size == 1 else 1.0
    return float(tensor.quant.scale) * levels / scale_y


class TwoProducts(nn.Module):
    """Two products that a concat puts into one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(3, 4, 3) for _ in range(4))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = (stem(x) for stem in self.stems)
        return self.last(torch.cat([a * b.sigmoid(), c * d.sigmoid()], 1))


@pytest.mark.parametrize("seed", range(4))
def test_products_in_one_concat(seed: int) -> None:
    torch.manual_seed(seed)
    program = build_program(mixing.leave(nets.as_model(TwoProducts().eval())))
    products = [op for op in program.ops if op.kind == "mul"]
    assert len(products) == 2
    assert min(op_distance(program, op) for op in products) > 1e-4
