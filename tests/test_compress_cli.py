"""`edgecnn compress` as a user meets it: stdout, stderr, exit codes and files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import running
from running import RESULTS, names

from edgecnn.cli.main import main
from edgecnn.recipe import Recipe
from edgecnn.report import Report

pytestmark = pytest.mark.usefixtures("latency_costs_nothing")

Captured = pytest.CaptureFixture[str]
SMALL = running.small("classifier")


def write_images(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Write 8 PNGs of every class 0 to 4, of the sizes in turn."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(1)
    for label in range(5):
        (folder / str(label)).mkdir(parents=True)
        for index in range(8):
            pixels = rng.integers(0, 256, (*sizes[index % len(sizes)], 3), dtype=np.uint8)
            image.fromarray(pixels).save(folder / str(label) / f"{index}.png")
    return folder


def test_a_real_run(tmp_path: Path, examples_dir: Path) -> None:
    out = tmp_path / "o"
    done = running.run(
        "compress", examples_dir / "lenet5_digits.pt2", "--int8", "--data", "digits", "-o", out
    )
    assert done.returncode == 0, done.stderr
    for word in ("Smaller", "Faster", "Cost", "Trust", "ONNX vs TFLite", "preprocess", str(out)):
        assert word in done.stdout
    assert "Warning" not in done.stderr
    assert "calibrate (512)" in done.stderr
    assert names(out) == RESULTS
    report = Report.from_json((out / "report.json").read_text())
    assert report.latency is not None
    for key in ("float_onnx", "onnx", "float_tflite", "tflite"):
        figures = report.latency.of(key)
        assert figures is not None and figures.median_ms > 0 and figures.threads == 1
    assert set(report.latency.speedup) == {"onnx", "tflite"}


def test_json_is_all_of_stdout(tmp_path: Path, capsys: Captured) -> None:
    assert main(["compress", *SMALL, "--data", "small_networks:images", "-o", str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "report.json").read_text()
    assert Report.from_json(captured.out).data.source == "small_networks:images"


def test_a_state_dict_and_its_architecture(tmp_path: Path, examples_dir: Path, capsys: Captured) -> None:
    weights = str(examples_dir / "lenet5_digits.safetensors")
    arguments = ["--arch", "examples.lenet5:LeNet5", "--input-shape", "1x32x32", "--data", "digits"]
    assert main(["compress", weights, *arguments, "--num-samples", "64", "-o", str(tmp_path), "--json"]) == 0
    report = Report.from_json(capsys.readouterr().out)
    assert report.accuracy is not None and report.accuracy.float_top1 > 0.98


@pytest.mark.parametrize("sizes", [[(16, 16)], [(20, 31), (64, 16), (9, 9)]], ids=["one size", "mixed sizes"])
def test_a_folder_of_images(tmp_path: Path, capsys: Captured, sizes: list[tuple[int, int]]) -> None:
    folder = write_images(tmp_path / "images", sizes)
    assert main(["compress", *SMALL, "--data", str(folder), "-o", str(tmp_path / "o"), "--json"]) == 0
    report = Report.from_json(capsys.readouterr().out)
    assert report.accuracy is not None
    assert (report.data.num_calibration, report.accuracy.num_samples) == (16, 24)


def test_one_broken_image_among_many_is_left_out(tmp_path: Path, capsys: Captured) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(120):
        image.fromarray(np.full((16, 16, 3), 2 * index, np.uint8)).save(folder / f"{index:03}.png")
    broken = bytearray((folder / "050.png").read_bytes())
    broken[broken.index(b"IDAT") + 8] ^= 0xFF  # whole at both ends, so that only decoding shows it
    (folder / "050.png").write_bytes(bytes(broken))
    assert main(["compress", *SMALL, "--data", str(folder), "-o", str(tmp_path / "o"), "--json"]) == 0
    report = Report.from_json(capsys.readouterr().out)
    assert any("050.png" in warning and "left out" in warning for warning in report.warnings)


def test_an_npz_archive(tmp_path: Path, capsys: Captured) -> None:
    import small_networks

    pixels, labels = small_networks.images()
    np.savez(tmp_path / "set.npz", images=pixels, labels=labels)
    assert main(["compress", *SMALL, "--data", str(tmp_path / "set.npz"), "-o", str(tmp_path / "o")]) == 0
    assert "labelled images" in capsys.readouterr().out


def test_a_dry_run_prints_a_recipe(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "o"
    assert main(["compress", "missing.pt2", "--int8", "--seed", "5", "-o", str(out), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert Recipe.from_toml(text).seed == 5
    (tmp_path / "again.toml").write_text(text)
    assert Recipe.load(tmp_path / "again.toml") == Recipe.from_toml(text)
    assert not out.exists()


@pytest.mark.parametrize(
    ("budget", "code"),
    [
        (["--max-size-mb", "0.001"], 3),
        (["--max-latency-ms", "0.5"], 3),
        (["--max-drop", "1"], 3),
        (["--max-size-mb", "1", "--max-latency-ms", "1.5"], 0),
    ],
)
def test_budgets(tmp_path: Path, capsys: Captured, budget: list[str], code: int) -> None:
    assert main(["compress", *SMALL, "-o", str(tmp_path / "o"), *budget]) == code
    captured = capsys.readouterr()
    assert "Smaller" in captured.out
    assert ("error: budget missed: " in captured.err) == (code == 3)
    assert names(tmp_path / "o") == RESULTS


def test_the_hint_for_accuracy_that_nobody_could_measure(tmp_path: Path, capsys: Captured) -> None:
    main(["compress", *SMALL, "-o", str(tmp_path), "--max-drop", "1"])
    error = capsys.readouterr().err
    assert "accuracy was not measured, the budget is a drop of 1 points" in error
    assert "hint: give labelled images with --data" in error


def test_latency_of_another_machine_is_not_claimed(tmp_path: Path, capsys: Captured) -> None:
    main(["compress", *SMALL, "-o", str(tmp_path), "--target", "raspberrypi4"])
    out = " ".join(capsys.readouterr().out.split())
    assert "latency was measured on this machine, not on raspberrypi4" in out


@pytest.mark.parametrize(("preprocess", "warned"), [("raw", True), ("unit", False)])
def test_pixels_in_the_wrong_range(tmp_path: Path, capsys: Captured, preprocess: str, warned: bool) -> None:
    arguments = [*SMALL, "--preprocess", preprocess, "--data", "small_networks:images", "-o", str(tmp_path)]
    assert main(["compress", *arguments, "--json"]) == 0
    report = Report.from_json(capsys.readouterr().out)
    found = [warning for warning in report.warnings if "does not fit the network's training" in warning]
    assert bool(found) == warned
    if warned:
        assert "--preprocess unit would fit better" in found[0]


def test_existing_results_are_refused_before_the_long_work(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "report.json").write_text("mine")
    assert main(["compress", *SMALL, "-o", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}: already holds report.json\n")
    assert "--force" in error
    assert "load and export" not in error
    assert (tmp_path / "report.json").read_text() == "mine"
    assert main(["compress", *SMALL, "-o", str(tmp_path), "--force"]) == 0
    assert names(tmp_path) == RESULTS


def test_warnings_of_other_packages_show_when_debugging(tmp_path: Path) -> None:
    code = "import warnings; from edgecnn.cli.main import _quiet\nwith _quiet(): warnings.warn('from below')"
    for debug in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=running.environment({"EDGECNN_DEBUG": debug}),
            check=True,
        )
        assert ("from below" in done.stderr) == (debug == "1")


def test_a_reader_who_has_seen_enough(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        running.command("recipes", "show", "static_wi8_ai8"),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=running.environment(),
        cwd=tmp_path,
        check=False,
    )
    os.close(write)
    assert "Traceback" not in done.stderr


def test_the_report_of_a_run_reads_back_as_json(tmp_path: Path) -> None:
    assert main(["compress", *SMALL, "-o", str(tmp_path), "--format", "onnx"]) == 0
    values = json.loads((tmp_path / "report.json").read_text())
    assert set(values["artifacts"]) == {"onnx"}
    assert values["accuracy"] is None
