"""Networks with seeded random weights and BatchNorm statistics of smooth images, for timing.

Latency does not depend on the weights, but quantization errors do: with the statistics of a fresh network
(mean 0, variance 1) the values of a deep one grow or vanish from layer to layer, and the SQNR means nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

SIDE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

NETS = ("resnet18", "mobilenet_v2", "squeezenet1_1", "efficientnet_b0")
HARD_NETS = (
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "timm.efficientnet_lite0",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "convnext_tiny",
    "mnasnet1_0",
    "timm.ghostnet_100",
    "densenet121",
    "lraspp_mobilenet_v3_large",
    "ssdlite320_mobilenet_v3_large",
)
"""Networks that int8 tools make slower than float, or wrong."""

_LIBRARIES: list[torch.library.Library] = []  # what they define lives as long as they do


def import_torchvision_models() -> object:
    """Return torchvision.models, also where the wheel was built for another PyTorch than the CPU's.

    Its compiled operators do not load there; the two that are registered at import need a schema.
    """
    if not _LIBRARIES:
        try:
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _LIBRARIES.append(library)
        except RuntimeError:  # torchvision fits this PyTorch and has defined them
            pass
    import torchvision.models

    return torchvision.models


def smooth_pixels(count: int, seed: int, side: int = SIDE) -> npt.NDArray[np.uint8]:
    """Return seeded images that vary slowly, as photographs do: uint8 (n, side, side, 3).

    Noise of 28 x 28 is enlarged bicubically, so that one image takes 3 x 784 random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, 28, 28, generator=generator)
    images = nn.functional.interpolate(noise, size=(side, side), mode="bicubic")  # (n, 3, side, side)
    pixels: npt.NDArray[np.uint8] = (images * 48 + 118).clamp(0, 255).to(torch.uint8).numpy()
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def normalize(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return ImageNet-normalized float32 (n, 3, h, w) for uint8 (n, h, w, 3)."""
    x = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255.0)
    mean, std = (np.asarray(v, np.float32).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return np.ascontiguousarray((x - mean) / std)


def build_net(name: str, weights: Path) -> nn.Module:
    """Return a network in eval mode; its weights are made and kept in `weights` the first time."""
    torch.manual_seed(0)
    net = _architecture(name)
    if weights.is_file():
        net.load_state_dict(torch.load(weights, weights_only=True))
        return net.eval()
    settle_batch_norms(net, torch.from_numpy(normalize(smooth_pixels(16, seed=1))))
    weights.parent.mkdir(parents=True, exist_ok=True)
    temporary = weights.with_suffix(".part")
    torch.save(net.state_dict(), temporary)
    temporary.replace(weights)
    return net.eval()


class Heads(nn.Module):
    """A detector's network without anchors and boxes: the class scores and box offsets of all places."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores (n, places, classes) and offsets (n, places, 4)."""
        found = self.head(list(self.backbone(x).values()))
        return found["cls_logits"], found["bbox_regression"]


class Segmenter(nn.Module):
    """A segmentation network that returns its one tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores (n, classes, h, w)."""
        out: torch.Tensor = self.net(x)["out"]
        return out


def _architecture(name: str) -> nn.Module:
    """Return a fresh network: "NAME" of torchvision or "timm.NAME"."""
    models = import_torchvision_models()
    if name.startswith("timm."):
        import timm

        made: nn.Module = timm.create_model(name.removeprefix("timm."), pretrained=False)
        return made
    parts = {} if "lraspp" not in name and "ssd" not in name else {"weights_backbone": None}
    net: nn.Module = models.get_model(name, weights=None, **parts)  # type: ignore[attr-defined]
    if "ssd" in name:
        return Heads(net)
    return Segmenter(net) if "lraspp" in name else net


def settle_batch_norms(net: nn.Module, images: torch.Tensor) -> None:
    """Give every BatchNorm the mean and variance of its own input over `images`.

    Layer by layer is not needed: in training mode each normalizes with the batch's own statistics, and a
    momentum of None makes the running ones their plain average.
    """
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    net.eval()  # dropout and stochastic depth stay off
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        net(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
