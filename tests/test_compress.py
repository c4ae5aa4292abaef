"""`edgecnn.compress` from end to end, in the real runtimes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import onnx
import small_networks
import torch
from running import RESULTS, names, run_onnx, run_tflite

import edgecnn
from edgecnn.compress import CompressOptions, CompressResult
from edgecnn.data import open_dataset
from edgecnn.errors import BudgetError, ExportError, OutputError, PassError
from edgecnn.load import load_model
from edgecnn.report import Report
from edgecnn.runner.environment import local_isa
from edgecnn.runner.preprocess import Preprocess

FAST = CompressOptions(num_samples=32, measure=False)
PARITY = {"onnx_vs_reference", "tflite_vs_reference", "onnx_vs_tflite"}


def folder_of(result: CompressResult) -> Path:
    return next(iter(result.artifacts.values())).path.parent


def digits(result: CompressResult, count: int = 100) -> np.ndarray[Any, Any]:
    """Return inputs as float32 (n, 1, 32, 32)."""
    return open_dataset("digits", result.model.spec.preprocess).inputs(range(count))


def options_for(**changes: Any) -> CompressOptions:
    load = edgecnn.LoadOptions(input_shape=small_networks.SIZE, preprocess="unit")
    return replace(FAST, load=load, **changes)


def compress_small(
    out: Path, net: str = "classifier", data: Any = "images", **changes: Any
) -> CompressResult:
    return edgecnn.compress(
        getattr(small_networks, net)(),
        data=f"small_networks:{data}" if isinstance(data, str) else data,
        out=out,
        options=options_for(**changes),
    )


def test_exactly_these_files_are_written(lenet_result: CompressResult) -> None:
    assert names(folder_of(lenet_result)) == RESULTS


def test_the_report_file_is_the_report(lenet_result: CompressResult) -> None:
    text = (folder_of(lenet_result) / "report.json").read_text()
    assert Report.from_json(text) == lenet_result.report
    values = json.loads(text)
    assert set(values) >= {
        "schema_version", "model", "recipe", "seed", "environment", "passes", "artifacts", "parity",
        "accuracy", "latency", "warnings",
    }  # fmt: skip
    assert values["model"] == {
        "name": "lenet5", "params": 61706, "macs": 416520, "size_bytes": 246824, "task": "classification",
        "params_after": None, "macs_after": None,
    }  # fmt: skip
    assert (values["schema_version"], values["recipe"], values["seed"]) == (1, "static_wi8_ai8", 0)
    assert values["latency"] is None
    assert values["environment"]["torch"] == torch.__version__
    assert set(values["environment"]["runtimes"]) == {"onnxruntime", "litert"}
    assert [step["name"] for step in values["passes"]][-1] == "quantize_static"
    assert all(step["seconds"] >= 0 and step["before"] and step["after"] for step in values["passes"])


def test_the_promises_hold_on_digits(lenet_result: CompressResult) -> None:
    report = lenet_result.report
    assert set(report.parity) == PARITY
    for parity in report.parity.values():
        assert parity.max_lsb <= 1
        assert parity.fraction_within_1_lsb == 1.0
        assert parity.top1_agreement is not None and parity.top1_agreement >= 0.998
        assert parity.num_samples == report.data.num_proof == 256
    assert report.accuracy is not None
    assert report.accuracy.float_top1 > 0.98
    assert abs(report.accuracy.drop_points) <= 0.5
    assert report.accuracy.num_samples == 1797 - 64
    assert all(value is not None and value >= 0.985 for value in report.agreement.values())
    assert all(value is not None and value > 30 for value in report.sqnr_db.values())
    assert (report.data.source, report.data.synthetic, report.data.held_out) == ("digits", False, True)


@pytest.mark.parametrize("name", ["onnx", "tflite"])
def test_report_sidecar_and_file_belong_together(lenet_result: CompressResult, name: str) -> None:
    artifact = lenet_result.artifacts[name]
    data = artifact.path.read_bytes()
    sidecar = json.loads(artifact.sidecar_path.read_text())
    figures = lenet_result.report.artifacts[name]
    assert artifact.sha256 == sidecar["sha256"] == figures.sha256
    assert len(data) == sidecar["size_bytes"] == figures.size_bytes
    assert Path(figures.path) == artifact.path
    assert Preprocess.from_dict(sidecar["preprocess"]) == lenet_result.model.spec.preprocess
    assert sidecar["labels"] == [str(digit) for digit in range(10)]
    assert edgecnn.artifact.read_artifact(artifact.path).sha256 == artifact.sha256


def test_no_file_keeps_float_weights(lenet_result: CompressResult) -> None:
    weights = 61_706
    model = onnx.load(lenet_result.artifacts["onnx"].path)
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert sum(int(np.prod(t.dims)) for t in floats) < 1000  # scales only
    integers = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert sum(int(np.prod(t.dims)) for t in integers) >= 61_000
    for artifact in lenet_result.artifacts.values():
        assert artifact.size_bytes < 1.25 * weights
    assert (folder_of(lenet_result) / "model.pt2").stat().st_size < 4 * weights


def test_the_onnx_file_itself_carries_the_preprocess(lenet_result: CompressResult) -> None:
    model = onnx.load(lenet_result.artifacts["onnx"].path)
    metadata = json.loads({p.key: p.value for p in model.metadata_props}["edgecnn"])
    assert Preprocess.from_dict(metadata["preprocess"]) == lenet_result.model.spec.preprocess
    assert [value.name for value in model.graph.input] == ["image"]
    assert [value.name for value in model.graph.output] == ["output"]


def test_plain_runtimes_and_pytorch_compute_the_same_integers(lenet_result: CompressResult) -> None:
    x = digits(lenet_result)
    onnx_y = run_onnx(lenet_result.artifacts["onnx"].path, x)
    tflite_y = run_tflite(lenet_result.artifacts["tflite"].path, x.transpose(0, 2, 3, 1))
    model = load_model(folder_of(lenet_result) / "model.pt2")
    with torch.no_grad():
        torch_y = model.graph(torch.from_numpy(x)).numpy()
    step = np.unique(np.abs(onnx_y[onnx_y != 0])).min()
    steps = [np.rint(y / step).astype(int) for y in (onnx_y, tflite_y, torch_y)]
    assert np.abs(steps[0] - steps[1]).max() <= 1
    assert np.abs(steps[0] - steps[2]).max() <= 1
    assert (np.abs(steps[0] - steps[2]) == 0).mean() > 0.99
    assert model.spec == lenet_result.model.spec
    assert [record.name for record in model.history][-1] == "quantize_static"


def test_the_same_seed_gives_the_same_bytes(
    lenet_result: CompressResult, tmp_path: Path, examples_dir: Path
) -> None:
    again = edgecnn.compress(
        examples_dir / "lenet5_digits.pt2",
        data="digits",
        out=tmp_path,
        options=CompressOptions(num_samples=64, measure=False),
    )
    for name, artifact in lenet_result.artifacts.items():
        assert again.artifacts[name].sha256 == artifact.sha256


def test_compressing_twice_is_refused(lenet_result: CompressResult, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="lenet5 is quantized already, expected a float network"):
        edgecnn.compress(folder_of(lenet_result) / "model.pt2", data="digits", out=tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["onnx", "tflite"])
def test_one_format_alone(tmp_path: Path, name: str) -> None:
    result = compress_small(tmp_path / "o", formats=(name,))
    assert names(tmp_path / "o") == {
        f"model.{name}",
        f"model.{name}.json",
        "model.pt2",
        "report.json",
        "report.html",
    }
    assert set(result.report.parity) == {f"{name}_vs_reference"}
    assert set(result.report.artifacts) == set(result.report.sizes) == {name}
    assert result.report.accuracy is not None
    assert result.report.accuracy.top1(name) is not None


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_integer_inputs_and_outputs(tmp_path: Path, dtype: str) -> None:
    result = compress_small(tmp_path, io=dtype)
    plain = compress_small(tmp_path / "float")
    pixels, _ = small_networks.images()
    real = result.model.spec.preprocess.apply(pixels)
    outputs = {}
    for name, artifact in result.artifacts.items():
        (source,), (target,) = artifact.inputs, artifact.outputs
        assert (source.dtype, target.dtype, target.name) == (
            dtype,
            dtype,
            plain.artifacts[name].outputs[0].name,
        )
        assert source.scale is not None and source.zero_point is not None
        limits = np.iinfo(dtype)
        q = np.clip(np.rint(real / source.scale) + source.zero_point, limits.min, limits.max).astype(dtype)
        run = run_onnx if name == "onnx" else run_tflite
        y = run(artifact.path, q if name == "onnx" else q.transpose(0, 2, 3, 1))
        assert y.dtype == np.dtype(dtype)
        outputs[name] = y.astype(int)
        expected = (run_onnx if name == "onnx" else run_tflite)(
            plain.artifacts[name].path, real if name == "onnx" else real.transpose(0, 2, 3, 1)
        )
        assert target.scale is not None and target.zero_point is not None
        steps = np.rint(expected / target.scale) + target.zero_point
        assert np.abs(steps - outputs[name]).max() <= 1
    assert np.abs(outputs["onnx"] - outputs["tflite"]).max() <= 1


def test_an_arm_board_gets_signed_activations(tmp_path: Path) -> None:
    result = compress_small(tmp_path / "arm", target="raspberrypi4")
    here = compress_small(tmp_path / "here", target="local_cpu")
    found = {}
    for key, made in (("arm", result), ("here", here)):
        model = onnx.load(made.artifacts["onnx"].path)
        constants = {t.name: t.data_type for t in model.graph.initializer}
        nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        found[key] = {constants[node.input[2]] for node in nodes}
    assert found["arm"] == {onnx.TensorProto.INT8}
    assert result.report.target == "raspberrypi4"
    assert result.artifacts["tflite"].sha256 == here.artifacts["tflite"].sha256


def test_without_data_nothing_is_claimed_about_accuracy(tmp_path: Path) -> None:
    report = compress_small(tmp_path, data=None).report
    assert report.accuracy is None
    assert json.loads((tmp_path / "report.json").read_text())["accuracy"] is None
    assert report.data.synthetic
    assert set(report.parity) == PARITY
    assert all(value is not None for value in report.sqnr_db.values())
    assert any("accuracy is unmeasured" in warning for warning in report.warnings)


def test_labels_are_needed_for_accuracy_and_for_nothing_else(tmp_path: Path) -> None:
    report = compress_small(tmp_path, data=small_networks.images()[0]).report
    assert report.accuracy is None
    assert report.agreement["onnx"] is not None


def test_a_network_that_classifies_pixels(tmp_path: Path) -> None:
    report = compress_small(tmp_path, "segmentation").report
    assert report.model.task == "segmentation"
    assert report.accuracy is None
    assert all(value is not None and value > 0.95 for value in report.agreement.values())


def test_a_network_that_gives_one_number(tmp_path: Path) -> None:
    report = compress_small(tmp_path, "regression").report
    assert report.model.task == "other"
    assert report.agreement == {"onnx": None, "tflite": None}
    assert report.accuracy is None
    assert report.parity["onnx_vs_tflite"].top1_agreement is None
    assert report.environment["machine"]  # though nothing but the proof has run


def test_a_network_with_two_outputs(tmp_path: Path) -> None:
    result = compress_small(tmp_path, "TwoHeads")
    assert result.report.model.task == "other"
    assert [len(a.outputs) for a in result.artifacts.values()] == [2, 2]
    assert result.report.parity["onnx_vs_tflite"].max_lsb <= 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_drop": 1.0}, "accuracy was not measured, the budget is a drop of 1 points"),
        ({"max_latency_ms": 5.0}, "onnx latency was not measured, the budget is 5 ms"),
        ({"max_size_mb": 0.001}, "the budget is 0.001 MB"),
    ],
)
def test_a_missed_budget_leaves_the_files(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(BudgetError) as found:
        compress_small(tmp_path, data=None, **changes)
    assert expected in found.value.message
    assert str(tmp_path) in found.value.message
    assert found.value.exit_code == 3
    assert isinstance(found.value.result, CompressResult)
    assert names(tmp_path) == RESULTS


def test_a_drop_without_labels_is_explained(tmp_path: Path) -> None:
    report = compress_small(tmp_path, data="unlabelled", max_drop=100.0).report
    assert report.accuracy is None
    (words,) = [w for w in report.warnings if w.startswith("a drop of 100 points was asked for")]
    share = min(value for value in report.agreement.values() if value is not None)
    assert "without labels only agreement with float is known" in words
    assert f"top-1 can move by {100 * (1 - share):.3g} points at most" in words


def test_an_older_machine_is_foreseen_for_x86_alone(tmp_path: Path) -> None:
    here = compress_small(tmp_path / "here", target="local_cpu")
    arm = compress_small(tmp_path / "arm", target="raspberrypi4")
    kinds = {key: [d["kind"] for d in made.report.details] for key, made in (("here", here), ("arm", arm))}
    assert ("saturation" in kinds["here"]) == (local_isa().startswith("x86"))
    assert "saturation" not in kinds["arm"]


def test_budgets_that_are_met(tmp_path: Path) -> None:
    assert compress_small(tmp_path, max_size_mb=0.1, max_drop=100.0).report.accuracy is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": ("keras",)}, "formats: found 'keras', expected one or more of onnx, tflite"),
        ({"formats": ()}, r"formats: found \(\), expected one or more"),
        ({"formats": "onnx"}, "formats: found 'onnx', expected one or more"),
        ({"io": "int16"}, "io is 'int16', expected one of float32, int8, uint8"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
        ({"num_samples": 0}, "num_samples is 0, expected at least 1"),
        ({"max_drop": float("nan")}, "max_drop is nan, expected a finite number, 0 or more"),
    ],
)
def test_options_out_of_range(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        compress_small(tmp_path / "o", **changes)
    assert not (tmp_path / "o").exists()


def test_earlier_results_are_kept_or_replaced_together(tmp_path: Path) -> None:
    compress_small(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    held = r"model\.onnx, model\.pt2, model\.tflite, report\.html, report\.json"
    with pytest.raises(OutputError, match=f"already holds {held}"):
        compress_small(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "notes.txt").write_text("mine")
    compress_small(tmp_path, "segmentation", formats=("onnx",), force=True)
    assert names(tmp_path) == {
        "model.onnx",
        "model.onnx.json",
        "model.pt2",
        "report.html",
        "report.json",
        "notes.txt",
    }
    assert (tmp_path / "model.onnx").read_bytes() != before["model.onnx"]


def test_the_network_given_is_never_replaced(tmp_path: Path, examples_dir: Path) -> None:
    model = tmp_path / "model.pt2"
    model.write_bytes((examples_dir / "lenet5_digits.pt2").read_bytes())
    with pytest.raises(OutputError, match="is the network to be compressed"):
        edgecnn.compress(model, data="digits", out=tmp_path, options=replace(FAST, force=True))
    assert model.read_bytes() == (examples_dir / "lenet5_digits.pt2").read_bytes()
