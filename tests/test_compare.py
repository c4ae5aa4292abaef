"""`compare`: two reports side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import benches
import pytest
from reports import REPORT

from edgecnn.cli.main import main
from edgecnn.errors import DataError
from edgecnn.report import ArtifactFigures, LatencyFigures, LatencyReport
from edgecnn.report.bench_results import EMULATED
from edgecnn.report.reading import FoundReport
from edgecnn.report.side_by_side import Row, compare_reports

LATER = replace(
    REPORT,
    artifacts={"onnx": ArtifactFigures("out/model.onnx", "a" * 64, 35_000)},
    latency=LatencyReport(onnx=LatencyFigures(0.122, None, None, threads=1)),
)


def rows_of(first: object, second: object, **options: bool) -> tuple[dict[tuple[str, str], Row], list[str]]:
    found = FoundReport("a.json", first), FoundReport("b.json", second)  # type: ignore[arg-type]
    rows, warnings = compare_reports(*found, **options)
    return {(row.figure, row.file): row for row in rows}, warnings


def test_reports_of_compress() -> None:
    rows, warnings = rows_of(REPORT, LATER)
    assert rows["size", "onnx"].change == "-50.0 %"
    assert (rows["size", "tflite"].second, rows["size", "tflite"].change) == (None, "")
    assert (rows["median latency", "onnx"].change, rows["median latency", "onnx"].is_worse) == (
        "+100.0 %",
        True,
    )
    assert rows["top-1", "float"].change == "same"
    assert rows["parity", "onnx vs tflite"].first == 2
    assert warnings[0].startswith("latencies of separate runs differ")


def test_other_numbers_of_threads_are_shown_without_a_change() -> None:
    other = replace(LATER, latency=LatencyReport(onnx=LatencyFigures(0.122, None, None, threads=4)))
    row = rows_of(REPORT, other)[0]["median latency", "onnx"]
    assert (row.first, row.second, row.change, row.is_worse) == (0.061, 0.122, "", False)


def test_reports_of_bench() -> None:
    first = benches.report_of(accuracy=(benches.accuracy_of("model.onnx", 0.9),))
    second = benches.report_of(
        runs=(benches.run_of("model.onnx", 2.5), benches.broken_run("model.tflite")),
        comparisons=(),
        accuracy=(benches.accuracy_of("model.onnx", 0.8),),
    )
    rows, _ = rows_of(first, second)
    assert rows["median latency", "model.onnx"].change == "-50.0 %"
    assert rows["median latency", "model.tflite"].second is None
    assert (rows["top-1", "model.onnx"].change, rows["top-1", "model.onnx"].is_worse) == (
        "−10.00 points",
        True,
    )


def test_latencies_of_different_devices_are_refused_unless_said() -> None:
    other = benches.report_of(environment={"board": "Raspberry Pi 5"})
    message = r"latency on pi4 \(Raspberry Pi 4\) and on pi4 \(Raspberry Pi 5\) cannot be compared"
    with pytest.raises(DataError, match=message):
        rows_of(benches.report_of(), other)
    rows, warnings = rows_of(benches.report_of(), other, across_devices=True)
    assert rows["median latency", "model.onnx"].change == ""
    assert rows["size", "model.onnx"].change == "same"
    assert warnings == ["latencies are of pi4 (Raspberry Pi 4) and of pi4 (Raspberry Pi 5)"]


def test_sizes_of_compress_on_different_machines_are_compared_without_latency() -> None:
    first, second = replace(REPORT, latency=None), replace(LATER, environment={"cpu": "other"})
    rows, warnings = rows_of(first, second)
    assert rows["size", "onnx"].change == "-50.0 %"
    assert warnings == []


def test_emulated_latencies_have_no_change() -> None:
    rows, warnings = rows_of(benches.report_of(), benches.report_of(emulated=True))
    assert rows["median latency", "model.onnx"].change == ""
    assert f"b.json: {EMULATED}" in warnings


def test_compress_and_bench_do_not_compare() -> None:
    with pytest.raises(DataError, match=r"a\.json and b\.json are not of the same kind"):
        rows_of(REPORT, benches.report_of())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, report in (("a", REPORT), ("b", LATER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(report.to_json())
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["compare", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("70.0 kB" in line and "35.0 kB" in line and "-50.0 %" in line for line in lines)
    assert main(["compare", *paths, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0] == {
        "figure": "size",
        "file": "onnx",
        "unit": "bytes",
        "first": 70_000,
        "second": 35_000,
        "is_comparable": True,
        "change": "-50.0 %",
    }
    assert main(["compare", paths[0], str(tmp_path / "gone")]) == 1
    assert "gone cannot be read: No such file or directory" in capsys.readouterr().err


def test_a_folder_with_several_bench_reports_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pi4", "pi5"):
        (tmp_path / f"bench-{name}.json").write_text(benches.report_of(device=name).to_json())
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "holds 2 reports, expected one" in error
    assert "give one of bench-pi4.json, bench-pi5.json" in error
