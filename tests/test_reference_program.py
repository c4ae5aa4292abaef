"""Running whole Programs in the NumPy reference: what comes back, what is freed, what is refused."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from programs import ProgramBuilder, feeds_for, float_sample, quantize_program, quantized_sample

from edgecnn.errors import DataError
from edgecnn.graph.program import Array, Program, Tensor
from edgecnn.quantize.reference import iterate_program, run_op, run_program


def two_outputs() -> Program:
    builder = ProgramBuilder("net")
    x = builder.input((4, 5, 5))
    y = builder.conv2d(x, 3, 3, clamp=(0.0, None))
    return builder.finish(y, builder.op("mean", y, axes=(2, 3), keepdim=False))


def test_run_program_returns_public_and_kept_tensors() -> None:
    program = quantize_program(two_outputs())
    feeds = feeds_for(program)
    results = run_program(program, feeds, keep=["conv2d_0", "image", "w0"])
    assert set(results) == {"output_0", "output_1", "conv2d_0", "image", "w0"}
    assert results["conv2d_0"].dtype == np.int8
    assert np.array_equal(results["image"], feeds["image"])
    assert results["output_1"].shape == (2, 3)
    quant = program.tensors["conv2d_0"].quant
    assert quant is not None
    assert np.array_equal(results["output_0"], quant.dequantize(results["conv2d_0"]))


def test_integer_inputs_and_outputs() -> None:
    """A file with integer input and output is the same Program without its first and last op."""
    program = quantize_program(float_sample("conv"))
    inner = Program("int", ("image_q",), (("output", "conv2d_0"),), program.tensors, program.ops[1:-1])
    feeds = feeds_for(program)
    kept = run_program(program, feeds, keep=["image_q", "conv2d_0"])
    from_float = run_program(inner, {"image_q": feeds["image"]})["output"]
    from_int = run_program(inner, {"image_q": kept["image_q"]})["output"]
    assert from_int.dtype == np.int8
    assert np.array_equal(from_float, kept["conv2d_0"])
    assert np.array_equal(from_int, kept["conv2d_0"])


def test_run_op_takes_given_integers_and_fills_in_constants() -> None:
    program = quantize_program(float_sample("conv"))
    kept = run_program(program, feeds_for(program), keep=["image_q", "conv2d_0"])
    op = program.ops[1]
    assert np.array_equal(run_op(program, op, [kept["image_q"], None, None]), kept["conv2d_0"])
    with pytest.raises(DataError, match="no value for input 'image_q', which is no constant"):
        run_op(program, op, [None, None, None])
    with pytest.raises(DataError, match="1 arrays given, expected 3"):
        run_op(program, op, [kept["image_q"]])


def test_quantized_weights_of_a_float_op_are_dequantized() -> None:
    builder = ProgramBuilder("weight_only")
    program = builder.finish(builder.linear(builder.input((6,)), 3))
    tensors = dict(program.tensors)
    quantized = quantize_program(program).tensors["w0"]
    tensors["w0"] = quantized
    weight_only = Program("weight_only", program.inputs, program.outputs, tensors, program.ops)
    assert quantized.quant is not None
    assert quantized.data is not None
    tensors = {
        **tensors,
        "w0": Tensor("w0", quantized.shape, data=quantized.quant.dequantize(quantized.data)),
    }
    plain = Program("plain", program.inputs, program.outputs, tensors, program.ops)
    feeds = feeds_for(program)
    assert np.array_equal(run_program(weight_only, feeds)["output"], run_program(plain, feeds)["output"])


def test_iterate_program_frees_what_is_no_longer_read() -> None:
    builder = ProgramBuilder("chain")
    x = builder.input((2, 4, 4))
    for _ in range(8):
        x = builder.op("clamp", x, clamp=(0.0, None))
    program = builder.finish(x)
    seen = []
    for _, array in iterate_program(program, feeds_for(program)):
        seen.append(weakref.ref(array))
        assert sum(reference() is not None for reference in seen) <= 2


def test_one_image_gives_what_a_batch_gives() -> None:
    program = quantized_sample("classifier")
    feeds = feeds_for(program, batch=5)
    batch = run_program(program, feeds)["output"]
    single = [run_program(program, {"image": feeds["image"][i : i + 1]})["output"] for i in range(5)]
    assert np.array_equal(batch, np.concatenate(single))


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"feeds are \[\], expected \['image'\]"),
        ({"image": np.zeros((1, 4, 9, 8), np.float32)}, r"shape \(1, 4, 9, 8\), expected \(n, 4, 9, 7\)"),
        ({"image": np.zeros((4, 9, 7), np.float32)}, r"shape \(4, 9, 7\), expected \(n, 4, 9, 7\)"),
        ({"image": np.zeros((1, 4, 9, 7))}, "'image' is float64, expected float32"),
    ],
)
def test_bad_feeds(feeds: dict[str, Array], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run_program(float_sample("conv"), feeds)


def test_bad_keep() -> None:
    program = float_sample("conv")
    with pytest.raises(DataError, match=r"keep names \['nowhere'\]"):
        run_program(program, feeds_for(program), keep=["nowhere"])
