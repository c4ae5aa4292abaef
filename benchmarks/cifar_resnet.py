"""ResNet-20 and ResNet-56 for CIFAR-10 with the parameter-free shortcut (option A).

He et al. 2015, arXiv:1512.03385, section 4.2.

Use with `edgecnn compress weights.th --arch benchmarks.cifar_resnet:resnet20 --input-shape 3x32x32`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut that drops every other pixel and pads channels with zeros."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride = stride
        self.extra = (c_out - c_in) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, c_in, h, w) -> (n, c_out, h/stride, w/stride)."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            kept = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(kept, (0, 0, 0, 0, self.extra, self.extra))
        return functional.relu(y + x)


class CifarResNet(nn.Module):
    """6 n + 2 layers: a 3x3 convolution, three stages of n blocks of 16, 32, 64 channels, a linear layer."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    def _stage(self, c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(c_in, c_out, stride), *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 32, 32) -> (n, 10) logits."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet20() -> CifarResNet:
    """20 layers, 0.27 million parameters."""
    return CifarResNet(3)


def resnet56() -> CifarResNet:
    """56 layers, 0.85 million parameters."""
    return CifarResNet(9)
