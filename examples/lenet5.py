"""LeNet-5 for the 10 digits, in the form of LeCun et al. 1998 with ReLU and max pooling.

**Source**: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document
recognition, Proceedings of the IEEE 86(11), 1998, section II.B.
"""

from __future__ import annotations

import torch
from torch import nn


class LeNet5(nn.Module):
    """conv5x5(6) - pool - conv5x5(16) - pool - linear 120 - 84 - classes, for gray images of 32x32."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2),  # (n, 6, 14, 14)
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),  # (n, 16, 5, 5)
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(),  # (n, 400)
            nn.Linear(400, 120), nn.ReLU(),
            nn.Linear(120, 84), nn.ReLU(),
            nn.Linear(84, num_classes),
        )  # fmt: skip

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return scores (n, num_classes) for images (n, 1, 32, 32)."""
        return self.classifier(self.features(image))
