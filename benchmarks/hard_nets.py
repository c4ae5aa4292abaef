"""Networks that quantize badly, trained from scratch on CIFAR-10 JPEGs enlarged to 64x64.

    python -m benchmarks.hard_nets [--cache DIR] [--epochs N] [mobilenet_v3_small depthwise efficientnet_half]

hard-swish and squeeze-and-excitation (MobileNetV3-small as torchvision has it), SiLU and gates
(EfficientNet-B0 at half its width; at full width an epoch takes 7 minutes of a core), depthwise convolutions
between plain ReLUs whose channels differ widely in range (a small MobileNetV1). AdamW on a one-cycle rate,
float32: bfloat16 trains MobileNetV3 at a third of the speed on a CPU. The first 65 % of the steps see images
of 40x40. Weights are kept in --cache, trained only once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.cifar_jpeg import DATA, decode
from benchmarks.nets import import_torchvision_models

SIDE = 64
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
BATCH = 128
EPOCHS = {"mobilenet_v3_small": 6.0, "depthwise": 4.0, "efficientnet_half": 3.0}
FIRST_SIDE, FIRST_SHARE = 40, 0.65  # most steps see smaller images, which takes half the time
PEAK_RATE = 3e-3
DECAY = 0.05


def separable(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """Depthwise 3x3 and pointwise convolution, each with batch norm and ReLU (arXiv:1704.04861)."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False),
        nn.BatchNorm2d(c_in),
        nn.ReLU(),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
    )


def depthwise(width: int = 16, classes: int = 10) -> nn.Module:
    """Small MobileNetV1 without any ReLU6: a stem of `width` channels, eight blocks, a linear head."""
    plan = ((1, 2, 1), (2, 4, 2), (4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 1))
    stem = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [separable(a * width, b * width, stride) for a, b, stride in plan]
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16 * width, classes)
    )


def mobilenet_v3_small() -> nn.Module:
    """Torchvision's, with ten classes."""
    net: nn.Module = import_torchvision_models().mobilenet_v3_small(num_classes=10)  # type: ignore[attr-defined]
    return net


def efficientnet_half() -> nn.Module:
    """Torchvision's EfficientNet-B0 with half the channels, all its layers and ten classes."""
    import_torchvision_models()
    from torchvision.models.efficientnet import EfficientNet, _efficientnet_conf

    blocks, last = _efficientnet_conf("efficientnet_b0", width_mult=0.5, depth_mult=1.0)
    net: nn.Module = EfficientNet(blocks, 0.1, stochastic_depth_prob=0.0, last_channel=last, num_classes=10)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3_small": mobilenet_v3_small,
    "depthwise": depthwise,
    "efficientnet_half": efficientnet_half,
}


def augment(images: torch.Tensor, enlarged: int, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to 4 pixels, mirror half, enlarge: uint8 (n, h, h, 3) -> (n, 3, enlarged, enlarged)."""
    x = functional.pad(images.permute(0, 3, 1, 2), (4,) * 4)
    side = x.shape[2] - 8
    out = torch.empty(len(x), 3, side, side)
    for index, (top, left, mirror) in enumerate(
        torch.randint(0, 9, (len(x), 3), generator=generator).tolist()
    ):
        crop = x[index, :, top : top + side, left : left + side]
        out[index] = crop.flip(2) if mirror % 2 else crop
    out = functional.interpolate(out, size=enlarged, mode="bilinear")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((out / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def train(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: float, seed: int = 0) -> None:
    """Train in place.

    Args:
        net: in float32.
        images: uint8 (n, 32, 32, 3).
        labels: int64 (n,).
        epochs: may be a fraction.
        seed: of the order and the augmentation.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = min(BATCH, len(images))
    steps = max(2, round(epochs * len(images) / batch))
    net.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), PEAK_RATE, weight_decay=DECAY, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.3)
    order = torch.empty(0, dtype=torch.int64)
    started, loss_sum = time.process_time(), 0.0
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator)
        chosen, order = order[:batch], order[batch:]
        inputs = augment(images[chosen], FIRST_SIDE if step <= FIRST_SHARE * steps else SIDE, generator)
        loss = functional.cross_entropy(net(inputs), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        loss_sum += loss.item()
        if step % 100 == 0 or step == steps:
            mean = loss_sum / ((step - 1) % 100 + 1)
            seconds = time.process_time() - started
            print(f"  step {step}/{steps}, loss {mean:.3f}, {seconds:.0f} CPU s", flush=True)
            loss_sum = 0.0


def trained(name: str, cache: Path, data: Path = DATA, epochs: float | None = None) -> Path:
    """Return a state dict's file, trained the first time."""
    epochs = EPOCHS[name] if epochs is None else epochs
    path = cache / f"hard-{name}-{epochs:g}.pt"
    if path.is_file():
        return path
    with np.load(decode(data / "cifar10" / "train_jpeg.tar.gz", cache)) as arrays:
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    torch.manual_seed(0)
    net = NETS[name]()
    print(f"{name}: {epochs:g} epochs of {len(images)} images", flush=True)
    train(net, images, labels, epochs)
    temporary = path.with_suffix(".part")
    torch.save({key: value.contiguous() for key, value in net.state_dict().items()}, temporary)
    temporary.replace(path)
    return path


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what the commands on these networks have in common."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=list(NETS))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--epochs", type=float, help="of training, instead of each network's own number")
    return parser


def main() -> None:
    arguments = argument_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    for name in arguments.networks:
        print(trained(name, arguments.cache, arguments.data, arguments.epochs), flush=True)


if __name__ == "__main__":
    main()
