"""The ONNX writer: every op kind against the reference in ONNX Runtime, fused into integer kernels there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_session import executed, open_session, run, shifted
from programs import (
    FLOAT_SAMPLE_NAMES,
    RELU,
    SAMPLE_NAMES,
    ProgramBuilder,
    feeds_for,
    float_sample,
    quantize_program,
    quantized_sample,
)

from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.graph.program import BATCH, Array, Op, Program, QuantParams, Tensor
from edgecnn.quantize.reference import run_program

DTYPES = ("uint8", "int8")

ROUNDING_OF_HALVES = {"avg_pool_exclude_pad"}
"""Samples where a mean that ends in .5 rounds the other way in ONNX Runtime: its division is exact."""

KERNELS = {
    "conv": {"QLinearConv": 1},
    "conv_no_bias": {"QLinearConv": 1},
    "conv_relu": {"QLinearConv": 1},
    "conv_relu6": {"QLinearConv": 1},
    "conv_depthwise": {"QLinearConv": 1},
    "conv_grouped": {"QLinearConv": 1},
    "conv_transpose": {"QLinearConv": 1, "DepthToSpace": 1},
    "conv_transpose_grouped": {"QLinearConv": 1, "DepthToSpace": 1, "Slice": 1},
    "linear": {"QGemm": 2, "Reshape": 1},
    "add": {"QLinearConv": 2, "QLinearAdd": 1},
    "add_relu": {"QLinearConv": 2, "QLinearAdd": 1},
    "mul": {"QLinearConv": 2, "QLinearMul": 1},
    "add_constant_per_channel": {"QLinearAdd": 1},
    "sub_constant_per_channel": {"QLinearAdd": 1},
    "mul_constant_scalar": {"QLinearMul": 1},
    "relu": {"QLinearLeakyRelu": 1},
    "leaky_relu": {"QLinearLeakyRelu": 1},
    "sigmoid": {"QLinearSigmoid": 1},
    "tanh": {"QLinearSigmoid": 1},
    "softmax_channels": {"QLinearSoftmax": 1},
    "max_pool": {"MaxPool": 1},
    "avg_pool": {"QLinearAveragePool": 1},
    "avg_pool_exclude_pad": {"QLinearAveragePool": 1},
    "global_mean": {"QLinearGlobalAveragePool": 1, "Reshape": 1},
    "global_mean_keepdim": {"QLinearGlobalAveragePool": 1},
    "channel_mean": {"QLinearConv": 1},
    "global_amax": {"ReduceMax": 1},
    "channel_amax": {"ReduceMax": 1},
    "concat": {"QLinearConv": 2, "QLinearConcat": 1},
    "slice_channels": {"Slice": 1},
    "pad_value": {"Pad": 1},
    "transpose": {"Transpose": 1},
    "resize_nearest": {"Resize": 1},
    "resize_nearest_odd": {"Gather": 2},
    "residual_block": {"QLinearConv": 2, "QLinearAdd": 1},
    "squeeze_excite": {
        "QLinearConv": 3,
        "QLinearGlobalAveragePool": 1,
        "QLinearSigmoid": 1,
        "QLinearMul": 1,
    },
    "classifier": {
        "QLinearConv": 2,
        "NhwcMaxPool": 1,
        "QLinearGlobalAveragePool": 1,
        "Reshape": 1,
        "QGemm": 1,
    },
}
"""What ONNX Runtime runs between the first QuantizeLinear and the last DequantizeLinear, Transpose aside."""


def levels_apart(got: Array, want: Array, dtype: str) -> Array:
    return np.abs(got.astype(np.int16) - shifted(want, dtype).astype(np.int16))


def one_op(
    kind: str, out: Tensor, quant: QuantParams, attributes: dict[str, Any], *constants: Tensor
) -> Program:
    """Return a Program: float x -> quantize -> the op, whose quantized result is the output `out`."""
    shape = out.shape if kind != "mean" else (BATCH, 8, 6, 5)
    tensors = [Tensor("x", shape), Tensor("x_q", shape, "int8", quant), out, *constants]
    op = Op(kind, ("x_q", *(tensor.name for tensor in constants)), out.name, attributes, f"layer ({kind})")
    quantize = Op("quantize", ("x",), "x_q", layer="x (quantize)")
    by_name = {tensor.name: tensor for tensor in tensors}
    return Program("one", ("x",), ((out.name, out.name),), by_name, (quantize, op))


def quant(scale: float, zero_point: int) -> QuantParams:
    return QuantParams(np.asarray(scale, np.float32), zero_point)


@pytest.mark.parametrize("name", FLOAT_SAMPLE_NAMES)
def test_float_program_matches_reference(name: str) -> None:
    program = float_sample(name)
    model = to_onnx(program)
    onnx.checker.check_model(model, full_check=True)
    feeds = feeds_for(program, batch=3, seed=7)
    got, want = run(model, feeds)["output"], run_program(program, feeds)["output"]
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_every_quantized_tensor_matches_reference(name: str, dtype: str) -> None:
    program = quantized_sample(name)
    keep = tuple(name for name, t in program.tensors.items() if t.quant is not None and not t.is_constant)
    feeds = feeds_for(program, batch=3, seed=7)
    want = run_program(program, feeds, keep=keep)
    model = to_onnx(program, OnnxOptions(activation_dtype=dtype, debug_outputs=keep))
    onnx.checker.check_model(model, full_check=True)
    got = run(model, feeds)
    allowed = 1 if name in ROUNDING_OF_HALVES else 0
    for tensor in keep:
        assert got[tensor].dtype == dtype
        assert levels_apart(got[tensor], want[tensor], dtype).max() <= allowed, tensor
    plain = run(to_onnx(program, OnnxOptions(activation_dtype=dtype)), feeds)["output"]
    np.testing.assert_array_equal(plain, got["output"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_op_runs_in_integers(name: str, dtype: str, tmp_path: Path) -> None:
    found = executed(to_onnx(quantized_sample(name), OnnxOptions(activation_dtype=dtype)), tmp_path)
    expected = {"QuantizeLinear": 1, "DequantizeLinear": 1, **KERNELS[name]}
    if dtype == "int8" and expected.pop("DepthToSpace", 0):
        expected["Reshape"] = 2
    if name != "transpose":
        found.pop("Transpose", None)
    assert found == expected


@pytest.mark.parametrize("name", ["residual_block", "squeeze_excite", "classifier", "concat"])
def test_int8_activations_where_the_runtime_does_not_allow_them(name: str) -> None:
    """On x86 ONNX Runtime by default runs parts of an int8 file in float; the values stay the same."""
    program = quantized_sample(name)
    feeds = feeds_for(program, batch=3)
    model = to_onnx(program, OnnxOptions(activation_dtype="int8"))
    (got,) = open_session(model, int8_allowed=False).run(["output"], feeds)
    np.testing.assert_array_equal(got, run_program(program, feeds)["output"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_chain_stays_in_one_layout(dtype: str, tmp_path: Path) -> None:
    b = ProgramBuilder("chain")
    x = b.conv2d(b.input((3, 12, 12)), 16, 3, padding=(1, 1, 1, 1), clamp=RELU)
    for _ in range(2):
        y = b.conv2d(x, 16, 3, padding=(1, 1, 1, 1), clamp=RELU)
        x = b.op("add", b.conv2d(y, 16, 3, padding=(1, 1, 1, 1)), x, clamp=RELU)
    program = quantize_program(b.finish(x))
    model = to_onnx(program, OnnxOptions(activation_dtype=dtype))
    ends = {"QuantizeLinear": 1, "DequantizeLinear": 1, "Transpose": 2}
    assert executed(model, tmp_path) == {"QLinearConv": 5, "QLinearAdd": 2, **ends}
    feeds = feeds_for(program, batch=4, seed=3)
    np.testing.assert_array_equal(run(model, feeds)["output"], run_program(program, feeds)["output"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamp_inside_the_range_clips_integers_after_the_kernel(dtype: str, tmp_path: Path) -> None:
    w = np.arange(-9, 9, dtype=np.int8).reshape(2, 9, 1, 1)
    weight = Tensor("w", w.shape, "int8", QuantParams(np.float32([0.1, 0.2]), 0, 0), w)
    out = Tensor("y", (BATCH, 2, 4, 4), "int8", quant(0.05, -100))
    window = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
    program = one_op("conv2d", out, quant(0.02, 3), {**window, "clamp": (0.0, 6.0)}, weight)
    wide = Tensor("x_q", (BATCH, 9, 4, 4), "int8", quant(0.02, 3))
    tensors = {**program.tensors, "x": Tensor("x", wide.shape), "x_q": wide}
    program = replace(program, tensors=tensors)
    model = to_onnx(program, OnnxOptions(activation_dtype=dtype, io=dtype))
    assert executed(model, tmp_path) == {"Transpose": 2, "QLinearConv": 1, "Clip": 1}
    x = np.random.default_rng(0).integers(-128, 128, (2, 9, 4, 4)).astype(np.int8)
    want = run_program(program, {"x": wide.quant.dequantize(x)})["y"]
    got = run(model, {"x": shifted(x, dtype)})["y"]
    np.testing.assert_array_equal(got, shifted(want, dtype))
    assert (want.min(), want.max()) == (-100, 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "out_quant", "attributes"),
    [
        ("sigmoid", quant(1 / 256, -128), {}),
        ("tanh", quant(1 / 128, 0), {}),
        ("tanh", quant(1 / 100, 4), {}),
        ("requantize", quant(0.031, -40), {}),
        ("leaky_relu", quant(0.031, -40), {"negative_slope": 0.2}),
        ("clamp", quant(0.031, -40), {"clamp": (-0.5, 2.0)}),
        ("clamp", quant(0.02, 17), {"clamp": (0.0, 1.0)}),
        ("clamp", quant(0.02, 17), {"clamp": (None, None)}),
    ],
)
def test_all_256_levels(kind: str, out_quant: QuantParams, attributes: dict[str, Any], dtype: str) -> None:
    x_quant = quant(0.02, 17)
    program = one_op(kind, Tensor("y", (BATCH, 256), "int8", out_quant), x_quant, attributes)
    levels = np.arange(-128, 128).astype(np.int8)[None]
    want = run_program(program, {"x": x_quant.dequantize(levels)})["y"]
    got = run(to_onnx(program, OnnxOptions(activation_dtype=dtype, io=dtype)), {"x": shifted(levels, dtype)})
    np.testing.assert_array_equal(got["y"], shifted(want, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_point", [-128, -20, 127])
@pytest.mark.parametrize("side", [3, 5, 7])
def test_average_pools_that_leave_padding_out(side: int, zero_point: int, dtype: str) -> None:
    same, shape = quant(0.05, zero_point), (BATCH, 8, 12, 12)
    attributes = {
        "kernel": (side, side),
        "stride": (1, 1),
        "padding": (side // 2,) * 4,
        "count_include_pad": False,
    }
    program = one_op("avg_pool2d", Tensor("y", shape, "int8", same), same, attributes)
    x = np.random.default_rng(side).integers(-128, 128, (3, *shape[1:])).astype(np.int8)
    model = to_onnx(program, OnnxOptions(activation_dtype=dtype, io=dtype))
    want = run_program(program, {"x": same.dequantize(x)})["y"]
    np.testing.assert_array_equal(run(model, {"x": shifted(x, dtype)})["y"], shifted(want, dtype))


@pytest.mark.parametrize("opset", [13, 18, 21])
@pytest.mark.parametrize("axes", [(1,), (2,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("keepdim", [True, False])
def test_mean_over_any_axes(axes: tuple[int, ...], keepdim: bool, opset: int) -> None:
    kept = [1 if i in axes else size for i, size in enumerate((BATCH, 8, 6, 5)) if keepdim or i not in axes]
    attributes = {"axes": axes, "keepdim": keepdim}
    program = one_op("mean", Tensor("y", tuple(kept), "int8", quant(0.013, -20)), quant(0.02, -7), attributes)
    x = np.random.default_rng(1).integers(-128, 128, (3, 8, 6, 5)).astype(np.int8)
    model = to_onnx(program, OnnxOptions(activation_dtype="int8", io="int8", opset=opset))
    want = run_program(program, {"x": program.tensors["x_q"].quant.dequantize(x)})["y"]
    np.testing.assert_array_equal(run(model, {"x": x})["y"], want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_on_three_dimensions(dtype: str, tmp_path: Path) -> None:
    b = ProgramBuilder("tokens")
    program = quantize_program(b.finish(b.linear(b.input((5, 16)), 7)))
    model = to_onnx(program, OnnxOptions(activation_dtype=dtype))
    expected = {"QuantizeLinear": 1, "Reshape": 2, "QGemm": 1, "DequantizeLinear": 1}
    assert executed(model, tmp_path) == expected
    feeds = feeds_for(program, batch=3)
    np.testing.assert_array_equal(run(model, feeds)["output"], run_program(program, feeds)["output"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_left_in_float(dtype: str, tmp_path: Path) -> None:
    """A layer that falls back to float stands between the Program's own dequantize and quantize."""
    b = ProgramBuilder("fallback")
    x = b.conv2d(b.input((3, 8, 8)), 4, 3, clamp=RELU)
    program = quantize_program(b.finish(x))
    real = program.ops[-1].output
    w = np.random.default_rng(0).standard_normal((5, 4, 3, 3)).astype(np.float32)
    window = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
    tensors = {
        **program.tensors,
        "w_float": Tensor("w_float", w.shape, data=w),
        "y": Tensor("y", (BATCH, 5, 4, 4)),
        "z_q": Tensor("z_q", (BATCH, 5, 4, 4), "int8", quant(0.1, -3)),
        "z": Tensor("z", (BATCH, 5, 4, 4)),
    }
    ops = (
        *program.ops,
        Op("conv2d", (real, "w_float"), "y", {**window, "clamp": (-2.0, 2.0)}, "head"),
        Op("quantize", ("y",), "z_q"),
        Op("dequantize", ("z_q",), "z"),
    )
    mixed = replace(program, tensors=tensors, ops=ops, outputs=(("z", "z"),))
    model = to_onnx(mixed, OnnxOptions(activation_dtype=dtype))
    assert executed(model, tmp_path)["QLinearConv"] == 1
    feeds = feeds_for(mixed, batch=2)
    assert np.abs(run(model, feeds)["z"] - run_program(mixed, feeds)["z"]).max() <= 0.101


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_only_int8(dtype: str) -> None:
    """Quantized weights beside float activations are stored as int8 and dequantized by the file."""
    rng = np.random.default_rng(0)
    w = rng.integers(-127, 128, (6, 8)).astype(np.int8)
    tensors = [
        Tensor("x", (BATCH, 8)),
        Tensor("w", w.shape, "int8", QuantParams(rng.uniform(0.01, 0.1, 6).astype(np.float32), 0, 0), w),
        Tensor("y", (BATCH, 6)),
    ]
    op = Op("linear", ("x", "w"), "y", {"clamp": (None, None)}, "head")
    program = Program("wo", ("x",), (("y", "y"),), {tensor.name: tensor for tensor in tensors}, (op,))
    model = to_onnx(program, OnnxOptions(activation_dtype=dtype))
    stored = {i.name: i.data_type for i in model.graph.initializer}
    assert stored["w"] == onnx.TensorProto.INT8
    feeds = feeds_for(program, batch=3)
    np.testing.assert_allclose(run(model, feeds)["y"], run_program(program, feeds)["y"], atol=1e-4)
