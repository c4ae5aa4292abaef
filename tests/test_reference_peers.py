"""The NumPy reference against torch.nn.functional (float) and onnxruntime (integers)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from programs import feeds_for, quantized_sample

from edgecnn.graph.program import BATCH, Array, Op, Program, QuantParams, Tensor
from edgecnn.quantize.reference import iterate_program, run_op


def compute(kind: str, *arrays: Array, **attributes: Any) -> Array:
    """Run one float op."""
    tensors = {f"x{i}": Tensor(f"x{i}", x.shape) for i, x in enumerate(arrays)}
    op = Op(kind, tuple(tensors), "y", attributes)
    return run_op(Program("one", (), (), {**tensors, "y": Tensor("y", ())}, (op,)), op, arrays)


X, W, B = (2, 4, 9, 7), (6, 4, 3, 3), (6,)
POOL = {"kernel": (3, 3), "stride": (2, 2)}
CEIL = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 1, 1)}
UP: dict[str, Any] = {"size": (18, 14), "mode": "bilinear", "align_corners": False}
DECONV: dict[str, Any] = {"dilation": (1, 1), "groups": 1, "output_padding": (0, 0)}
TORCH_CASES: dict[str, tuple[str, dict[str, Any], list[tuple[int, ...]], Callable[..., Any]]] = {
    "conv": ("conv2d", {"padding": (1, 1, 1, 1)}, [X, W, B], lambda F, *a: F.conv2d(*a, padding=1)),
    "conv_grouped": (
        "conv2d",
        {"stride": (2, 1), "padding": (2, 1, 2, 1), "dilation": (2, 1), "groups": 2, "clamp": (0.0, 1.0)},
        [X, (6, 2, 3, 3), B],
        lambda F, *a: F.conv2d(*a, (2, 1), (2, 1), (2, 1), 2).clamp(0, 1),
    ),
    "conv_depthwise": (
        "conv2d",
        {"stride": (2, 2), "padding": (1, 1, 1, 1), "groups": 4},
        [X, (8, 1, 3, 3), (8,)],
        lambda F, *a: F.conv2d(*a, 2, 1, 1, 4),
    ),
    "conv_asymmetric": (
        "conv2d",
        {"stride": (2, 2), "padding": (0, 1, 2, 0)},
        [X, W],
        lambda F, a, w: F.conv2d(F.pad(a, (1, 0, 0, 2)), w, None, 2),
    ),
    "deconv": (
        "conv_transpose2d",
        {**DECONV, "stride": (2, 3), "padding": (1, 0, 1, 0), "output_padding": (1, 2)},
        [X, (4, 6, 3, 2), B],
        lambda F, *a: F.conv_transpose2d(*a, (2, 3), (1, 0), (1, 2)),
    ),
    "deconv_grouped_dilated": (
        "conv_transpose2d",
        {**DECONV, "stride": (2, 2), "padding": (1, 1, 1, 1), "dilation": (2, 2), "groups": 2},
        [X, (4, 3, 3, 3), B],
        lambda F, *a: F.conv_transpose2d(*a, 2, 1, 0, 2, 2),
    ),
    "deconv_cropped": (
        "conv_transpose2d",
        {**DECONV, "stride": (1, 1), "padding": (2, 2, 2, 2)},
        [X, (4, 6, 2, 2), B],
        lambda F, *a: F.conv_transpose2d(*a, 1, 2),
    ),
    "linear": ("linear", {}, [(2, 3, 5), (4, 5), (4,)], lambda F, *a: F.linear(*a)),
    "max_pool": (
        "max_pool2d",
        {**POOL, "padding": (1, 1, 1, 1), "dilation": (2, 1)},
        [X],
        lambda F, a: F.max_pool2d(a, 3, 2, 1, (2, 1)),
    ),
    "max_pool_ceil": (
        "max_pool2d",
        {**CEIL, "dilation": (1, 1)},
        [X],
        lambda F, a: F.max_pool2d(a, 2, 2, ceil_mode=True),
    ),
    "avg_pool": (
        "avg_pool2d",
        {**POOL, "padding": (1, 1, 1, 1), "count_include_pad": True},
        [X],
        lambda F, a: F.avg_pool2d(a, 3, 2, 1),
    ),
    "avg_pool_exclude": (
        "avg_pool2d",
        {**POOL, "padding": (1, 1, 1, 1), "count_include_pad": False},
        [X],
        lambda F, a: F.avg_pool2d(a, 3, 2, 1, count_include_pad=False),
    ),
    "avg_pool_ceil": (
        "avg_pool2d",
        {**CEIL, "count_include_pad": False},
        [X],
        lambda F, a: F.avg_pool2d(a, 2, 2, ceil_mode=True),
    ),
    "mean": ("mean", {"axes": (2, 3), "keepdim": True}, [X], lambda F, a: a.mean((2, 3), keepdim=True)),
    "amax": ("amax", {"axes": (1,), "keepdim": False}, [X], lambda F, a: a.amax((1,))),
    "softmax": ("softmax", {"axis": 1}, [X], lambda F, a: F.softmax(a, 1)),
    "sigmoid": ("sigmoid", {}, [X], lambda F, a: a.sigmoid()),
    "tanh": ("tanh", {}, [X], lambda F, a: a.tanh()),
    "hard_swish": ("hard_swish", {}, [X], lambda F, a: F.hardswish(a)),
    "hard_sigmoid": ("hard_sigmoid", {}, [X], lambda F, a: F.hardsigmoid(a)),
    "leaky_relu": ("leaky_relu", {"negative_slope": 0.2}, [X], lambda F, a: F.leaky_relu(a, 0.2)),
    "sub": ("sub", {"clamp": (None, 0.5)}, [X, (4, 1, 1)], lambda F, a, c: (a - c).clamp(max=0.5)),
    "pad": (
        "pad",
        {"pads": ((0, 0), (0, 0), (1, 2), (3, 0)), "value": 0.25},
        [X],
        lambda F, a: F.pad(a, (3, 0, 1, 2), value=0.25),
    ),
    "slice": (
        "slice",
        {"axis": 2, "start": -6, "stop": 100, "step": 2},
        [X],
        lambda F, a: a[:, :, -6::2],
    ),
    "reshape": ("reshape", {"shape": (BATCH, 2, -1)}, [X], lambda F, a: a.reshape(2, 2, -1)),
    "transpose": ("transpose", {"perm": (0, 2, 3, 1)}, [X], lambda F, a: a.permute(0, 2, 3, 1)),
    "nearest": ("resize", {**UP, "mode": "nearest"}, [X], lambda F, a: F.interpolate(a, (18, 14))),
    "nearest_odd": (
        "resize",
        {"size": (13, 5), "mode": "nearest", "align_corners": False},
        [X],
        lambda F, a: F.interpolate(a, (13, 5)),
    ),
    "bilinear": ("resize", UP, [X], lambda F, a: F.interpolate(a, (18, 14), mode="bilinear")),
    "bilinear_smaller": (
        "resize",
        {**UP, "size": (4, 5)},
        [X],
        lambda F, a: F.interpolate(a, (4, 5), mode="bilinear"),
    ),
    "bilinear_corners": (
        "resize",
        {**UP, "size": (20, 1), "align_corners": True},
        [X],
        lambda F, a: F.interpolate(a, (20, 1), mode="bilinear", align_corners=True),
    ),
}
"""name -> (kind, attributes, input shapes, the same with torch.nn.functional F)."""


@pytest.mark.parametrize("name", TORCH_CASES)
def test_float_op_equals_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    kind, attributes, shapes, function = TORCH_CASES[name]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    expected = function(torch.nn.functional, *map(torch.from_numpy, arrays)).numpy()
    found = compute(kind, *arrays, **attributes)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_sigmoid_and_softmax_do_not_overflow() -> None:
    x = np.float32([[-1e4, 0.0, 1e4]])
    assert compute("sigmoid", x).tolist() == [[0.0, 0.5, 1.0]]
    assert compute("softmax", x, axis=1).tolist() == [[0.0, 0.0, 1.0]]


def test_hard_activations_at_their_corners() -> None:
    x = np.float32([[-4, -3, -1.5, 0, 3, 5]])
    assert compute("hard_swish", x).tolist() == [[0, 0, -0.375, 0, 3, 5]]
    assert compute("hard_sigmoid", x).tolist() == [[0, 0, 0.25, 0.5, 1, 1]]


def quantized_operands(name: str, quant: QuantParams, offset: int, dtype: type) -> dict[str, Array]:
    """Return the scale and zero point initializers of a tensor, moved to uint8 by `offset`."""
    zero_point = np.full(np.shape(quant.scale), quant.zero_point + offset)
    return {f"{name}_scale": np.asarray(quant.scale, np.float32), f"{name}_zero": zero_point.astype(dtype)}


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize(
    "name",
    [
        "conv",
        "conv_strided",
        "conv_asymmetric_padding",
        "conv_dilated",
        "conv_grouped",
        "conv_depthwise_multiplier",
        "conv_1x1_strided",
    ],
)
def test_conv2d_gives_the_integers_of_onnxruntime(name: str, dtype: type) -> None:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    program = quantized_sample(name)
    steps = list(iterate_program(program, feeds_for(program, batch=8, seed=1)))
    (_, x), (op, expected) = steps[0], steps[1]
    offset = 128 if dtype is np.uint8 else 0
    tensors = [program.tensors[tensor] for tensor in (*op.inputs[:2], op.output)]
    initializers: dict[str, Array] = {}
    for label, tensor, shift in zip("xwy", tensors, (offset, 0, offset), strict=True):
        assert tensor.quant is not None
        kind = np.int8 if label == "w" else dtype
        initializers.update(quantized_operands(label, tensor.quant, shift, kind))
    w, b = (program.tensors[tensor].data for tensor in op.inputs[1:])
    assert w is not None
    assert b is not None
    initializers.update(w=w, b=b)
    names = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero", "b"]
    node = onnx.helper.make_node(
        "QLinearConv",
        names,
        ["y"],
        strides=op.attributes["stride"],
        pads=op.attributes["padding"],
        dilations=op.attributes["dilation"],
        group=op.attributes["groups"],
    )
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = onnx.helper.make_graph(
        [node],
        "conv",
        [onnx.helper.make_tensor_value_info("x", element, x.shape)],
        [onnx.helper.make_tensor_value_info("y", element, expected.shape)],
        [onnx.numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": (x.astype(np.int16) + offset).astype(dtype)})
    assert np.array_equal(found.astype(np.int16) - offset, expected)
