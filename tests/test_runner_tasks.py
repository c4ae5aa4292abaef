"""Requests in, results out: the three tasks on real runtimes, and what a bad request is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecnn.runner.__main__ import main
from edgecnn.runner.failure import InputFailure, RequestFailure
from edgecnn.runner.preprocess import Preprocess
from edgecnn.runner.request import parse_request
from edgecnn.runner.tasks import execute

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def write_model(
    path: Path, nodes: list[Any], in_shape: list[Any], out_shape: list[Any], **constants: Any
) -> Path:
    """An opset 17 model from input "image" to output "scores"."""
    helper, float_type = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", float_type, in_shape)],
        [helper.make_tensor_value_info("scores", float_type, out_shape)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def classifier(path: Path, sign: float = 1.0) -> Path:
    """Scores of 7 classes: the 7 values of a (n, 1, 1, 7) image, times `sign`."""
    node = onnx.helper.make_node
    nodes = [node("Flatten", ["image"], ["flat"]), node("Mul", ["flat", "sign"], ["scores"])]
    return write_model(path, nodes, ["n", 1, 1, 7], ["n", 7], sign=np.float32(sign))


def segmenter(path: Path, sign: float = 1.0) -> Path:
    """Scores (n, 2, 2, 3), the image's own channels, times `sign`."""
    nodes = [onnx.helper.make_node("Mul", ["image", "sign"], ["scores"])]
    return write_model(path, nodes, ["n", 2, 2, 3], ["n", 2, 2, 3], sign=np.float32(sign))


def save(path: Path, array: np.ndarray[Any, Any]) -> str:
    np.save(path, array)
    return str(path)


def run(values: dict[str, Any]) -> dict[str, Any]:
    return execute(parse_request(values))


def artifacts(**paths: Path) -> list[dict[str, str]]:
    return [{"key": key, "path": str(path)} for key, path in paths.items()]


def test_predictions_count_top1_top5_and_agreement(tmp_path: Path) -> None:
    scores = np.tile(np.arange(7, dtype=np.float32), (5, 1)).reshape(
        5, 1, 1, 7
    )  # ascending: classes 6, 5, 4, 3, 2
    request = {
        "task": "predictions",
        "artifacts": artifacts(
            up=classifier(tmp_path / "up.onnx"), down=classifier(tmp_path / "down.onnx", -1.0)
        ),
        "inputs": save(tmp_path / "x.npy", scores),
        "labels": save(tmp_path / "y.npy", np.array([6, 5, 2, 1, 0])),
        "reference": "down",
        "batch_size": 2,
    }
    result = run(request)
    up, down = result["artifacts"]["up"], result["artifacts"]["down"]
    assert (result["num_samples"], result["kind"]) == (5, "classification")
    assert up["predictions"] == [6] * 5
    assert down["predictions"] == [0] * 5
    assert (up["top1"], up["top5"]) == (0.2, 0.6)
    assert (down["top1"], down["top5"]) == (0.2, 0.6)  # down's best five are 0 to 4: labels 2, 1, 0
    assert (up["agreement"], down["agreement"]) == (0.0, None)


def test_predictions_without_labels_have_no_accuracy(tmp_path: Path) -> None:
    x = save(tmp_path / "x.npy", np.zeros((2, 1, 1, 7), np.float32))
    result = run(
        {"task": "predictions", "artifacts": artifacts(a=classifier(tmp_path / "a.onnx")), "inputs": x}
    )
    entry = result["artifacts"]["a"]
    assert (entry["top1"], entry["top5"], entry["agreement"]) == (None, None, None)


def test_segmentation_counts_pixels_and_leaves_out_the_ignored(tmp_path: Path) -> None:
    x = np.zeros((1, 2, 2, 3), np.float32)
    x[0, 1, 0] = 1.0  # the upper row is class 1, the lower row ties: class 0
    labels = np.array([[[1, 1, 0], [0, 255, 255]]])
    paths = artifacts(a=segmenter(tmp_path / "a.onnx"), b=segmenter(tmp_path / "b.onnx", -1.0))
    request = {
        "task": "predictions",
        "artifacts": paths,
        "inputs": save(tmp_path / "x.npy", x),
        "labels": save(tmp_path / "y.npy", labels),
        "reference": "a",
    }
    result = run(request)
    assert result["kind"] == "segmentation"
    assert result["artifacts"]["a"]["top1"] == 0.75
    assert result["artifacts"]["a"]["num_labelled"] == 4
    assert result["artifacts"]["b"]["agreement"] == 0.5
    assert result["artifacts"]["b"]["predictions"] is None


def test_nonfinite_outputs_are_a_warning(tmp_path: Path) -> None:
    x = np.zeros((1, 1, 1, 7), np.float32)
    x[0, 0, 0, 3] = np.inf
    request = {
        "task": "predictions",
        "artifacts": artifacts(a=classifier(tmp_path / "a.onnx")),
        "inputs": save(tmp_path / "x.npy", x),
    }
    assert run(request)["artifacts"]["a"]["warnings"] == ["1 output values are NaN or infinite"]


def test_outputs_stream_to_files_and_pixels_take_the_sidecars_preprocess(tmp_path: Path) -> None:
    path = segmenter(tmp_path / "a.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 1), np.uint8)
    preprocess = Preprocess(size=(2, 3), channel_order="gray", mean=(0.5,), std=(0.25,))
    nodes = [onnx.helper.make_node("Identity", ["image"], ["scores"])]
    path = write_model(tmp_path / "gray.onnx", nodes, ["n", 1, 2, 3], ["n", 1, 2, 3])
    request = {
        "task": "outputs",
        "artifacts": artifacts(gray=path),
        "inputs": save(tmp_path / "x.npy", pixels),
        "outputs": str(tmp_path / "out"),
        "batch_size": 2,
    }
    with pytest.raises(InputFailure, match=r"neither the request nor gray\.onnx\.json has a preprocess"):
        run(request)
    sidecar = {"schema_version": 1, "preprocess": preprocess.to_dict(), "inputs": [], "outputs": []}
    path.with_name("gray.onnx.json").write_text(json.dumps(sidecar))
    result = run(request)
    entry = result["artifacts"]["gray"]["outputs"][0]
    assert (entry["name"], entry["array"], entry["shape"]) == ("scores", "gray.0.npy", [5, 1, 2, 3])
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "gray.0.npy"), preprocess.apply(pixels))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["gray.0.npy"]
    run({**request, "outputs": str(tmp_path / "all.npz"), "preprocess": preprocess.to_dict()})
    with np.load(tmp_path / "all.npz") as arrays:
        np.testing.assert_array_equal(arrays["gray/scores"], preprocess.apply(pixels))


def test_outputs_without_a_batch_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("ReduceMax", ["image"], ["scores"], axes=[0], keepdims=1)]
    request = {
        "task": "outputs",
        "artifacts": artifacts(a=write_model(tmp_path / "a.onnx", nodes, ["n", 7], [1, 7])),
        "inputs": save(tmp_path / "x.npy", np.zeros((3, 7), np.float32)),
        "outputs": str(tmp_path / "out"),
        "batch_size": 3,
    }
    with pytest.raises(InputFailure, match=r"shape \(1, 7\) for a batch of 3, expected the batch first"):
        run(request)
    assert list((tmp_path / "out").iterdir()) == []


def test_latency_keeps_every_sample_and_compares_with_the_baseline(tmp_path: Path) -> None:
    request = {
        "task": "latency",
        "artifacts": artifacts(a=classifier(tmp_path / "a.onnx"), b=classifier(tmp_path / "b.onnx")),
        "min_runs": 20,
        "min_seconds": 0.01,
        "baseline": "b",
    }
    result = run(request)
    entry = result["artifacts"]["a"]
    assert entry["num_samples"] == len(entry["samples_ns"]) >= 20
    assert all(isinstance(sample, int) for sample in entry["samples_ns"])
    assert entry["load_ms"] > 0
    assert entry["first_ms"] > 0
    assert (result["baseline"], list(result["comparisons"])) == ("b", ["a"])
    assert result["comparisons"]["a"]["verdict"] in ("faster", "slower", "no difference", "undecided")
    assert result["environment"]["runtimes"]["onnxruntime"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 7]), r"labels hold 7, a\.onnx has classes 0 to 6"),
        (np.array([0, -1]), "labels hold -1"),
        (np.array([0]), "holds 1 labels for 2 images"),
        (np.array([0.5, 1.0]), "holds float64 of shape"),
        (np.zeros((2, 2, 3), int), "labels of a batch have shape"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, labels: np.ndarray[Any, Any], message: str) -> None:
    request = {
        "task": "predictions",
        "artifacts": artifacts(a=classifier(tmp_path / "a.onnx")),
        "inputs": save(tmp_path / "x.npy", np.zeros((2, 1, 1, 7), np.float32)),
        "labels": save(tmp_path / "y.npy", labels),
        "batch_size": 2,
    }
    with pytest.raises(InputFailure, match=message):
        run(request)


def test_inputs_that_cannot_be_used(tmp_path: Path) -> None:
    request = {"task": "predictions", "artifacts": artifacts(a=classifier(tmp_path / "a.onnx"))}
    with pytest.raises(InputFailure, match="does not exist"):
        run({**request, "inputs": str(tmp_path / "none.npy")})
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(InputFailure, match=r"is not a readable \.npy file"):
        run({**request, "inputs": str(tmp_path / "text.npy")})
    with pytest.raises(InputFailure, match="holds no images"):
        run({**request, "inputs": save(tmp_path / "empty.npy", np.zeros((0, 1, 1, 7), np.float32))})
    with pytest.raises(InputFailure, match="holds float64 of shape"):
        run({**request, "inputs": save(tmp_path / "double.npy", np.zeros((1, 1, 1, 7)))})
    with pytest.raises(InputFailure, match=r"have shape \(1, 1, 1, 8\), expected \(n, 1, 1, 7\)"):
        run({**request, "inputs": save(tmp_path / "wide.npy", np.zeros((1, 1, 1, 8), np.float32))})


GOOD = {"task": "latency", "artifacts": [{"key": "a", "path": "a.onnx"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "train"}, "task is 'train', expected one of outputs, predictions, latency"),
        ({"artifacts": []}, "expected a list of at least one"),
        ({"artifacts": [{"key": "a"}]}, r"artifacts\[0\]\.path is None"),
        ({"artifacts": [{"key": "a/b", "path": "x"}]}, "expected letters, digits"),
        ({"artifacts": [*GOOD["artifacts"], *GOOD["artifacts"]]}, "expected each once"),
        ({"threads": 0}, "threads is 0, expected a whole number of 1 or more"),
        ({"threads": True}, "threads is True"),
        ({"min_seconds": -1}, "min_seconds is -1, expected seconds"),
        ({"baseline": "z"}, r"baseline is 'z', expected one of the artifacts \['a'\]"),
        ({"preprocess": 3}, "preprocess is 3, expected an object"),
        ({"inputs": 3}, "inputs is 3, expected a path"),
        ({"optimize": 1}, "optimize is 1, expected true or false"),
        ({"task": "predictions"}, "has no inputs"),
        ({"task": "outputs", "inputs": "x.npy"}, "has no 'outputs'"),
    ],
)
def test_bad_requests_say_what_was_found_and_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestFailure, match=message):
        parse_request({**GOOD, **change})


def test_an_unknown_key_gets_a_suggestion() -> None:
    with pytest.raises(RequestFailure, match="unknown key 'thread'") as caught:
        parse_request({**GOOD, "thread": 2})
    assert caught.value.hint == "did you mean 'threads'?"


def test_the_module_writes_a_failure_as_a_result_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text("{")
    command = [
        sys.executable,
        "-m",
        "edgecnn.runner",
        str(tmp_path / "request.json"),
        str(tmp_path / "result.json"),
    ]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert (done.returncode, done.stderr) == (1, "")
    assert result["ok"] is False
    assert result["error"]["type"] == "RequestFailure"
    assert "is not JSON" in result["error"]["message"]
    assert not list(tmp_path.glob("*.part"))


def test_usage_and_unwritable_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err
    (tmp_path / "request.json").write_text("[]")
    assert main([str(tmp_path / "request.json"), str(tmp_path / "none" / "result.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_folder_runs_alone_under_another_name(tmp_path: Path) -> None:
    import shutil

    runner = Path(__file__).parent.parent / "edgecnn" / "runner"
    shutil.copytree(runner, tmp_path / "edgecnn_runner", ignore=shutil.ignore_patterns("__pycache__"))
    classifier(tmp_path / "a.onnx")
    request = {
        "task": "predictions",
        "artifacts": [{"key": "a", "path": "a.onnx"}],
        "inputs": save(tmp_path / "x.npy", np.eye(7, dtype=np.float32).reshape(7, 1, 1, 7)),
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "edgecnn_runner", "request.json", "result.json"]
    subprocess.run(command, cwd=tmp_path, check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["artifacts"]["a"]["predictions"] == [0, 1, 2, 3, 4, 5, 6]
