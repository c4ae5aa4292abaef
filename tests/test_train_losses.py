"""The losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from edgecnn.errors import PassError
from edgecnn.train.losses import SupervisedLoss, choose_loss, soft_targets, supervised_loss
from edgecnn.train.objective import Batch

LN2, LN3 = math.log(2.0), math.log(3.0)

Z = torch.tensor([[LN3, 0.0]])
"""softmax is (3/4, 1/4)."""


def loss(name: str, z: torch.Tensor, t: torch.Tensor, smoothing: float = 0.0) -> float:
    return float(supervised_loss(name, z, t, smoothing))


@pytest.mark.parametrize(
    ("name", "label", "smoothing", "expected"),
    [
        ("cross_entropy", 0, 0.0, math.log(4 / 3)),
        ("cross_entropy", 1, 0.0, math.log(4)),
        # smoothing 0.2 over 2 classes: targets 0.9 and 0.1
        ("cross_entropy", 0, 0.2, 0.9 * math.log(4 / 3) + 0.1 * math.log(4)),
        # (1 - 3/4)^2 log(4/3)
        ("focal", 0, 0.0, math.log(4 / 3) / 16),
        ("focal", 0, 0.2, 0.9 * math.log(4 / 3) / 16 + 0.1 * math.log(4) * 9 / 16),
        # sigmoid(log 3) = 3/4, sigmoid(0) = 1/2
        ("bce", 0, 0.0, (math.log(4 / 3) + LN2) / 2),
        ("bce", 1, 0.0, (math.log(4) + LN2) / 2),
        ("bce", 0, 0.2, (0.9 * math.log(4 / 3) + 0.1 * math.log(4) + LN2) / 2),
    ],
)
def test_losses_of_labels(name: str, label: int, smoothing: float, expected: float) -> None:
    assert loss(name, Z, torch.tensor([label]), smoothing) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "bce"])
def test_soft_targets_give_the_mixture_of_the_labels_losses(name: str) -> None:
    mixed = loss(name, Z, torch.tensor([[0.7, 0.3]]))
    parts = [loss(name, Z, torch.tensor([label])) for label in (0, 1)]
    assert mixed == pytest.approx(0.7 * parts[0] + 0.3 * parts[1], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mse", (0.25 + 9.0) / 2), ("mae", (0.5 + 3.0) / 2), ("huber", (0.125 + 2.5) / 2)],
)
def test_losses_of_numbers(name: str, expected: float) -> None:
    z, t = torch.tensor([[1.5, 4.0]]), torch.tensor([[1.0, 1.0]])
    assert loss(name, z, t) == pytest.approx(expected)
    columns = torch.tensor([[1.5], [4.0]]), torch.tensor([1.0, 1.0])
    assert loss(name, *columns) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "bce"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_segmentation_loss_is_the_mean_over_the_pixels(name: str, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 4, 5, generator=generator)
    labels = torch.randint(0, 3, (2, 4, 5), generator=generator)
    pixels = z.permute(0, 2, 3, 1).reshape(-1, 3)
    expected = loss(name, pixels, labels.reshape(-1), smoothing)
    assert loss(name, z, labels, smoothing) == pytest.approx(expected, rel=1e-5)


def test_one_number_per_pixel() -> None:
    z = torch.full((1, 1, 2, 2), 3.0)
    assert loss("mae", z, torch.ones(1, 2, 2)) == 2.0


def test_auto_follows_the_task() -> None:
    from dataclasses import replace

    import nets

    spec = nets.model("residual").spec
    assert choose_loss("auto", replace(spec, task="classification")) == "cross_entropy"
    assert choose_loss("auto", replace(spec, task="segmentation")) == "cross_entropy"
    assert choose_loss("auto", replace(spec, task="other")) == "mse"
    assert choose_loss("focal", spec) == "focal"


def test_targets_that_do_not_fit() -> None:
    with pytest.raises(PassError, match=r"targets have shape \(2, 4\) for outputs of shape \(2, 3\)"):
        soft_targets(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(PassError, match="loss is 'hinge', expected cross_entropy"):
        supervised_loss("hinge", Z, torch.tensor([0]))


def test_unlabelled_images_are_refused() -> None:
    batch = Batch(torch.zeros(1, 1, 1, 1), None, torch.tensor([0]), 0, False)
    with pytest.raises(PassError, match="the loss bce needs labels"):
        SupervisedLoss("bce")((Z,), batch, {})
