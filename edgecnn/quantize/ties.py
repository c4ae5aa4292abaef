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
from edgecnn.quantize.fitting import Fitting
from edgecnn.quantize.leaky_relu import fit_input, fit_output

_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_SUMS = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.rsub.Scalar})

DENOMINATOR = 2047
"""Odd; fixed-point error stays below 1/(2 * 2047), and a scale grows by at most 1/(2047 r)."""


PRODUCT_DENOMINATOR = 4095
"""About so large is that of a product, which then grows by at most 2/4095."""


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
    """Return the smallest scale not below `scale_y`, or the nearest, with scale_a scale_b / scale = p / D.

    p is what fits 4095 best, and D the odd number next to what p asks for: it moves the scale by less than p.

    Example: a gate in steps of 1/256 on values in the product's own scale: 16 / 4097 for 16 / 4096.
        >>> round(product_scale(1 / 256, 1.0, 1.0), 5)
        1.00024
    """
    p, ratio = _product_steps(scale_a, scale_b, scale_y)
    return float(np.float32(scale_a * scale_b * _odd(p / ratio, nearest=nearest, up=True) / p))


def factor_scale(scale_a: float, scale_b: float, scale_y: float, *, nearest: bool = False) -> float:
    """Return the smallest scale not below `scale_a`, or the nearest, with scale * scale_b / scale_y = p / D.

    Example: the gate of 1/256 again, where an addition has bound the product: 16 / 4095.
        >>> round(factor_scale(1.0, 1 / 256, 1.0), 5)
        1.00024
    """
    p, ratio = _product_steps(scale_a, scale_b, scale_y)
    return float(np.float32(p * scale_y / (scale_b * _odd(p / ratio, nearest=nearest, up=False))))


def _product_steps(scale_a: float, scale_b: float, scale_y: float) -> tuple[int, float]:
    """Return p and the ratio that p / D is to be close to."""
    ratio = scale_a * scale_b / scale_y
    return max(round(ratio * PRODUCT_DENOMINATOR), 1), ratio


def _odd(value: float, *, nearest: bool, up: bool) -> int:
    """Return the odd whole number next to a value: the nearest, the first above it or the first below."""
    if nearest:
        return 2 * round((value - 1.0) / 2.0) + 1
    slack = 1e-6 if up else -1e-6
    halves = (value * (1.0 - slack) - 1.0) / 2.0
    return 2 * (math.ceil(halves) if up else math.floor(halves)) + 1


def remove_ties(
    slots: Slots,
    by_root: dict[fx.Node, tuple[float, int]],
    mean_counts: Mapping[fx.Node, int],
    *,
    nearest: bool = False,
) -> None:
    """Adjust the scales that additions, subtractions, products, means and leaky ReLUs read and write.

    Ranges only grow, unless `nearest`.

    The output of an addition with a number, or with a value whose parameters are prescribed, is adjusted too.

    From the last operator to the first, so that an output's scale is settled before what it is made of is
    fitted to it: the operands of additions, and where that has bound what a leaky ReLU or a product writes,
    the input of the one (`leaky_relu`) and a factor of the other; that of a product whose factors are both
    free comes last, after the additions that may make them. A slot that two of them read is fitted to the
    later one alone. What means, products and leaky ReLUs write without being bound follows from the first to
    the last, each fitted to settled inputs: a mean often averages a product.

    Args:
        slots: of the graph.
        by_root: (scale, zero_point) per slot root, changed in place.
        mean_counts: how many values each mean node averages.
        nearest: change every scale as little as it takes, be it to a smaller one: for scales that were
            learned, which have no range that they must cover.
    """
    fitting = Fitting(slots, by_root, {slots.root(node) for node in slots.fixed}, nearest)
    integer = [held for held in slots.held if held not in slots.floats.nodes]
    for both_free in (False, True):
        for held in reversed(integer):
            _fit_operands(fitting, held)
            fit_input(fitting, held)
            _fit_factor(fitting, held, both_free=both_free)
    for held in integer:
        fit_output(fitting, held)
        _fit_mean(fitting, held, mean_counts.get(held, 0))
        _fit_product(fitting, held)
        fit_input(fitting, held)  # where a concat shares the output with what came first
        _fit_factor(fitting, held, both_free=True)


def _fit_operands(fitting: Fitting, held: fx.Node) -> None:
    """Fit the operands of an addition to its output, and that to a number or prescribed scale among them."""
    addition = _arithmetic(held, _SUMS)
    if addition is None:
        return
    y = fitting.slots.root(held)
    offset = _prescribed_step(fitting.slots, addition, fitting.scale(y))
    fitting.settle(y, offset_scale(offset, fitting.scale(y)) if offset else None)
    for operand in addition.args[:2]:
        root = fitting.root(operand)
        if root is not None and fitting.is_free(root):
            scale = tie_free_scale(fitting.scale(root), fitting.scale(y), nearest=fitting.nearest)
            fitting.settle(root, scale)


def _fit_factor(fitting: Fitting, held: fx.Node, *, both_free: bool) -> None:
    """Fit a free factor of a product to its output, where that is bound by what reads it.

    The other factor has to be settled, unless `both_free`.
    """
    product, y = _arithmetic(held, _PRODUCTS), fitting.slots.root(held)
    if product is None or fitting.is_free(y):
        return
    first, second = product.args[:2]
    for factor, other in ((first, second), (second, first)):
        root, gate, scale_b = fitting.root(factor), fitting.root(other), _factor_scale(fitting, other)
        if root is None or not fitting.is_free(root) or root is gate or not scale_b:
            continue
        if gate is not None and fitting.is_free(gate) and not both_free:
            continue
        scale = factor_scale(fitting.scale(root), scale_b, fitting.scale(y), nearest=fitting.nearest)
        fitting.settle(root, scale)
        _settle_all(fitting, product)
        return


def _fit_mean(fitting: Fitting, held: fx.Node, count: int) -> None:
    """Fit the output of a mean, where it is free, to its input."""
    y, x = fitting.slots.root(held), fitting.root(held.args[0]) if held.args else None
    if not count or x is None or not fitting.is_free(y):
        return
    fitting.settle(x)
    fitting.settle(y, mean_scale(fitting.scale(x), fitting.scale(y), count, nearest=fitting.nearest))


def _fit_product(fitting: Fitting, held: fx.Node) -> None:
    """Fit the output of a product, where it is free, to its factors."""
    product, y = _arithmetic(held, _PRODUCTS), fitting.slots.root(held)
    if product is None or not fitting.is_free(y):
        return
    scale_a, scale_b = (_factor_scale(fitting, factor) for factor in product.args[:2])
    if scale_a and scale_b:
        _settle_all(fitting, product)
        fitting.settle(y, product_scale(scale_a, scale_b, fitting.scale(y), nearest=fitting.nearest))


def _settle_all(fitting: Fitting, product: fx.Node) -> None:
    """Let the factors of a product keep their scales."""
    for root in map(fitting.root, product.args[:2]):
        if root is not None:
            fitting.settle(root)


def _factor_scale(fitting: Fitting, factor: object) -> float:
    """Return the scale a factor is held in, 0 where it is not known yet (a parameter)."""
    if isinstance(factor, (int, float)):
        return abs(float(factor)) / 127.0
    root = fitting.root(factor)
    return 0.0 if root is None else fitting.scale(root)


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
