"""Which preprocess is chosen, what is refused, and the check against BatchNorm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgecnn.errors import LoadError
from edgecnn.load import LoadOptions, check_against_batch_norm, load_model
from edgecnn.load.preprocess import choose_preprocess, named_preprocess, timm_preprocess
from edgecnn.model import Model
from edgecnn.runner.preprocess import Preprocess

RGB = (3, 224, 224)
GRAY = (1, 28, 28)


@pytest.mark.parametrize(
    ("name", "black", "white"), [("unit", 0.0, 1.0), ("symmetric", -1.0, 1.0), ("raw", 0.0, 255.0)]
)
def test_names_map_black_and_white(name: str, black: float, white: float) -> None:
    chosen = named_preprocess(name, GRAY)
    images = np.zeros((2, 28, 28, 1), np.uint8)
    images[1] = 255
    x = chosen.apply(images)
    assert (float(x[0].max()), float(x[1].min())) == (black, white)


def test_imagenet_by_hand() -> None:
    x = named_preprocess("imagenet", (3, 1, 1)).apply(np.array([[[[255, 0, 51]]]], np.uint8))
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(x.ravel(), expected, rtol=1e-6)


def test_defaults() -> None:
    rgb, gray, small = (choose_preprocess(s, LoadOptions()) for s in (RGB, GRAY, (3, 32, 32)))
    assert (rgb.source, rgb.resize_short, rgb.channel_order) == ("default: imagenet", 256, "rgb")
    assert (gray.source, gray.resize_short, gray.channel_order) == ("default: unit", None, "gray")
    assert small.resize_short is None
    assert choose_preprocess((3, 299, 299), LoadOptions()).resize_short == 342


def test_stored_wins_over_default_and_user_over_stored() -> None:
    stored = replace(named_preprocess("symmetric", RGB), source="timm")
    assert choose_preprocess(RGB, LoadOptions(), stored) == stored
    assert choose_preprocess(RGB, LoadOptions(preprocess="raw"), stored).source == "user: raw"
    changed = choose_preprocess(RGB, LoadOptions(mean=(1, 2, 3), channel_order="bgr"), stored)
    assert (changed.mean, changed.std, changed.channel_order) == ((1.0, 2.0, 3.0), (0.5,) * 3, "bgr")
    assert changed.source == "timm; user: mean, channel_order"


def test_timm_configuration() -> None:
    config = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "crop_pct": 0.9, "interpolation": "bicubic"}
    chosen = timm_preprocess(config, (3, 256, 256))
    assert chosen is not None
    assert (chosen.resize_short, chosen.interpolation, chosen.source) == (284, "bicubic", "timm")
    assert timm_preprocess({"mean": None}, RGB) is None
    assert timm_preprocess(config, GRAY) is None


def test_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('scale = 1.0\nmean = [104, 117, 123]\nchannel_order = "bgr"\n')
    chosen = choose_preprocess(RGB, LoadOptions(preprocess=str(path)))
    assert (chosen.scale, chosen.mean, chosen.channel_order) == (1.0, (104, 117, 123), "bgr")
    assert (chosen.size, chosen.source) == ((224, 224), "user: mine.toml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5,)}, r"mean has 1 values \(0\.5,\), expected 3, one per channel"),
        ({"std": (1.0, 0.0, 1.0)}, r"std is \(1\.0, 0\.0, 1\.0\), expected values above 0"),
        ({"mean": (0.0, float("nan"), 0.0)}, r"mean is .*nan.*, expected finite numbers"),
        ({"channel_order": "grb"}, r"channel order is 'grb', expected rgb or bgr for 3 channels"),
        (
            {"preprocess": "caffe"},
            r"preprocess 'caffe' is not known, expected imagenet, unit, symmetric, raw or",
        ),
        ({"preprocess": "nowhere.toml"}, r"preprocess file nowhere\.toml: cannot be read \(No such file"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        choose_preprocess(RGB, LoadOptions(**options))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mena = [1, 2, 3]", r"unknown key 'mena', expected size, "),
        ("mean = [1, 2", r"not TOML"),
        ("mean = 3", r"mean is 3, expected a list"),
        ("mean = ['a', 'b', 'c']", r"mean is .*, expected finite numbers"),
        ("scale = 0", r"scale is 0, expected a number above 0"),
        ("size = [32, 32]", r"size is \(32, 32\), the network takes \(224, 224\)"),
        ("resize_short = 100", r"resize_short is 100, expected an integer of at least 224"),
        ("interpolation = 'nearest'", r"interpolation is 'nearest', expected bilinear or bicubic"),
    ],
)
def test_toml_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(LoadError, match=message):
        choose_preprocess(RGB, LoadOptions(preprocess=str(tmp_path / "p.toml")))


def test_gray_networks() -> None:
    with pytest.raises(LoadError, match="preprocess imagenet is for 3 channels, the network takes 1"):
        choose_preprocess(GRAY, LoadOptions(preprocess="imagenet"))
    with pytest.raises(LoadError, match="channel order is 'bgr', expected gray for 1 channels"):
        choose_preprocess(GRAY, LoadOptions(channel_order="bgr"))
    with pytest.raises(LoadError, match="images of 4 channels, expected 1"):
        choose_preprocess((4, 8, 8), LoadOptions())


def photos(count: int = 16) -> np.ndarray:
    """Smooth uint8 images (n, 16, 16, 3) whose red is bright and whose blue is dark."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 1, (count, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    return (coarse * [255, 160, 70]).astype(np.uint8)


def trained(preprocess: Preprocess) -> Model:
    """A net whose BatchNorm has seen photos() through `preprocess`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU())
    with torch.no_grad():
        net.train()(torch.from_numpy(preprocess.apply(photos())))
    return load_model(net.eval(), LoadOptions(input_shape=(3, 16, 16)))


@pytest.mark.parametrize("name", ["imagenet", "unit", "symmetric", "raw"])
def test_right_preprocess_gives_no_warning(name: str) -> None:
    right = named_preprocess(name, (3, 16, 16))
    model = trained(right)
    model = replace(model, spec=replace(model.spec, preprocess=right))
    assert check_against_batch_norm(model, right.apply(photos())) == []


@pytest.mark.parametrize(
    ("right", "wrong"), [("raw", "unit"), ("unit", "raw"), ("imagenet", "raw"), ("raw", "imagenet")]
)
def test_wrong_scale_is_named(right: str, wrong: str) -> None:
    model = trained(named_preprocess(right, (3, 16, 16)))
    used = named_preprocess(wrong, (3, 16, 16))
    model = replace(model, spec=replace(model.spec, preprocess=used))
    (warning,) = check_against_batch_norm(model, used.apply(photos()))
    assert f"the preprocess (user: {wrong}) does not fit the network's training" in warning
    assert warning.endswith(f"--preprocess {right} would fit better")


def test_wrong_channel_order_is_named() -> None:
    used = named_preprocess("unit", (3, 16, 16))
    model = trained(replace(used, channel_order="bgr"))
    model = replace(model, spec=replace(model.spec, preprocess=used))
    (warning,) = check_against_batch_norm(model, used.apply(photos()))
    assert "--channel-order bgr would fit better" in warning


def test_nothing_to_compare_with() -> None:
    inputs = np.ones((4, 3, 16, 16), np.float32) * 100
    untrained = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    for net in (untrained, nn.Conv2d(3, 8, 3)):
        assert check_against_batch_norm(load_model(net, LoadOptions(input_shape=(3, 16, 16))), inputs) == []
