"""The optimizer, its learning rate over time, and the average of the weights.

    lr(s) = peak * (s + 1) / W                                      s < W   (warm-up)
    lr(s) = peak * (1 + cos(pi * (s - W) / (T - W))) / 2            s >= W, T steps in all
    EMA:  w_avg <- d * w_avg + (1 - d) * w,   d = min(decay, (1 + s) / (10 + s))

Source: Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5 (cosine); Goyal et al. 2017,
arXiv:1706.02677, section 2.2 (warm-up); Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from edgecnn.train.settings import TrainSettings

_ADAM_BETA2 = 0.999


def learning_rate(settings: TrainSettings, step: int, total: int, warmup: int) -> float:
    """Return the learning rate of a step.

    Args:
        settings: its learning_rate is the peak.
        step: from 0.
        total: steps of the run.
        warmup: steps of the rise.

    Example:
        >>> [round(learning_rate(TrainSettings(learning_rate=1.0), s, 6, 2), 3) for s in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    fraction = (step - warmup) / max(total - warmup, 1)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * fraction))


def make_optimizer(named: Iterable[tuple[str, Tensor]], settings: TrainSettings) -> torch.optim.Optimizer:
    """Return the optimizer of the settings; vectors (biases, normalization) have no weight decay."""
    parameters = [parameter for _, parameter in named]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    lr, momentum = settings.learning_rate, settings.momentum
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, _ADAM_BETA2))
    nesterov = settings.nesterov and momentum > 0
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def ema_decay(decay: float, step: int) -> float:
    """Return the decay of a step: less in the first ones, when there is little to average.

    Example:
        >>> ema_decay(0.999, 0), ema_decay(0.999, 10**6)
        (0.1, 0.999)
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(average: dict[str, Tensor], current: dict[str, Tensor], decay: float) -> None:
    """Move an average of named tensors towards their current values, in place; integers are copied."""
    names = [name for name, value in average.items() if value.is_floating_point()]
    averages = [average[name] for name in names]
    torch._foreach_lerp_(averages, [current[name] for name in names], 1.0 - decay)
    for name, value in average.items():
        if not value.is_floating_point():
            value.copy_(current[name])
