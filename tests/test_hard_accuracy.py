"""The benchmark of networks that quantize badly: its networks, its training, its rows and its table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import hard_accuracy, hard_nets
from edgecnn.data import ArrayDataset
from edgecnn.runner.preprocess import Preprocess

PREPROCESS = Preprocess((64, 64), mean=hard_nets.MEAN, std=hard_nets.STD)


def coloured(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of 32x32 in one of two colours with noise: uint8 (n, 32, 32, 3), labels (n,)."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 2
    images = rng.integers(0, 120, (count, 32, 32, 3))
    images[labels == 1, :, :, 0] += 120
    return images.astype(np.uint8), labels


def test_the_depthwise_net_has_plain_relus_only() -> None:
    net = hard_nets.depthwise(width=8)
    kinds = {type(module) for module in net.modules()}
    assert kinds <= {
        *(nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
        *(nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear),
    }
    depthwise = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    assert [conv.in_channels for conv in depthwise] == [8, 16, 32, 32, 64, 64, 128, 128]
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


def test_augmentation_only_shifts_mirrors_and_enlarges() -> None:
    images = torch.full((3, 32, 32, 3), 255, dtype=torch.uint8)
    x = hard_nets.augment(images, 40, torch.Generator().manual_seed(0))
    assert x.shape == (3, 3, 40, 40)
    white = (1 - hard_nets.MEAN[0]) / hard_nets.STD[0]
    assert x[:, 0, 20, 20].tolist() == pytest.approx([white] * 3, rel=1e-5)
    assert float(x[:, 0].min()) >= -hard_nets.MEAN[0] / hard_nets.STD[0] - 1e-5


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> hard_accuracy.Bench:
    """A depthwise net after a few steps on two colours."""
    images, labels = coloured(32)
    torch.manual_seed(0)
    net = hard_nets.depthwise()
    hard_nets.train(net, torch.from_numpy(images), torch.from_numpy(labels), epochs=60)
    weights = tmp_path_factory.mktemp("hard") / "weights.pt"
    torch.save(net.state_dict(), weights)
    data = ArrayDataset("two colours", images, PREPROCESS, labels=labels, class_count=10)
    return hard_accuracy.open_bench("depthwise", weights, data, data, 16)


@pytest.mark.slow
def test_training_learns(bench: hard_accuracy.Bench) -> None:
    assert (bench.logits.argmax(1) == bench.test.labels).mean() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain min-max", "+ equalization", "static_wi8_ai8"])
def test_a_row_is_measured_on_real_files(bench: hard_accuracy.Bench, tmp_path: Path, name: str) -> None:
    row = hard_accuracy.measure(bench, name, None, tmp_path)
    assert row["parity"] == 100.0
    assert row["drop"] == pytest.approx(row["float"] - row["top1"])
    assert row["agreement"] >= 90
    assert row["sqnr_db"] > 10


@pytest.mark.slow
def test_figures_by_hand(bench: hard_accuracy.Bench) -> None:
    wrong = bench.logits.copy()
    wrong[:8] = -wrong[:8]  # another class for a quarter of the images
    row = hard_accuracy.figures(bench, {"onnx": wrong, "tflite": bench.logits})
    assert row["agreement"] == 75.0
    assert row["parity"] == 75.0
    expected = 10 * np.log10((bench.logits**2).sum() / (4 * bench.logits[:8] ** 2).sum())
    assert row["sqnr_db"] == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.slow
def test_a_peer_that_was_not_asked_for_says_so(bench: hard_accuracy.Bench, tmp_path: Path) -> None:
    assert hard_accuracy.measure(bench, "NNCF", None, tmp_path) == {"failed": "no --peers-python"}


def test_the_table_is_ordered_and_holds_what_failed(tmp_path: Path) -> None:
    figures = {"float": 70.0, "top1": 69.5, "drop": 0.5, "agreement": 97.5, "sqnr_db": 20.04}
    rows = [
        {"net": "depthwise", "row": "NNCF", "failed": "RuntimeError: no\nmore"},
        {"net": "depthwise", "row": "guard 0.3", **figures, "parity": 100.0, "changes": ["AdaRound"]},
    ]
    out = tmp_path / "rows.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = hard_accuracy.table(out).splitlines()
    assert lines[0] == "depthwise float 70.00"
    assert lines[4] == "| depthwise | guard 0.3 | 69.50 | +0.50 | 97.50 | 20.0 | 100.00 | - | AdaRound |"
    assert lines[5].startswith("| depthwise | NNCF | failed: RuntimeError: no |")
