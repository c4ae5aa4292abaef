"""The ONNX file: inputs and outputs, names, versions, size, metadata, and what the writer refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_session import open_session, run, shifted
from programs import RELU, ProgramBuilder, feeds_for, float_sample, quantize_program, quantized_sample

from edgecnn.errors import ExportError, UnsupportedOpError
from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.onnx_boundary import boundary_params
from edgecnn.graph.program import BATCH, Op, Program, QuantParams, Tensor
from edgecnn.quantize.reference import run_program

GOLDEN = Path(__file__).parent / "golden" / "onnx_classifier.json"
DTYPES = ("uint8", "int8")


@pytest.mark.parametrize("io", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_integer_inputs_and_outputs(io: str, dtype: str) -> None:
    program = quantized_sample("classifier")
    source, result = program.ops[0].output, program.ops[-1].inputs[0]
    want = run_program(program, feeds_for(program, batch=3), keep=(source, result))
    model = to_onnx(program, OnnxOptions(activation_dtype=dtype, io=io))
    onnx.checker.check_model(model, full_check=True)
    got = run(model, {"image": shifted(want[source], io)})
    assert list(got) == ["output"]
    np.testing.assert_array_equal(got["output"], shifted(want[result], io))
    params = boundary_params(program)
    assert params == {"image": program.tensors[source].quant, "output": program.tensors[result].quant}


def test_debug_output_of_an_integer_input() -> None:
    program = quantized_sample("conv")
    source = program.ops[0].output
    want = run_program(program, feeds_for(program), keep=(source,))[source]
    for io in DTYPES:
        model = to_onnx(program, OnnxOptions(activation_dtype="uint8", io=io, debug_outputs=(source,)))
        onnx.checker.check_model(model, full_check=True)
        got = run(model, {"image": shifted(want, io)})[source]
        np.testing.assert_array_equal(got, shifted(want, "uint8"))


@pytest.mark.parametrize("io", ["float32", *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_program_whose_own_inputs_and_outputs_are_integers(io: str, dtype: str) -> None:
    params = QuantParams(np.asarray(0.5, np.float32), -3)
    x, y = (Tensor(name, (BATCH, 4), "int8", params) for name in "xy")
    pick = Op("slice", ("x",), "y", {"axis": 1, "start": 1, "stop": 4, "step": 2}, "pick")
    y = replace(y, shape=(BATCH, 2))
    program = Program("raw", ("x",), (("y", "y"), ("again", "x")), {"x": x, "y": y}, (pick,))
    model = to_onnx(program, OnnxOptions(activation_dtype=dtype, io=io))
    onnx.checker.check_model(model, full_check=True)
    q = np.int8([[-128, -3, 5, 127]])
    got = run(model, {"x": params.dequantize(q) if io == "float32" else shifted(q, io)})
    for name, want in (("y", q[:, [1, 3]]), ("again", q)):
        expected = params.dequantize(want) if io == "float32" else shifted(want, io)
        np.testing.assert_array_equal(got[name], expected)
        assert got[name].dtype == io


def test_integer_io_adds_no_node_where_the_dtypes_agree() -> None:
    program = quantized_sample("conv")
    count = {
        io: len(to_onnx(program, OnnxOptions(activation_dtype="int8", io=io)).graph.node)
        for io in ("float32", "int8", "uint8")
    }
    assert count == {"float32": 7, "int8": 5, "uint8": 9}


def test_integer_io_of_a_float_program_is_refused() -> None:
    with pytest.raises(ExportError, match=r"input 'image' is not quantized on entry.*float32 inputs"):
        to_onnx(float_sample("conv"), OnnxOptions(io="int8"))
    program = quantized_sample("conv")
    softmax = Tensor("p", program.tensors["conv2d_0"].shape)
    ops = (*program.ops, Op("softmax", (program.ops[-1].output,), "p", {"axis": 1}, "head"))
    tensors = {**program.tensors, "p": softmax}
    changed = replace(program, tensors=tensors, ops=ops, outputs=(("p", "p"),))
    with pytest.raises(ExportError, match="output 'p' is made by no dequantize, expected one for uint8"):
        to_onnx(changed, OnnxOptions(io="uint8"))


def test_batch_is_dynamic_and_rows_do_not_depend_on_it() -> None:
    program = quantized_sample("classifier")
    model = to_onnx(program)
    for info in (*model.graph.input, *model.graph.output):
        assert info.type.tensor_type.shape.dim[0].dim_param == "batch"
    feeds = feeds_for(program, batch=3)
    three = run(model, feeds)["output"]
    for row in range(3):
        alone = run(model, {"image": feeds["image"][row : row + 1]})["output"]
        np.testing.assert_array_equal(alone[0], three[row])


def test_file_is_about_as_large_as_its_int8_weights() -> None:
    b = ProgramBuilder("large")
    x = b.conv2d(b.input((16, 6, 6)), 64, 3, clamp=RELU)
    program = quantize_program(b.finish(b.conv2d(x, 64, 3)))
    model = to_onnx(program)
    weights = sum(tensor.data.size for tensor in program.constants() if tensor.dtype == "int8")
    assert weights == 64 * 16 * 9 + 64 * 64 * 9
    assert weights < len(model.SerializeToString()) < 1.12 * weights
    for initializer in model.graph.initializer:
        array = numpy_helper.to_array(initializer)
        assert array.dtype != np.float32 or array.size <= 64, initializer.name
        assert initializer.data_type != onnx.TensorProto.INT8 or array.ndim != 4 or array.min() >= -127
    assert len(model.graph.initializer) == len({i.name for i in model.graph.initializer})


def test_versions_producer_metadata_and_bytes() -> None:
    program = quantized_sample("conv")
    options = OnnxOptions(metadata={"task": "other", "labels": "[]"})
    model = to_onnx(program, options)
    assert (model.ir_version, model.producer_name) == (7, "edgecnn")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)]
    assert open_session(model).get_modelmeta().custom_metadata_map == {"task": "other", "labels": "[]"}
    again = to_onnx(quantized_sample("conv"), OnnxOptions(metadata={"labels": "[]", "task": "other"}))
    assert again.SerializeToString() == model.SerializeToString()
    names = [node.name for node in to_onnx(quantized_sample("residual_block")).graph.node]
    assert len(names) == len(set(names))
    assert "residual_block.2/Add" in names


@pytest.mark.parametrize("opset", [14, 15, 17, 18, 19, 21])
def test_other_opsets_give_the_same_values(opset: int) -> None:
    for name in (
        "classifier",
        "channel_amax",
        "resize_bilinear_odd",
        "resize_nearest",
        "pad_value",
        "concat",
    ):
        program = quantized_sample(name)
        model = to_onnx(program, OnnxOptions(opset=opset))
        onnx.checker.check_model(model, full_check=True)
        feeds = feeds_for(program)
        np.testing.assert_array_equal(run(model, feeds)["output"], run_program(program, feeds)["output"])


def test_outputs_with_awkward_names() -> None:
    """An output may be called as another tensor, be given out twice, or be a debug output as well."""
    b = ProgramBuilder("names")
    x = b.input((2, 3), "x")
    first = b.op("sigmoid", x)
    second = b.op("tanh", first)
    program = replace(b.finish(second), outputs=((first, second), ("twice", second), ("plain", first)))
    feeds = feeds_for(program)
    model = to_onnx(program, OnnxOptions(debug_outputs=(second,)))
    onnx.checker.check_model(model, full_check=True)
    got, want = run(model, feeds), run_program(program, feeds)
    assert list(got) == [first, "twice", "plain", second]
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-6)
    np.testing.assert_allclose(got[second], want["twice"], atol=1e-6)
    b = ProgramBuilder("constant")
    program = b.finish(b.op("add", b.input((2, 3), "x"), b.constant([1.0, 2.0, 3.0], "output"), clamp=RELU))
    for written in (program, quantize_program(program)):
        got, want = run(to_onnx(written), feeds), run_program(written, feeds)
        np.testing.assert_allclose(got["output"], want["output"], atol=1e-6)
    with pytest.raises(ExportError, match="output 'x' has the name of an input"):
        to_onnx(replace(program, outputs=(("x", second),)))


def test_what_cannot_be_written_is_named() -> None:
    x, y = Tensor("x", (BATCH, 2)), Tensor("y", (BATCH, 2))
    program = Program("p", ("x",), (("y", "y"),), {"x": x, "y": y}, (Op("erf", ("x",), "y", {}, "head.act"),))
    with pytest.raises(UnsupportedOpError, match=r"^head.act: operator 'erf' has no ONNX form, expected one"):
        to_onnx(program)
    attributes = {"size": (4, 4), "mode": "bicubic", "align_corners": False}
    resized = replace(program, ops=(Op("resize", ("x",), "y", attributes, "up"),))
    with pytest.raises(UnsupportedOpError, match=r"^up: resize mode is 'bicubic', expected 'nearest'"):
        to_onnx(resized)
    for kind in ("hard_swish", "hard_sigmoid"):
        with pytest.raises(UnsupportedOpError, match=rf"\({kind}\): {kind} is quantized, expected float32"):
            to_onnx(quantize_program(float_sample(kind)))
    for kind in ("quantize", "dequantize"):
        with pytest.raises(ExportError, match=rf"^cast: {kind} .*which has no quantization parameters"):
            to_onnx(replace(program, ops=(Op(kind, ("x",), "y", {}, "cast"),)))
    for options, message in (
        ({"activation_dtype": "int4"}, "activation_dtype is 'int4', expected 'uint8' or 'int8'"),
        ({"io": "float16"}, "io is 'float16', expected 'float32', 'int8' or 'uint8'"),
        ({"opset": 12}, "opset is 12, expected 13 to 21 .*oldest with per_channel"),
    ):
        with pytest.raises(ExportError, match=message):
            OnnxOptions(**options)
    with pytest.raises(ExportError, match="debug output 'nothing' is no tensor of the network"):
        to_onnx(quantized_sample("conv"), OnnxOptions(debug_outputs=("nothing",)))


def value_info(info: onnx.ValueInfoProto) -> list[Any]:
    tensor = info.type.tensor_type
    shape = [size.dim_param or size.dim_value for size in tensor.shape.dim]
    return [info.name, onnx.TensorProto.DataType.Name(tensor.elem_type), *shape]


def structure(model: onnx.ModelProto) -> dict[str, Any]:
    """Return what the file is made of, without the values of its initializers."""
    graph = model.graph
    types = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in graph.initializer}
    return {
        "initializers": {i.name: [types[i.name], *i.dims] for i in graph.initializer},
        "inputs": [value_info(i) for i in graph.input],
        "nodes": [
            [
                n.name,
                n.op_type,
                list(n.input),
                list(n.output),
                {a.name: helper.get_attribute_value(a) for a in n.attribute},
            ]
            for n in graph.node
        ],
        "outputs": [value_info(o) for o in graph.output],
    }


def test_golden_structure() -> None:
    found = structure(to_onnx(quantized_sample("classifier")))
    assert found == json.loads(GOLDEN.read_text()), f"run tests/{Path(__file__).name} if the change is meant"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(structure(to_onnx(quantized_sample("classifier"))), indent=1) + "\n")
