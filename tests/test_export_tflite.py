"""The TFLite writer in its real runtime: numbers, delegate partitions, inputs and outputs, errors."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import (
    FLOAT_SAMPLE_NAMES,
    SAMPLE_NAMES,
    ProgramBuilder,
    feeds_for,
    float_sample,
    quantize_program,
    quantized_sample,
)
from tflite_session import TfliteSession, difference, make, metadata, read_model, structure

from edgecnn.errors import ExportError, MissingDependencyError, UnsupportedOpError
from edgecnn.export.tflite import LOWERINGS, TfliteOptions, to_tflite
from edgecnn.graph.program import BATCH, FLOAT_KINDS, Array, Op, Program, QuantParams, Tensor
from edgecnn.quantize.reference import OP_KINDS, run_program

GOLDEN = Path(__file__).parent / "golden" / "tflite_classifier.json"

INEXACT = {
    "leaky_relu": "XNNPACK multiplies by an 8-bit number",
    "avg_pool_exclude_pad": "TFLite rounds the mean of the levels",
}
"""Quantized samples that may differ from the reference by one level, and why; all others are exact."""

OUTSIDE_INT8 = {
    "gather": ["GATHER"],
    "gather_width": ["GATHER"],
    "mirror": ["MIRROR_PAD"],
    "softmax_channels": ["SOFTMAX"],
    "softmax_2d": ["SOFTMAX"],
    "avg_pool_exclude_pad": ["AVERAGE_POOL_2D"],
    "slice_channels": ["STRIDED_SLICE"],
    "pad_value": ["PADV2"],
    "resize_nearest": ["RESIZE_NEAREST_NEIGHBOR"],
    "resize_nearest_odd": ["RESIZE_NEAREST_NEIGHBOR"],
}
"""Quantized samples with operators that XNNPACK does not take."""


@pytest.mark.parametrize("name", FLOAT_SAMPLE_NAMES)
def test_float_samples_match_the_reference_at_any_batch(name: str) -> None:
    program = float_sample(name)
    file = to_tflite(program)
    for batch in (1, 3):
        assert difference(program, file, batch) < 1e-4
    assert difference(program, file, 2, xnnpack=False) < 1e-4


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_quantized_samples_match_the_reference_at_any_batch(name: str) -> None:
    program = quantized_sample(name)
    file = to_tflite(program)
    for batch in (1, 3):
        assert difference(program, file, batch) < (1.001 if name in INEXACT else 1e-3)


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_quantized_samples_run_in_one_xnnpack_partition(name: str) -> None:
    session = TfliteSession(to_tflite(quantized_sample(name)))
    outside = OUTSIDE_INT8.get(name, [])
    assert [op for op in session.operators() if op in outside] == outside
    assert session.num_delegates() == 1 + len(outside)


def test_samples_hold_every_op_kind() -> None:
    kinds = {op.kind for name in SAMPLE_NAMES for op in quantized_sample(name).ops}
    assert kinds | {"hard_swish", "hard_sigmoid"} | FLOAT_KINDS == OP_KINDS == set(LOWERINGS)


@pytest.mark.parametrize("name", ["hard_swish", "hard_sigmoid"])
def test_hard_activations_run_in_xnnpack(name: str) -> None:
    assert TfliteSession(to_tflite(float_sample(name))).num_delegates() == 1


@pytest.mark.parametrize("name", ["hard_swish", "hard_sigmoid"])
def test_quantized_hard_activation_is_refused(name: str) -> None:
    program = quantize_program(float_sample(name))
    with pytest.raises(UnsupportedOpError, match=f"op '{name}' .*it is quantized, expected float32") as error:
        to_tflite(program)
    assert error.value.hint == "run the pass decompose_activations before quantizing"


def test_quantize_and_dequantize_stand_only_at_the_boundary() -> None:
    for name in SAMPLE_NAMES:
        program = quantized_sample(name)
        operators = TfliteSession(to_tflite(program)).operators()
        assert (operators.count("QUANTIZE"), operators.count("DEQUANTIZE")) == (1, len(program.outputs)), name


def requantized(program: Program, name: str, quant: QuantParams) -> Program:
    tensors = {**program.tensors, name: dataclasses.replace(program.tensors[name], quant=quant)}
    return dataclasses.replace(program, tensors=tensors)


@pytest.mark.parametrize(
    ("clamp", "operators"),
    [
        ((-0.3, 0.7), ["CONV_2D", "MAXIMUM", "MINIMUM"]),
        ((None, 0.7), ["CONV_2D", "MINIMUM"]),
        ((0.0, 0.7), ["CONV_2D", "MINIMUM"]),
        ((0.0, 6.0), ["CONV_2D"]),
        ((-1.0, 1.0), ["CONV_2D"]),
        ((-3.0, 3.0), ["CONV_2D"]),
    ],
)
def test_clamp_is_fused_where_tflite_can(
    clamp: tuple[float | None, float | None], operators: list[str]
) -> None:
    wide = QuantParams(np.asarray(0.02, np.float32), 5)  # holds [-2.66, 2.44]
    fused = quantize_program(make(lambda b, x: b.conv2d(x, 6, 3, clamp=clamp)))
    program = requantized(fused, "conv2d_0", wide)
    file = to_tflite(program)
    assert TfliteSession(file).operators() == ["QUANTIZE", *operators, "DEQUANTIZE"]
    assert difference(program, file, 2) < 1e-3

    alone = quantize_program(make(lambda b, x: b.op("clamp", b.conv2d(x, 6, 3), clamp=clamp)))
    program = requantized(requantized(alone, "conv2d_0", wide), "clamp_1", wide)
    assert difference(program, to_tflite(program), 2) < 1e-3


@pytest.mark.parametrize("io", ["int8", "uint8"])
def test_integer_inputs_and_outputs_leave_out_the_boundary_ops(io: Any) -> None:
    program = quantized_sample("classifier")
    file = to_tflite(program, TfliteOptions(io=io))
    session = TfliteSession(file)
    inside = ["CONV_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "MEAN", "FULLY_CONNECTED"]
    edge = ["QUANTIZE"] if io == "uint8" else []
    assert session.operators() == [*edge, *inside, *edge]

    quant_x = program.tensors["image_q"].quant
    quant_y = program.tensors["linear_4"].quant
    assert quant_x is not None
    assert quant_y is not None
    offset = 128 if io == "uint8" else 0
    x, y = session.inputs["image"], session.outputs["output"]
    assert (x["dtype"], y["dtype"]) == (np.dtype(io).type, np.dtype(io).type)
    assert x["quantization"] == pytest.approx((float(quant_x.scale), quant_x.zero_point + offset))
    assert y["quantization"] == pytest.approx((float(quant_y.scale), quant_y.zero_point + offset))

    feeds = feeds_for(program, 3)
    expected = run_program(program, feeds, keep=["linear_4"])["linear_4"].astype(int)
    levels = (quant_x.quantize(feeds["image"]).astype(int) + offset).astype(io)
    assert np.array_equal(session.run({"image": levels})["output"].astype(int) - offset, expected)


def test_integer_io_of_a_float_network_is_refused() -> None:
    with pytest.raises(
        ExportError, match=r"output 'output' of 'relu' is float32 \(made by clamp\).*float32 inputs"
    ):
        to_tflite(float_sample("relu"), TfliteOptions(io="int8"))
    program = quantized_sample("relu")
    extra = Op("clamp", ("image",), "other", {"clamp": (0.0, None)})
    tensors = {**program.tensors, "other": Tensor("other", program.tensors["image"].shape)}
    mixed = dataclasses.replace(program, tensors=tensors, ops=(*program.ops, extra))
    with pytest.raises(ExportError, match=r"input 'image' of 'relu' is read as float32 by clamp, quantize"):
        to_tflite(mixed, TfliteOptions(io="int8"))


def test_debug_outputs_follow_the_real_ones_as_raw_levels() -> None:
    program = quantized_sample("residual_block")
    names = ("conv2d_1", "image_q", "conv2d_0")
    file = to_tflite(program, TfliteOptions(debug_outputs=names))
    feeds = feeds_for(program, 2)
    found, expected = TfliteSession(file).run(feeds), run_program(program, feeds, keep=names)
    assert list(structure(file)["outputs"]) == ["output", *names]
    for name in names:
        assert found[name].dtype == np.int8
        assert np.array_equal(found[name], expected[name])
    with pytest.raises(ExportError, match="debug output 'w0' is no activation"):
        to_tflite(program, TfliteOptions(debug_outputs=("w0",)))


def test_debug_output_of_a_flatten_that_went_into_the_weight_is_in_order() -> None:
    program = float_sample("linear")
    file = to_tflite(program, TfliteOptions(debug_outputs=("reshape_0",)))
    feeds = feeds_for(program, 2)
    assert np.array_equal(TfliteSession(file).run(feeds)["reshape_0"], feeds["image"].reshape(2, -1))


def test_debug_output_that_is_an_output_already_is_found_by_place() -> None:
    program = dataclasses.replace(float_sample("relu"), outputs=(("clamp_0", "clamp_0"),))
    file = to_tflite(program, TfliteOptions(debug_outputs=("clamp_0", "image")))
    assert list(structure(file)["outputs"]) == ["clamp_0", "image"]
    assert len(TfliteSession(file).interpreter.get_output_details()) == 3


def test_unknown_io_is_refused() -> None:
    with pytest.raises(ExportError, match="io is 'int4', expected one of float32, int8, uint8"):
        to_tflite(float_sample("relu"), TfliteOptions(io="int4"))  # type: ignore[arg-type]


def test_input_given_back_as_output_is_copied() -> None:
    x = Tensor("x", (BATCH, 3, 4, 5))
    program = Program("identity", ("x",), (("y", "x"),), {"x": x}, ())
    feeds = {"x": np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)}
    assert np.array_equal(TfliteSession(to_tflite(program)).run(feeds)["y"], feeds["x"])


def test_layouts_say_how_each_tensor_is_stored() -> None:
    file = to_tflite(make(lambda b, x: (b.conv2d(x, 6, 3), b.op("mean", x, axes=(2, 3), keepdim=False))))
    assert dict(file.layouts) == {"image": "nhwc", "output_0": "nhwc", "output_1": "nchw"}
    session = TfliteSession(file)
    assert session.inputs["image"]["shape"].tolist() == [1, 9, 7, 4]
    assert session.inputs["image"]["shape_signature"].tolist() == [-1, 9, 7, 4]


def test_metadata_and_minimum_runtime_are_readable() -> None:
    text = json.dumps({"mean": [0.5], "label": "Zürich"}, ensure_ascii=False)
    found = metadata(to_tflite(quantized_sample("classifier"), TfliteOptions(metadata={"preprocess": text})))
    assert found["preprocess"] == text
    assert found["min_runtime_version"].rstrip("\0") == "1.14.0"
    grouped = metadata(to_tflite(quantized_sample("conv_grouped")))
    assert grouped["min_runtime_version"].rstrip("\0") == "2.9.0"


def test_weights_are_stored_once_as_int8_and_aligned() -> None:
    program = quantize_program(make(lambda b, x: b.conv2d(b.conv2d(x, 64, 3), 128, 3)))
    weights = sum(tensor.data.nbytes for tensor in program.constants() if tensor.data is not None)
    file = to_tflite(program)
    assert weights < len(file.data) < weights + 8000
    model = read_model(file)
    assert model.buffers[0].data is None
    for buffer in model.buffers[1:]:
        content = bytes(buffer.data)
        assert file.data.find(content) >= 0
        assert len(content) < 64 or file.data.find(content) % 16 == 0


def test_equal_constants_share_one_buffer() -> None:
    def twice(b: ProgramBuilder, x: str) -> str:
        bias = b.constant(np.linspace(-1, 1, 4))
        w = b.constant(b.rng.standard_normal((4, 4, 1, 1)))
        window = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
        y = b.op("conv2d", x, w, bias, **window)
        return b.op("conv2d", y, b.constant(b.values[w].copy()), b.constant(b.values[bias].copy()), **window)

    buffers = [bytes(buffer.data) for buffer in read_model(to_tflite(make(twice))).buffers[1:]]
    assert len(buffers) == len({*buffers}) == 3  # weight, bias, minimum runtime version


def test_the_same_program_gives_the_same_bytes() -> None:
    options = TfliteOptions(metadata={"b": "2", "a": "1"})
    first, second = (to_tflite(quantized_sample("squeeze_excite"), options) for _ in range(2))
    assert first.data == second.data


def test_structure_of_a_small_file_is_the_golden_one() -> None:
    found = structure(to_tflite(quantized_sample("classifier"), TfliteOptions(metadata={"preprocess": "{}"})))
    assert found == json.loads(GOLDEN.read_text())


def program_of(kind: str, **attributes: Any) -> Program:
    tensors = {name: Tensor(name, (BATCH, 4, 9, 7)) for name in ("x", "y")}
    return Program(
        "net", ("x",), (("out", "y"),), tensors, (Op(kind, ("x",), "y", attributes, "body.3 (aten)"),)
    )


POOL = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("kind", "attributes", "reason"),
    [
        ("erf", {}, "expected one of abs, add, amax"),
        ("max_pool2d", {**POOL, "dilation": (2, 2)}, r"dilation is \(2, 2\)"),
        (
            "avg_pool2d",
            {**POOL, "stride": (1, 2), "count_include_pad": False, "padding": (0, 0, 2, 0)},
            "not counted",
        ),
        ("mean", {"axes": (0, 1), "keepdim": True}, "without the batch"),
        ("slice", {"axis": 0, "start": 0, "stop": 1, "step": 1}, "axis is 0"),
        ("pad", {"pads": ((0, 0), (0, 0), (-1, 0), (0, 0)), "value": 0.0}, "none below zero"),
        ("pad", {"pads": ((1, 0), (0, 0), (0, 0), (0, 0)), "value": 0.0}, "none along the batch"),
        ("transpose", {"perm": (1, 0, 2, 3)}, "the batch to stay first"),
        ("resize", {"size": (3, 3), "mode": "bicubic"}, "mode is 'bicubic'"),
        ("requantize", {}, "expected int8"),
    ],
)
def test_unsupported_ops_are_named_with_layer_and_kind(
    kind: str, attributes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(
        UnsupportedOpError, match=rf"^body\.3 \(aten\): op '{kind}' has no TFLite form.*{reason}"
    ):
        to_tflite(program_of(kind, **attributes))


def test_computed_weights_and_misfitting_operands_are_refused() -> None:
    shapes: dict[str, tuple[int, ...]] = {"x": (BATCH, 4, 9, 7), "w": (BATCH, 4, 1, 1), "y": (BATCH, 4, 9, 7)}
    tensors = {name: Tensor(name, shape) for name, shape in shapes.items()}
    conv = Program("net", ("x", "w"), (("y", "y"),), tensors, (Op("conv2d", ("x", "w"), "y", {}, "c"),))
    with pytest.raises(
        UnsupportedOpError, match=r"c: op 'conv2d' .* weight 'w' is computed, expected a constant"
    ):
        to_tflite(conv)
    tensors["w"] = Tensor("w", (BATCH, 9, 7))
    add = Program("net", ("x", "w"), (("y", "y"),), tensors, (Op("add", ("x", "w"), "y", {}, "a"),))
    with pytest.raises(UnsupportedOpError, match=r"a: op 'add' .* operand 'w' has 3 dimensions, expected 4"):
        to_tflite(add)


def test_missing_runtime_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(MissingDependencyError, match=r'ai-edge-litert.*pip install "edgecnn\[tflite\]"'):
        to_tflite(float_sample("relu"))


def test_a_file_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgecnn.export.tflite_graph._MAX_FILE_BYTES", 1000)
    with pytest.raises(
        ExportError, match=r"'classifier': its constants take \d+ bytes, expected at most 1000"
    ):
        to_tflite(float_sample("classifier"))


def test_batch_rows_do_not_depend_on_each_other() -> None:
    program = quantized_sample("classifier")
    session_feeds: Array = feeds_for(program, 3)["image"]
    file = to_tflite(program)
    together = TfliteSession(file).run({"image": session_feeds})["output"]
    alone = [TfliteSession(file).run({"image": session_feeds[i : i + 1]})["output"] for i in range(3)]
    assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("axes", [(4, 5), (2, 6), (6,), (1, 3, 5)])
@pytest.mark.parametrize("kind", ["mean", "amax", "sum"])
def test_reductions_of_seven_dimensions(kind: str, axes: tuple[int, ...], keepdim: bool) -> None:
    """XNNPACK takes six, so that neighbours are merged first, which three of four of these allow."""

    def build(b: ProgramBuilder, x: str) -> str:
        windows = b.op("reshape", x, shape=(-1, 2, 2, 3, 2, 3, 4))
        return b.op(kind, windows, axes=axes, keepdim=keepdim)

    program = make(build, (4, 9, 8))
    if axes == (1, 3, 5):
        with pytest.raises(UnsupportedOpError, match="XNNPACK takes at most 6 dimensions, found 7"):
            to_tflite(program)
        return
    assert difference(program, to_tflite(program), 3) < 1e-5
    if kind != "sum":
        quantized = quantize_program(program)
        assert difference(quantized, to_tflite(quantized), 2) < (1.001 if kind == "mean" else 1e-3)
