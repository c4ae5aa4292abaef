"""Round in float as integers would be, with gradients that go through the rounding.

    v^ = s clamp(round(v / s), low, high)
    dv^/dv = 1                     where low < v / s < high, else 0         (straight-through)
    dv^/ds = round(v / s) - v / s  where low < v / s < high, else low or high
    ds <- g ds,    g = 1 / sqrt(n high)

n is how many values share the step size s; g keeps its updates in proportion to those of the weights.

Source: Esser et al. 2020, arXiv:1902.08153, equations 1 to 3 and section 2.2; Bengio et al. 2013,
arXiv:1308.3432 (straight-through estimator).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _FakeQuantize(torch.autograd.Function):
    """The equations above; a scale of any shape that broadcasts with the values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float, gradient_scale: float) -> Tensor:
        y = torch.div(x, scale).round_().clamp_(low, high).mul_(scale)
        ctx.save_for_backward(x, scale, y)
        ctx.low, ctx.high, ctx.gradient_scale = low, high, gradient_scale
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, scale, y = ctx.saved_tensors
        inside = (x > ctx.low * scale) & (x < ctx.high * scale)
        to_x = gradient * inside
        if not ctx.needs_input_grad[1]:
            return to_x, None, None, None, None
        # dv^/ds is (y - x) / s inside and y / s outside
        to_scale = (gradient * y).sub_(to_x * x).sum_to_size(scale.shape) / scale
        return to_x, to_scale * ctx.gradient_scale, None, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, low: float, high: float, gradient_scale: float = 1.0, smallest: float = 2.0**-24
) -> Tensor:
    """Return the values that integers in [low, high] stand for.

    Args:
        x: float32, any shape.
        scale: step size, float32, of a shape that broadcasts with x.
        low: smallest integer, less the zero point.
        high: largest integer, less the zero point.
        gradient_scale: g.
        smallest: what a step size that training has taken below it counts as.

    Example:
        >>> fake_quantize(torch.tensor([0.26, 5.0]), torch.tensor([0.5]), -128, 7).tolist()
        [0.5, 3.5]
    """
    used = scale + (scale.clamp_min(smallest) - scale).detach()
    return _FakeQuantize.apply(x, used, low, high, gradient_scale)  # type: ignore[no-any-return,no-untyped-call]


def fake_quantize_bias(bias: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return the values that int32 in steps of x_scale * weight_scale stand for.

    No gradient goes into the steps, which are too small to matter to the loss.

    Args:
        bias: float32 (c_out,).
        x_scale: of the layer's input, (1,).
        weight_scale: (c_out,), or fewer that repeat.

    Example:
        >>> fake_quantize_bias(torch.tensor([0.26]), torch.tensor([0.5]), torch.tensor([0.25])).item()
        0.25
    """
    step = (x_scale * weight_scale).detach()
    step = step.repeat(len(bias) // len(step))
    return bias + (torch.round(bias.detach() / step) * step - bias.detach())


def gradient_scale(count: int, high: float) -> float:
    """Return g = 1 / sqrt(n high).

    Args:
        count: n, weights of a channel, or values of an activation per image.
        high: the largest integer, less the zero point.

    Example:
        >>> gradient_scale(100, 4)
        0.05
    """
    return 1.0 / math.sqrt(max(count, 1) * max(high, 1.0))
