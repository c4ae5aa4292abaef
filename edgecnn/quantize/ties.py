"""Scales for which no int8 addition, mean or product lies half-way between two integers.

    y_q = round((a_q - z_a) r_a + (b_q - z_b) r_b) + z_y      r_a = scale_a / scale_y, r_b = scale_b / scale_y

ONNX Runtime computes this in float and rounds half to even, XNNPACK in 21-bit fixed point and rounds half
up; near a tie they differ by 1, and a deep residual network passes that on. With r_a = p / D and
r_b = q / D for whole p, q and an odd D the exact sum is a multiple of 1 / D, so it stays at least 1 / (2 D)
away from every tie, more than either computation's error: both give the same integer.

A product is (a_q - z_a) (b_q - z_b) s_a s_b / s_y; with s_a s_b / s_y = p / D it has no tie either. ONNX
Runtime adds the zero point before it rounds, which loses the last bits: products within 1e-5 of a tie went
astray, one in a million, and moved four fifths of an EfficientNet's outputs.

Measured on ResNet-18 and MobileNetV2 with random weights: 3 to 8 additions in 100,000 differed before, none
after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx

from edgecnn.graph.nodes import aten
from edgecnn.quantize.annotate import Slots, fuses_into_clamp
from edgecnn.quantize.leaky_relu import fit_inputs, fit_outputs

_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_SUMS = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.rsub.Scalar})

DENOMINATOR = 2047
"""Odd; fixed-point error stays below 1/(2 * 2047), and a scale grows by at most 1/(2047 r)."""


PRODUCT_DENOMINATOR = 4095
"""Larger, since a product's ratio is small: 1/128 for a sigmoid gate, whose scale then grows by up to 3 %."""


def tie_free_scale(scale: float, scale_y: float, *, nearest: bool = False) -> float:
    """Return the smallest p / 2047 * scale_y that is not below `scale`, or the nearest, as a float32 value.

    Example:
        >>> tie_free_scale(0.5, 1.0) == float(np.float32(1024 / 2047))
        True
        >>> tie_free_scale(0.5001, 1.0, nearest=True) == float(np.float32(1024 / 2047))
        True
    """
    p = scale / scale_y * DENOMINATOR
    p = max(round(p) if nearest else math.ceil(p - 1e-6), 1)
    return float(np.float32(p * scale_y / DENOMINATOR))


def offset_scale(offset: float, scale_y: float) -> float:
    """Return the smallest scale, not below `scale_y`, at which adding a number moves by some q / 2047 steps.

    Example: hard_sigmoid adds 1/2 to values held in steps of 1/255, which makes 127.5 of zero: a tie.
        >>> round(0.5 / offset_scale(0.5, 1 / 255) % 1, 4)
        0.4998
    """
    q = max(math.floor(offset / scale_y * DENOMINATOR), 1)
    return float(np.float32(max(offset * DENOMINATOR / q, scale_y)))


def mean_scale(scale_x: float, scale_y: float, count: int, *, nearest: bool = False) -> float:
    """Return a scale not below `scale_y`, or the nearest, at which no mean of `count` integers is a tie.

    With count = 2^a m, m odd, the mean's steps are sum * p / (count D) for scale_x / scale_y = p / D; a tie
    needs 2 sum p = count D (2 k + 1), which no whole numbers fulfil when D is odd and p a multiple of 2^a.
    p / 2^a is kept small, about 32, so that the distance to the next tie stays above the float32 error.

    Example: the mean of 4 values in the same scale, a tie for every second odd sum, becomes steps of 32/31.
        >>> round(mean_scale(1.0, 1.0, 4), 4)
        1.0078
    """
    a = (count & -count).bit_length() - 1
    ratio = scale_x / scale_y
    denominator = max(int(32 * 2**a / ratio) | 1, 3)
    p = ratio * denominator / 2**a
    p = max(round(p) if nearest else math.floor(p), 1) * 2**a
    found = scale_x * denominator / p
    return float(np.float32(found if nearest else max(found, scale_y)))


def product_scale(scale_a: float, scale_b: float, scale_y: float, *, nearest: bool = False) -> float:
    """Return the smallest scale, at most 0.5 % below `scale_y`, with scale_a scale_b / scale = p / 4095.

    `nearest` is the nearest such scale.

    Example: a gate in steps of 1/256 on values in the product's own scale: p = 16 for 15.996.
        >>> round(product_scale(1 / 256, 1.0, 1.0), 4)
        0.9998
    """
    p = scale_a * scale_b / scale_y * PRODUCT_DENOMINATOR
    p = max(round(p) if nearest else math.floor(p * 1.005), 1)
    return float(np.float32(scale_a * scale_b * PRODUCT_DENOMINATOR / p))


def remove_ties(
    slots: Slots,
    by_root: dict[fx.Node, tuple[float, int]],
    mean_counts: Mapping[fx.Node, int],
    *,
    nearest: bool = False,
) -> None:
    """Adjust the scales of slots that additions and subtractions read, or that means and products write.

    Ranges only grow, unless `nearest`.

    The output of an addition with a number, or with a value whose parameters are prescribed, is adjusted too.

    Additions are taken from the last to the first, so that an output's scale is final before its operands
    are fitted to it. A slot that two additions read is fitted to the later one alone. Means and
    products follow from the first to the last, each fitted to inputs that are final: a mean often averages a
    product. A leaky ReLU is fitted with them, or its input to it where an addition has bound its output
    (`leaky_relu`).

    Args:
        slots: of the graph.
        by_root: (scale, zero_point) per slot root, changed in place.
        mean_counts: how many values each mean node averages.
        nearest: change every scale as little as it takes, be it to a smaller one: for scales that were
            learned, which have no range that they must cover.
    """
    final = {slots.root(node) for node in slots.fixed}
    integer = [held for held in slots.held if held not in slots.floats.nodes]
    for held in reversed(integer):
        _fit_addition(slots, by_root, final, held, nearest=nearest)
    for held in reversed(integer):
        fit_inputs(slots, by_root, final, held, nearest=nearest)
    for held in integer:
        fit_outputs(slots, by_root, final, held, nearest=nearest)
        y = slots.root(held)
        if y in final:
            continue
        scale, zero_point = by_root[y]
        source, product = held.args[0] if held.args else None, _arithmetic(held, _PRODUCTS)
        factors = [] if product is None else [_factor_scale(slots, by_root, a) for a in product.args[:2]]
        if held in mean_counts and isinstance(source, fx.Node) and source in slots.parent:
            scale_x = by_root[slots.root(source)][0]
            by_root[y] = (mean_scale(scale_x, scale, mean_counts[held], nearest=nearest), zero_point)
            final.add(y)
        elif factors and all(factors):
            by_root[y] = (product_scale(factors[0], factors[1], scale, nearest=nearest), zero_point)
            final.add(y)


def _fit_addition(
    slots: Slots,
    by_root: dict[fx.Node, tuple[float, int]],
    final: set[fx.Node],
    held: fx.Node,
    *,
    nearest: bool,
) -> None:
    """Fit the operands of an addition to its output, and that to a number or prescribed scale among them."""
    addition = _arithmetic(held, _SUMS)
    if addition is None:
        return
    y = slots.root(held)
    offset = _prescribed_step(slots, addition, by_root[y][0])
    if offset and y not in final:
        scale, zero_point = by_root[y]
        by_root[y] = (offset_scale(offset, scale), zero_point)
    final.add(y)
    for operand in addition.args[:2]:
        if not isinstance(operand, fx.Node) or operand not in slots.parent:
            continue
        root = slots.root(operand)
        if root in final:
            continue
        scale, zero_point = by_root[root]
        by_root[root] = (tie_free_scale(scale, by_root[y][0], nearest=nearest), zero_point)
        final.add(root)


def _factor_scale(slots: Slots, by_root: Mapping[fx.Node, tuple[float, int]], factor: object) -> float:
    """Return the scale a factor is held in, 0 where it is not known yet (a parameter)."""
    if isinstance(factor, (int, float)):
        return abs(float(factor)) / 127.0
    if isinstance(factor, fx.Node) and factor in slots.parent:
        return by_root[slots.root(factor)][0]
    return 0.0


def _prescribed_step(slots: Slots, addition: fx.Node, scale_y: float) -> float:
    """Return what the output's scale has to fit: an operand's fixed scale, or a number; else 0.

    A fixed scale below scale_y / 16 is let be: fitting the output to it would cost more range than ties do.
    """
    for operand in addition.args[:2]:
        if isinstance(operand, fx.Node) and operand in slots.parent:
            fixed = slots.fixed.get(slots.root(operand))
            if fixed is not None and fixed[0] > scale_y / 16.0:
                return fixed[0]
    return next((abs(float(v)) for v in addition.args[:2] if isinstance(v, (int, float))), 0.0)


def _arithmetic(held: fx.Node, targets: frozenset[Any]) -> fx.Node | None:
    """Return the operator among `targets` whose result this held value is, through a fused clamp."""
    if held.target in targets:
        return held
    source = held.args[0] if held.args else None
    if isinstance(source, fx.Node) and source.target in targets and fuses_into_clamp(source):
        return source
    return None
