"""A small network and few images, for the tests of the training loop; run as a program, it trains.

    python training.py FOLDER [checkpoint seconds]

trains with checkpoints in FOLDER and writes the weights to FOLDER/weights.pt.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgecnn.data import ArrayDataset
from edgecnn.load import LoadOptions, load_model
from edgecnn.model import Model
from edgecnn.runner.preprocess import Preprocess
from edgecnn.train.checkpoint import Checkpoints
from edgecnn.train.data import TrainData
from edgecnn.train.loop import TrainResult, train
from edgecnn.train.settings import TrainSettings

SIZE = (12, 12)
PREPROCESS = Preprocess(SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
CLASSES = 4

SETTINGS = TrainSettings(
    epochs=6,
    learning_rate=0.05,
    batch_size=16,
    warmup_epochs=0.5,
    ema_decay=0.9,
    label_smoothing=0.1,
    clip_norm=5.0,
    precision="float32",
    augment=("flip", "crop", "noise"),
    mixup=0.2,
    cutmix=0.2,
    batch_norm_batches=2,
    patience=50,
)
"""Everything at once."""

PLAIN = TrainSettings(
    epochs=6, learning_rate=0.05, batch_size=16, warmup_epochs=0.0, precision="float32", augment=()
)


def weights(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.graph.state_dict().items()}


def same(first: Model, second: Model) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def network(norm: bool = True, seed: int = 0, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=not norm),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, classes),
    ).eval()


@functools.cache
def make_model(norm: bool = True, seed: int = 0, classes: int = CLASSES) -> Model:
    model = load_model(network(norm, seed, classes), LoadOptions(input_shape=(3, *SIZE)))
    return replace(model, spec=replace(model.spec, preprocess=PREPROCESS))


def dataset(count: int = 96, labels: bool = True, seed: int = 0) -> ArrayDataset:
    """Four classes told apart by the quarter of the image that is bright."""
    rng = np.random.default_rng(seed)
    classes = np.arange(count) % CLASSES
    images = rng.integers(0, 120, (count, *SIZE, 3), dtype=np.uint8)
    for image, label in zip(images, classes, strict=True):
        row, column = 6 * (label // 2), 6 * (label % 2)
        image[row : row + 6, column : column + 6] += 100
    return ArrayDataset("quarters", images, PREPROCESS, labels=classes if labels else None)


def train_data(count: int = 96, validation: int = 16, labels: bool = True) -> TrainData:
    images = dataset(count, labels)
    return TrainData(
        images, tuple(range(count - validation)), tuple(range(count - validation, count)), labels
    )


def run(folder: Path, seconds: float = 0.0, settings: TrainSettings = SETTINGS) -> TrainResult:
    checkpoint = Checkpoints(folder, {"test": "1"}, interval_seconds=seconds).stage("train")
    return train(make_model(), train_data(), settings, seed=3, checkpoint=checkpoint)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    result = run(folder, float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    torch.save(result.model.graph.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    main()
