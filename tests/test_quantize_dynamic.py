"""Dynamic int8: both files against a NumPy model of what each runtime does, by hand and from end to end."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import nets
import numpy as np
import onnx_session
import pytest
import torch
from tflite_session import TfliteSession, structure
from torch import nn

import edgecnn
from edgecnn.compress import CompressOptions
from edgecnn.errors import ExportError, ParityError, PassError, RecipeError
from edgecnn.export import dynamic
from edgecnn.export.dynamic import as_computed, float_layers
from edgecnn.export.onnx import to_onnx
from edgecnn.export.parity import first_difference, relative_error
from edgecnn.export.tflite import to_tflite
from edgecnn.export.trace import trace_onnx, trace_tflite
from edgecnn.graph.build import build_program, float_islands
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.graph.program import Array, Program
from edgecnn.model import Model
from edgecnn.quantize.dynamic import QuantizeDynamic
from edgecnn.quantize.reference import run_op, run_program
from edgecnn.quantize.reference_dynamic import held_at_run_time
from edgecnn.recipe import Recipe

RECIPE = "dynamic_wi8_ai8"


def dynamic_model(name: str) -> Model:
    folded = FoldBatchNorm().run(nets.model(name), nets.context())
    return QuantizeDynamic().run(folded, nets.context())


def network(*layers: nn.Module) -> Model:
    torch.manual_seed(0)
    return nets.as_model(nn.Sequential(*layers).eval())


def dynamic_program(*layers: nn.Module) -> Program:
    return build_program(QuantizeDynamic().run(network(*layers), nets.context()))


def run_tflite(program: Program, x: Array, xnnpack: bool = True) -> dict[str, Array]:
    return TfliteSession(to_tflite(program), xnnpack).run({program.inputs[0]: x})


def run_onnx(program: Program, x: Array) -> dict[str, Array]:
    """One image at a time: ONNX Runtime's range is that of the batch."""
    model, name = to_onnx(program), program.inputs[0]
    rows = [onnx_session.run(model, {name: x[i : i + 1]}) for i in range(len(x))]
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("name", nets.NETS)
def test_both_files_compute_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic, "LARGE", 0)
    monkeypatch.setattr(dynamic, "WIDE", 0)
    program, x = build_program(dynamic_model(name)), nets.held_out(3)
    assert program.is_dynamic
    assert program.computes_in_float
    assert float_islands(program) == []
    for kind, run in (("tflite", run_tflite), ("onnx", run_onnx)):
        computed = as_computed(program, kind)
        expected = run_program(computed, {program.inputs[0]: x})
        assert relative_error(expected, run(computed, x)) < 1e-5


@pytest.mark.parametrize("name", ["residual", "se_linear", "mlp"])
def test_pytorch_computes_the_reference_of_one_image(name: str) -> None:
    model, x = dynamic_model(name), nets.held_out(1)
    expected = run_program(build_program(model), {model.spec.inputs[0].name: x})
    for values, found in zip(expected.values(), nets.outputs_of(model.graph, x), strict=True):
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-4)


def test_a_convolution_by_hand() -> None:
    """x from -1 to 1.55 has s = 0.01 and z = -28: 0.104 becomes 0.10; w = (0.5, -1, 0) is 64, -127, 0."""
    layer = nn.Conv2d(3, 1, 1, stride=2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -1.0, 0.0]).reshape(1, 3, 1, 1))
        layer.bias.fill_(0.25)  # type: ignore[union-attr]
    program = dynamic_program(layer)
    x = np.zeros((1, 3, 12, 12), np.float32)
    x[0, :, 0, 0] = (0.104, -1.0, 1.55)
    first = 0.25 + 0.10 * 64 / 127 - (-1.0) * 127 / 127
    for kind, run in (("tflite", run_tflite), ("reference", None)):
        computed = as_computed(program, "tflite")
        found = run(computed, x) if run else run_program(computed, {program.inputs[0]: x})
        y = next(iter(found.values()))
        assert y[0, 0, 0, 0] == pytest.approx(first, abs=1e-6), kind
        assert y[0, 0, 1, 1] == pytest.approx(0.25, abs=1e-7)


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ("image", [[1.0, 2.55], [0.49, 0.01]]),
        ("row", [[1.0, 2.55], [0.49, 0.0077]]),
    ],
)
def test_the_range_is_that_of_the_image_or_the_row(over: str, expected: list[list[float]]) -> None:
    x = np.float32([[[1.0, 2.55], [0.49, 0.008]]])
    assert held_at_run_time(x, over)[0].round(4).tolist() == np.float32(expected).tolist()


def test_an_image_of_zeros_or_of_one_sign_is_held() -> None:
    assert held_at_run_time(np.zeros((1, 3, 2, 2), np.float32), "image").max() == 0.0
    negative = held_at_run_time(np.float32([[-2.55, -1.004]]), "row")
    np.testing.assert_allclose(negative, [[-2.55, -1.0]], atol=1e-6)


def test_each_image_has_a_range_of_its_own_in_tflite() -> None:
    program = as_computed(dynamic_program(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 5)), "tflite")
    x = nets.held_out(3).copy()
    x[1] *= 100.0
    together = run_tflite(program, x)
    apart = [next(iter(run_tflite(program, x[i : i + 1]).values())) for i in range(3)]
    np.testing.assert_array_equal(next(iter(together.values())), np.concatenate(apart))


def test_what_each_runtime_quantizes() -> None:
    layers = (nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 4, 1))
    program = dynamic_program(*layers, nn.Flatten(), nn.Linear(256, 256), nn.Linear(256, 10))

    def over(kind: str) -> list[str | None]:
        found = as_computed(program, kind).ops
        return [op.attributes.get("dynamic") for op in found if op.kind in ("conv2d", "linear")]

    assert over("tflite") == ["image", None, "pixel", None, "row", "row"]
    assert over("onnx") == [None, None, None, None, "image", None]
    onnx_text, tflite_text = float_layers(program, ("onnx", "tflite"))
    assert onnx_text.startswith(
        "onnx: 5 of 6 layers compute in float with int8 weights, first 0 (aten.conv2d"
    )
    assert tflite_text.startswith("tflite: 2 of 6 layers compute in float with int8 weights, first 1 (aten")
    assert float_layers(nets.quantized_program("mlp"), ("onnx",)) == []


def test_the_files_hold_int8_weights_and_the_integer_operators(tmp_path: Path) -> None:
    layers = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(512, 256))
    program = dynamic_program(*layers)
    file = to_tflite(as_computed(program, "tflite"))
    described = structure(file)
    assert set(described["operator_codes"]) >= {"CONV_2D v5", "FULLY_CONNECTED v12", "DEPTHWISE_CONV_2D v1"}
    fully_connected = next(o for o in described["operators"] if o["operator"].startswith("FULLY"))
    assert fully_connected["options"]["asymmetricQuantizeInputs"]
    assert TfliteSession(file).num_delegates() == 1
    assert TfliteSession(file).operators().count("DEQUANTIZE") == 1
    model = to_onnx(as_computed(program, "onnx"))
    executed = onnx_session.executed(model, tmp_path)
    assert executed["DynamicQuantizeMatMul"] == 1
    assert executed["ConvInteger"] == executed["DequantizeLinear"] == 0
    plain = build_program(network(*layers))
    assert len(file.data) < 0.3 * len(to_tflite(plain).data)
    assert model.ByteSize() < 0.3 * to_onnx(plain).ByteSize()


def test_the_trace_finds_the_layer_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    program = as_computed(build_program(dynamic_model("residual")), "tflite")
    feeds = {program.inputs[0]: nets.held_out(2)}
    traced = trace_tflite(program, feeds)
    assert first_difference(program, traced, feeds, run_op) is None
    wrong = next(op for op in program.ops if op.kind == "conv2d" and op.output in traced)
    traced[wrong.output] = 1.02 * traced[wrong.output]
    found = first_difference(program, traced, feeds, run_op)
    assert found is not None
    assert found.op is wrong
    monkeypatch.setattr(dynamic, "LARGE", 0)
    onnx_program = as_computed(build_program(dynamic_model("residual")), "onnx")
    assert onnx_program.is_dynamic
    assert first_difference(onnx_program, trace_onnx(onnx_program, feeds, "uint8"), feeds, run_op) is None


def test_a_file_that_computes_something_else_is_refused(
    tmp_path: Path, examples_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = importlib.import_module("edgecnn.making")
    written = sentence.write_model

    def cut_off(program: Program, kind: str, *rest: object) -> object:
        ops = [
            replace(op, attributes=MappingProxyType({**op.attributes, "clamp": (None, 0.5)}))
            if op.kind == "linear" and program.is_dynamic
            else op
            for op in program.ops
        ]
        return written(replace(program, ops=tuple(ops)), kind, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sentence, "write_model", cut_off)
    options = CompressOptions(formats=("tflite",), measure=False)
    lenet = examples_dir / "lenet5_digits.pt2"
    with pytest.raises(ParityError, match=r"tflite file does not compute in LiteRT what its operators .*"):
        edgecnn.compress(lenet, recipe=RECIPE, data="digits", out=tmp_path / "o", options=options)
    assert not (tmp_path / "o").exists()


def test_the_recipe_from_end_to_end(tmp_path: Path, examples_dir: Path) -> None:
    result = edgecnn.compress(
        examples_dir / "lenet5_digits.pt2",
        recipe=RECIPE,
        data="digits",
        out=tmp_path / "o",
        options=CompressOptions(measure=False),
    )
    report = result.report
    assert [step.name for step in report.passes] == ["fold_batch_norm", "quantize_dynamic"]
    assert report.data.num_calibration == 0
    for size in report.sizes.values():
        assert size.float_size_bytes > 3.4 * size.size_bytes
    for key in ("onnx_vs_reference", "tflite_vs_reference"):
        assert (report.parity[key].max_relative_error or 0.0) < 1e-3
    assert all((value or 0.0) > 30.0 for value in report.sqnr_db.values())
    assert report.accuracy is not None
    assert report.accuracy.drop_points < 0.5
    assert any(text.startswith("onnx: ") and "compute in float" in text for text in report.warnings)
    for artifact in result.artifacts.values():
        assert {tensor.dtype for tensor in (*artifact.inputs, *artifact.outputs)} == {"float32"}
    with pytest.raises(PassError, match="already, expected a float network"):
        edgecnn.compress(tmp_path / "o" / "model.pt2", data="digits", out=tmp_path / "again")


def test_integer_inputs_are_refused_with_the_reason(tmp_path: Path, examples_dir: Path) -> None:
    with pytest.raises(ExportError, match="takes scales from each image when it runs") as found:
        edgecnn.compress(
            examples_dir / "lenet5_digits.pt2",
            recipe=RECIPE,
            out=tmp_path / "o",
            options=CompressOptions(io="int8"),
        )
    assert "--int8" in str(found.value.hint)


def test_what_the_pass_refuses() -> None:
    with pytest.raises(PassError, match="is not folded"):
        QuantizeDynamic().requires(nets.model("residual"))
    with pytest.raises(PassError, match="quantized already"):
        QuantizeDynamic().requires(dynamic_model("residual"))
    with pytest.raises(RecipeError, match="weight_bits is 4, expected 7 or 8"):
        QuantizeDynamic(4).check()
    assert Recipe.load(RECIPE).passes == (FoldBatchNorm(), QuantizeDynamic())
