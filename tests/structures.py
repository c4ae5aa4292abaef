"""The tiny networks behind `nets`: one for each structure that real CNNs are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Layers by name and a function of (this module, image)."""

    def __init__(self, layers: dict[str, nn.Module], function: Forward) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = function

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Scale(nn.Module):
    """A learned scale and shift per channel, as LayerScale has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)
        self.beta = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.beta


def conv(c_in: int, c_out: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, relu."""
    padding = options.pop("padding", kernel // 2)
    layer = nn.Conv2d(c_in, c_out, kernel, padding=padding, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.ReLU())


def plain(*layers: nn.Module) -> Net:
    return Net({"body": nn.Sequential(*layers)}, lambda net, x: net.body(x))


def head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def residual() -> Net:
    layers = {"stem": conv(3, 8), "last": head(8)}
    for i in range(3):
        layers[f"a{i}"] = conv(8, 8)
        layers[f"b{i}"] = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        for i in range(3):
            x = F.relu(x + getattr(net, f"b{i}")(getattr(net, f"a{i}")(x)))
        return net.last(x)

    return Net(layers, forward)


def preactivation() -> Net:
    layers = {"stem": nn.Conv2d(3, 8, 3, padding=1), "last": head(8)}
    for i in range(2):
        layers[f"bn{i}"] = nn.BatchNorm2d(8)
        layers[f"conv{i}"] = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        for i in range(2):
            x = x + getattr(net, f"conv{i}")(F.relu(getattr(net, f"bn{i}")(x)))
        return net.last(x)

    return Net(layers, forward)


def option_a() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.last(F.relu(net.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))))

    body = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
    return Net({"stem": conv(3, 4), "body": body, "last": head(8)}, forward)


def squeeze_excite(gate: Callable[[Tensor], Tensor], view: str) -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        s = x.mean((2, 3), keepdim=True)
        if view == "linear":
            s = net.up(F.relu(net.down(s.flatten(1))))[:, :, None, None]
        else:
            s = net.up(F.relu(net.down(s)))
        s = gate(s)
        return net.last(x * (s.expand_as(x) if view == "linear" else s))

    if view == "linear":
        down, up = nn.Linear(8, 4), nn.Linear(4, 8)
    else:
        down, up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
    return Net({"stem": conv(3, 8), "down": down, "up": up, "last": head(8)}, forward)


def cbam() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        average, largest = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        x = x * torch.sigmoid(net.mlp(average) + net.mlp(largest))
        spatial = torch.cat([x.max(dim=1, keepdim=True)[0], x.mean(dim=1, keepdim=True)], 1)
        return net.last(x * torch.sigmoid(net.spatial(spatial)))

    mlp = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    spatial = nn.Sequential(nn.Conv2d(2, 1, 5, padding=2, bias=False), nn.BatchNorm2d(1))
    return Net({"stem": conv(3, 8), "mlp": mlp, "spatial": spatial, "last": head(8)}, forward)


def inception() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.last(torch.cat([net.a(x), net.b(x), net.c(x)], 1))

    pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), *conv(8, 4, 1))
    stem = nn.Sequential(conv(3, 8), nn.MaxPool2d(3, 2, ceil_mode=True))
    return Net({"stem": stem, "a": conv(8, 4, 1), "b": conv(8, 6), "c": pooled, "last": head(14)}, forward)


def dense() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        for i in range(2):
            layer = getattr(net, f"layer{i}")
            x = torch.cat([x, layer(x)], 1)
        return net.last(x)

    layers: dict[str, nn.Module] = {"stem": nn.Conv2d(3, 6, 3, padding=1, bias=False)}
    for i in range(2):
        c = 6 + 4 * i
        layers[f"layer{i}"] = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 4, 3, padding=1))
    layers["last"] = nn.Sequential(nn.BatchNorm2d(14), nn.ReLU(), nn.AvgPool2d(2), head(14))
    return Net(layers, forward)


def unet() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        a = net.a(x)
        b = net.b(F.max_pool2d(a, 2))
        return net.last(torch.cat([a, net.up(b)], 1))

    up = nn.ConvTranspose2d(8, 6, 2, 2)
    return Net({"a": conv(3, 6), "b": conv(6, 8), "up": up, "last": nn.Conv2d(12, 2, 1)}, forward)


def upsample(mode: str, align: bool | None = None) -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        small = F.max_pool2d(net.stem(x), 2)
        return net.last(F.interpolate(small, size=x.shape[2:], mode=mode, align_corners=align))

    return Net({"stem": conv(3, 6), "last": nn.Conv2d(6, 2, 1)}, forward)


def shuffle() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        left, right = net.stem(x).chunk(2, dim=1)
        x = torch.cat([left, net.body(right)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return net.last(x)

    return Net({"stem": conv(3, 8), "body": conv(4, 4, groups=4), "last": head(8)}, forward)


def multi_output() -> Net:
    def forward(net: Net, x: Tensor) -> dict[str, Tensor]:
        x = net.stem(x)
        return {"mask": net.mask(x), "logits": net.last(x), "features": x}

    return Net({"stem": conv(3, 6), "mask": nn.Conv2d(6, 2, 1), "last": head(6)}, forward)


def arithmetic() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        y = -(x * 2.0) + 1.5
        z = (1.0 - x) / 3.0
        return net.last(torch.cat([y - z, x - 0.25, z * y], 1))

    return Net({"stem": conv(3, 4), "last": head(12)}, forward)


def mixed_concat() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.last(torch.cat([torch.sigmoid(x), 4.0 * x, torch.tanh(x)], 1))

    return Net({"stem": nn.Conv2d(3, 4, 3), "last": nn.Conv2d(12, 2, 1)}, forward)


def means() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        rows = x.mean(3).mean(2)
        return net.last(rows + x.amax((2, 3)) + x.mean((1, 2, 3), keepdim=True).flatten(1))

    return Net({"stem": conv(3, 6), "last": nn.Linear(6, 4)}, forward)


def pools() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        found = [
            F.avg_pool2d(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), 3, 2, 1),
            F.avg_pool2d(x, 2, 2),
            F.avg_pool2d(x, 2, 2, ceil_mode=True),
            F.adaptive_avg_pool2d(x, (6, 6)),
            F.adaptive_max_pool2d(x, (6, 6)),
        ]
        return net.last(torch.cat(found, 1))

    return Net({"stem": conv(3, 4), "last": nn.Conv2d(20, 3, 1)}, forward)


def ceil_pools() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        a = F.avg_pool2d(x, 3, 2, ceil_mode=True)
        return net.last(torch.cat([a, F.max_pool2d(x, 3, 2, ceil_mode=True)], 1))

    return Net({"stem": conv(3, 4), "last": nn.Conv2d(8, 3, 1)}, forward)


def same_pools() -> Net:
    """A reduction of NASNet: TensorFlow's padding, single values picked by average pools."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        y, lowest = F.relu(x), float("-inf")
        found = [
            F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=lowest), 3, 2),
            F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2, count_include_pad=False),
            F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 4, 2),
            net.even(F.avg_pool2d(y, 1, 2, count_include_pad=False)),
            net.odd(F.avg_pool2d(F.pad(y, (-1, 1, -1, 1)), 1, 2, count_include_pad=False)),
        ]
        return net.last(torch.cat(found, 1))

    stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    return Net(
        {"stem": stem, "even": conv(4, 3, 1), "odd": conv(4, 3, 1), "last": nn.Conv2d(18, 3, 1)}, forward
    )


def splits() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        a, b = torch.split(net.stem(x), [3, 5], dim=1)
        return net.last(torch.cat([F.relu6(b * 2.0), a, b[:, 1::2], a.narrow(1, 1, 2)], 1))

    return Net({"stem": nn.Conv2d(3, 8, 3), "last": nn.Conv2d(12, 4, 1)}, forward)


def repeated_reader() -> Net:
    """A copy (contiguous, no-op reshape) between a convolution and relu must not hide its other reader."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.last(torch.cat([F.relu(x.contiguous().view(x.shape)), x], 1))

    return Net({"stem": nn.Conv2d(3, 4, 3), "last": nn.Conv2d(8, 4, 1)}, forward)


def transposed() -> Net:
    up = nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, groups=2, bias=False)
    return plain(conv(3, 8), nn.MaxPool2d(2), up, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))


def mlp() -> Net:
    return plain(
        conv(3, 4),
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(64, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.BatchNorm1d(16),
        nn.Dropout(),
        nn.Linear(16, 5),
    )


def _depthwise() -> Net:
    inverted = [conv(3, 12, 1), conv(12, 12, 5, groups=12, stride=2)]
    return plain(*inverted, nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6), head(6))


def _activation(layer: Callable[[], nn.Module]) -> Callable[[], Net]:
    def build() -> Net:
        body = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), layer(), nn.Conv2d(8, 8, 3, groups=8)]
        return plain(*body, layer(), head(8))

    return build


NETS: dict[str, Callable[[], Net]] = {
    "conv_bn_relu": lambda: plain(conv(3, 8, stride=2), conv(8, 8, padding="same"), head(8)),
    "residual": residual,
    "preactivation": preactivation,
    "option_a": option_a,
    "depthwise": _depthwise,
    "grouped": lambda: plain(conv(3, 8), conv(8, 8, groups=4, dilation=2, padding=2), nn.ReLU6(), head(8)),
    "se_conv": lambda: squeeze_excite(torch.sigmoid, "conv"),
    "se_linear": lambda: squeeze_excite(F.hardsigmoid, "linear"),
    "cbam": cbam,
    "inception": inception,
    "dense": dense,
    "unet": unet,
    "nearest": lambda: upsample("nearest"),
    "bilinear": lambda: upsample("bilinear", False),
    "bilinear_aligned": lambda: upsample("bilinear", True),
    "shuffle": shuffle,
    "hard_swish": _activation(nn.Hardswish),
    "silu": _activation(nn.SiLU),
    "leaky_relu": _activation(lambda: nn.LeakyReLU(0.1)),
    "tanh": _activation(nn.Tanh),
    "hardtanh": _activation(lambda: nn.Hardtanh(-0.5, 2.0)),
    "softmax": lambda: plain(conv(3, 8), head(8), nn.Softmax(dim=1)),
    "splits": splits,
    "mlp": mlp,
    "multi_output": multi_output,
    "pools": pools,
    "ceil_pools": ceil_pools,
    "arithmetic": arithmetic,
    "mixed_concat": mixed_concat,
    "learned_scale": lambda: plain(nn.Conv2d(3, 6, 3), Scale(6), nn.ReLU(), Scale(6), head(6)),
    "transposed": transposed,
    "means": means,
    "repeated_reader": repeated_reader,
    "same_pools": same_pools,
}
