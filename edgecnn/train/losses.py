"""Losses of outputs z against targets t; mean over images, and over pixels for outputs (n, classes, h, w).

    cross_entropy   - sum_k t_k log softmax(z)_k
    focal           - sum_k t_k (1 - p_k)^gamma log p_k,     p = softmax(z), gamma = 2
    bce             - mean_k [t_k log s_k + (1 - t_k) log(1 - s_k)],   s = sigmoid(z)
    mse             mean_k (z_k - t_k)^2
    mae             mean_k |z_k - t_k|
    huber           mean_k of (z_k - t_k)^2 / 2 where |z_k - t_k| <= 1, |z_k - t_k| - 1/2 beyond

Label smoothing e: t <- (1 - e) t + e / classes for the first two, (1 - e) t + e / 2 for bce.

Source: Szegedy et al. 2016, arXiv:1512.00567, section 7 (label smoothing); Lin et al. 2017, arXiv:1708.02002,
equation 4 (focal); Huber 1964, doi:10.1214/aoms/1177703732.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from edgecnn.errors import PassError
from edgecnn.model import ModelSpec
from edgecnn.train.objective import Batch

FOCAL_GAMMA = 2.0
_BY_CLASS = frozenset({"cross_entropy", "focal", "bce"})


def choose_loss(name: str, spec: ModelSpec) -> str:
    """Return the loss that "auto" stands for: cross_entropy for classes, mse for numbers."""
    if name != "auto":
        return name
    return "cross_entropy" if spec.task in ("classification", "segmentation") else "mse"


def soft_targets(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return targets in the shape of the outputs: labels become one-hot, numbers are reshaped.

    Args:
        outputs: (n, classes) or (n, classes, h, w).
        targets: labels int64 (n,) or (n, h, w), or numbers that fit the outputs.

    Raises:
        PassError: if they do not fit.

    Example:
        >>> import torch
        >>> soft_targets(torch.zeros(1, 3), torch.tensor([2])).tolist()
        [[0.0, 0.0, 1.0]]
    """
    if targets.shape == outputs.shape:
        return targets.to(outputs.dtype)
    fits = targets.ndim == outputs.ndim - 1 and targets.shape == (outputs.shape[0], *outputs.shape[2:])
    if fits and outputs.shape[1] == 1:
        return targets.unsqueeze(1).to(outputs.dtype)
    if fits and not targets.is_floating_point():
        one_hot = functional.one_hot(targets, outputs.shape[1])  # (n, [h, w,] classes)
        return one_hot.movedim(-1, 1).to(outputs.dtype)
    raise PassError(
        f"targets have shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)}, expected "
        "one label per image (or per pixel), or a number per output"
    )


def supervised_loss(name: str, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return one of the losses above, ().

    Args:
        name: cross_entropy, focal, bce, mse, mae or huber.
        outputs: (n, classes) or (n, classes, h, w).
        targets: labels (n,) or (n, h, w), or values in the shape of the outputs.
        label_smoothing: in [0, 1); no part of mse, mae and huber.

    Raises:
        PassError: if the targets do not fit the outputs, or the name is unknown.

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 0.0]])
        >>> round(float(supervised_loss("cross_entropy", z, torch.tensor([1]))), 4)
        0.6931
    """
    if name == "cross_entropy" and not targets.is_floating_point() and targets.ndim == outputs.ndim - 1:
        return functional.cross_entropy(outputs, targets, label_smoothing=label_smoothing)
    t = soft_targets(outputs, targets)
    if name in _BY_CLASS and label_smoothing:
        classes = 2 if name == "bce" else outputs.shape[1]
        t = (1.0 - label_smoothing) * t + label_smoothing / classes
    if name == "cross_entropy":
        return functional.cross_entropy(outputs, t)
    if name == "focal":
        log_p = outputs.log_softmax(1)
        return -(t * (1.0 - log_p.exp()) ** FOCAL_GAMMA * log_p).sum(1).mean()
    if name == "bce":
        return functional.binary_cross_entropy_with_logits(outputs, t)
    if name == "mse":
        return functional.mse_loss(outputs, t)
    if name == "mae":
        return functional.l1_loss(outputs, t)
    if name == "huber":
        return functional.huber_loss(outputs, t)
    raise PassError(f"loss is {name!r}, expected cross_entropy, focal, bce, mse, mae or huber")


class SupervisedLoss:
    """The objective of fine-tuning: a loss of the first output against the labels.

    Args:
        name: cross_entropy, focal, bce, mse, mae or huber.
        label_smoothing: in [0, 1).

    Example:
        >>> import torch
        >>> batch = Batch(torch.zeros(1, 1, 1, 1), torch.tensor([0]), torch.tensor([0]), 0, False)
        >>> round(float(SupervisedLoss("cross_entropy")((torch.zeros(1, 2),), batch, {})), 4)
        0.6931
    """

    taps: tuple[str, ...] = ()

    def __init__(self, name: str, label_smoothing: float = 0.0) -> None:
        self.name = name
        self.label_smoothing = label_smoothing

    def modules(self) -> nn.Module | None:
        """Return None: there is nothing but the network to train."""
        return None

    def __call__(
        self,
        outputs: tuple[Tensor, ...],
        batch: Batch,
        tapped: Mapping[str, Tensor],  # noqa: ARG002 (the Objective protocol's signature)
    ) -> Tensor:
        """Return the loss, ().

        Raises:
            PassError: if the batch is unlabelled or its targets do not fit.
        """
        if batch.targets is None:
            raise PassError(
                f"the loss {self.name} needs labels, found images without any",
                hint="give labelled images, or distil from a teacher, which needs none",
            )
        return supervised_loss(self.name, outputs[0], batch.targets, self.label_smoothing)
