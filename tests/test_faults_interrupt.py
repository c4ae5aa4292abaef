"""Ctrl-C and SIGTERM at any step: an exit code, one line, and neither files nor processes left behind."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import running


def descendants(pid: int) -> set[int]:
    """Return the processes started by one, and by those."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child, *descendants(child)}
    return found


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


MOMENTS = ["load", "pass 1", "calibrate", "run the files", "accuracy", "latency of onnx", "latency of tflite"]


def stop(tmp_path: Path, examples_dir: Path, moment: str, number: signal.Signals) -> None:
    """Send a run a signal when it has come to a step, and check that nothing of it is left."""
    code, word = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}[number]
    out, temporary = tmp_path / "o", tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        running.command("compress", examples_dir / "lenet5_digits.pt2", "--data", "digits", "-o", out),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=running.environment({"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(moment):
            break
    needs_child = moment.startswith(("run", "accuracy", "latency"))
    deadline = time.monotonic() + 10
    while needs_child and not descendants(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    children = descendants(process.pid)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr.splitlines()[-1] == f"{word}; no unfinished file is left"
    assert "Traceback" not in stderr
    assert stdout == ""
    assert not out.exists()
    assert list(temporary.glob("edgecnn-*")) == []
    assert bool(children) == needs_child
    assert not any(alive(child) for child in children)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for orphans in /proc")
class TestInterrupt:
    @pytest.mark.parametrize("moment", MOMENTS)
    def test_ctrl_c(self, tmp_path: Path, examples_dir: Path, moment: str) -> None:
        stop(tmp_path, examples_dir, moment, signal.SIGINT)

    @pytest.mark.parametrize("moment", ["calibrate", "latency of onnx"])
    def test_sigterm(self, tmp_path: Path, examples_dir: Path, moment: str) -> None:
        stop(tmp_path, examples_dir, moment, signal.SIGTERM)
