"""What goes wrong ends with exit code 1, one clear line and a hint, and leaves the directory as it was."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import running
import small_networks
from running import RESULTS, names

import edgecnn
from edgecnn import artifact as artifact_module
from edgecnn.cli.main import main
from edgecnn.compress import CompressOptions
from edgecnn.errors import EdgeCNNError, OutputError, ParityError, RunnerError

pytestmark = pytest.mark.usefixtures("latency_costs_nothing")

Captured = pytest.CaptureFixture[str]
SMALL = running.small("classifier")
LOAD = edgecnn.LoadOptions(input_shape=small_networks.SIZE, preprocess="unit")
FAST = CompressOptions(load=LOAD, num_samples=16, measure=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def fails(arguments: list[str], capsys: Captured) -> tuple[str, str]:
    """Run the command; return its error and its hint."""
    assert main(["compress", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    lines = captured.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert len(errors) == 1
    assert lines[-1] == (hints or errors)[-1]
    return errors[0].removeprefix("error: "), "".join(hints).removeprefix("hint: ")


class TestOutput:
    @pytest.mark.parametrize("place", ["file/out", "file"])
    def test_a_file_in_the_way(self, tmp_path: Path, capsys: Captured, place: str) -> None:
        (tmp_path / "file").write_text("mine")
        message, hint = fails([*SMALL, "-o", str(tmp_path / place)], capsys)
        assert message == f"cannot write {tmp_path / place}: Not a directory"
        assert "choose another directory with -o" in hint
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
    def test_no_permission(
        self, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        def refuse(path: Path, data: bytes) -> None:
            raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr(artifact_module, "_write_to_disk", refuse)
        message, hint = fails([*SMALL, "-o", str(tmp_path / "o")], capsys)
        assert message == f"cannot write {tmp_path / 'o'}: {os.strerror(number)}"
        assert hint.endswith("choose another directory with -o")
        assert not (tmp_path / "o").exists()

    def test_a_system_folder(self, capsys: Captured) -> None:
        if not Path("/proc/self").exists():
            pytest.skip("needs /proc")
        message, _ = fails([*SMALL, "-o", "/proc/edgecnn/out"], capsys)
        assert message.startswith("cannot write /proc/edgecnn/out: ")

    def test_the_disk_fills_up_while_results_are_written(
        self, small_disk: Path, capsys: Captured, examples_dir: Path
    ) -> None:
        model = str(examples_dir / "lenet5_digits.pt2")
        message, hint = fails([model, "--num-samples", "8", "-o", str(small_disk / "o")], capsys)
        assert re.fullmatch(rf"cannot write {small_disk}/o/model\.\w+: No space left on device", message)
        assert hint == "the disk is full: free some space or choose another directory with -o"
        assert list(small_disk.iterdir()) == []

    def test_the_disk_of_temporary_files_fills_up(
        self,
        small_disk: Path,
        tmp_path: Path,
        capsys: Captured,
        examples_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
        model = str(examples_dir / "lenet5_digits.pt2")
        message, hint = fails([model, "--num-samples", "8", "-o", str(tmp_path / "o")], capsys)
        assert message == f"cannot write temporary files in {small_disk}: No space left on device"
        assert "TMPDIR" in hint
        assert list(small_disk.iterdir()) == []
        assert not (tmp_path / "o").exists()

    @pytest.mark.parametrize("failing", range(6))
    def test_a_failure_between_two_renames_puts_everything_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
    ) -> None:
        folder, calls = tmp_path / "o", [0]
        folder.mkdir()
        old = {folder / name: name.encode() for name in RESULTS}
        artifact_module.publish_files(folder, old, force=False)
        rename = Path.replace

        def replace(path: Path, target: Path) -> Path:
            if path.suffix == ".tmp" and calls[0] == failing:
                calls[0] += 1
                raise OSError(errno.EIO, "Input/output error", str(path), None, str(target))
            calls[0] += 1
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", replace)
        with pytest.raises(OutputError, match=r"cannot write .*/o/(model|report)\..*: Input/output error"):
            artifact_module.publish_files(folder, dict.fromkeys(old, b"new"), force=True)
        assert {path: path.read_bytes() for path in folder.iterdir()} == old

    def test_ctrl_c_between_two_renames_waits_for_the_last(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename = Path.replace

        def replace(path: Path, target: Path) -> Path:
            os.kill(os.getpid(), signal.SIGINT)
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            artifact_module.publish_files(tmp_path, {tmp_path / n: b"new" for n in RESULTS}, force=False)
        assert names(tmp_path) == RESULTS
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    @pytest.mark.parametrize("force", [False, True])
    def test_two_runs_that_end_at_once(self, tmp_path: Path, force: bool) -> None:
        """Without force the second is refused; with it the files of one run stay together."""
        barrier, outcomes = threading.Barrier(2), []

        def publish(content: bytes) -> None:
            barrier.wait(60)
            try:
                artifact_module.publish_files(tmp_path, {tmp_path / n: content for n in RESULTS}, force)
                outcomes.append("done")
            except OutputError as error:
                outcomes.append(error.message)

        threads = [threading.Thread(target=publish, args=(content,)) for content in (b"first", b"second")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert names(tmp_path) == RESULTS
        assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
        assert outcomes.count("done") == (2 if force else 1)
        assert force or any("already holds" in outcome for outcome in outcomes)


class TestNetworks:
    def test_weights_that_are_not_finite(self, tmp_path: Path, capsys: Captured) -> None:
        arguments = ["small_networks:not_finite", *SMALL[1:], "-o", str(tmp_path / "o")]
        message, hint = fails(arguments, capsys)
        assert message == (
            "weights are not finite: 0.weight (1 NaN, 0 infinite of 216), 5.bias (0 NaN, 1 infinite of 5)"
        )
        assert "earlier checkpoint" in hint

    def test_an_operator_that_cannot_be_exported(self, tmp_path: Path, capsys: Captured) -> None:
        arguments = ["small_networks:CumulativeSum", *SMALL[1:], "-o", str(tmp_path / "o")]
        message, hint = fails(arguments, capsys)
        assert "neck (aten.cumsum.default)" in message
        assert "edgecnn inspect" in hint
        assert not (tmp_path / "o").exists()

    def test_an_unforeseen_error_has_no_traceback(
        self, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object) -> None:
            raise ZeroDivisionError("division by zero")

        monkeypatch.delenv("EDGECNN_DEBUG", raising=False)
        monkeypatch.setattr(importlib.import_module("edgecnn.compress"), "build_report", broken)
        message, hint = fails([*SMALL, "-o", str(tmp_path / "o")], capsys)
        assert message == "ZeroDivisionError: division by zero"
        assert "EDGECNN_DEBUG=1" in hint
        assert not (tmp_path / "o").exists()


class TestData:
    def test_a_single_image(self, tmp_path: Path) -> None:
        pixels = small_networks.images()[0][:1]
        report = edgecnn.compress(small_networks.classifier(), data=pixels, out=tmp_path, options=FAST).report
        assert (report.data.num_calibration, report.data.num_proof, report.data.held_out) == (1, 1, False)
        assert any("one image only" in warning for warning in report.warnings)

    def test_images_without_any_light(self, tmp_path: Path) -> None:
        report = edgecnn.compress(
            small_networks.classifier(), data="small_networks:black_images", out=tmp_path, options=FAST
        ).report
        assert all(parity.max_lsb <= 1 for parity in report.parity.values())
        assert any("zero on every calibration image" in warning for warning in report.warnings)

    def test_a_label_out_of_range(self, tmp_path: Path, capsys: Captured) -> None:
        arguments = [*SMALL, "--data", "small_networks:wrong_labels", "-o", str(tmp_path / "o")]
        message, _ = fails(arguments, capsys)
        assert "9" in message and "label" in message and "5 classes" in message

    @pytest.mark.parametrize("content", [None, b"", b"no image"])
    def test_folders_without_images(self, tmp_path: Path, capsys: Captured, content: bytes | None) -> None:
        folder = tmp_path / "images"
        folder.mkdir()
        if content is not None:
            (folder / "0.png").write_bytes(content)
        message, _ = fails([*SMALL, "--data", str(folder), "-o", str(tmp_path / "o")], capsys)
        assert str(folder) in message
        assert ("the folder is empty" in message) == (content is None)
        assert ("1 of 1 images cannot be read" in message) == (content is not None)
        assert not (tmp_path / "o").exists()

    def test_a_source_that_is_not_there(self, tmp_path: Path, capsys: Captured) -> None:
        message, hint = fails([*SMALL, "--data", "digit", "-o", str(tmp_path / "o")], capsys)
        assert "data source 'digit' does not exist" in message
        assert "did you mean 'digits'?" in hint

    def test_pixels_that_are_not_finite(self, tmp_path: Path) -> None:
        bad = np.zeros((20, 3, 16, 16), np.float32)
        bad[3, 0, 0, 0] = np.nan
        with pytest.raises(EdgeCNNError, match=r"NaN|finite"):
            edgecnn.compress(small_networks.classifier(), data=bad, out=tmp_path / "o", options=FAST)
        assert not (tmp_path / "o").exists()


class TestRunner:
    def test_a_runner_that_is_killed(
        self, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start = subprocess.Popen

        def killed(command: list[str], **options: Any) -> Any:
            code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
            return start([sys.executable, "-c", code], **options)

        monkeypatch.setattr("edgecnn.devices.local.subprocess.Popen", killed)
        message, hint = fails([*SMALL, "-o", str(tmp_path / "o")], capsys)
        assert message == "the runner was killed by SIGKILL"
        assert "memory" in hint
        assert not (tmp_path / "o").exists()

    def test_a_file_with_other_integers_is_not_written(
        self, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The reference of one operator is made wrong, which looks as if both runtimes were."""
        proof = importlib.import_module("edgecnn.contract")
        right, run_op = proof.run_program, proof.run_op

        def off(program: Any, feeds: Any, **options: Any) -> Any:
            return {name: value + 1.0 for name, value in right(program, feeds, **options).items()}

        def op_off(program: Any, op: Any, inputs: Any, **options: Any) -> Any:
            value = run_op(program, op, inputs, **options)
            return value // 2 if op.kind == "conv2d" else value

        monkeypatch.setattr(proof, "run_program", off)
        monkeypatch.setattr(proof, "run_op", op_off)
        message, hint = fails([*SMALL, "-o", str(tmp_path / "o")], capsys)
        assert re.match(r"the onnx file does not compute the contract's integers in onnxruntime \(", message)
        assert re.search(r"the first operator that differs is 0 .*, conv2d: \d+ LSB off", message)
        assert hint == "nothing was written; please report this with the version of onnxruntime"
        assert not (tmp_path / "o").exists()
        assert issubclass(ParityError, EdgeCNNError) and issubclass(RunnerError, EdgeCNNError)

    def test_a_runner_without_room_for_its_result(
        self, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise RunnerError(f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}")

        monkeypatch.setattr(importlib.import_module("edgecnn.proof"), "run_local", full)
        message, hint = fails([*SMALL, "-o", str(tmp_path / "o")], capsys)
        place = tempfile.gettempdir()
        assert message == f"cannot write temporary files in {place}: {os.strerror(errno.ENOSPC)}"
        assert "TMPDIR" in hint


class TestPackages:
    """Each in a process of its own, in which the packages seem not to be installed."""

    LITERT = ("ai_edge_litert", "tflite_runtime", "tensorflow", "flatbuffers")
    ONNX = ("onnx", "onnxruntime", "onnxscript")

    @pytest.mark.parametrize(
        ("hidden", "named", "extra"),
        [
            (("onnxruntime",), "the onnx format needs onnxruntime, not installed here", "onnx"),
            (("onnx",), "the onnx format needs onnx, not installed here", "onnx"),
            (LITERT, "the tflite format needs flatbuffers and ai_edge_litert, not installed here", "tflite"),
            (("torch",), "torch is needed here and not installed", "torch"),
        ],
    )
    def test_what_to_install(self, tmp_path: Path, hidden: tuple[str, ...], named: str, extra: str) -> None:
        changes = running.hide(tmp_path, *hidden)
        done = running.run("compress", *SMALL, "-o", tmp_path / "o", changes=changes)
        assert done.returncode == 1
        assert f"error: {named}\nhint: pip install 'edgecnn[{extra}]'" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "o").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize(("hidden", "name"), [(LITERT, "onnx"), (ONNX, "tflite")])
    def test_one_format_needs_only_its_own_packages(
        self, tmp_path: Path, hidden: tuple[str, ...], name: str
    ) -> None:
        changes = running.hide(tmp_path, *hidden)
        done = running.run("compress", *SMALL, "--format", name, "-o", tmp_path / "o", changes=changes)
        assert done.returncode == 0, done.stderr
        assert names(tmp_path / "o") == {
            f"model.{name}",
            f"model.{name}.json",
            "model.pt2",
            "report.html",
            "report.json",
        }
