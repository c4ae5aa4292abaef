"""The bench report: JSON and back, and its renderings."""

from __future__ import annotations

import csv
import io
import json

import benches
import pytest
from rich.console import Console

from edgecnn.errors import DataError
from edgecnn.report.bench_csv import COLUMNS, render_csv
from edgecnn.report.bench_results import EMULATED, BenchReport, Comparison
from edgecnn.report.bench_terminal import render_bench

ROW = {"op": "Conv", "name": "conv1", "total_ms": 1.5, "count": 10, "share": 0.75}


def full_report(**changes: object) -> BenchReport:
    broken = benches.broken_run("c.onnx")
    whole = benches.run_of("model.onnx@2", profile=(ROW,), taints=("throttled: now",), threads=2)
    values = {
        "runs": (whole, benches.run_of("model.tflite@2"), broken),
        "comparisons": (Comparison("model.onnx@2", "model.tflite@2", 1.0, None, None, "undecided", 3),),
        "accuracy": (benches.accuracy_of("model.onnx"), benches.accuracy_of("model.tflite", None)),
        "warnings": ("model.onnx@2: throttled: now",),
        "data": "digits",
        "baseline": "model.onnx",
        **changes,
    }
    return benches.report_of(**values)


def text_of(report: BenchReport) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80, color_system=None).print(render_bench(report))
    return stream.getvalue()


def test_json_and_back() -> None:
    report = full_report()
    assert BenchReport.from_json(report.to_json()) == report
    values = json.loads(report.to_json())
    assert (values["schema_version"], values["kind"]) == (1, "bench")
    assert values["runs"][0]["samples_ns"] == [2_000_000] * 6
    assert values["runs"][2]["median_ms"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "its kind is not 'bench'"),
        ({"schema_version": 2}, "schema_version is 2, expected 1"),
        ({"runs": 3}, r"bench report\.runs is 3, expected a list"),
        ({"emulated": "no"}, r"bench report\.emulated is 'no', expected bool"),
    ],
)
def test_json_that_is_no_report(change: dict[str, object], message: str) -> None:
    values = {**json.loads(full_report().to_json()), **change}
    with pytest.raises(DataError, match=message):
        BenchReport.from_json(json.dumps(values))


def test_a_report_cut_short() -> None:
    with pytest.raises(DataError, match="not valid JSON"):
        BenchReport.from_json(full_report().to_json()[:100])


def test_a_broken_run_cannot_have_a_number() -> None:
    with pytest.raises(ValueError, match=r"has error 'x' and median_ms 2\.0"):
        benches.run_of("a", error="x")
    with pytest.raises(ValueError, match="6 samples in blocks of 3"):
        benches.run_of("a", block_lengths=(3,))


def test_a_run_by_its_key() -> None:
    assert full_report().run("model.tflite@2").threads == 1
    with pytest.raises(DataError, match=r"has no run 'x', expected one of model\.onnx@2"):
        full_report().run("x")


def test_csv_has_one_row_per_run() -> None:
    report = full_report(emulated=True)
    rows = list(csv.DictReader(io.StringIO(render_csv([report, report]))))
    assert len(rows) == 6
    assert tuple(rows[0]) == COLUMNS
    assert (rows[0]["device"], rows[0]["median_ms"], rows[0]["top1"]) == ("pi4", "2.0", "0.9")
    assert (rows[0]["emulated"], rows[0]["taints"], rows[0]["p99_ms"]) == ("True", "throttled: now", "")
    assert (rows[1]["verdict"], rows[1]["top1"]) == ("undecided", "")
    assert (rows[2]["error"], rows[2]["median_ms"], rows[2]["num_samples"]) == ("no memory", "", "")


def test_the_table_fits_80_columns_and_says_what_matters() -> None:
    text = text_of(full_report())
    assert max(map(len, text.splitlines())) <= 80
    for part in ("Raspberry Pi 4, aarch64, 4 cores", "2.00 ms*", "±2.0 %", "failed", "90.00 %", "0 LSB"):
        assert part in text
    assert "1.00x, undecided" in text
    assert "operators of model.onnx@2" in text
    assert EMULATED not in text


def test_the_table_of_an_emulated_board() -> None:
    report = full_report(emulated=True, warnings=(EMULATED, "hot"))
    assert text_of(report).count(EMULATED) == 1


def test_a_long_run_says_how_it_changed() -> None:
    samples = (10_000_000_000,) * 3 + (15_000_000_000,)
    trace = tuple(
        {"t_s": t, "temperature_c": c, "frequency_mhz": f, "throttled": None}
        for t, c, f in ((0.0, 48.2, 1800.0), (30.0, 81.7, 1200.0))
    )
    run = benches.run_of("m.onnx", samples_ns=samples, block_lengths=(4,), trace=trace)
    line = next(line for line in text_of(benches.report_of(runs=(run,))).splitlines() if "MHz" in line)
    assert " ".join(line.split()) == "m.onnx 10.0 s 15.0 s 48 to 82 °C 1200 to 1800 MHz"


def test_long_names_fold_and_numbers_stay_whole() -> None:
    key = "a_network_with_a_very_long_name_indeed-" * 2 + "model.onnx"
    text = text_of(benches.report_of(runs=(benches.run_of(key, 12.3456),), comparisons=()))
    assert max(map(len, text.splitlines())) <= 80
    assert "12.3 ms" in text
    assert "18.0 MB" in text
