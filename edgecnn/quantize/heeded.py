"""Which part of a value's range its readers tell apart: calibration need not hold the rest in int8.

A hard-sigmoid is 0 below -3 and 6 / 6 above 3, so its input may saturate there; a hard-swish x * relu6(x + 3)
is 0 for every x up to -3. The levels that a range of -28 to 24 would spend out there resolve what is within.
The clamped value gives exactly the same float outputs.

    >>> import torch
    >>> x = torch.tensor([-9.0, -1.0, 5.0])
    >>> torch.equal(torch.nn.functional.hardswish(x), torch.nn.functional.hardswish(x.clamp(min=-3.0)))
    True
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import fx

from edgecnn.graph.nodes import aten
from edgecnn.quantize.lockstep import clamp_bounds
from edgecnn.quantize.scheme import CLAMPS

Interval = tuple[float, float]
EVERYTHING: Interval = (-math.inf, math.inf)
_NOTHING: Interval = (math.inf, -math.inf)


def heeded_ranges(nodes: Iterable[fx.Node]) -> dict[fx.Node, Interval]:
    """Return the heeded range of those nodes of which not everything is heeded."""
    found = ((node, heeded_range(node)) for node in nodes)
    return {node: heeded for node, heeded in found if heeded[0] < heeded[1] and heeded != EVERYTHING}


def heeded_range(node: fx.Node) -> Interval:
    """Return (low, high) such that clamping a value to it changes nothing that its readers give.

    Followed through sums with and products by a number, up to clamps; any other reader heeds everything.
    A value that nobody reads has (inf, -inf).

    Args:
        node: of a float graph, hard-swishes and hard-sigmoids written out.
    """
    low, high = _NOTHING
    for user in node.users:
        user_low, user_high = _heeded_by(user, node)
        low, high = min(low, user_low), max(high, user_high)
    return low, high


def _heeded_by(user: fx.Node, node: fx.Node) -> Interval:
    if user.target in CLAMPS:
        low, high = clamp_bounds(user)
        return -math.inf if low is None else low, math.inf if high is None else high
    number = _number(user, node)
    if user.target is aten.add.Tensor and number is not None and not user.kwargs:
        low, high = heeded_range(user)
        return low - number, high - number
    if user.target is aten.mul.Tensor and number is not None and number > 0.0:
        low, high = heeded_range(user)
        return low / number, high / number
    if user.target is aten.mul.Tensor and len(user.args) == 2:
        return _gated(user, node)
    return EVERYTHING


def _gated(product: fx.Node, node: fx.Node) -> Interval:
    """Return what x * clamp(x + number, 0, ...) heeds of x."""
    first, second = product.args
    gate: Any = second if first is node else first
    if not isinstance(gate, fx.Node) or gate.target not in CLAMPS or clamp_bounds(gate)[0] != 0.0:
        return EVERYTHING
    shifted = gate.args[0]
    if not isinstance(shifted, fx.Node) or shifted.target is not aten.add.Tensor or shifted.kwargs:
        return EVERYTHING
    number = _number(shifted, node)
    return EVERYTHING if number is None else (-number, math.inf)


def _number(call: fx.Node, node: fx.Node) -> float | None:
    """Return the number that a call of two arguments combines a node with."""
    others = [argument for argument in call.args if argument is not node]
    if len(call.args) != 2 or len(others) != 1 or not isinstance(others[0], (int, float)):
        return None
    return float(others[0])
