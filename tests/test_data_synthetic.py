"""Images made without data: distilled from BatchNorm statistics, and noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgecnn.data import distill_images, noise_images, open_dataset
from edgecnn.data.noise import natural_noise
from edgecnn.data.synthetic import batch_norm_loss, plan_work
from edgecnn.errors import DataError
from edgecnn.model import Model, ModelSpec, TensorSpec
from edgecnn.runner.preprocess import Preprocess

SHARED = Path(__file__).parents[2] / "shared" / "data"
IMAGENET = Preprocess((16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def to_model(
    net: nn.Module, preprocess: Preprocess, fixed_batch: int | None = None, classes: int = 10
) -> Model:
    shape = (preprocess.num_channels, *preprocess.size)
    dynamic = None if fixed_batch else ({0: torch.export.Dim("n")},)
    program = torch.export.export(
        net.eval(), (torch.randn(fixed_batch or 2, *shape),), dynamic_shapes=dynamic
    )
    inputs, outputs = (TensorSpec("x", (None, *shape)),), (TensorSpec("y", (None, classes)),)
    spec = ModelSpec("net", inputs, outputs, "classification", None, preprocess)
    return Model(program.module(), spec, fixed_batch=fixed_batch)


def small_net(channels: int = 3, trained: bool = True) -> nn.Module:
    """Return a network whose BatchNorms have seen bright images with little contrast."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    if trained:
        for layer in (net[0], net[2]):
            layer.momentum = None
        smooth = functional.interpolate(torch.rand(64, channels, 4, 4), (16, 16), mode="bilinear")
        pixels = 0.7 + 0.2 * (smooth - 0.5)
        mean, std = (torch.tensor(values)[:channels, None, None] for values in (IMAGENET.mean, IMAGENET.std))
        with torch.no_grad():
            net((pixels - mean) / std)
    return net


def test_distilled_images_match_the_statistics_far_better_than_noise() -> None:
    model = to_model(small_net(), IMAGENET)
    calls: list[tuple[int, int]] = []
    data = distill_images(model, 8, seed=0, progress=lambda done, total: calls.append((done, total)))
    inputs = data.inputs(range(8))
    noise = noise_images(IMAGENET, 8, seed=0).inputs(range(8))
    assert batch_norm_loss(model, inputs) < 0.02 * batch_norm_loss(model, noise)
    # The first BatchNorm sees the input itself.
    assert inputs.mean((0, 2, 3)) == pytest.approx(((0.7 - np.array(IMAGENET.mean)) / IMAGENET.std), abs=0.15)
    assert (inputs.shape, inputs.dtype, data.labels) == ((8, 3, 16, 16), np.float32, None)
    assert calls == [(step, 50) for step in range(1, 51)]
    assert "BatchNorm statistics, so accuracy is unmeasured" in data.warnings[0]
    assert len(data.warnings) == 1


def test_the_same_seed_gives_the_same_images_and_the_model_is_left_alone() -> None:
    model = to_model(small_net(), IMAGENET)
    before = {key: value.clone() for key, value in model.graph.state_dict().items()}
    first, again, other = (distill_images(model, 3, seed).inputs([0, 1, 2]) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    for key, value in model.graph.state_dict().items():
        assert torch.equal(value, before[key])
        assert value.grad is None


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_images_are_pixels_in_the_order_of_the_network(order: str) -> None:
    preprocess = replace(IMAGENET, channel_order=order)
    data = distill_images(to_model(small_net(), preprocess), 4, seed=0)
    pixels = data.inputs(range(4)) * np.reshape(preprocess.std, (3, 1, 1)) + np.reshape(
        preprocess.mean, (3, 1, 1)
    )
    levels = pixels * 255.0
    assert np.abs(levels - np.rint(levels)).max() < 1e-3
    assert -1e-3 < levels.min() <= levels.max() < 255.001
    assert batch_norm_loss(to_model(small_net(), preprocess), data.inputs(range(4))) < 0.05


def test_untrained_statistics_are_reported() -> None:
    data = distill_images(to_model(small_net(trained=False), IMAGENET), 2, seed=0)
    assert "does not seem to be trained" in data.warnings[1]


def test_a_fixed_batch_is_kept_to() -> None:
    assert len(distill_images(to_model(small_net(), IMAGENET, fixed_batch=2), 3, seed=0)) == 3


def test_large_networks_get_fewer_images() -> None:
    assert plan_work(1e6, 32) == (32, 50)
    images, steps = plan_work(4e9, 32)
    assert 4 <= images < 32
    assert images * steps * 4e9 <= 1.2e12
    assert plan_work(1e12, 32) == (4, 20)
    assert plan_work(4e9, 32, max_steps=20) == (15, 20)  # 1.2e12 / 4e9 / 20


def colour_net(*last: nn.Module) -> nn.Module:
    """Return a classifier that tells which of the three colours an image has most of."""
    linear = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(8.0 * torch.eye(3))
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear, *last)


@pytest.mark.parametrize("last", [(), (nn.Softmax(1),)], ids=["logits", "probabilities"])
@pytest.mark.parametrize("fixed_batch", [None, 4])
def test_a_classifier_without_batch_norm_gets_images_that_it_is_sure_of(
    last: tuple[nn.Module, ...], fixed_batch: int | None
) -> None:
    model = to_model(colour_net(*last), IMAGENET, fixed_batch=fixed_batch, classes=3)
    data = distill_images(model, 6, seed=0)
    colours = torch.from_numpy(data.inputs(range(6))).mean((2, 3))
    assert sorted(colours.argmax(1).tolist()) == [0, 0, 1, 1, 2, 2]  # every class drawn as often
    sure = torch.softmax(8.0 * colours, 1).amax(1)
    noise = torch.from_numpy(noise_images(IMAGENET, 6, seed=0).inputs(range(6))).mean((2, 3))
    assert sure.min() > 0.98 > torch.softmax(8.0 * noise, 1).amax(1).min()
    assert "no BatchNorm to learn from; accuracy is unmeasured" in data.warnings[0]
    assert (data.inputs(range(6)) == distill_images(model, 6, seed=0).inputs(range(6))).all()
    assert (data.inputs(range(6)) != distill_images(model, 6, seed=1).inputs(range(6))).any()


def test_more_images_than_classes_and_one_batch() -> None:
    data = distill_images(to_model(colour_net(), IMAGENET, classes=3), 34, seed=0)
    colours = data.inputs(range(34)).mean((2, 3)).argmax(1)
    assert sorted(np.bincount(colours, minlength=3)) == [11, 11, 12]


def test_neither_batch_norm_nor_classes_gives_noise_and_a_stronger_warning() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    model = to_model(net, IMAGENET)
    model = replace(model, spec=replace(model.spec, task="other"))
    data = distill_images(model, 4, seed=3)
    assert (data.inputs(range(4)) == noise_images(IMAGENET, 4, seed=3).inputs(range(4))).all()
    assert "no BatchNorm and no classes to learn from" in data.warnings[0]
    assert "do not ship this file" in data.warnings[0]
    with pytest.raises(DataError, match="net: the network has no BatchNorm layer"):
        batch_norm_loss(model, data.inputs([0]))


def test_noise_has_the_spectrum_and_brightness_of_photographs() -> None:
    pixels = natural_noise(Preprocess((64, 64), channel_order="gray"), 64, seed=0)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (64, 64, 64, 1))
    levels = pixels[..., 0] / 255.0
    assert levels.mean() == pytest.approx(0.45, abs=0.05)
    assert levels.std() == pytest.approx(0.25, abs=0.05)
    amplitude = np.abs(np.fft.fft2(levels))[:, 0, 1:17].mean(0)
    slope = np.polyfit(np.log(np.arange(1, 17)), np.log(amplitude), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.2)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 1)])
def test_tiny_images(size: tuple[int, int]) -> None:
    assert np.isfinite(noise_images(Preprocess(size), 2, seed=0).inputs([0, 1])).all()
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert len(distill_images(to_model(net, Preprocess(size)), 2, seed=0)) == 2


def test_no_images_asked_for() -> None:
    with pytest.raises(DataError, match="asked for 0 synthetic images, expected at least 1"):
        noise_images(IMAGENET, 0, seed=0)
    with pytest.raises(DataError, match="asked for -1 synthetic images"):
        distill_images(to_model(small_net(), IMAGENET), -1, seed=0)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut without parameters (option A)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.stride, self.extra = (1, 0) if c_in == c_out else (2, (c_out - c_in) // 2)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        shortcut = functional.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra)
        )
        return functional.relu(y + shortcut)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16), (16, 32), (32, 64)]
        stages = [nn.Sequential(BasicBlock(i, o), BasicBlock(o, o), BasicBlock(o, o)) for i, o in widths]
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@pytest.mark.slow
def test_resnet20_sees_in_distilled_images_what_it_saw_in_training() -> None:
    weights = SHARED / "weights" / "resnet20-12fca82f.th"
    if not weights.exists():
        pytest.skip("../shared/data/weights is absent")
    net = ResNet20()
    state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    net.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    model = to_model(net, replace(IMAGENET, size=(32, 32)))
    real = open_dataset(SHARED / "cifar10" / "train4000.npz", model.spec.preprocess, class_count=10)
    distilled = distill_images(model, 32, seed=0)
    noise = noise_images(model.spec.preprocess, 32, seed=0)
    losses = [batch_norm_loss(model, data.inputs(range(32))) for data in (real, distilled, noise)]
    assert losses[1] < losses[0] < 0.1 < 0.3 < losses[2]
    with torch.no_grad():
        classes = model.graph(torch.from_numpy(distilled.inputs(range(32)))).argmax(1)
    assert len(set(classes.tolist())) >= 5
