"""Bilinear resizing of integers: the reference, ONNX Runtime and XNNPACK give the same ones."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_session import run, shifted
from programs import ProgramBuilder, feeds_for, quantize_program
from tflite_session import TfliteSession

from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.tflite import TfliteOptions, to_tflite
from edgecnn.graph.interpolation import has_exact_weights, interpolation, interpolation_matrix
from edgecnn.graph.program import BATCH, Array, Op, Program, QuantParams, Tensor
from edgecnn.quantize.reference import run_program

Size = tuple[int, int]
CASES: dict[str, tuple[Size, Size, bool]] = {
    "twice": ((9, 7), (18, 14), False),
    "16_times": ((14, 14), (224, 224), False),
    "large": ((40, 36), (160, 72), False),
    "half": ((16, 16), (8, 8), False),
    "one_pixel": ((1, 1), (5, 7), False),
    "corners": ((9, 9), (17, 33), True),
    "corners_of_one": ((6, 5), (1, 9), True),
    "other_factors": ((9, 7), (13, 5), False),
    "large_other_factors": ((40, 36), (50, 70), False),
}


def resized(size_in: Size, size: Size, align_corners: bool) -> Program:
    """Return an int8 Program that resizes (4, *size_in)."""
    b = ProgramBuilder("resize")
    x = b.input((4, *size_in))
    program = b.finish(b.op("resize", x, size=size, mode="bilinear", align_corners=align_corners))
    return quantize_program(program, feeds_for(program))


def levels(program: Program, batch: int) -> tuple[Array, Array]:
    """Return random levels of all kinds and what the reference makes of them."""
    x = np.random.default_rng(2).integers(-128, 128, (batch, *program.tensors["image"].shape[1:]), np.int8)
    quant = program.tensors["image_q"].quant
    assert quant is not None
    return x, run_program(program, {"image": quant.dequantize(x)}, keep=("resize_0",))["resize_0"]


@pytest.mark.parametrize("name", CASES)
def test_xnnpack_gives_the_reference(name: str) -> None:
    program = resized(*CASES[name])
    x, want = levels(program, batch=2)
    session = TfliteSession(to_tflite(program, TfliteOptions(io="int8")))
    np.testing.assert_array_equal(session.run({"image": x})["output"], want)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_gives_the_reference(name: str, dtype: str) -> None:
    program = resized(*CASES[name])
    x, want = levels(program, batch=2)
    model = to_onnx(program, OnnxOptions(activation_dtype=dtype, io=dtype))
    got = run(model, {"image": shifted(x, dtype)})["output"].astype(np.int16)
    apart = np.abs(got - shifted(want, dtype).astype(np.int16))
    exact = all(has_exact_weights(i, o, CASES[name][2]) for i, o in zip(*CASES[name][:2], strict=True))
    assert apart.max() <= (0 if exact else 1)
    assert np.mean(apart) < 1e-3


def test_operators_of_the_file() -> None:
    def operators(name: str) -> list[str]:
        model = to_onnx(resized(*CASES[name]), OnnxOptions(io="uint8"))
        return [node.op_type for node in model.graph.node]

    assert operators("twice") == ["Cast", "Add", "MatMul", "MatMul", "QuantizeLinear"]
    assert operators("large") == ["Cast", "Add", "Resize", "QuantizeLinear"]
    assert operators("large_other_factors") == operators("twice")


def test_halves_are_rounded_up() -> None:
    quant = QuantParams(np.asarray(0.5, np.float32), 3)
    tensors = [Tensor("x", (BATCH, 1, 1, 4), "int8", quant), Tensor("y", (BATCH, 1, 1, 2), "int8", quant)]
    op = Op("resize", ("x",), "y", {"size": (1, 2), "mode": "bilinear", "align_corners": False}, "down")
    program = Program("half", ("x",), (("y", "y"),), {tensor.name: tensor for tensor in tensors}, (op,))
    x = np.array([[[[0, 1, -1, -2]]]], np.int8)  # means 0.5 and -1.5
    assert run_program(program, {"x": x})["y"].ravel().tolist() == [1, -1]
    assert run(to_onnx(program, OnnxOptions("int8", "int8")), {"x": x})["y"].ravel().tolist() == [1, -1]


def test_weights_by_hand() -> None:
    first, second, weight = interpolation(3, 2, align_corners=False)
    assert (first.tolist(), second.tolist()) == ([0, 1], [1, 2])
    np.testing.assert_allclose(weight, [0.25, 0.75])
    third = 683 / 2048  # 1/3 in 11 bits
    matrix = interpolation_matrix(2, 4, align_corners=True)
    np.testing.assert_array_equal(matrix[1], np.float32([1 - third, third]))
    np.testing.assert_array_equal(matrix.sum(1), 1)
    assert has_exact_weights(9, 17, align_corners=True)
    assert not has_exact_weights(2, 4, align_corners=True)
