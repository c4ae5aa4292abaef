"""What the user may say about a model beside its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoadOptions:
    """Everything that a model file alone may not say.

    Attributes:
        arch: torchvision:NAME, timm:NAME or package.module:factory; builds the network of a state dict.
        weights: file with the state dict, when the source is an architecture.
        input_shape: (channels, height, width) of one image.
        preprocess: imagenet, unit, symmetric, raw, or a TOML file with the fields of Preprocess.
        mean: per channel, replaces the mean of the preprocess.
        std: per channel, replaces the std of the preprocess.
        channel_order: "rgb" or "bgr", replaces the order of the preprocess.
        trust: allow a file to run code (a pickled module, custom objects in a .pt2).
        seed: of the random weights when an architecture comes without any.
    """

    arch: str | None = None
    weights: str | Path | None = None
    input_shape: tuple[int, int, int] | None = None
    preprocess: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channel_order: str | None = None
    trust: bool = False
    seed: int = 0
