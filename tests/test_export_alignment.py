"""Widened channels: the same integers, in the widths that ONNX Runtime's fast kernels take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_session import open_session, run
from programs import RELU, RELU6, ProgramBuilder, feeds_for, quantize_program

from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.onnx_alignment import align_channels
from edgecnn.graph.program import Program
from edgecnn.quantize.reference import run_program

SIDE = (1, 1, 1, 1)


def mobile_block(channels: int, image: int = 32, stem: int = 16) -> Program:
    """A stem, an expansion, a depthwise convolution, squeeze-and-excitation, a projection and an addition."""
    builder = ProgramBuilder("mobile")
    x = builder.input((3, image, image))
    x = builder.conv2d(x, stem, 3, stride=(2, 2), padding=SIDE, clamp=RELU6)
    wide = builder.conv2d(x, channels, 1, clamp=RELU6)
    wide = builder.conv2d(wide, channels, 3, padding=SIDE, groups=channels, clamp=RELU)
    gate = builder.op("mean", wide, axes=(2, 3), keepdim=True)
    gate = builder.conv2d(gate, 8, 1, clamp=RELU)
    gate = builder.op("sigmoid", builder.conv2d(gate, channels, 1))
    narrow = builder.conv2d(builder.op("mul", wide, gate), stem, 1)
    pooled = builder.op("mean", builder.op("add", x, narrow), axes=(2, 3), keepdim=False)
    return quantize_program(builder.finish(builder.linear(pooled, 10)))


def shapes(program: Program) -> set[int]:
    return {t.shape[1] for t in program.tensors.values() if not t.is_constant and len(t.shape) == 4}


def check_same_integers(program: Program) -> Program:
    """Assert that both compute what they do unaligned; return the aligned Program."""
    aligned = align_channels(program)
    feeds = feeds_for(program, 2)
    arm = run(to_onnx(program, OnnxOptions(activation_dtype="int8")), feeds)
    for found, expected in (
        (run_program(aligned, feeds), run_program(program, feeds)),
        (run(to_onnx(program), feeds), arm),
    ):
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
    return aligned


def test_depthwise_and_its_branch_become_a_multiple_of_16() -> None:
    program = mobile_block(88)
    assert 88 in shapes(program)
    aligned = check_same_integers(program)
    assert 88 not in shapes(aligned)
    assert 96 in shapes(aligned)
    depthwise = next(op for op in aligned.ops if op.kind == "conv2d" and op.attributes["groups"] > 1)
    assert depthwise.attributes["groups"] == 96
    assert aligned.tensors[depthwise.inputs[1]].shape == (96, 1, 3, 3)


def test_image_gets_a_fourth_channel() -> None:
    model = to_onnx(mobile_block(32))
    pad = next(node for node in model.graph.node if node.op_type == "Pad")
    stem = next(node for node in model.graph.node if node.op_type == "Conv")
    assert any(pad.output[0] in node.input for node in model.graph.node)
    weight = next(node for node in model.graph.node if node.output[0] == stem.input[1]).input[0]
    assert tuple(next(i for i in model.graph.initializer if i.name == weight).dims) == (16, 4, 3, 3)
    assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 3


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (mobile_block(32, image=8), "aligned layers on a small image"),
        (mobile_block(8, stem=12, image=8), "8 to 16 channels is twice as many"),
    ],
    ids=["small_image", "too_few"],
)
def test_what_gains_nothing_stays(program: Program, why: str) -> None:
    assert align_channels(program).ops == program.ops, why


def test_arm_files_stay() -> None:
    program = mobile_block(88)
    model = to_onnx(program, OnnxOptions(activation_dtype="int8"))
    assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 3
    assert "Pad" not in {node.op_type for node in model.graph.node}
    assert not any(96 in tuple(i.dims) for i in model.graph.initializer)


def test_float_program_stays() -> None:
    builder = ProgramBuilder("float")
    x = builder.input((3, 32, 32))
    program = builder.finish(builder.conv2d(x, 24, 3, padding=SIDE))
    assert align_channels(program) is program


def test_outputs_and_kept_tensors_stay() -> None:
    program = mobile_block(88)
    kept = next(op.output for op in program.ops if op.kind == "conv2d" and op.attributes["groups"] == 88)
    assert align_channels(program, (kept,)).tensors[kept].shape[1] == 88
    debug = to_onnx(program, OnnxOptions(debug_outputs=(kept,)))
    feeds = feeds_for(program, 1)
    q = run(debug, feeds)[kept]
    np.testing.assert_array_equal(q.astype(np.int16) - 128, run_program(program, feeds, (kept,))[kept])


def test_pruned_widths_of_dense_layers() -> None:
    builder = ProgramBuilder("pruned")
    x = builder.input((3, 32, 32))
    x = builder.conv2d(x, 29, 3, padding=SIDE, clamp=RELU)
    y = builder.conv2d(x, 61, 3, padding=SIDE, clamp=RELU)
    y = builder.conv2d(y, 29, 3, padding=SIDE)
    x = builder.op("mean", builder.op("add", x, y), axes=(2, 3), keepdim=False)
    aligned = check_same_integers(quantize_program(builder.finish(builder.linear(x, 10))))
    assert {32, 64} <= shapes(aligned)
    assert not {29, 61} & shapes(aligned)


def test_concat_and_slices_keep_their_channels() -> None:
    builder = ProgramBuilder("concat")
    x = builder.input((4, 32, 32))
    a = builder.conv2d(x, 24, 3, padding=SIDE, groups=1)
    b = builder.conv2d(a, 24, 3, padding=SIDE, groups=24)
    joined = builder.op("concat", a, b, axis=1)
    y = builder.op("mean", builder.conv2d(joined, 16, 1), axes=(2, 3), keepdim=False)
    program = quantize_program(builder.finish(builder.linear(y, 10)))
    aligned = check_same_integers(program)
    assert 24 in shapes(aligned)


@settings(max_examples=12, deadline=None)
@given(channels=st.integers(9, 70), stem=st.sampled_from([8, 12, 16, 24]), image=st.sampled_from([8, 32]))
def test_any_width_gives_the_same_integers(channels: int, stem: int, image: int) -> None:
    check_same_integers(mobile_block(channels, image, stem))


def test_integer_input_is_padded_too() -> None:
    program = mobile_block(88)
    feeds = feeds_for(program, 1)
    quantized = program.tensors[program.ops[0].output].quant
    assert quantized is not None
    q = quantized.quantize(feeds["image"])
    model = to_onnx(program, OnnxOptions(io="uint8"))
    found = run(model, {"image": (q.astype(np.int16) + 128).astype(np.uint8)})["output"]
    dequantized = run(to_onnx(program), feeds)["output"]
    assert len(np.unique(found)) > 1
    np.testing.assert_array_equal(
        np.argsort(found[0], kind="stable"), np.argsort(dequantized[0], kind="stable")
    )


def test_aligned_file_is_valid_and_still_fuses(tmp_path: Path) -> None:
    model = to_onnx(mobile_block(88))
    onnx.checker.check_model(model, full_check=True)
    open_session(model, tmp_path / "optimized.onnx")
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not kinds & {"Conv", "Add", "Mul"}
