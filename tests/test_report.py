"""The Report: its JSON is complete, finite and checked; its table says what was found."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from reports import REPORT
from rich.console import Console

from edgecnn.devices.kernels import kernels_for
from edgecnn.errors import DataError
from edgecnn.report import ParityFigures, Report, SpeedupFigures
from edgecnn.report.misses import budget_misses
from edgecnn.report.terminal import print_inspection, print_report
from edgecnn.runner.preprocess import Preprocess


def text_of(report: Report, width: int = 80) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def row(text: str, start: str) -> str:
    """The line that begins with `start`, with single spaces."""
    return next(" ".join(line.split()) for line in text.splitlines() if line.strip().startswith(start))


def test_json_round_trip() -> None:
    assert Report.from_json(REPORT.to_json()) == REPORT


def test_json_round_trip_with_nothing_measured() -> None:
    bare = replace(
        REPORT, accuracy=None, latency=None, sqnr_db={"onnx": None}, agreement={"onnx": None}, warnings=()
    )
    assert Report.from_json(bare.to_json()) == bare


def test_json_has_every_key_of_the_schema() -> None:
    values = json.loads(REPORT.to_json())
    assert next(iter(values)) == "schema_version"
    assert values["schema_version"] == 1
    assert values["model"] == {
        "name": "lenet5", "params": 61706, "macs": 416520, "size_bytes": 246824, "task": "classification",
        "params_after": None, "macs_after": None,
    }  # fmt: skip
    assert set(values) >= {
        "recipe", "seed", "environment", "passes", "artifacts", "parity", "accuracy", "latency", "warnings",
        "sqnr_db", "agreement", "sizes", "data", "target", "timings",
    }  # fmt: skip
    assert set(values["passes"][0]) == {"name", "parameters", "seconds", "before", "after"}
    assert set(values["artifacts"]["onnx"]) == {"path", "sha256", "size_bytes"}
    assert values["accuracy"] == {
        "float": 0.984, "onnx": 0.982, "tflite": 0.984, "drop_points": 0.2, "num_samples": 500,
        "drop_error_points": None,
    }  # fmt: skip
    assert set(values["parity"]["onnx_vs_tflite"]) == {
        "max_lsb", "fraction_within_1_lsb", "top1_agreement", "num_samples", "max_relative_error",
    }  # fmt: skip
    assert set(values["latency"]) == {"float_onnx", "onnx", "float_tflite", "tflite", "speedup"}
    assert values["latency"]["float_onnx"]["p99_ms"] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_is_not_written(value: float) -> None:
    broken = replace(REPORT, sqnr_db={"onnx": value})
    with pytest.raises(
        DataError, match=rf"report\.sqnr_db\.onnx is {value}, expected a finite number or null"
    ):
        broken.to_json()


def test_a_value_that_json_does_not_know_is_named() -> None:
    broken = replace(REPORT, environment={"path": {1, 2}})
    with pytest.raises(DataError, match=r"report\.environment\.path is of type set"):
        broken.to_json()


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (
            ("parity", "onnx_vs_reference", "max_lsb"),
            "x",
            "report.parity.onnx_vs_reference.max_lsb is 'x', expected int",
        ),
        (
            ("parity", "onnx_vs_tflite", "top1_agreement"),
            1.5,
            "report.parity.onnx_vs_tflite: top1_agreement is 1.5",
        ),
        (("model", "params"), 1.5, "report.model.params is 1.5, expected int"),
        (("model", "params"), True, "report.model.params is True, expected int"),
        (("model",), [], "report.model is [], expected an object"),
        (("passes",), {}, "report.passes is {}, expected a list"),
        (("warnings",), [1], "report.warnings[0] is 1, expected str"),
        (("artifacts",), None, "report.artifacts is None, expected an object"),
        (
            ("latency", "speedup", "onnx", "low"),
            3.0,
            "report.latency.speedup.onnx: the interval is [3.0, 1.93]",
        ),
        (("schema_version",), 2, "report: schema_version is 2, expected 1"),
    ],
)
def test_a_wrong_field_is_named(place: tuple[str, ...], value: Any, expected: str) -> None:
    values = json.loads(REPORT.to_json())
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(DataError) as caught:
        Report.from_json(json.dumps(values))
    assert expected in str(caught.value)


def test_a_missing_field_is_named() -> None:
    values = json.loads(REPORT.to_json())
    del values["parity"]["onnx_vs_tflite"]["num_samples"]
    with pytest.raises(DataError, match=r"report\.parity\.onnx_vs_tflite\.num_samples is missing"):
        Report.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("[]", "schema_version is None, expected 1"),
    ],
)
def test_a_text_that_is_no_report(text: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        Report.from_json(text)


def test_a_report_of_a_later_version_with_more_keys_is_read() -> None:
    values = json.loads(REPORT.to_json())
    values["energy"] = {"joules": 1}
    assert Report.from_json(json.dumps(values)) == REPORT


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((1.01, 1.2), "faster"),
        ((0.9, 0.99), "slower"),
        ((0.9, 1.1), "no difference"),
        ((1.0, 1.1), "no difference"),
    ],
)
def test_the_verdict_on_a_speedup_follows_its_interval(interval: tuple[float, float], verdict: str) -> None:
    assert SpeedupFigures(sum(interval) / 2, *interval).verdict == verdict


def test_the_table_answers_the_four_questions() -> None:
    text = text_of(REPORT)
    assert row(text, "Smaller") == "Smaller ONNX 280 kB 70.0 kB 4.00x smaller (4.00x through gzip)"
    assert row(text, "Faster") == "Faster ONNX 0.112 ms 0.0610 ms 1.84x faster (1.71 to 1.93), 1 thread"
    assert row(text, "Cost") == "Cost ONNX 98.40 % 98.20 % -0.20 points, agree 99.5 %, SQNR 32.1 dB"
    assert row(text, "Trust") == "Trust ONNX vs reference max 1 LSB, 99.99 % within 1, top-1 100 %"
    assert row(text, "proven on").startswith("proven on 500 images, held out from the 512")
    assert row(text, "warning") == "warning the clock frequency moved during the measurement"
    assert "2.3 s to make, 4.2 s to prove" in text
    assert "out/model.onnx  out/model.tflite" in text


def test_what_got_worse_is_said_plainly() -> None:
    text = text_of(REPORT)
    assert "1.25x LARGER" in text
    assert "no difference (0.96 to 1.03), 2 threads" in text
    assert REPORT.latency is not None
    slower = replace(
        REPORT, latency=replace(REPORT.latency, speedup={"onnx": SpeedupFigures(0.8, 0.75, 0.84)})
    )
    assert "1.25x SLOWER (1.19 to 1.33), 1 thread" in text_of(slower)
    stream = io.StringIO()
    print_report(slower, Console(file=stream, width=100, force_terminal=True, color_system="standard"))
    assert "\x1b[1;31m1.25x SLOWER" in stream.getvalue()


def test_what_was_not_measured_is_said_plainly() -> None:
    text = text_of(replace(REPORT, accuracy=None, latency=None, agreement={}))
    assert row(text, "Cost") == "Cost top-1 - - unmeasured: no labels"
    assert row(text, "Faster") == "Faster not measured"
    assert "agree" not in text


def test_images_that_are_not_held_out_are_said_plainly() -> None:
    text = text_of(replace(REPORT, data=replace(REPORT.data, held_out=False)), width=120)
    assert "500 images, NOT held out from the 512 calibrated on (digits)" in text


def test_nearly_all_is_not_rounded_to_all() -> None:
    near = {"onnx_vs_tflite": ParityFigures(1, 0.999999, 0.99999, 9)}
    assert "99.99 % within 1, top-1 99.99 %" in text_of(replace(REPORT, parity=near))


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_is_plain_ascii_without_colour(width: int) -> None:
    text = text_of(REPORT, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert text.isascii()


def test_names_are_not_taken_for_markup() -> None:
    text = text_of(replace(REPORT, model=replace(REPORT.model, name="net[bold]")))
    assert "net[bold]" in text


def test_inspection_lists_layers_and_what_cannot_be_exported() -> None:
    stream = io.StringIO()
    layer = {
        "layer": "features.0",
        "op": "conv2d",
        "output_shape": [None, 6, 8, 8],
        "params": 156,
        "macs": 9600,
    }
    found = {
        "name": "net", "params": 156, "macs": 9600, "size_bytes": 624,
        "inputs": [{"name": "x", "shape": [None, 3, 8, 8]}], "outputs": [], "warnings": ["random weights"],
        "preprocess": Preprocess((8, 8), source="unit").to_dict(), "layers": [layer],
        "unsupported": ["head (aten.foo)"],
    }  # fmt: skip
    print_inspection(found, Console(file=stream, width=80, color_system=None))
    text = stream.getvalue()
    assert row(text, "net") == "net 156 params, 9.60 k MACs, 624 B"
    assert row(text, "inputs") == "inputs x nx3x8x8"
    assert "preprocess 8x8 rgb, pixels * 0.003922, mean 0 0 0, std 1 1 1 (unit)" in " ".join(text.split())
    assert "warning random weights" in " ".join(text.split())
    assert row(text, "features.0") == "features.0 conv2d nx6x8x8 156 9.60 k"
    assert row(text, "warning") == "warning cannot be exported yet: head (aten.foo)"


def test_a_sure_difference_under_one_percent_is_none() -> None:
    assert SpeedupFigures(0.997, 0.996, 0.998).verdict == "no difference"
    assert SpeedupFigures(0.98, 0.979, 0.981).verdict == "slower"
    assert SpeedupFigures(1.02, 1.01, 1.03).verdict == "faster"


def test_what_was_pruned_and_trained_on_the_terminal() -> None:
    model = replace(REPORT.model, params_after=20_000, macs_after=100_000)
    data = replace(REPORT.data, train_source="digits", num_train=1000, num_validation=50)
    curves = {
        "pass": "fine_tune",
        "kind": "training_curves",
        "epochs": [0, 4.0],
        "validation_accuracy": [0.5, 0.875],
        "seconds": 12.0,
    }
    text = text_of(replace(REPORT, model=model, data=data, details=(curves,)), width=100)
    assert row(text, "Pruned") == "Pruned MACs 417 k 100 k 4.17x fewer"
    assert row(text, "params") == "params 61.7 k 20.0 k 3.09x fewer"
    assert row(text, "trained on") == "trained on 1000 images of digits"
    assert row(text, "fine_tune") == "fine_tune 4 epochs, validation top-1 50.00 % → 87.50 %, 12 s"


def test_float_files_are_near_each_other_in_their_range() -> None:
    parity = {"onnx_vs_reference": replace(REPORT.parity["onnx_vs_tflite"], max_relative_error=3e-7)}
    text = text_of(replace(REPORT, parity=parity))
    assert "max 3e-07 of range, top-1" in row(text, "Trust")


def test_a_drop_without_labels_is_bounded_by_agreement() -> None:
    unlabelled = replace(REPORT, accuracy=None)
    assert budget_misses(unlabelled, 1.0, None, None) == []
    (miss,) = budget_misses(unlabelled, 0.9, None, None)
    assert miss.startswith("accuracy was not measured, the budget is a drop of 0.9 points; without labels")
    assert miss.endswith("99.0 %: on the images judged, top-1 can move by 1 points at most")
    made_up = replace(unlabelled, data=replace(REPORT.data, synthetic=True))
    assert budget_misses(made_up, 0.9, None, None) == [miss.partition(";")[0]]


def test_the_kernels_of_the_target_are_named() -> None:
    detail = {"pass": "target", "kind": "kernels", **kernels_for("aarch64").to_dict()}
    report = replace(REPORT, details=(detail,))
    assert row(text_of(report, 120), "kernels").startswith("kernels no dot product: smull and smlal")
    assert Report.from_json(report.to_json()) == report
