"""Boxes beside scores in one output: each keeps a scale of its own, in both files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import torch
from running import run_onnx, run_tflite
from torch import Tensor, nn

import edgecnn
from edgecnn.compress import CompressOptions, CompressResult

SIDE = 16
IMAGES = np.random.default_rng(0).integers(0, 256, (48, SIDE, SIDE, 3)).astype(np.uint8)


class Detector(nn.Module):
    """Two box numbers in 0..300 and two scores in 0..1 per place, as (n, 4, places)."""

    def __init__(self, *, read_on: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.boxes, self.scores = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)
        self.last = nn.Conv2d(4, 3, 1) if read_on else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return boxes above scores."""
        y = torch.relu(self.body(x))
        joined = torch.cat([self.boxes(y) * 100.0, torch.sigmoid(self.scores(y))], 1)
        return self.last(joined).flatten(2)


def compress(out: Path, net: nn.Module, io: str = "float32") -> CompressResult:
    load = edgecnn.LoadOptions(input_shape=(3, SIDE, SIDE), preprocess="unit")
    options = CompressOptions(load=load, measure=False, num_samples=32, io=io)
    return edgecnn.compress(net.eval(), data=IMAGES, out=out, options=options)


def largest_error(result: CompressResult, net: nn.Module, run: object) -> np.ndarray:  # type: ignore[type-arg]
    """Return the largest error of each channel over 8 images."""
    inputs = IMAGES[40:].astype(np.float32).transpose(0, 3, 1, 2) / 255.0
    with torch.no_grad():
        expected = net(torch.from_numpy(inputs)).numpy()
    kind = "onnx" if run is run_onnx else "tflite"
    given = inputs if kind == "onnx" else inputs.transpose(0, 2, 3, 1)
    found = run(result.artifacts[kind].path, given)  # type: ignore[operator]
    error: np.ndarray = np.abs(found - expected).max((0, 2))  # type: ignore[type-arg]
    return error


@pytest.mark.parametrize("run", [run_onnx, run_tflite])
def test_scores_beside_boxes_keep_their_own_steps(tmp_path: Path, run: object) -> None:
    net = Detector()
    result = compress(tmp_path, net)
    errors = largest_error(result, net, run)
    with torch.no_grad():
        reach = float(net(torch.rand(8, 3, SIDE, SIDE))[:, :2].abs().max())
    assert reach > 20  # in one scale the scores would be off by half a step of 2 * 20 / 255, 0.08 and more
    assert errors[2:].max() < 0.02
    (note,) = [text for text in result.report.warnings if "times apart" in text]
    assert "cat" in note and "joined in float" in note
    assert not any("left in float" in text for text in result.report.warnings)
    assert result.report.parity["onnx_vs_tflite"].fraction_within_1_lsb == 1.0


def test_values_that_are_read_on_share_one_scale(tmp_path: Path) -> None:
    result = compress(tmp_path, Detector(read_on=True))
    assert not any("times apart" in text for text in result.report.warnings)


def test_integer_outputs_share_one_scale(tmp_path: Path) -> None:
    result = compress(tmp_path, Detector(), io="int8")
    assert not any("times apart" in text for text in result.report.warnings)
    assert result.report.parity["onnx_vs_reference"].max_lsb == 0
