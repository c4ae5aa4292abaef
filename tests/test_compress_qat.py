"""`edgecnn compress --int8 --qat`: from the flags to files that are proven like those of static int8."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import running
from running import RESULTS, names

from edgecnn.cli.main import main
from edgecnn.report import Report

pytestmark = pytest.mark.usefixtures("latency_costs_nothing")

Captured = pytest.CaptureFixture[str]
SMALL = running.small("deep")
DATA = ["--data", "small_networks:images"]
BRIEF = ["--epochs", "1", "--batch-size", "8"]


def test_one_command_trains_and_proves(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    code = main(["compress", *SMALL, "--int8", "--qat", *BRIEF, *DATA, "-o", str(out), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report = Report.from_json(captured.out)
    assert names(out) == RESULTS, "no checkpoints are left"
    assert report.recipe == "qat_wi8_ai8"
    assert [step.name for step in report.passes][-1] == "quantize_aware_training"
    assert {figures.max_lsb for figures in report.parity.values()} == {0}
    kinds = [detail["kind"] for detail in report.details if detail["pass"] == "quantize_aware_training"]
    training = ["distillation", "training_curves"]
    assert kinds == [*training, "quantize_aware_training", *training]
    assert "quantize_aware_training" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--qat", *DATA], "--qat without --int8: it trains with the rounding of int8", "add --int8"),
        (["--int8", "--qat"], "--qat trains, and there are no images to train on", "give some with --data"),
        (
            ["--recipe", "qat_wi8_ai8"],
            "the pass quantize_aware_training trains the network, and there are no images to train on",
            "give them with --data or --train-data",
        ),
        (
            ["--int8", "--qat", *DATA, "--teacher", "small_networks:regression"],
            "expected the same outputs",
            "the teacher must have been trained for the same classes",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: Captured, arguments: list[str], message: str, hint: str
) -> None:
    out = tmp_path / "out"
    assert main(["compress", *SMALL, *arguments, "-o", str(out)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert hint in error
    assert "Traceback" not in error
    assert not out.exists()


def test_a_dry_run_shows_it(tmp_path: Path, capsys: Captured) -> None:
    arguments = ["--int8", "--qat", "--epochs", "0.5", *DATA, "-o", str(tmp_path), "--dry-run"]
    assert main(["compress", *SMALL, *arguments]) == 0
    found = capsys.readouterr().out
    assert 'pass = "quantize_aware_training"' in found
    assert "epochs = 0.5" in found
    assert "learn from   the network as it was given" in found
