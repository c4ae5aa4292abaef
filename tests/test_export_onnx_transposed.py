"""Quantized transposed convolution in ONNX: the reference's integers, in integer kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_session import executed, run
from programs import RELU, ProgramBuilder, feeds_for, quantize_program

from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.graph.program import Program
from edgecnn.quantize.reference import run_program

WINDOWS: dict[str, dict[str, Any]] = {
    "k2s2": {"kernel": (2, 2)},
    "k3s2": {"kernel": (3, 3), "padding": (1, 1, 1, 1), "output_padding": (1, 1)},
    "k4s2": {"kernel": (4, 4), "padding": (1, 1, 1, 1)},
    "odd_size": {"kernel": (3, 3), "padding": (1, 1, 1, 1)},
    "stride_1": {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1)},
    "stride_2_by_3": {
        "kernel": (3, 2),
        "stride": (2, 3),
        "padding": (1, 0, 1, 0),
        "output_padding": (1, 2),
        "clamp": RELU,
    },
    "stride_wider_than_kernel": {"kernel": (2, 2), "stride": (3, 3)},
    "dilated": {"kernel": (3, 3), "padding": (1, 1, 1, 1), "dilation": (2, 2)},
    "grouped": {"kernel": (4, 4), "padding": (1, 1, 1, 1), "groups": 2, "clamp": (0.0, 0.5)},
    "depthwise": {"kernel": (4, 4), "padding": (1, 1, 1, 1), "groups": 6},
}


def transposed(
    kernel: tuple[int, int],
    groups: int = 1,
    stride: tuple[int, int] = (2, 2),
    bias: bool = True,
    **attributes: Any,
) -> Program:
    """Return a float Program of one conv_transpose2d of (6, 9, 7) to 6 channels."""
    b = ProgramBuilder("up")
    x = b.input((6, 9, 7))
    weight = b.constant(b.rng.standard_normal((6, 6 // groups, *kernel)) * 0.2)
    constants = [weight, b.constant(b.rng.standard_normal(6))] if bias else [weight]
    defaults = {"padding": (0,) * 4, "output_padding": (0, 0), "dilation": (1, 1), "clamp": (None, None)}
    window = {**defaults, "stride": stride, "groups": groups, **attributes}
    return b.finish(b.op("conv_transpose2d", x, *constants, **window))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", WINDOWS)
def test_integers_are_the_reference(name: str, bias: bool, dtype: str) -> None:
    program = quantize_program(transposed(**WINDOWS[name], bias=bias))
    model = to_onnx(program, OnnxOptions(activation_dtype=dtype))
    onnx.checker.check_model(model, full_check=True)
    assert "ConvTranspose" not in {node.op_type for node in model.graph.node}
    for batch in (1, 3):
        feeds = feeds_for(program, batch=batch, seed=5)
        np.testing.assert_array_equal(run(model, feeds)["output"], run_program(program, feeds)["output"])


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("k4s2", {"DepthToSpace": 1}),
        ("odd_size", {"DepthToSpace": 1, "Slice": 1}),
        ("stride_1", {}),
        ("stride_2_by_3", {"Reshape": 2, "Transpose": 1, "Slice": 1}),
    ],
)
def test_kernels_are_integer(name: str, kernels: dict[str, int], dtype: str, tmp_path: Path) -> None:
    found = executed(
        to_onnx(quantize_program(transposed(**WINDOWS[name])), OnnxOptions(activation_dtype=dtype)), tmp_path
    )
    if dtype == "int8" and "DepthToSpace" in kernels:
        kernels = {**{k: n for k, n in kernels.items() if k != "DepthToSpace"}, "Reshape": 2}
    if "Transpose" not in kernels:
        found.pop("Transpose", None)  # of a layout
    elif "Transpose" in found:
        found["Transpose"] = 1
    assert found == {"QuantizeLinear": 1, "QLinearConv": 1, "DequantizeLinear": 1, **kernels}


def test_float_network_keeps_its_operator() -> None:
    model = to_onnx(transposed((2, 2)))
    assert [node.op_type for node in model.graph.node] == ["ConvTranspose"]


def test_debug_output_and_relu_follow_the_spread_values() -> None:
    program = quantize_program(transposed((3, 3), padding=(1, 1, 1, 1), clamp=RELU))
    name = program.ops[-2].output
    feeds = feeds_for(program)
    model = to_onnx(program, OnnxOptions(activation_dtype="int8", debug_outputs=(name,)))
    want = run_program(program, feeds, keep=(name,))[name]
    assert want.shape == (2, 6, 17, 13)
    np.testing.assert_array_equal(run(model, feeds)[name], want)
