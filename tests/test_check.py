"""`check`: budgets against reports, the exit code and JUnit XML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import benches
import pytest
from reports import REPORT

from edgecnn.cli.main import main
from edgecnn.report.bench_results import EMULATED, BenchReport, Comparison
from edgecnn.report.budgets import Budgets, Check, run_checks
from edgecnn.report.junit import render_junit
from edgecnn.report.misses import budget_misses
from edgecnn.report.reading import FoundReport


def check(budgets: Budgets, *reports: object) -> list[tuple[str, bool, str]]:
    found = [FoundReport(f"r{i}.json", report) for i, report in enumerate(reports)]  # type: ignore[arg-type]
    return [(entry.name, entry.passed, entry.message) for entry in run_checks(found, budgets)]


def bench(**changes: object) -> BenchReport:
    return benches.report_of(**changes)


def test_a_report_of_compress() -> None:
    budgets = Budgets(max_drop=0.2, max_latency_ms=1.0, max_size_mb=0.07, min_speedup=1.5)
    assert check(budgets, REPORT) == [
        ("top-1 drop", True, "0.2 points, at most 0.2 points"),
        ("onnx size", True, "0.07 MB, at most 0.07 MB"),
        ("onnx latency", True, "0.061 ms, at most 1 ms"),
        ("tflite size", True, "0.068 MB, at most 0.07 MB"),
        ("tflite latency", False, "12.6 ms, at most 1 ms"),
        ("onnx speed-up", True, "1.84x (1.71 to 1.93), at least 1.5x"),
        ("tflite speed-up", False, "0.99x (0.96 to 1.03), at least 1.5x"),
    ]


def test_without_labels_the_drop_is_bounded_by_agreement_as_compress_does() -> None:
    report = replace(REPORT, accuracy=None)  # the worse file agrees on 99 %
    note = " (no labels: as many images as answer otherwise than float)"
    for limit, passed in ((1.0, True), (0.9, False)):
        message = f"1 points, at most {limit:g} points{note}"
        assert check(Budgets(max_drop=limit), report) == [("top-1 drop", passed, message)]
        assert (budget_misses(report, limit, None, None) == []) == passed


def test_what_was_not_measured_fails_and_says_why() -> None:
    report = replace(REPORT, accuracy=None, latency=None, agreement={})
    budgets = Budgets(max_drop=5, max_latency_ms=5, min_speedup=1)
    assert check(budgets, report) == [
        ("top-1 drop", False, "not measured: the run had no labelled images"),
        ("onnx latency", False, "not measured: the run did not time it"),
        ("tflite latency", False, "not measured: the run did not time it"),
        ("onnx speed-up", False, "not measured: the run did not time it against float"),
        ("tflite speed-up", False, "not measured: the run did not time it against float"),
    ]
    assert check(Budgets(max_drop=5), bench()) == [
        ("top-1 drop", False, "not measured: no report has accuracy of float and of a file")
    ]
    assert check(Budgets(min_speedup=1), bench(comparisons=())) == [
        ("speed-up", False, "not measured: no report compares a file with another")
    ]


def test_a_speedup_is_held_against_the_lower_end_of_its_interval() -> None:
    assert check(Budgets(min_speedup=2.45), bench()) == [
        ("model.tflite on pi4 speed-up", False, "2.5x (2.4 to 2.6), at least 2.45x")
    ]
    undecided = Comparison("model.onnx", "model.tflite", 2.5, None, None, "undecided", 3)
    assert check(Budgets(min_speedup=1), bench(comparisons=(undecided,)))[0][1] is False


def test_a_broken_run_fails_its_check() -> None:
    report = bench(runs=(benches.broken_run("a.onnx", "killed by SIGKILL"),), comparisons=())
    assert check(Budgets(max_latency_ms=9), report) == [
        ("a.onnx on pi4 latency", False, "not measured: the run broke: killed by SIGKILL")
    ]


def test_latency_of_an_emulated_board_is_refused_and_its_size_is_not() -> None:
    found = check(Budgets(max_latency_ms=99, max_size_mb=1, min_speedup=1), bench(emulated=True))
    assert [(name, passed) for name, passed, _ in found] == [
        ("model.onnx on pi4 latency", False),
        ("model.tflite on pi4 latency", False),
        ("model.onnx size", True),
        ("model.tflite size", True),
        ("model.tflite on pi4 speed-up", False),
    ]
    assert {message for name, passed, message in found if not passed} == {EMULATED}


def test_a_named_baseline_is_not_held_against_the_budget() -> None:
    budgets = Budgets(max_latency_ms=3, max_size_mb=1)
    names = [name for name, _, _ in check(budgets, bench(baseline="model.onnx"))]
    assert names == ["model.tflite on pi4 latency", "model.tflite size"]


def test_taints_are_named() -> None:
    run = benches.run_of("a.onnx", taints=("throttled: capped", "shared CPU: 9", "shared CPU: 8"))
    (found,) = check(Budgets(max_latency_ms=3), bench(runs=(run,), comparisons=()))
    assert found == ("a.onnx on pi4 latency", True, "2 ms, at most 3 ms, tainted: throttled, shared CPU")


def test_top1_on_the_device_against_the_first_file() -> None:
    accuracy = (benches.accuracy_of("f.onnx", 0.9), benches.accuracy_of("q.onnx", 0.88))
    assert check(Budgets(max_drop=1), bench(accuracy=accuracy)) == [
        ("q.onnx on pi4 top-1 drop", False, "2 points, at most 1 points against f.onnx")
    ]


def test_the_boards_word_counts() -> None:
    budgets = Budgets(max_latency_ms=9, max_drop=1, min_speedup=1)
    names = [name for name, _, _ in check(budgets, REPORT, bench())]
    assert names == [  # no baseline was named, so the float file of compress is the measure
        "top-1 drop",
        "model.onnx on pi4 latency",
        "model.tflite on pi4 latency",
        "onnx speed-up",
        "tflite speed-up",
    ]
    names = [name for name, _, _ in check(budgets, REPORT, bench(baseline="model.onnx"))]
    assert names[-1] == "model.tflite on pi4 speed-up"


def test_junit_counts_and_escapes() -> None:
    checks = [
        Check("r.json", 'a "b" <size>', passed=False, message="2 MB & \x1bmore"),
        Check("r.json", "c", passed=True, message="fine"),
    ]
    root = ET.fromstring(render_junit(checks))
    suite = root.find("testsuite")
    assert root.tag == "testsuites"
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    first, second = suite.findall("testcase")
    assert (first.get("classname"), first.get("name")) == ("r.json", 'a "b" <size>')
    failure = first.find("failure")
    assert failure is not None
    assert (failure.get("message"), failure.get("type")) == ("2 MB & ?more", "BudgetError")
    assert second.find("failure") is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(REPORT.to_json())
    assert main(["check", str(tmp_path), "--max-drop", "1"]) == 0
    assert capsys.readouterr().out == "ok    top-1 drop: 0.2 points, at most 1 points (report.json)\n"
    (tmp_path / "bench-pi4.json").write_text(bench().to_json())
    junit = tmp_path / "junit.xml"
    assert main(["check", str(tmp_path), "--max-latency-ms", "3", "--junit", str(junit)]) == 3
    found = capsys.readouterr()
    assert found.out.splitlines() == [
        "FAIL  model.onnx on pi4 latency: 5 ms, at most 3 ms (bench-pi4.json)",
        "ok    model.tflite on pi4 latency: 2 ms, at most 3 ms (bench-pi4.json)",
    ]
    assert found.err == "error: 1 of 2 checks failed\n"
    assert ET.parse(junit).getroot().get("failures") == "1"


def test_several_reports_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "both.json"
    path.write_text(f"[{bench().to_json()},{bench(device='pi5').to_json()}]")
    assert main(["check", str(path), "--max-latency-ms", "9"]) == 0
    assert "model.onnx on pi5 latency: 5 ms, at most 9 ms (both.json[1])" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds neither report.json nor bench-DEVICE.json"),
        ("{", "not valid JSON"),
        ("[]", "an empty list, expected a report"),
        ('{"schema_version": 9}', "schema_version is 9, expected 1"),
    ],
)
def test_reports_that_are_none(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert main(["check", str(tmp_path), "--max-drop", "1"]) == 1
    assert message in capsys.readouterr().err


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(REPORT.to_json())
    assert main(["check", str(tmp_path)]) == 2
    assert "nothing to check, give at least one of --max-drop" in capsys.readouterr().err
