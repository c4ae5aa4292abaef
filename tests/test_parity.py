"""Parity: the numbers, the contract's edge, and an error planted in one operator that is found and named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import nets
import numpy as np
import pytest

from edgecnn import contract as proof
from edgecnn.contract import prove_parity
from edgecnn.errors import ExportError, ParityError
from edgecnn.export.files import SUFFIXES, FileOptions, write_model
from edgecnn.export.parity import (
    Comparison,
    compare,
    first_difference,
    output_scales,
    sqnr_db,
    traced_outputs,
    worst_images,
)
from edgecnn.export.trace import trace_onnx, trace_tflite, traceable
from edgecnn.graph.build import build_program
from edgecnn.graph.program import Array, Program
from edgecnn.judgement import stage_file
from edgecnn.pipeline import SilentProgress
from edgecnn.proof import Candidate
from edgecnn.quantize.reference import run_op, run_program

LAYER = "a1.0 (aten.conv2d.default)"


def planted(program: Program, layer: str = LAYER) -> Program:
    """Return the program with the weights of one layer negated, as a faulty writer might give them."""
    op = next(op for op in program.ops if op.layer == layer)
    weight = program.tensors[op.inputs[1]]
    wrong = replace(weight, data=-weight.data)
    return replace(program, tensors=MappingProxyType({**program.tensors, weight.name: wrong}))


def feeds(program: Program, num_images: int = 2) -> dict[str, Array]:
    return {program.inputs[0]: nets.held_out(num_images)}


def test_compare_by_hand() -> None:
    """Steps of 0.5: differences of 0, 1, 1 (0.6 rounded), 3 steps; one of two samples changes its top 1."""
    a = {"y": np.array([[0.0, 1.0], [2.0, 3.0]], np.float32)}
    b = {"y": np.array([[0.0, 1.5], [2.6, 1.5]], np.float32)}
    found = compare(a, b, {"y": 0.5})
    assert found == Comparison(3, 0.75, 0.5, 2)
    assert not found.holds


def test_compare_counts_all_outputs_and_judges_top1_by_the_first() -> None:
    a = {"mask": np.zeros((2, 1, 2, 2)), "y": np.zeros((2, 4))}
    b = {"mask": np.zeros((2, 1, 2, 2)), "y": np.array([[9.0, 0, 0, 0], [0, 0, 0, 0]])}
    found = compare(a, b, {"mask": 1.0, "y": 1.0})
    assert (found.max_lsb, found.fraction_within_1_lsb, found.top1_agreement) == (9, 15 / 16, None)


def test_an_output_in_float_is_measured_in_127ths_of_its_largest() -> None:
    a, b = {"y": np.array([[127.0, 1.0]])}, {"y": np.array([[125.0, 1.0]])}
    assert compare(a, b, {"y": 0.0}).max_lsb == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_breaks_the_contract(bad: float) -> None:
    found = compare({"y": np.zeros((1, 2))}, {"y": np.array([[0.0, bad]])}, {"y": 1.0})
    assert found.max_lsb > 1000
    assert not found.holds


@pytest.mark.parametrize(
    ("max_lsb", "fraction", "holds"),
    [(0, 1.0, True), (2, 0.999, True), (3, 1.0, False), (1, 0.9989, False), (2, 0.99899, False)],
)
def test_contract_boundary(max_lsb: int, fraction: float, holds: bool) -> None:
    assert Comparison(max_lsb, fraction, None, 1).holds is holds


def test_contract_boundary_in_numbers() -> None:
    """Of 1,000 values one may be two steps off, and no second."""
    a, b = np.zeros((1, 1000)), np.zeros((1, 1000))
    b[0, 0] = 2.0
    assert compare({"y": a}, {"y": b}, {"y": 1.0}).holds
    b[0, 1] = 2.0
    assert not compare({"y": a}, {"y": b}, {"y": 1.0}).holds


def test_worst_images_are_found_by_steps_of_their_own_output() -> None:
    a = {"x": np.zeros((4, 2)), "y": np.zeros((4, 1, 2, 2))}
    b = {"x": np.zeros((4, 2)), "y": np.zeros((4, 1, 2, 2))}
    b["x"][3, 1] = 1.0
    b["y"][1, 0, 1, 1] = 0.5
    b["y"][2, 0, 0, 0] = np.nan
    assert worst_images(a, b, {"x": 1.0, "y": 0.1}, 2) == [1, 2]
    assert worst_images(a, b, {"x": 1.0, "y": 0.1}, 9) == [0, 1, 2, 3]


def test_sqnr() -> None:
    """Signal 1 + 4, noise 0.05: 10 log10(100) = 20 dB."""
    reference = np.array([1.0, 2.0])
    assert sqnr_db(reference, reference + np.array([np.sqrt(0.05), 0.0])) == pytest.approx(20.0)
    assert sqnr_db(reference, reference) == 200.0
    assert sqnr_db(np.zeros(2), reference) is None


def test_output_scales() -> None:
    program = nets.quantized_program("multi_output")
    scales = output_scales(program)
    assert list(scales) == ["mask", "logits", "features"]
    assert all(scale > 0 for scale in scales.values())
    assert set(output_scales(build_program(nets.folded("multi_output"))).values()) == {0.0}


@pytest.mark.parametrize("runtime", ["uint8", "int8", "tflite"])
@pytest.mark.parametrize("name", ["residual", "shuffle", "se_linear", "multi_output"])
def test_traces_are_the_reference_value_by_value(name: str, runtime: str) -> None:
    program = nets.quantized_program(name)
    given = feeds(program)
    traced = trace_tflite(program, given) if runtime == "tflite" else trace_onnx(program, given, runtime)
    assert tuple(traced) == traceable(program)
    expected = run_program(program, given, keep=traceable(program))
    for tensor, values in traced.items():
        assert values.dtype == np.int8
        assert np.array_equal(values, expected[tensor]), tensor
    for public, values in traced_outputs(program, traced).items():
        assert np.array_equal(values, expected[public])
    assert first_difference(program, traced, given, run_op) is None


@pytest.mark.parametrize("runtime", ["onnx", "tflite"])
def test_a_planted_error_is_found_at_its_operator(runtime: str) -> None:
    """Later operators differ too, but on the values they were given they are right."""
    program = nets.quantized_program("residual")
    wrong, given = planted(program), feeds(program)
    traced = trace_onnx(wrong, given, "uint8") if runtime == "onnx" else trace_tflite(wrong, given)
    difference = first_difference(program, traced, given, run_op)
    assert difference is not None
    assert (difference.op.layer, difference.op.kind) == (LAYER, "conv2d")
    assert difference.max_lsb > 1
    assert 0.0 < difference.fraction <= 1.0


def candidates(program: Program, folder: Path) -> list[Candidate]:
    """Write both files of a program, and the float ONNX."""
    model, float_model = nets.quantized("residual"), nets.folded("residual")
    found = []
    for name in SUFFIXES:
        file = write_model(program, name, model.spec, FileOptions())
        found.append(Candidate(name, stage_file(file, folder / "int8", model, "test")))
    file = write_model(build_program(float_model), "onnx", model.spec, FileOptions())
    return [*found, Candidate("float_onnx", stage_file(file, folder / "float", float_model, "test"))]


def test_prove_parity_holds_and_is_exact(tmp_path: Path) -> None:
    program = nets.quantized_program("residual")
    x = nets.images(16, 1)
    parity = prove_parity(program, candidates(program, tmp_path), x, "uint8", SilentProgress())
    exact = Comparison(0, 1.0, 1.0, 16)
    pairs = ("onnx_vs_reference", "tflite_vs_reference", "onnx_vs_tflite")
    assert parity.comparisons == dict.fromkeys(pairs, exact)
    assert parity.warnings == ()
    assert parity.sqnr_db["onnx"] == parity.sqnr_db["tflite"]
    assert (parity.sqnr_db["onnx"] or 0.0) > 25.0


def test_prove_parity_names_the_operator_of_a_faulty_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = nets.quantized_program("residual")
    wrong = planted(program)
    files = candidates(wrong, tmp_path)
    monkeypatch.setattr(proof, "trace_onnx", lambda _, given, dtype: trace_onnx(wrong, given, dtype))
    monkeypatch.setattr(proof, "trace_tflite", lambda _, given: trace_tflite(wrong, given))
    message = r"the onnx file does not compute the contract's integers in onnxruntime.*a1\.0 \(aten\.conv2d"
    with pytest.raises(ParityError, match=message):
        prove_parity(program, files, nets.held_out(4), "uint8", SilentProgress())
    with pytest.raises(ParityError, match=r"the tflite file.*in LiteRT.*a1\.0 .*conv2d: \d+ LSB off"):
        prove_parity(program, files[1:], nets.held_out(4), "uint8", SilentProgress())


def test_a_file_that_its_own_trace_does_not_explain_is_refused(tmp_path: Path) -> None:
    """Written again for the trace, every operator is right: the file holds something else."""
    program = nets.quantized_program("residual")
    files = candidates(planted(program), tmp_path)
    with pytest.raises(
        ParityError, match=r"does not compute in onnxruntime what its operators compute one by one"
    ):
        prove_parity(program, files, nets.held_out(4), "uint8", SilentProgress())


@pytest.mark.parametrize("io", ["float32", "int8", "uint8"])
@pytest.mark.parametrize("format_", list(SUFFIXES))
def test_files_describe_their_inputs_and_outputs(format_: str, io: str) -> None:
    program = nets.quantized_program("multi_output")
    file = write_model(program, format_, nets.model("multi_output").spec, FileOptions(io))
    (image,) = file.inputs
    assert image.shape == (None, 3, 12, 12)
    assert image.layout == ("nhwc" if format_ == "tflite" else "nchw")
    assert [o.name for o in file.outputs] == ["mask", "logits", "features"]
    scales = output_scales(program)
    for tensor in (image, *file.outputs):
        assert tensor.dtype == io
        assert (tensor.scale is None) == (io == "float32")
    if io != "float32":
        shift = 128 if io == "uint8" else 0
        assert [o.scale for o in file.outputs] == [scales[o.name] for o in file.outputs]
        held = program.tensors[next(op for op in program.ops if op.kind == "quantize").output].quant
        assert (image.scale, image.zero_point) == (float(held.scale), held.zero_point + shift)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ExportError, match=r"format is 'coreml', expected one of onnx, tflite"):
        write_model(nets.quantized_program("residual"), "coreml", nets.model("residual").spec, FileOptions())
