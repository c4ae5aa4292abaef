"""The check that a rewrite keeps what a network computes: noise gives the same outputs before and after.

    max |y' - y| <= 1e-3 max |y|

Deep networks can amplify what float rounding changes beyond that. So an error above the bound is compared
with what a like cause does to the network as it was: with its input multiplied by 1 + 1e-5, a hundred
roundings. A rewrite that is wrong is orders of magnitude off, also there.
"""

from __future__ import annotations

from typing import Any

import torch

from edgecnn.errors import PassError
from edgecnn.model import Model

TOLERANCE = 1e-3
"""Relative to the largest output: what float rounding may change."""

NUDGE, ALLOWANCE = 1e-5, 10.0
"""Of the input, and how many times what it does to the outputs is taken for rounding."""


def refuse_changed_outputs(before: Model, after: Model, name: str) -> None:
    """Run both on noise and compare every output.

    Args:
        before: the network that was rewritten.
        after: what became of it.
        name: of the pass, for the message.

    Raises:
        PassError: if an output changed by more than rounding; nothing is said of outputs that are not finite
            in the first place.
    """
    generator = torch.Generator().manual_seed(0)
    shape = [before.fixed_batch or 1, *(size or 1 for size in before.spec.inputs[0].shape[1:])]
    x = torch.randn(shape, generator=generator)
    expected, found = _outputs(before, x), _outputs(after, x)
    nudged: list[torch.Tensor] = []
    for index, (old, new) in enumerate(zip(expected, found, strict=True)):
        if not bool(old.isfinite().all()):
            continue
        error, reach = _distance(new, old), float(old.abs().max()) if old.numel() else 0.0
        if error <= TOLERANCE * max(reach, 1e-6):
            continue
        nudged = nudged or _outputs(before, x * (1.0 + NUDGE))
        if not error <= ALLOWANCE * _distance(nudged[index], old):
            raise PassError(f"{name} changed an output by {error:.3g} where it reaches {reach:.3g}")


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def _outputs(model: Model, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return _flat(model.graph(x))


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.float()]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for item in values for tensor in _flat(item)]
