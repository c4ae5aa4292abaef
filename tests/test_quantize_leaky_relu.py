"""Leaky ReLU in int8: both runtimes compute the same integers, though XNNPACK's ratios have 8 bits."""

from __future__ import annotations

import mixing
import nets
import numpy as np
import onnx_session
import pytest
import torch
import torch.nn.functional as F
from tflite_session import TfliteSession
from torch import Tensor, nn

from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.tflite import to_tflite
from edgecnn.graph.build import build_program
from edgecnn.graph.program import BATCH, Array, Op, Program, QuantParams
from edgecnn.graph.program import Tensor as Described
from edgecnn.quantize.leaky_relu import exact_slope, leaky_input_scale, leaky_output_scale
from edgecnn.quantize.reference import run_program
from edgecnn.quantize.widen import WidenActivations

LEVELS = np.arange(-128, 128, dtype=np.int8)[None]


def one_leaky_relu(x: QuantParams, y: QuantParams, slope: float) -> Program:
    tensors = {
        "x": Described("x", (BATCH, 256)),
        "x_q": Described("x_q", (BATCH, 256), "int8", x),
        "y_q": Described("y_q", (BATCH, 256), "int8", y),
        "y": Described("y", (BATCH, 256)),
    }
    ops = (
        Op("quantize", ("x",), "x_q"),
        Op("leaky_relu", ("x_q",), "y_q", {"negative_slope": slope}, "net"),
        Op("dequantize", ("y_q",), "y"),
    )
    return Program("net", ("x",), (("y", "y"),), tensors, ops)


def eight_bits(x: QuantParams, y: QuantParams, slope: float) -> Array:
    """Return what XNNPACK's kernel is said to compute for all 256 levels."""
    d = LEVELS.astype(np.int64) - int(x.zero_point)
    ratio = float(x.scale) / float(y.scale)
    k = np.where(d >= 0, round(256 * ratio), round(256 * slope * ratio))
    return np.clip(((k * d + 128) >> 8) + int(y.zero_point), -128, 127).astype(np.int8)


@pytest.mark.parametrize("slope", [0.01, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.9, -0.3])
@pytest.mark.parametrize(
    ("scale_y", "zero_x", "zero_y"), [(0.02, 0, -90), (0.013, -20, -110), (0.007, 127, 100)]
)
def test_all_256_levels_in_both_runtimes(slope: float, scale_y: float, zero_x: int, zero_y: int) -> None:
    scale_x = 0.02
    chosen = leaky_output_scale(scale_x, scale_y, slope)
    assert scale_y * 0.9999 < chosen < scale_y * 1.03
    x, y = (QuantParams(np.float32(s), z) for s, z in ((scale_x, zero_x), (chosen, zero_y)))
    fitted = exact_slope(float(x.scale), float(y.scale), slope)
    assert abs(fitted - slope) * float(x.scale) / float(y.scale) < 0.502 / 256
    program = one_leaky_relu(x, y, fitted)
    feeds = {"x": x.dequantize(LEVELS)}
    expected = y.dequantize(eight_bits(x, y, slope))
    np.testing.assert_array_equal(run_program(program, feeds)["y"], expected)
    np.testing.assert_array_equal(TfliteSession(to_tflite(program)).run(feeds)["y"], expected)
    for dtype in ("uint8", "int8"):
        found = onnx_session.run(to_onnx(program, OnnxOptions(activation_dtype=dtype)), feeds)["y"]
        np.testing.assert_array_equal(found, expected)


def test_scales_and_slopes_by_hand() -> None:
    """Up from 256 / 256: 250 is the first whose tenth is whole. 102.4 / 256 for an input becomes 103."""
    up = 1.0 + 2.0**-18
    assert 256.0 / leaky_output_scale(1.0, 1.0, 0.1) == pytest.approx(250.0 * up, rel=1e-7)
    assert 256.0 / leaky_output_scale(1.0, 1.0, 0.1, nearest=True) == pytest.approx(256.0 * up, rel=1e-7)
    assert 256.0 * leaky_input_scale(0.4, 1.0) == pytest.approx(103.0 * up, rel=1e-7)
    assert 256.0 * leaky_input_scale(0.4, 1.0, nearest=True) == pytest.approx(102.0 * up, rel=1e-7)
    assert 256.0 * exact_slope(1.0, 1.0, 0.1) == pytest.approx(26.0 * (2.0 - up), rel=1e-9)
    assert 256.0 * exact_slope(1.0, 1.0, -0.1) == pytest.approx(-26.0 * up, rel=1e-9)
    assert exact_slope(1.0, 1.0, 0.001) == 0.001


class Residuals(nn.Module):
    """As in Darknet: a leaky ReLU ahead of an addition, one behind it, one behind a mean's input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.stem(x), 0.1)
        y = F.leaky_relu(self.one(x), 0.3)
        x = x + F.leaky_relu(self.two(y), 0.1)
        return self.head(F.leaky_relu(x, 0.2).mean((2, 3)))


def test_both_files_are_the_reference_bit_for_bit_around_additions() -> None:
    model = nets.as_model(Residuals().eval())
    quantized = mixing.leave(model)
    program, x = build_program(quantized), nets.held_out(16)
    feeds = {program.inputs[0]: x}
    expected = run_program(program, feeds)
    found = [TfliteSession(to_tflite(program)).run(feeds)]
    found += [
        onnx_session.run(to_onnx(program, OnnxOptions(activation_dtype=t)), feeds) for t in ("uint8", "int8")
    ]
    for values in found:
        for public, value in expected.items():
            np.testing.assert_array_equal(values[public], value)
    slopes = [op.attributes["negative_slope"] for op in program.ops if op.kind == "leaky_relu"]
    assert slopes == pytest.approx([0.1, 0.3, 0.1, 0.2], abs=0.002)
    wide = build_program(WidenActivations().run(quantized, nets.context()))
    assert [op.attributes["negative_slope"] for op in wide.ops if op.kind == "leaky_relu"] == [
        0.1,
        0.3,
        0.1,
        0.2,
    ]


class CrossStage(nn.Module):
    """As in CSPResNet: a leaky ReLU of each sum, which the next sum reads, and two in one concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.aside, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(16, 5, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.stem(x), 0.2)
        for block in self.blocks:
            y = F.leaky_relu(block(y) + y, 0.1)
        return self.last(torch.cat([y, F.leaky_relu(self.aside(x), 0.3)], 1)).mean((2, 3))


@pytest.mark.parametrize("seed", range(3))
def test_a_leaky_relu_between_two_additions(seed: int) -> None:
    """The later addition binds its output, that its input, and that the operands of the earlier addition."""
    torch.manual_seed(seed)
    program = build_program(mixing.leave(nets.prepare(nets.as_model(CrossStage().eval()))))

    def ratio(name: str, output: str) -> float:
        x, y = (np.float64(program.tensors[n].quant.scale) for n in (name, output))
        return float(x / y)

    leaky = [op for op in program.ops if op.kind == "leaky_relu"]
    ratios = [256 * ratio(op.inputs[0], op.output) / (1.0 + 2.0**-18) for op in leaky]
    assert ratios == pytest.approx([round(r) for r in ratios], abs=1e-4)
    additions = [op for op in program.ops if op.kind == "add"]
    assert (len(leaky), len(additions)) == (6, 4)
    ratios = [2047 * ratio(name, op.output) for op in additions for name in op.inputs]
    assert ratios == pytest.approx([round(r) for r in ratios], abs=1e-3)
    feeds = {program.inputs[0]: nets.held_out(32)}
    (expected,) = run_program(program, feeds).values()
    found = [TfliteSession(to_tflite(program)).run(feeds)]
    found += [
        onnx_session.run(to_onnx(program, OnnxOptions(activation_dtype=t)), feeds) for t in ("uint8", "int8")
    ]
    for values in found:
        np.testing.assert_array_equal(next(iter(values.values())), expected)
