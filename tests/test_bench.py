"""`bench`: what is asked of a device, in which order, and what is made of its answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import benches
import pytest

from edgecnn.bench import BenchOptions, bench
from edgecnn.bench_files import find_files
from edgecnn.errors import DeviceError, LoadError, RunnerError
from edgecnn.report.bench_results import EMULATED

QUICK = BenchOptions(num_blocks=6)


def answer_by_file(**entries: dict[str, Any]) -> benches.Answer:
    return lambda request, index: benches.result(entries[benches.name_of(request).partition(".")[0]])


def test_two_files_go_in_abba_blocks_each_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = benches.two_files(tmp_path)
    opened = benches.install(
        monkeypatch, answer_by_file(a=benches.entry(4.0, 4.2), b=benches.entry(2.0, 2.1))
    )
    report = bench(a, b, device=benches.DEVICE, options=QUICK)
    letters = "".join(name[0] for name in opened[0].files)
    assert letters == "abba" + "baab" + "abba"
    assert {len(request["artifacts"]) for request in opened[0].requests} == {1}
    assert {request["threads"] for request in opened[0].requests} == {2}  # the device's own
    first, second = report.runs
    assert (first.key, first.block_lengths, len(first.samples_ns)) == ("a.onnx", (2,) * 6, 12)
    assert (report.median_ms, first.median_ms, second.median_ms) == (4.1, 4.1, 2.05)
    assert (first.p90_ms, first.peak_rss_bytes) == (None, 20_000_000)  # p90 needs 64 samples
    (comparison,) = report.comparisons
    assert (comparison.baseline, comparison.candidate) == ("a.onnx", "b.tflite")
    assert (comparison.speedup, comparison.verdict, comparison.num_pairs) == (2.0, "faster", 6)
    assert (comparison.low, comparison.high) == (2.0, 2.0)


def test_an_interval_that_includes_one_is_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = benches.two_files(tmp_path)

    def answer(request: Mapping[str, Any], index: int) -> dict[str, Any]:
        slow = (index // 2) % 2 == 0
        mine = benches.name_of(request)[0] == "a"
        return benches.result(benches.entry(1.1 if slow == mine else 1.0))

    benches.install(monkeypatch, answer)
    (comparison,) = bench(a, b, device=benches.DEVICE, options=QUICK).comparisons
    assert comparison.verdict == "no difference"
    assert comparison.low is not None and comparison.high is not None
    assert comparison.low < 1 < comparison.high


def test_one_file_alone_is_one_process_with_all_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = benches.two_files(tmp_path)
    blocks = benches.entry(*[3.0] * 64, block_lengths=[32, 32])
    opened = benches.install(monkeypatch, answer_by_file(a=blocks))
    report = bench(a, device=benches.DEVICE)
    (request,) = opened[0].requests
    assert (request["min_runs"], request["min_seconds"], request["max_seconds"]) == (64, 1.0, 60.0)
    assert (report.runs[0].block_lengths, report.runs[0].p90_ms, report.comparisons) == ((32, 32), 3.0, ())


def test_threads_are_compared_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = benches.two_files(tmp_path)

    def answer(request: Mapping[str, Any], index: int) -> dict[str, Any]:
        base = 8.0 if benches.name_of(request)[0] == "a" else 2.0
        return benches.result(benches.entry(base / request["threads"]))

    benches.install(monkeypatch, answer)
    options = BenchOptions(threads=(1, 2), num_blocks=6)
    report = bench(a, b, device=benches.DEVICE, options=options)
    assert [(run.key, run.threads, run.median_ms) for run in report.runs] == [
        ("a.onnx@1", 1, 8.0),
        ("b.tflite@1", 1, 2.0),
        ("a.onnx@2", 2, 4.0),
        ("b.tflite@2", 2, 1.0),
    ]
    pairs = [(c.baseline, c.candidate, c.speedup) for c in report.comparisons]
    assert pairs == [("a.onnx@1", "b.tflite@1", 4.0), ("a.onnx@2", "b.tflite@2", 4.0)]
    (alone,) = bench(a, device=benches.DEVICE, options=options).comparisons
    assert (alone.baseline, alone.candidate, alone.speedup) == ("a.onnx@1", "a.onnx@2", 2.0)


@pytest.mark.parametrize("broken_at", [0, 5])
def test_a_broken_run_has_no_number_whatever_its_earlier_blocks_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_at: int
) -> None:
    a, b = benches.two_files(tmp_path)
    seen = {"b": 0}

    def answer(request: Mapping[str, Any], index: int) -> dict[str, Any]:
        if benches.name_of(request)[0] == "b":
            seen["b"] += 1
            if seen["b"] > broken_at:
                raise RunnerError("the runner was killed by SIGKILL", hint="out of memory?")
        return benches.result(benches.entry(1.0))

    opened = benches.install(monkeypatch, answer)
    report = bench(a, b, device=benches.DEVICE, options=QUICK)
    whole, broken = report.runs
    assert (whole.median_ms, broken.median_ms, broken.samples_ns) == (1.0, None, ())
    assert broken.error == "the runner was killed by SIGKILL (hint: out of memory?)"
    assert report.comparisons == ()
    assert any(text.startswith("b.tflite did not run: the runner was killed") for text in report.warnings)
    assert opened[0].files.count("b.tflite") == broken_at + 1  # a broken file is not tried again


def test_nothing_that_runs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Mapping[str, Any], index: int) -> dict[str, Any]:
        raise RunnerError("onnxruntime is not installed")

    benches.install(monkeypatch, answer)
    with pytest.raises(RunnerError, match="nothing ran on fake: onnxruntime is not installed"):
        bench(*benches.two_files(tmp_path), device=benches.DEVICE, options=QUICK)


def test_nothing_that_runs_has_each_reason_once_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: Mapping[str, Any], index: int) -> dict[str, Any]:
        raise RunnerError("fake: the runner was killed by SIGILL", hint="install an older version")

    benches.install(monkeypatch, answer)
    device = dataclasses.replace(benches.DEVICE, transport="ssh", host="pi@fake")
    with pytest.raises(RunnerError) as caught:
        bench(*benches.two_files(tmp_path), device=device, options=QUICK)
    assert caught.value.message == "nothing ran on fake: the runner was killed by SIGILL"
    assert caught.value.hint == "install an older version; `edgecnn devices probe fake` says what runs there"


def test_a_lost_device_ends_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Mapping[str, Any], index: int) -> dict[str, Any]:
        if index == 3:
            raise DeviceError("fake went away during the run and did not come back")
        return benches.result(benches.entry(1.0))

    opened = benches.install(monkeypatch, answer)
    with pytest.raises(DeviceError, match="did not come back"):
        bench(*benches.two_files(tmp_path), device=benches.DEVICE, options=QUICK)
    assert len(opened[0].requests) == 4


def test_an_emulated_board_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = benches.two_files(tmp_path)
    benches.install(monkeypatch, lambda request, index: benches.result(benches.entry(9.0), emulated=True))
    report = bench(a, device=benches.DEVICE)
    assert report.emulated
    assert report.warnings[0] == EMULATED


def test_a_reconnection_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = benches.two_files(tmp_path)
    said = "the connection was lost; tried once more"
    benches.install(monkeypatch, lambda *_: {**benches.result(benches.entry(9.0)), "warnings": [said]})
    assert said in bench(a, device=benches.DEVICE).warnings


def test_taints_are_told_once_with_how_many_processes_had_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = benches.two_files(tmp_path)

    def answer(request: Mapping[str, Any], index: int) -> dict[str, Any]:
        if benches.name_of(request)[0] == "b":
            return benches.result(benches.entry(1.0))
        taints = ["throttled: frequency capped"]
        taints += [f"shared CPU: {index} switches", "drifted: 1.2"] if index >= 6 else []
        return benches.result(benches.entry(1.0, taints=taints, warnings=taints))

    benches.install(monkeypatch, answer)
    report = bench(a, b, device=benches.DEVICE, options=QUICK)
    assert report.runs[0].taints == (
        "throttled: frequency capped",
        "shared CPU: 6 switches (in 3 of 6 processes)",
    )
    assert report.runs[1].taints == ()
    assert "a.onnx: throttled: frequency capped" in report.warnings


def test_drift_is_that_of_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = benches.two_files(tmp_path)
    benches.install(monkeypatch, lambda _, index: benches.result(benches.entry(1.0 + index, 1.0 + index)))
    report = bench(a, b, device=benches.DEVICE, options=QUICK)
    assert report.runs[0].taints[0].startswith("drifted: the last quarter of the runs is ")


def test_operators_are_timed_in_a_process_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = benches.two_files(tmp_path)
    rows = [{"op": "Conv", "name": "c1", "total_ms": 1.0, "count": 10, "share": 1.0}]

    def answer(request: Mapping[str, Any], index: int) -> dict[str, Any]:
        return benches.result(benches.entry(9.0 if request.get("profile") else 1.0, profile=rows))

    opened = benches.install(monkeypatch, answer)
    report = bench(a, device=benches.DEVICE, options=BenchOptions(profile=True))
    assert [bool(request.get("profile")) for request in opened[0].requests] == [False, True]
    assert (report.runs[0].profile, report.median_ms) == (tuple(rows), 1.0)


def test_sustained_runs_go_one_after_the_other_without_a_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = benches.install(monkeypatch, lambda *_: benches.result(benches.entry(1.0)))
    report = bench(
        *benches.two_files(tmp_path), device=benches.DEVICE, options=BenchOptions(sustained_s=600.0)
    )
    assert [request["sustained_s"] for request in opened[0].requests] == [600.0, 600.0]
    assert report.comparisons == ()
    assert "sustained runs went one after the other, so no ratio is given" in report.warnings


def test_a_preset_that_was_not_met_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = benches.two_files(tmp_path)
    benches.install(monkeypatch, lambda *_: benches.result(benches.entry(*[100.0] * 50)))
    report = bench(a, device=benches.DEVICE, options=BenchOptions(preset="mlperf"))
    assert "a.onnx: preset mlperf was not met: 50 runs in 5.0 s" in report.warnings


def test_mlperf_asks_for_1024_runs_and_60_seconds() -> None:
    assert BenchOptions(preset="mlperf").limits(1) == {
        "min_runs": 1024,
        "min_seconds": 60.0,
        "max_seconds": 600.0,
    }
    assert BenchOptions(preset="mlperf").limits(16)["min_runs"] == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BenchOptions(threads=(0,)), "threads is 0, expected 1 or more"),
        (BenchOptions(threads=(2, 2)), "threads are 2, 2, expected each once"),
        (BenchOptions(num_runs=0), "num_runs is 0, expected 1 or more"),
        (BenchOptions(seconds=float("nan")), "seconds is nan, expected seconds above 0"),
        (BenchOptions(preset="mlprf"), "preset is 'mlprf', expected one of mlperf"),
        (BenchOptions(sustained_s=9.0, num_runs=5), "sustained runs last as long as they say"),
    ],
)
def test_wrong_options(options: BenchOptions, message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        options.check()


def test_a_folder_stands_for_its_two_files(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.tflite", "model.pt2"):
        (tmp_path / name).write_bytes(b"x")
    assert [file.key for file in find_files([tmp_path])] == ["model.onnx", "model.tflite"]


def test_the_baseline_comes_first_and_once(tmp_path: Path) -> None:
    a, b = benches.two_files(tmp_path)
    assert [file.key for file in find_files([a, b], baseline=b)] == ["b.tflite", "a.onnx"]
    assert [file.key for file in find_files([a], baseline=b)] == ["b.tflite", "a.onnx"]


def test_names_that_clash_get_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / "x y" / "m.onnx", tmp_path / "z" / "m.onnx"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(b"x")
    assert [file.key for file in find_files(paths)] == ["x_y-m.onnx", "z-m.onnx"]
    assert [file.key for file in find_files([paths[0], paths[0]])] == ["m.onnx", "m.onnx-2"]  # A/A


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "net.txt").write_text("x")
    with pytest.raises(LoadError, match=r"gone\.onnx does not exist"):
        find_files([tmp_path / "gone.onnx"])
    with pytest.raises(LoadError, match=r"net\.txt is a \.txt file, expected \.onnx, \.tflite or \.pt2"):
        find_files([tmp_path / "net.txt"])
    with pytest.raises(LoadError, match=r"holds neither model\.onnx nor model\.tflite"):
        find_files([tmp_path])
