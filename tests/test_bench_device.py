"""`bench` with real runtimes on this machine: latency, and accuracy against this host's own outputs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")
pytest.importorskip("sklearn")

import edgecnn
from edgecnn.accuracy import measure_accuracy, open_task
from edgecnn.bench import BenchOptions, bench
from edgecnn.cli.main import main
from edgecnn.compress import CompressResult
from edgecnn.devices.local import run_local
from edgecnn.devices.profile import Device, load_device
from edgecnn.errors import DataError, DeviceError, LoadError
from edgecnn.export.output_step import output_steps
from edgecnn.pipeline import SilentProgress
from edgecnn.report.bench_results import BenchReport

QUICK = BenchOptions(num_runs=12, seconds=0.001, num_blocks=6)


class DisturbedExecutor:
    """This machine, whose outputs are pushed off by some steps of the output for the last images."""

    def __init__(self, steps: float, scale: float) -> None:
        self.device: Device = load_device("local_cpu")
        self.steps, self.scale = steps, scale
        self.num_images: list[int] = []

    def run_request(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        result = run_local(request, timeout_s)
        result["artifacts"]["file"]["runtime_version"] = "9.9"
        path = Path(request["outputs"]) / result["artifacts"]["file"]["outputs"][0]["array"]
        values = np.load(path)
        self.num_images.append(len(values))
        values[-1, 0] += self.steps * self.scale
        np.save(path, values)
        return result

    def environment(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def folder(lenet_result: CompressResult) -> Path:
    return lenet_result.artifacts["onnx"].path.parent


def test_both_files_on_this_machine_with_accuracy(folder: Path) -> None:
    report = bench(folder, data="digits:test", options=QUICK)
    assert [run.runtime for run in report.runs] == ["onnxruntime", "litert"]
    for run in report.runs:
        assert run.median_ms is not None and run.median_ms > 0
        assert len(run.block_lengths) == 6
        assert run.peak_rss_bytes is not None and run.peak_rss_bytes > 1e6
        assert run.phases is not None and all(value is not None for value in run.phases.values())
        assert len(run.sha256) == 64
    assert report.comparisons[0].num_pairs == 6
    assert report.environment["runtimes"].keys() == {"onnxruntime", "litert"}
    expected = edgecnn.evaluate(folder / "model.tflite", data="digits:test")
    for entry in report.accuracy:
        assert (entry.max_lsb, entry.max_difference, entry.agreement_with_host) == (0, 0.0, 1.0)
        assert (entry.holds, entry.note) == (True, "")
        assert entry.num_samples == entry.num_compared == expected["num_samples"]
    assert report.accuracy[1].top1 == pytest.approx(expected["top1"])
    assert report.accuracy[1].top5 == pytest.approx(expected["top5"])
    assert BenchReport.from_json(report.to_json()) == report


def test_steps_of_both_files_are_the_same_scale(folder: Path) -> None:
    onnx, tflite = (output_steps(folder / name) for name in ("model.onnx", "model.tflite"))
    assert onnx[0] is not None
    assert onnx == pytest.approx(tflite)
    with pytest.raises(LoadError, match=r"report\.json cannot be read"):
        output_steps(folder / "report.json")


def test_litert_must_give_the_same_integers(folder: Path) -> None:
    task = open_task(folder / "model.tflite", "digits:test")
    assert task.step is not None
    entry = measure_accuracy(DisturbedExecutor(2, task.step), task, SilentProgress())
    assert (entry.max_lsb, entry.holds) == (2, False)
    assert "outputs of litert 9.9 on the device differ from litert 2" in entry.note
    assert "up to 2 LSB" in entry.note and "expected the same integers" in entry.note


def test_onnxruntime_may_differ_by_steps_but_not_by_classes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = open_task(folder / "model.onnx", "digits:test")
    assert task.step is not None
    near = measure_accuracy(DisturbedExecutor(2, task.step), task, SilentProgress())
    assert (near.max_lsb, near.holds, near.note) == (2, True, "")
    monkeypatch.setattr("edgecnn.accuracy.CHUNK_BYTES", 32 * 32 * 4 * 100)  # one image of a hundred is off
    far = DisturbedExecutor(10_000, task.step)
    entry = measure_accuracy(far, task, SilentProgress())
    assert max(far.num_images) <= 100
    assert sum(far.num_images) == entry.num_samples
    assert not entry.holds
    assert "expected cosine above 0.999 and 99% agreement" in entry.note


def test_a_nan_on_the_device_breaks_the_contract(folder: Path) -> None:
    task = open_task(folder / "model.onnx", "digits:test")
    entry = measure_accuracy(DisturbedExecutor(1, float("nan")), task, SilentProgress())
    assert not entry.holds
    assert "1 values not finite" in entry.note


def test_data_needs_the_sidecar(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes((folder / "model.tflite").read_bytes())
    with pytest.raises(LoadError, match="expected an artifact with its sidecar"):
        bench(tmp_path, data="digits:test", options=QUICK)


def test_data_that_is_none(folder: Path) -> None:
    with pytest.raises(DataError, match="'gone' does not exist"):
        bench(folder, data="gone", options=QUICK)


def test_the_command_writes_what_it_is_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", str(folder / "model.tflite"), "--runs", "6", "--seconds", "0.001", "--json"]
    files = ["--csv", str(tmp_path / "x" / "a.csv"), "-o", str(tmp_path / "y")]
    assert main([*arguments, *files]) == 0
    report = BenchReport.from_json(capsys.readouterr().out)
    assert report.median_ms is not None
    assert BenchReport.from_json((tmp_path / "y" / "bench-local_cpu.json").read_text()) == report
    assert "<svg" in (tmp_path / "y" / "bench.html").read_text()
    assert len((tmp_path / "x" / "a.csv").read_text().splitlines()) == 2


def test_a_damaged_file_is_reported_beside_the_good_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"not a network")
    arguments = [str(folder / "model.onnx"), str(damaged), "--runs", "6", "--seconds", "0.001", "--json"]
    assert main(["bench", *arguments, "--blocks", "2"]) == 1
    found = capsys.readouterr()
    good, bad = json.loads(found.out)["runs"]
    assert good["median_ms"] > 0
    assert (bad["median_ms"], bad["samples_ns"]) == (None, [])
    assert "damaged.onnx" in bad["error"]
    assert "error: did not run: damaged.onnx on local_cpu" in found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "1,x"], "'1,x' is no list of threads, expected whole numbers such as 1,2,4"),
        (["--threads", "2,2"], "'2,2' is no list of threads"),
        (["--sustained", "soon"], "'soon' is no duration, expected something like 90s or 10m"),
        (["--preset", "mlprf"], "'mlprf' is not 'mlperf'"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "a.onnx", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_several_devices_side_by_side(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgecnn.devices.deploy import LocalExecutor

    opened: list[str] = []

    @contextlib.contextmanager
    def open_executor(device: Device) -> Iterator[LocalExecutor]:
        opened.append(device.name)
        yield LocalExecutor(device)

    monkeypatch.setattr("edgecnn.devices.deploy.open_executor", open_executor)
    for name in ("one", "two"):
        text = f'name = "{name}"\ntransport = "local"\nruntime = "litert"\nisa = "auto"\n'
        (tmp_path / f"{name}.toml").write_text(text)
    devices = [part for name in ("one", "two") for part in ("--device", str(tmp_path / f"{name}.toml"))]
    arguments = [str(folder / "model.tflite"), "--runs", "6", "--seconds", "0.001", "--json"]
    assert main(["bench", *arguments, *devices, "-o", str(tmp_path / "out")]) == 0
    assert [report["device"] for report in json.loads(capsys.readouterr().out)] == ["one", "two"]
    assert sorted(opened) == ["one", "two"]
    assert (tmp_path / "out" / "bench-one.json").is_file()
    assert (tmp_path / "out" / "bench-two.json").is_file()
    reachable = open_executor

    @contextlib.contextmanager
    def open_first(device: Device) -> Iterator[LocalExecutor]:
        if device.name == "two":
            raise DeviceError("two does not answer", hint="is it on?")
        with reachable(device) as executor:
            yield executor

    monkeypatch.setattr("edgecnn.devices.deploy.open_executor", open_first)
    assert main(["bench", *arguments, *devices]) == 1
    found = capsys.readouterr()
    assert [report["device"] for report in json.loads(found.out)] == ["one"]
    assert "error: two does not answer\nhint: is it on?" in found.err
    assert main(["bench", *arguments, *devices[:2], "--device", str(_copy(tmp_path / "one.toml"))]) == 1
    assert "the devices are named one, one, expected each name once" in capsys.readouterr().err


def _copy(path: Path) -> Path:
    copy = path.with_name("copy.toml")
    copy.write_text(path.read_text())
    return copy
