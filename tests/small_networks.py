"""Small networks and images by name: small_networks:NAME is a model, or a data source."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

SIZE = (3, 16, 16)


class TwoHeads(nn.Module):
    """One trunk, five scores and two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3, padding=1)
        self.scores = nn.Linear(8, 5)
        self.position = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = torch.relu(self.trunk(x)).mean((2, 3))
        return self.scores(pooled), self.position(pooled)


class CumulativeSum(nn.Module):
    """A classifier with an operator that no file format here takes."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3)
        self.neck = _Cumulate()
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.neck(self.trunk(x)).mean((2, 3)))  # type: ignore[no-any-return]


class _Cumulate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x, 1)


def classifier(num_classes: int = 5) -> nn.Module:
    """A classifier whose BatchNorm has seen pixels in 0..1."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )
    for _ in range(30):
        net(torch.rand(16, *SIZE))
    return net.eval()


def deep() -> nn.Module:
    """A classifier with channels to spare."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    for _ in range(30):
        net(torch.rand(16, *SIZE))
    return net.eval()


def regression() -> nn.Module:
    """One number for each image."""
    return classifier(1)


def segmentation() -> nn.Module:
    """Four scores for each pixel."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def not_finite() -> nn.Module:
    """A classifier whose training diverged."""
    net = classifier()
    net[0].weight.data[0, 0, 0, 0] = float("nan")  # type: ignore[index]
    net[5].bias.data[1] = float("inf")  # type: ignore[index]
    return net


def images() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """40 images and their labels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), rng.integers(0, 5, 40)


def unlabelled() -> npt.NDArray[np.uint8]:
    """The same images without labels."""
    return images()[0]


def black_images() -> npt.NDArray[Any]:
    """40 images without any light."""
    return np.zeros((40, 16, 16, 3), np.uint8)


def wrong_labels() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """A label that is no class of `classifier`."""
    pixels, labels = images()
    labels[7] = 9
    return pixels, labels


class Transformer(nn.Module):
    """A convolution, an attention over its pixels, a classifier: half of it has no int8 form."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        read = self.norm(tokens)
        tokens = tokens + self.attention(read, read, read, need_weights=False)[0]
        return self.head(tokens.mean(1))  # type: ignore[no-any-return]
