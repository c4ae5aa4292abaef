"""int16x8: both files against the reference in steps of 16 bits, by hand and from end to end."""

from __future__ import annotations

from pathlib import Path

import nets
import numpy as np
import onnx
import onnx_session
import pytest
import torch
from tflite_session import TfliteSession, structure
from torch import nn

import edgecnn
from edgecnn.compress import CompressOptions
from edgecnn.errors import ExportError, PassError, UnsupportedOpError
from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.parity import first_difference, relative_error, sqnr_db
from edgecnn.export.tflite import to_tflite
from edgecnn.export.trace import trace_onnx, trace_tflite
from edgecnn.graph.build import build_program, float_islands
from edgecnn.graph.program import Program, QuantParams
from edgecnn.model import Model
from edgecnn.quantize.reference import run_op, run_program
from edgecnn.quantize.static import QuantizeStatic
from edgecnn.quantize.widen import WidenActivations, widened_scale
from edgecnn.recipe import Recipe

RECIPE = "static_wi8_ai16"
NO_TFLITE = {"unet": "DEPTH_TO_SPACE", "transposed": "DEPTH_TO_SPACE", "bilinear_aligned": "no exact weights"}


def int8(model: Model) -> Model:
    return QuantizeStatic(observer="min_max").run(model, nets.context())


def wide(model: Model) -> Model:
    return WidenActivations().run(int8(model), nets.context())


def wide_program(name: str) -> Program:
    return build_program(wide(nets.folded(name)))


@pytest.mark.parametrize("name", nets.NETS)
def test_both_files_compute_the_reference(name: str) -> None:
    program, x = wide_program(name), nets.held_out(3)
    feeds = {program.inputs[0]: x}
    expected = run_program(program, feeds)
    assert program.activation_bits == 16
    assert float_islands(program) == []
    assert relative_error(expected, onnx_session.run(to_onnx(program), feeds)) < 3e-4
    assert first_difference(program, trace_onnx(program, feeds, "uint8"), feeds, run_op) is None
    if name in NO_TFLITE:
        with pytest.raises(UnsupportedOpError, match=rf"aten.*{NO_TFLITE[name]}") as found:
            to_tflite(program)
        assert "--format onnx" in str(found.value.hint)
        return
    assert relative_error(expected, TfliteSession(to_tflite(program)).run(feeds)) < 3e-4
    assert first_difference(program, trace_tflite(program, feeds), feeds, run_op) is None


@pytest.mark.parametrize("name", ["residual", "hard_swish", "silu", "mixed_concat"])
def test_rounding_activations_costs_next_to_nothing(name: str) -> None:
    x = nets.images(64, 1)[:8]  # of calibration, so that nothing is cut off
    given = nets.outputs_of(nets.folded(name).graph, x)[0]
    narrow, finer = (
        next(iter(run_program(build_program(form), {form.spec.inputs[0].name: x}).values()))
        for form in (int8(nets.folded(name)), wide(nets.folded(name)))
    )
    assert (sqnr_db(given, finer) or 0.0) > (sqnr_db(given, narrow) or 0.0) + 6.0


def test_pytorch_computes_the_reference_too() -> None:
    model, x = wide(nets.folded("residual")), nets.held_out(2)
    expected = run_program(build_program(model), {model.spec.inputs[0].name: x})
    for values, found in zip(expected.values(), nets.outputs_of(model.graph, x), strict=True):
        assert relative_error({"y": values}, {"y": found}) < 3e-4


def test_a_layer_in_float_stays_in_float() -> None:
    step = QuantizeStatic(observer="min_max", float_layers=("*conv2d_1*",))
    program = build_program(
        WidenActivations().run(step.run(nets.folded("residual"), nets.context()), nets.context())
    )
    assert len(float_islands(program)) == 1
    feeds = {program.inputs[0]: nets.held_out(2)}
    expected = run_program(program, feeds)
    assert relative_error(expected, onnx_session.run(to_onnx(program), feeds)) < 3e-4
    assert relative_error(expected, TfliteSession(to_tflite(program)).run(feeds)) < 3e-4


def test_scales_by_hand() -> None:
    """[0, 25.5] in steps of 0.1 reaches 25.5; [-1, 1.55] reaches 1.55; the prescribed ones reach 1."""
    assert widened_scale(0.1, -128) * 32767 == pytest.approx(25.5)
    assert widened_scale(0.01, -28) * 32767 == pytest.approx(1.55)
    assert widened_scale(1 / 256, -128) == widened_scale(1 / 128, 0) == 1 / 32768
    assert widened_scale(1 / 128, -128) * 32767 == pytest.approx(255 / 128)


def test_levels_by_hand() -> None:
    quant = QuantParams(np.asarray(0.5, np.float32), num_bits=16)
    q = quant.quantize(np.float32([0.26, -1.0, 16383.6, 20000.0, -20000.0]))
    assert (q.dtype, q.tolist()) == (np.int16, [1, -2, 32767, 32767, -32768])
    assert quant.dequantize(q).tolist() == [0.5, -1.0, 16383.5, 16383.5, -16384.0]


def one_layer(weights: list[float], bias: float) -> Model:
    layer = nn.Conv2d(3, 1, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights).reshape(1, 3, 1, 1))
        layer.bias.fill_(bias)  # type: ignore[union-attr]
    return nets.as_model(nn.Sequential(layer).eval())


def test_a_convolution_by_hand() -> None:
    """q_y = round(s_x s_w / s_y (sum q_x q_w + q_b)), in both runtimes."""
    step = QuantizeStatic(observer="min_max", bias_correction=False)
    model = WidenActivations().run(
        step.run(one_layer([0.5, -1.0, 0.25], 0.3), nets.context()), nets.context()
    )
    program = build_program(model)
    conv = next(op for op in program.ops if op.kind == "conv2d")
    x_quant, w_quant, y_quant = (
        program.tensors[name].quant for name in (conv.inputs[0], conv.inputs[1], conv.output)
    )
    assert x_quant is not None
    assert w_quant is not None
    assert y_quant is not None
    assert (x_quant.zero_point, y_quant.zero_point) == (0, 0)
    s_x, s_w, s_y = float(x_quant.scale), float(w_quant.scale[0]), float(y_quant.scale)
    weight, bias = program.tensors[conv.inputs[1]].data, program.tensors[conv.inputs[2]].data
    assert weight is not None
    assert bias is not None
    assert weight.ravel().tolist() == [64, -127, 32]
    assert abs(int(bias[0]) - 0.3 / (s_x * s_w)) <= 128.0  # half a step of the int8 network's bias
    x = np.zeros((1, 3, 12, 12), np.float32)
    x[0, :, 3, 4] = (0.5, -0.25, 0.125)
    q = [round(value / s_x) for value in (0.5, -0.25, 0.125)]
    level = round(s_x * s_w / s_y * (64 * q[0] - 127 * q[1] + 32 * q[2] + int(bias[0])))
    feeds = {program.inputs[0]: x}
    for found in (
        run_program(program, feeds),
        onnx_session.run(to_onnx(program), feeds),
        TfliteSession(to_tflite(program)).run(feeds),
    ):
        y = next(iter(found.values()))[0, 0, 3, 4]
        assert round(float(y) / s_y) == level
        assert y == pytest.approx(0.3 + 0.5 * 0.5 + 0.25 + 0.25 * 0.125, abs=0.004)


def test_a_bias_too_large_for_the_finer_steps_widens_its_channel() -> None:
    model = int8(one_layer([1e-7, -1e-7, 5e-8], 3.0))
    given = {model.spec.inputs[0].name: nets.held_out(2)}
    program = build_program(WidenActivations().run(model, nets.context()))
    bias = next(t for t in program.constants() if t.dtype == "int32")
    assert bias.data is not None
    assert 2**29 < int(bias.data[0]) <= 2**30 + 1
    np.testing.assert_allclose(next(iter(run_program(program, given).values())), 3.0, atol=1e-3)
    np.testing.assert_allclose(next(iter(onnx_session.run(to_onnx(program), given).values())), 3.0, atol=1e-3)


def test_what_the_files_hold() -> None:
    program = wide_program("residual")
    described = structure(to_tflite(program))
    assert {"CONV_2D v4", "FULLY_CONNECTED v7", "ADD v3", "QUANTIZE v2", "DEQUANTIZE v3"} <= set(
        described["operator_codes"]
    )
    types = {tensor["type"] for tensor in described["tensors"]}
    assert {"INT16", "INT8", "INT64", "FLOAT32"} <= types
    assert all(tensor["zero_point"] == 0 for tensor in described["tensors"] if tensor["type"] == "INT16")
    assert not any(op["options"].get("pot_scale_int16") for op in described["operators"])
    model = to_onnx(program)
    assert model.opset_import[0].version == 21
    held = {t.name: t for t in model.graph.initializer}
    dtypes = {held[n.input[2]].data_type for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert dtypes == {onnx.TensorProto.INT16}
    onnx.checker.check_model(model)
    with pytest.raises(ExportError, match="reads opset 20, 16-bit activations need 21"):
        to_onnx(program, OnnxOptions(max_opset=20))


def test_the_recipe_from_end_to_end(tmp_path: Path, examples_dir: Path) -> None:
    result = edgecnn.compress(
        examples_dir / "lenet5_digits.pt2",
        recipe=RECIPE,
        data="digits",
        out=tmp_path / "o",
        options=CompressOptions(measure=False),
    )
    report = result.report
    assert [step.name for step in report.passes][-2:] == ["quantize_static", "widen_activations"]
    for parity in report.parity.values():
        assert (parity.max_relative_error or 0.0) < 5e-4
    assert all((value or 0.0) > 38.0 for value in report.sqnr_db.values())
    assert report.accuracy is not None
    assert report.accuracy.drop_points < 0.5
    for size in report.sizes.values():
        assert size.float_size_bytes > 3.3 * size.size_bytes
    for artifact in result.artifacts.values():
        assert {tensor.dtype for tensor in (*artifact.inputs, *artifact.outputs)} == {"float32"}
    with pytest.raises(PassError, match="is quantized already"):
        edgecnn.compress(tmp_path / "o" / "model.pt2", data="digits", out=tmp_path / "again")


def test_integer_inputs_are_refused_with_the_reason(tmp_path: Path, examples_dir: Path) -> None:
    with pytest.raises(ExportError, match="the recipe static_wi8_ai16 has int16 activations"):
        edgecnn.compress(
            examples_dir / "lenet5_digits.pt2",
            recipe=RECIPE,
            out=tmp_path / "o",
            options=CompressOptions(io="uint8"),
        )


def test_what_the_pass_refuses_and_the_recipe_holds() -> None:
    with pytest.raises(PassError, match="no int8 activations") as found:
        WidenActivations().requires(nets.folded("residual"))
    assert "ahead of widen_activations" in str(found.value.hint)
    with pytest.raises(PassError, match="int16 activations already"):
        WidenActivations().requires(wide(nets.folded("residual")))
    recipe = Recipe.load(RECIPE)
    assert [step.name for step in recipe.passes][-2:] == ["quantize_static", "widen_activations"]
