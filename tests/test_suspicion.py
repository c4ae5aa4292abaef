"""Calibration gone wrong: each case is noticed and named, the right images are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from edgecnn.diagnosis.letter import diagnose
from edgecnn.images import check_calibration, open_images
from edgecnn.load import LoadOptions, load_model
from edgecnn.load.preprocess import named_preprocess
from edgecnn.load.suspicion import neighbour_correlation, suspect_images
from edgecnn.model import Model
from edgecnn.preflight import suspect_channels

UNIT = named_preprocess("unit", (3, 16, 16))
WRONG = {
    "black": "all 16 images are black (every pixel 0), expected pixels 0..255",
    "gray": "every pixel of 16 images is 128, expected photographs or drawings",
    "too large": "the inputs seem to be 0..255 where 0..1 or a normalized range was meant",
    "too small": "they seem to be scaled to 0..1 already, and are scaled again",
    "one colour": "16 of 16 images are one colour",
    "repeated": "all 16 images are the same one",
    "noise": "the images look like noise",
    "nan": "1 of 16 images hold NaN or infinite values",
}


def photos(size: int = 16) -> np.ndarray:
    """Smooth pixels (n, 3, size, size)."""
    coarse = np.random.default_rng(0).uniform(0, 255, (16, 3, size // 4, size // 4))
    return coarse.repeat(4, 2).repeat(4, 3)


def spoil(pixels: np.ndarray, how: str) -> np.ndarray:
    """Return pixels as a user might have them by mistake."""
    rng = np.random.default_rng(1)
    broken = pixels.copy()
    broken[0, 0, 0, 0] = np.nan
    return {
        "black": 0 * pixels,
        "gray": 0 * pixels + 128,
        "too large": pixels * 255,
        "too small": pixels / 255,
        "one colour": 0 * pixels + rng.uniform(20, 250, (len(pixels), 3, 1, 1)),
        "repeated": np.repeat(pixels[:1], len(pixels), 0),
        "noise": rng.uniform(0, 255, pixels.shape),
        "nan": broken,
    }[how]


@pytest.mark.parametrize("how", WRONG)
def test_images_that_show_it_themselves(how: str) -> None:
    inputs = (spoil(photos(), how) / 255).astype(np.float32)
    (warning,) = suspect_images(UNIT, inputs, "x.npz")
    assert warning.startswith("x.npz: ")
    assert WRONG[how] in warning
    assert warning.endswith("scales calibrated on it are useless")


def test_images_that_are_right() -> None:
    assert suspect_images(UNIT, (photos() / 255).astype(np.float32), "x.npz") == []


def test_the_digits_of_the_example_are_right(examples_dir: Path) -> None:
    model = load_model(examples_dir / "lenet5_digits.pt2")
    dataset = open_images(model, "digits")
    assert check_calibration(model, dataset.inputs(range(64))) == []


def test_correlation_of_neighbours_by_hand() -> None:
    """Stripes one pixel wide: every neighbour is the opposite."""
    stripes = np.tile([0.0, 1.0], (1, 1, 8, 8))
    assert neighbour_correlation(stripes) == pytest.approx(-1.0, abs=0.02)
    assert neighbour_correlation(stripes[..., :4]) is None


@pytest.fixture(scope="module")
def resnet20(data_dir: Path) -> Model:
    load = LoadOptions(
        arch="benchmarks.cifar_resnet:resnet20", input_shape=(3, 32, 32), preprocess="imagenet"
    )
    return load_model(data_dir / "weights" / "resnet20-12fca82f.th", load)


@pytest.fixture(scope="module")
def cifar(resnet20: Model, data_dir: Path) -> np.ndarray:
    inputs = open_images(resnet20, data_dir / "cifar10" / "test1000.npz").inputs(range(64))
    return np.asarray(inputs)


def test_resnet20_and_its_own_images(resnet20: Model, cifar: np.ndarray) -> None:
    assert check_calibration(resnet20, cifar) == []


def test_resnet20_and_the_colours_swapped(resnet20: Model, cifar: np.ndarray) -> None:
    used = resnet20.spec.preprocess
    mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (used.mean, used.std))
    swapped = ((cifar * std + mean)[:, ::-1] - mean) / std
    (warning,) = check_calibration(resnet20, swapped)
    assert "the order of the colours seems wrong: read as rgb" in warning
    assert "expected --channel-order bgr" in warning


@pytest.mark.parametrize("name", ["unit", "symmetric", "raw"])
def test_resnet20_and_another_mean_and_std(
    resnet20: Model, cifar: np.ndarray, data_dir: Path, name: str
) -> None:
    used = named_preprocess(name, (3, 32, 32))
    wrong = replace(resnet20, spec=replace(resnet20.spec, preprocess=used))
    inputs = open_images(wrong, data_dir / "cifar10" / "test1000.npz").inputs(range(64))
    (warning,) = check_calibration(wrong, inputs)
    assert f"the preprocess (user: {name}) does not fit the network's training" in warning
    assert warning.endswith("--preprocess imagenet would fit better")


@pytest.mark.parametrize("how", [how for how in WRONG if how not in ("nan", "too large", "too small")])
def test_resnet20_and_no_images_at_all(resnet20: Model, how: str) -> None:
    (warning,) = check_calibration(
        resnet20, resnet20.spec.preprocess.apply(_as_bytes(spoil(photos(32), how)))
    )
    assert WRONG[how] in warning


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8).transpose(0, 2, 3, 1)


def test_dead_and_exploding_batch_norm_channels_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-12), nn.ReLU())
    options = LoadOptions(input_shape=(3, 16, 16))
    assert suspect_channels(load_model(net.eval(), options)) == []
    with torch.no_grad():
        net[1].weight[2] = 0.0
        net[1].running_var[5] = 1e-10
    exploding, dead = suspect_channels(load_model(net.eval(), options))
    assert exploding.startswith("BatchNorm channels that explode in 1 (9.95e+04x)")
    assert dead.startswith("1 dead BatchNorm channels (weight 0), first 1 (1 of 8)")


def test_a_channel_explodes_with_the_usual_eps_too() -> None:
    """1 / sqrt(1e-10 + 1e-5) is 316; a large weight on an ordinary variance is no explosion."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    options = LoadOptions(input_shape=(3, 16, 16))
    with torch.no_grad():
        net[1].weight[2] = 200.0
    assert suspect_channels(load_model(net.eval(), options)) == []
    with torch.no_grad():
        net[1].running_var[5] = 1e-10
    (exploding,) = suspect_channels(load_model(net.eval(), options))
    assert exploding.startswith("BatchNorm channels that explode in 1 (")
    assert exploding in diagnose(net, options)["warnings"]
