"""`evaluate` on files and networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import small_networks

import edgecnn
from edgecnn.cli.main import main
from edgecnn.compress import CompressOptions, CompressResult
from edgecnn.errors import DataError, LoadError

SMALL = CompressOptions(load=edgecnn.LoadOptions(input_shape=small_networks.SIZE, preprocess="unit"))


@pytest.fixture(scope="module")
def float_figures(examples_dir: Path) -> dict[str, Any]:
    return edgecnn.evaluate(examples_dir / "lenet5_digits.pt2", data="digits")


def test_a_float_network(float_figures: dict[str, Any]) -> None:
    assert float_figures["model"] == "lenet5"
    assert float_figures["top1"] > 0.98
    assert float_figures["top5"] >= float_figures["top1"]
    assert (float_figures["num_samples"], float_figures["classes"]) == (1797, 10)
    assert float_figures["runtime"].startswith("onnxruntime ")


@pytest.mark.parametrize(("name", "runtime"), [("onnx", "onnxruntime"), ("tflite", "litert")])
def test_a_file(lenet_result: CompressResult, float_figures: dict[str, Any], name: str, runtime: str) -> None:
    path = lenet_result.artifacts[name].path
    found = edgecnn.evaluate(path, data="digits")
    assert found["path"] == str(path)
    assert found["runtime"].startswith(runtime)
    assert abs(found["top1"] - float_figures["top1"]) <= 0.005
    assert found["preprocess"] == float_figures["preprocess"]


def test_the_quantized_graph_itself(lenet_result: CompressResult) -> None:
    path = lenet_result.artifacts["onnx"].path
    graph = edgecnn.evaluate(path.with_name("model.pt2"), data="digits:test")
    assert graph["top1"] == edgecnn.evaluate(path, data="digits:test")["top1"]


def test_the_command(lenet_result: CompressResult, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(lenet_result.artifacts["onnx"].path)
    assert main(["evaluate", path, "--data", "digits"]) == 0
    out = capsys.readouterr().out
    assert "preprocess   32x32 gray, pixels * 0.003922, mean 0, std 1" in out
    assert main(["evaluate", path, "--data", "digits", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert f"top1         {100 * values['top1']:.2f} %" in out


def test_a_file_without_its_sidecar(lenet_result: CompressResult, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(lenet_result.artifacts["onnx"].path.read_bytes())
    with pytest.raises(LoadError, match=r"has no sidecar model\.onnx\.json") as found:
        edgecnn.evaluate(path, data="digits")
    assert found.value.hint is not None and "keep the .json" in found.value.hint


def test_a_file_takes_no_other_preprocess(lenet_result: CompressResult) -> None:
    with pytest.raises(LoadError, match="carries its own network and preprocess"):
        edgecnn.evaluate(lenet_result.artifacts["onnx"].path, data="digits", options=SMALL)


def test_a_file_that_changed(lenet_result: CompressResult, tmp_path: Path) -> None:
    artifact = lenet_result.artifacts["tflite"]
    data = bytearray(artifact.path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model.tflite").write_bytes(bytes(data))
    (tmp_path / "model.tflite.json").write_bytes(artifact.sidecar_path.read_bytes())
    with pytest.raises(LoadError, match="its sidecar says"):
        edgecnn.evaluate(tmp_path / "model.tflite", data="digits")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="No such file"):
        edgecnn.evaluate(tmp_path / "model.onnx", data="digits")


def test_labels_are_needed() -> None:
    with pytest.raises(DataError, match="accuracy needs labels, found 40 images without any"):
        edgecnn.evaluate(small_networks.classifier(), data="small_networks:black_images", options=SMALL)


@pytest.mark.parametrize(
    ("net", "shape"), [("regression", "n x 1"), ("segmentation", "n x 4 x 16 x 16"), ("TwoHeads", "n x 5")]
)
def test_accuracy_is_for_classification(net: str, shape: str) -> None:
    with pytest.raises(DataError, match=f"its output has shape {shape}; accuracy is measured for classif"):
        edgecnn.evaluate(getattr(small_networks, net)(), data="small_networks:images", options=SMALL)
