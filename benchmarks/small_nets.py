"""Networks with structures that torchvision has none of: squeeze-and-excitation ResNet, CBAM, U-Net."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def conv_bn_relu(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, relu."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
    )


class SqueezeExcitation(nn.Module):
    """Scale channels by sigmoid(W2 relu(W1 mean(x))) (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, c, h, w) -> (n, c, h, w)."""
        gate = torch.sigmoid(self.fc2(functional.relu(self.fc1(x.mean(dim=(2, 3))))))
        return x * gate[:, :, None, None]


class ConvolutionalAttention(nn.Module):
    """Channel gate from mean and maximum, then spatial gate from both (CBAM, arXiv:1807.06521)."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.shared = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, 1),
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, c, h, w) -> (n, c, h, w)."""
        mean, largest = functional.adaptive_avg_pool2d(x, 1), functional.adaptive_max_pool2d(x, 1)
        x = x * torch.sigmoid(self.shared(mean) + self.shared(largest))
        maps = torch.cat([x.mean(dim=1, keepdim=True), x.max(dim=1, keepdim=True)[0]], dim=1)
        return x * torch.sigmoid(self.spatial(maps))


class AttentionBlock(nn.Module):
    """Residual block with a gate on its branch."""

    def __init__(self, c_in: int, c_out: int, stride: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(c_in, c_out, stride)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.gate = gate(c_out)
        self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, c_in, h, w) -> (n, c_out, h/stride, w/stride)."""
        return functional.relu(self.gate(self.bn2(self.conv2(self.conv1(x)))) + self.shortcut(x))


def attention_net(gate: type[nn.Module]) -> nn.Sequential:
    """A stem, four gated residual blocks and a linear head, for 3x224x224."""
    blocks = [AttentionBlock(c, 2 * c, 2, gate) for c in (32, 64, 128, 256)]
    return nn.Sequential(
        conv_bn_relu(3, 32, 2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100)
    )


def senet() -> nn.Module:
    """Squeeze-and-excitation ResNet."""
    return attention_net(SqueezeExcitation)


def cbam() -> nn.Module:
    """ResNet with convolutional block attention."""
    return attention_net(ConvolutionalAttention)


class UNet(nn.Module):
    """Encoder and decoder with transposed convolutions and skip connections (arXiv:1505.04597), 3x224x224."""

    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        sizes = [width * 2**i for i in range(4)]
        self.down = nn.ModuleList(
            [
                nn.Sequential(conv_bn_relu(a, b), conv_bn_relu(b, b))
                for a, b in zip([3, *sizes[:-1]], sizes, strict=True)
            ]
        )
        self.up = nn.ModuleList([nn.ConvTranspose2d(2 * c, c, 2, 2) for c in reversed(sizes[:-1])])
        self.merge = nn.ModuleList(
            [nn.Sequential(conv_bn_relu(2 * c, c), conv_bn_relu(c, c)) for c in reversed(sizes[:-1])]
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) -> (n, classes, h, w)."""
        skips: list[torch.Tensor] = []
        for stage in self.down:
            if skips:
                x = functional.max_pool2d(x, 2)
            x = stage(x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], dim=1))
        return self.head(x)


def unet() -> nn.Module:
    """U-Net of four levels."""
    return UNet()
