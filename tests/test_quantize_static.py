"""The int8 network: its simulation, the reference and the real runtimes compute the same integers."""

from __future__ import annotations

import nets
import numpy as np
import onnx_session
import pytest
import torch
from tflite_session import TfliteSession

from edgecnn.errors import DataError, PassError, RecipeError
from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.parity import compare, output_scales, sqnr_db
from edgecnn.export.tflite import to_tflite
from edgecnn.graph.build import build_program, float_islands
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.graph.program import Array, Program
from edgecnn.pipeline import PassContext
from edgecnn.quantize.reference import run_program
from edgecnn.quantize.static import QuantizeStatic

ONE_STEP_IN_LITERT = {"pools", "ceil_pools"}
"""LiteRT's average-pool kernels round in their own way, by at most one step."""

LEAST_SQNR_DB = 25.0


def reference(program: Program, x: Array) -> dict[str, Array]:
    return run_program(program, {program.inputs[0]: x})


@pytest.mark.parametrize("name", nets.NETS)
def test_simulation_is_the_reference_but_for_rounding(name: str) -> None:
    """PyTorch between quantize and dequantize sums in float, so an odd value may land on the other side."""
    program, x = nets.quantized_program(name), nets.held_out(16)
    simulated = nets.outputs_of(nets.quantized(name).graph, x)
    named = dict(zip((public for public, _ in program.outputs), simulated, strict=True))
    found = compare(reference(program, x), named, output_scales(program))
    assert found.max_lsb <= 2
    assert found.fraction_within_1_lsb >= 0.999


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("name", nets.NETS)
def test_onnx_runtime_computes_the_reference_bit_for_bit(name: str, dtype: str) -> None:
    program, x = nets.quantized_program(name), nets.held_out(16)
    found = onnx_session.run(to_onnx(program, OnnxOptions(activation_dtype=dtype)), {program.inputs[0]: x})
    for public, values in reference(program, x).items():
        assert np.array_equal(found[public], values), public


@pytest.mark.parametrize("name", nets.NETS)
def test_litert_computes_the_reference(name: str) -> None:
    program, x = nets.quantized_program(name), nets.held_out(16)
    expected = reference(program, x)
    found = TfliteSession(to_tflite(program)).run({program.inputs[0]: x})
    if name in ONE_STEP_IN_LITERT:
        comparison = compare(expected, found, output_scales(program))
        assert comparison.max_lsb <= 1
    else:
        for public, values in expected.items():
            assert np.array_equal(found[public], values), public


@pytest.mark.parametrize("name", nets.NETS)
def test_integers_throughout_and_close_to_float(name: str) -> None:
    """Judged on the calibration images: 64 are too few to hold every channel's range of others."""
    program, x = nets.quantized_program(name), nets.images(64, 1)
    assert float_islands(program) == []
    assert {t.dtype for t in program.constants()} <= {"int8", "int32"}
    expected = nets.outputs_of(nets.module(name), x)[0]
    found = next(iter(reference(program, x).values()))
    ratio = sqnr_db(expected, found)
    assert ratio is not None
    assert ratio > LEAST_SQNR_DB


@pytest.mark.parametrize("name", ["residual", "depthwise", "transposed", "mlp", "learned_scale"])
def test_graph_and_program_hold_the_same_constants(name: str) -> None:
    """Weights are symmetric per channel, biases int32 in the product of the scales."""
    program = nets.quantized_program(name)
    for op in program.ops:
        if op.kind not in ("conv2d", "conv_transpose2d", "linear"):
            continue
        x, w = (program.tensors[n] for n in op.inputs[:2])
        assert w.dtype == "int8"
        assert w.quant.zero_point == 0
        assert w.quant.axis == (1 if op.kind == "conv_transpose2d" else 0)
        assert int(np.abs(w.data.astype(int)).max()) == 2 ** (nets.STEP.weight_bits - 1) - 1
        if len(op.inputs) == 3:
            b = program.tensors[op.inputs[2]]
            scales = np.float32(x.quant.scale) * w.quant.scale
            assert b.dtype == "int32"
            np.testing.assert_array_equal(b.quant.scale, np.resize(scales, b.data.shape))


def test_values_that_are_only_moved_keep_their_parameters() -> None:
    program = nets.quantized_program("shuffle")
    moving = {"max_pool2d", "concat", "slice", "pad", "reshape", "transpose", "resize", "amax"}
    moved = [op for op in program.ops if op.kind in moving]
    assert len(moved) >= 6
    for op in moved:
        parameters = {
            (float(program.tensors[n].quant.scale), program.tensors[n].quant.zero_point)
            for n in (*op.inputs, op.output)
        }
        assert len(parameters) == 1, op


def test_seven_bits() -> None:
    program = build_program(nets.quantized("residual", QuantizeStatic(weight_bits=7)))
    weights = [program.tensors[op.inputs[1]].data for op in program.ops if op.kind in ("conv2d", "linear")]
    assert max(int(np.abs(w).max()) for w in weights) == 63


@pytest.mark.parametrize("observer", ["min_max", "moving_average", "percentile", "mse", "entropy"])
def test_every_observer_gives_a_usable_network(observer: str) -> None:
    x = nets.held_out(64)
    expected = nets.outputs_of(nets.module("residual"), x)[0]
    found = nets.outputs_of(nets.quantized("residual", QuantizeStatic(observer=observer)).graph, x)[0]
    assert (sqnr_db(expected, found) or 0.0) > 30.0


def test_same_images_same_bytes() -> None:
    step = QuantizeStatic()
    first, second = (build_program(step.run(nets.folded("inception"), nets.context())) for _ in range(2))
    assert to_onnx(first).SerializeToString() == to_onnx(second).SerializeToString()
    assert to_tflite(first).data == to_tflite(second).data


def test_only_the_calibration_images_are_looked_at() -> None:
    x = nets.images(64, 1).copy()
    x[32:] = np.nan
    context = PassContext(nets.Images(x), tuple(range(64)))
    QuantizeStatic(num_samples=32).run(nets.folded("conv_bn_relu"), context)
    with pytest.raises(DataError, match=r"calibration images hold NaN or infinite values"):
        QuantizeStatic(num_samples=33).run(nets.folded("conv_bn_relu"), context)


def test_bias_correction_takes_out_the_mean_error() -> None:
    """Weights of 7 bits and images of one sign: the rounding error has a mean that a bias can hold."""
    x = np.abs(nets.images(64, 1)) + 1.0
    context = PassContext(nets.Images(x), tuple(range(64)))
    float_model = nets.folded("depthwise")
    expected = nets.outputs_of(float_model.graph, x)[0]

    def mean_error(correct: bool) -> float:
        step = QuantizeStatic(observer="min_max", weight_bits=7, bias_correction=correct)
        found = nets.outputs_of(step.run(float_model, context).graph, x)[0]
        return float(np.abs((found - expected).mean(axis=0)).mean())

    assert mean_error(True) < 0.7 * mean_error(False)


def test_a_network_that_overflows_is_refused() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)).eval()
    with torch.no_grad():
        net[0].weight.fill_(3e38)
    with pytest.raises(
        DataError, match=r"0 \(aten\.conv2d\.default\) gives values from .* expected finite ones"
    ):
        QuantizeStatic().run(nets.as_model(net), nets.context())


def test_activations_that_are_always_zero_are_named() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        net[0].bias.fill_(-1e3)
    after = QuantizeStatic().run(nets.as_model(net), nets.context())
    assert any(
        "1 activations were zero on every calibration image, first 1 (aten.relu" in w for w in after.warnings
    )
    build_program(after)


def test_what_cannot_be_quantized_is_refused() -> None:
    step = QuantizeStatic()
    with pytest.raises(
        PassError, match=r"stem\.1 \(aten\.batch_norm\.default\) is not folded.*fold_batch_norm"
    ):
        step.requires(nets.model("residual"))
    with pytest.raises(PassError, match=r"quantized already.*float model"):
        step.requires(nets.quantized("residual"))
    with pytest.raises(PassError, match=r"needs calibration images, found none"):
        step.run(nets.folded("residual"), PassContext())
    with pytest.raises(PassError, match=r"has a float weight after quantize_static"):
        step.ensures(nets.folded("residual"), nets.folded("residual"))
    step.requires(FoldBatchNorm().run(nets.model("residual"), nets.context()))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (QuantizeStatic(observer="kl"), r"observer is 'kl', expected one of min_max"),
        (QuantizeStatic(weight_observer="entropy"), r"weight_observer is 'entropy', expected mse or min_max"),
        (QuantizeStatic(weight_bits=4), r"weight_bits is 4, expected 7 or 8"),
        (QuantizeStatic(num_samples=0), r"num_samples is 0, expected at least 1"),
    ],
)
def test_parameters_out_of_range(step: QuantizeStatic, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        step.check()
