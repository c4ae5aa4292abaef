"""The task "latency" on real runtimes: phases, memory, profile, delegate, presets and sustained runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecnn.runner import latency, request
from edgecnn.runner.failure import InferenceFailure, RequestFailure
from edgecnn.runner.op_profile import delegate_coverage, read_profile
from edgecnn.runner.request import parse_request
from edgecnn.runner.samples import unpack_json
from edgecnn.runner.tasks import execute

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

QUICK = {"task": "latency", "min_runs": 32, "min_seconds": 0.01}


def matmul_chain(path: Path, side: int = 64, count: int = 3) -> Path:
    """`count` products of a (n, side) input with random (side, side) matrices."""
    helper, float_type = onnx.helper, onnx.TensorProto.FLOAT
    generator = np.random.default_rng(0)
    names = ["image", *(f"h{i}" for i in range(1, count)), "scores"]
    weights = [generator.standard_normal((side, side)).astype(np.float32) for _ in range(count)]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], f"product{i}")
            for i in range(count)
        ],
        "chain",
        [helper.make_tensor_value_info("image", float_type, ["n", side])],
        [helper.make_tensor_value_info("scores", float_type, ["n", side])],
        [onnx.numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def run(path: Path, **change: Any) -> dict[str, Any]:
    values = {**QUICK, "artifacts": [{"key": "a", "path": str(path)}], **change}
    result = execute(parse_request(values))
    encoder = json.JSONEncoder(allow_nan=False, default=lambda pieces: pieces.listed())  # as the runner's own
    written: dict[str, Any] = json.loads("".join(encoder.iterencode(result)))
    if all(isinstance(e["samples_ns"], list) for e in result["artifacts"].values()):  # over 50,000 are packed
        assert written == result
    return written


def test_phases_memory_and_cpu_of_each_artifact(tmp_path: Path) -> None:
    small, large = matmul_chain(tmp_path / "small.onnx"), matmul_chain(tmp_path / "large.onnx", 2048, 1)
    paths = [{"key": "large", "path": str(large)}, {"key": "small", "path": str(small)}]
    entries = run(small, artifacts=paths)["artifacts"]
    for entry in entries.values():
        assert set(entry["phases"]) == {"import_ms", "load_ms", "first_ms", "warmup_ms"}
        assert all(value > 0 for value in entry["phases"].values())
        assert entry["cpu"]["wall_s"] >= sum(entry["samples_ns"]) / 1e9
        assert entry["cpu"]["user_s"] + entry["cpu"]["system_s"] > 0
        assert (entry["delegate"], entry["profile"], entry["device_memory_bytes"]) == (None, None, None)
        assert len(entry["trace"]) >= 2
        assert "curve" not in entry
    used = {key: entry["peak_rss_bytes"] - entry["baseline_rss_bytes"] for key, entry in entries.items()}
    assert used["large"] > 2048 * 2048 * 4  # its weights
    assert used["small"] < 4 * 2**20  # loaded second, and the first one's peak is not in it


def test_without_clear_refs_only_a_lone_artifact_has_a_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "reset_peak_rss", lambda: False)
    path = str(matmul_chain(tmp_path / "a.onnx"))
    assert run(Path(path))["artifacts"]["a"]["peak_rss_bytes"] > 0
    both = run(Path(path), artifacts=[{"key": "a", "path": path}, {"key": "b", "path": path}])["artifacts"]
    assert both["a"]["peak_rss_bytes"] is None
    assert both["a"]["baseline_rss_bytes"] > 0


def test_the_profile_names_operators_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = matmul_chain(tmp_path / "a.onnx")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    rows = run(path, profile=True)["artifacts"]["a"]["profile"]
    assert {(row["op"], row["name"]) for row in rows} == {("MatMul", f"product{i}") for i in range(3)}
    assert all(set(row) == {"op", "name", "total_ms", "count", "median_ms", "share"} for row in rows)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert [row["total_ms"] for row in rows] == sorted((row["total_ms"] for row in rows), reverse=True)
    assert rows[0]["count"] == 49  # 50 runs, the first left out
    assert list((tmp_path / "work").iterdir()) == []


def test_a_profile_by_hand() -> None:
    def event(name: str, op: str, duration: int, index: int = 0, category: str = "Node") -> dict[str, Any]:
        arguments = {"op_name": op, "node_index": str(index)}
        return {"cat": category, "name": name, "dur": duration, "args": arguments}

    events = [
        event("session_run", "", 9999, category="Session"),
        event("c_fence_before", "Conv", 9999),
        event("c_kernel_time", "Conv", 5000),
        event("c_kernel_time", "Conv", 3000),
        event("r_kernel_time", "Relu", 1000, 1),
    ]
    assert read_profile(json.dumps(events)) == [
        {"op": "Conv", "name": "c", "total_ms": 3.0, "count": 1, "median_ms": 3.0, "share": 0.75},
        {"op": "Relu", "name": "r", "total_ms": 1.0, "count": 1, "median_ms": 1.0, "share": 0.25},
    ]
    assert read_profile("[]") == []
    with pytest.raises(InferenceFailure, match="profile of onnxruntime is not JSON"):
        read_profile("[")


def op(name: str, inputs: list[int], outputs: list[int]) -> dict[str, Any]:
    return {"op_name": name, "inputs": np.array(inputs, np.int32), "outputs": np.array(outputs, np.int32)}


def test_coverage_of_a_graph_with_an_operator_between_two_partitions() -> None:
    own = [
        op("CONV_2D", [0, 1], [2]),
        op("ADD", [2, 0], [3]),
        op("CUSTOM", [3], [4]),
        op("CONV_2D", [4, 5, -1], [6]),  # -1: no bias
    ]
    delegates = [op("DELEGATE", [0, 1], [3]), op("DELEGATE", [4, 5], [6])]
    assert delegate_coverage([*own, *delegates]) == {"partitions": 2, "delegated_ops": 3, "total_ops": 4}
    assert delegate_coverage(own) == {"partitions": 0, "delegated_ops": 0, "total_ops": 4}


def test_litert_says_what_its_delegate_took(tmp_path: Path) -> None:
    from test_runner_session import write_tflite

    path = write_tflite(tmp_path / "a.tflite")
    assert run(path)["artifacts"]["a"]["delegate"] == {"partitions": 1, "delegated_ops": 1, "total_ops": 1}
    plain = run(path, optimize=False, profile=True)["artifacts"]["a"]
    assert plain["delegate"] == {"partitions": 0, "delegated_ops": 0, "total_ops": 1}
    assert plain["profile"] is None


def test_a_sustained_run_gives_its_curve_and_all_samples(tmp_path: Path) -> None:
    entry = run(matmul_chain(tmp_path / "a.onnx"), sustained_s=0.5, max_seconds=0.1)["artifacts"]["a"]
    samples = unpack_json(entry["samples_ns"])
    assert samples.sum() > 0.4e9
    assert len(samples) == entry["num_samples"]
    assert 2 <= len(entry["curve"]) <= 600
    times = [point["t_s"] for point in entry["curve"]]
    assert times == sorted(times)
    assert times[0] > entry["phases"]["load_ms"] / 1e3  # the trace's clock, which starts before loading


def test_the_preset_raises_the_minima_and_keeps_larger_ones() -> None:
    base = {"task": "latency", "artifacts": [{"key": "a", "path": "a.onnx"}], "preset": "mlperf"}
    parsed = parse_request(base)
    assert (parsed.min_runs, parsed.min_seconds, parsed.max_seconds) == (1024, 60.0, 600.0)
    parsed = parse_request({**base, "min_runs": 5000, "min_seconds": 1, "max_seconds": 90})
    assert (parsed.min_runs, parsed.min_seconds, parsed.max_seconds) == (5000, 60.0, 90.0)


def test_a_preset_reports_p90_when_met_and_says_when_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = matmul_chain(tmp_path / "a.onnx")
    cut = run(path, preset="mlperf", max_seconds=0.05)["artifacts"]["a"]
    assert cut["preset"] == {"name": "mlperf", "met": False, "p90_ms": None}
    assert any(warning.startswith("preset mlperf was not met: ") for warning in cut["warnings"])
    monkeypatch.setitem(
        request.PRESETS, "mlperf", {"min_runs": 1024, "min_seconds": 0.01, "max_seconds": 60.0}
    )
    entry = run(path, preset="mlperf")["artifacts"]["a"]
    assert entry["num_samples"] >= 1024
    assert entry["preset"] == {"name": "mlperf", "met": True, "p90_ms": entry["p90_ms"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "fast"}, "preset is 'fast', expected one of mlperf"),
        ({"profile": 1}, "profile is 1, expected true or false"),
        ({"sustained_s": -1}, "sustained_s is -1, expected seconds"),
        ({"half": "yes"}, "half is 'yes', expected true or false"),
        ({"sustained": 3}, "unknown key 'sustained'"),
    ],
)
def test_bad_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestFailure, match=message):
        parse_request({**QUICK, "artifacts": [{"key": "a", "path": "a.onnx"}], **change})


def test_options_of_torch_are_refused_elsewhere(tmp_path: Path) -> None:
    path = matmul_chain(tmp_path / "a.onnx")
    with pytest.raises(
        RequestFailure, match=r"half and cuda_graph are options of torch, a\.onnx runs in onnx"
    ):
        run(path, half=True)


def test_a_provider_that_is_not_in_the_build_names_what_is(tmp_path: Path) -> None:
    import onnxruntime

    from edgecnn.runner.failure import MissingRuntimeFailure

    if "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has TensorRT")
    with pytest.raises(
        MissingRuntimeFailure, match=r"no TensorrtExecutionProvider, only .*CPUExecutionProvider"
    ):
        run(matmul_chain(tmp_path / "a.onnx"), provider="tensorrt")
