"""Choose how an image becomes the network's input.

the user's --preprocess, --mean, --std, --channel-order
else what the .pt2 or timm says
else imagenet for 3 channels, unit for 1

name        scale   mean                   std
imagenet    1/255   0.485, 0.456, 0.406    0.229, 0.224, 0.225
unit        1/255   0                      1                      x in [0, 1]
symmetric   1/255   0.5                    0.5                    x in [-1, 1]
raw         1       0                      1                      x in [0, 255]
"""

from __future__ import annotations

import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from edgecnn.errors import LoadError
from edgecnn.load.options import LoadOptions
from edgecnn.runner.preprocess import Preprocess

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NAMES = ("imagenet", "unit", "symmetric", "raw")

_CROP_FRACTION = 0.875
_SMALLEST_CROPPED = 160
"""Networks for smaller images (CIFAR, digits) take the whole image: no crop."""


def named_preprocess(name: str, shape: tuple[int, int, int], source: str | None = None) -> Preprocess:
    """Return one of the preprocesses of the table above.

    Args:
        name: imagenet, unit, symmetric or raw.
        shape: (c, h, w) of the network's input.
        source: where the choice came from; "user" by default.

    Raises:
        LoadError: for an unknown name, or imagenet for anything but 3 channels.

    Example:
        >>> p = named_preprocess("imagenet", (3, 224, 224))
        >>> p.resize_short, p.mean
        (256, (0.485, 0.456, 0.406))
    """
    channels, height, width = shape
    if name not in NAMES:
        raise LoadError(f"preprocess {name!r} is not known, expected {', '.join(NAMES)} or a TOML file")
    if channels not in (1, 3):
        raise LoadError(
            f"the network takes images of {channels} channels, expected 1 (gray) or 3 (RGB)",
            hint="edgecnn reads images of 1 or 3 channels only",
        )
    if name == "imagenet" and channels != 3:
        raise LoadError(
            f"preprocess imagenet is for 3 channels, the network takes {channels}",
            hint="use --preprocess unit",
        )
    short = min(height, width)
    base = Preprocess(
        size=(height, width),
        resize_short=round(short / _CROP_FRACTION) if short >= _SMALLEST_CROPPED else None,
        channel_order="rgb" if channels == 3 else "gray",
        scale=1.0 if name == "raw" else 1.0 / 255.0,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        source=source or f"user: {name}",
    )
    if name == "imagenet":
        return replace(base, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if name == "symmetric":
        return replace(base, mean=(0.5,) * channels, std=(0.5,) * channels)
    return base


def choose_preprocess(
    shape: tuple[int, int, int], options: LoadOptions, stored: Preprocess | None = None
) -> Preprocess:
    """Choose the preprocess of a network.

    Args:
        shape: (c, h, w) of the network's input.
        options: what the user said.
        stored: what the model file or timm's configuration says, if anything.

    Raises:
        LoadError: for a name, file, or count of values that does not fit.
    """
    channels = shape[0]
    if options.preprocess is None:
        default = "imagenet" if channels == 3 else "unit"
        chosen = stored or named_preprocess(default, shape, f"default: {default}")
    elif options.preprocess.endswith(".toml"):
        chosen = read_preprocess(Path(options.preprocess), shape)
    else:
        chosen = named_preprocess(options.preprocess, shape)
    changes: dict[str, Any] = {}
    for field, flag in (("mean", options.mean), ("std", options.std)):
        if flag is not None:
            changes[field] = tuple(float(value) for value in flag)
    if options.channel_order is not None:
        changes["channel_order"] = options.channel_order
    if changes:
        chosen = replace(chosen, **changes, source=f"{chosen.source}; user: {', '.join(changes)}")
    return check_preprocess(chosen, shape)


def check_preprocess(preprocess: Preprocess, shape: tuple[int, int, int]) -> Preprocess:
    """Return `preprocess` if it fits a network of input (c, h, w).

    Raises:
        LoadError: saying which field does not fit.
    """
    channels, height, width = shape
    for name in ("mean", "std"):
        values = getattr(preprocess, name)
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise LoadError(f"preprocess: {name} is {values}, expected finite numbers")
        if len(values) != channels:
            raise LoadError(
                f"preprocess: {name} has {len(values)} values {values}, expected {channels}, one per channel"
            )
    if any(value <= 0 for value in preprocess.std):
        raise LoadError(f"preprocess: std is {preprocess.std}, expected values above 0")
    if not (isinstance(preprocess.scale, (int, float)) and preprocess.scale > 0):
        raise LoadError(
            f"preprocess: scale is {preprocess.scale}, expected a number above 0", hint="1/255 is usual"
        )
    orders = ("rgb", "bgr") if channels == 3 else ("gray",)
    if preprocess.channel_order not in orders:
        raise LoadError(
            f"preprocess: channel order is {preprocess.channel_order!r}, expected {' or '.join(orders)} "
            f"for {channels} channels"
        )
    if preprocess.interpolation not in ("bilinear", "bicubic"):
        raise LoadError(
            f"preprocess: interpolation is {preprocess.interpolation!r}, expected bilinear or bicubic"
        )
    if tuple(preprocess.size) != (height, width):
        raise LoadError(f"preprocess: size is {tuple(preprocess.size)}, the network takes {(height, width)}")
    short = preprocess.resize_short
    if short is not None and (not isinstance(short, int) or short < min(height, width)):
        raise LoadError(
            f"preprocess: resize_short is {short}, expected an integer of at least {min(height, width)}"
        )
    return preprocess


def read_preprocess(path: Path, shape: tuple[int, int, int]) -> Preprocess:
    """Read a TOML file with the fields of Preprocess; absent ones are as for `unit`.

    Raises:
        LoadError: for a file that is missing, not TOML, or has an unknown key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"preprocess file {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"preprocess file {path}: not TOML ({error})") from error
    known = [field.name for field in fields(Preprocess)]
    for key in values:
        if key not in known:
            raise LoadError(f"preprocess file {path}: unknown key {key!r}, expected {', '.join(known)}")
    changes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    for key in ("size", "mean", "std"):
        if key in changes and not isinstance(changes[key], tuple):
            raise LoadError(f"preprocess file {path}: {key} is {changes[key]!r}, expected a list")
    changes.setdefault("source", f"user: {path.name}")
    return replace(named_preprocess("unit", shape), **changes)


def timm_preprocess(config: dict[str, Any], shape: tuple[int, int, int]) -> Preprocess | None:
    """Return the preprocess that a timm configuration states, or None if it does not fit the input.

    Args:
        config: `model.pretrained_cfg`: mean, std, crop_pct, interpolation.
        shape: (c, h, w) of the network's input.
    """
    mean, std = config.get("mean"), config.get("std")
    if mean is None or std is None or len(mean) != shape[0] or len(std) != shape[0] or shape[0] not in (1, 3):
        return None
    height, width = shape[1:]
    crop = float(config.get("crop_pct") or _CROP_FRACTION)
    short = min(height, width)
    return Preprocess(
        size=(height, width),
        resize_short=max(short, math.floor(short / crop)) if short >= _SMALLEST_CROPPED else None,
        channel_order="rgb" if shape[0] == 3 else "gray",
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
        interpolation="bicubic" if config.get("interpolation") == "bicubic" else "bilinear",
        source="timm",
    )
