"""A 32-bit board: LiteRT's predecessor, an older numpy, and no onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from board import boards
from board.networks import Network
from edgecnn.devices.deploy import open_executor
from edgecnn.devices.local import run_local
from edgecnn.devices.profile import load_device
from edgecnn.errors import RunnerError

pytestmark = pytest.mark.board

TIMEOUT_S = 300.0


def test_tflite_runtime_2_14_on_armv7(pi32: Path, lenet5: Network, tmp_path: Path) -> None:
    """Its 32-bit int8 kernels round otherwise than the 64-bit ones: up to 2 steps of the output."""
    request = {
        "task": "outputs",
        "artifacts": lenet5.artifacts("tflite", "float_tflite"),
        "inputs": str(lenet5.few),
    }
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here = run_local({**request, "outputs": str(tmp_path / "here")}, TIMEOUT_S)
    with open_executor(load_device(pi32)) as executor:
        there = executor.run_request({**request, "outputs": str(tmp_path / "there")}, TIMEOUT_S)
    assert boards.leftovers(pi32) == []
    assert there["environment"]["isa"] == "armv7l"
    assert there["environment"]["numpy"].startswith("1.")
    assert there["artifacts"]["tflite"]["runtime_version"] == "2.14.0"
    a, b = (
        {key: np.load(tmp_path / name / entry["outputs"][0]["array"]) for key, entry in found.items()}
        for name, found in (("here", here["artifacts"]), ("there", there["artifacts"]))
    )
    np.testing.assert_allclose(b["float_tflite"], a["float_tflite"], rtol=0, atol=1e-4)
    steps = np.unique(np.abs(np.diff(np.unique(a["tflite"]))))
    assert np.abs(b["tflite"] - a["tflite"]).max() <= 2.01 * steps.min()
    assert (b["tflite"].argmax(axis=1) == a["tflite"].argmax(axis=1)).mean() >= 0.95


def test_a_runtime_that_is_not_there(pi32: Path, lenet5: Network) -> None:
    request = {"task": "latency", "artifacts": lenet5.artifacts("onnx")}
    expected = pytest.raises(RunnerError, match="onnxruntime")
    with open_executor(load_device(pi32)) as executor, expected as caught:
        executor.run_request(request, TIMEOUT_S)
    assert "test-32bit" in caught.value.message
    assert boards.leftovers(pi32) == []
