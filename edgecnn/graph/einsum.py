"""Products of two tensors given by letters, as one product of matrices.

"bhid,bjd->bhij"        letters in both and in the result are kept apart, those in both alone are summed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from edgecnn.graph.program import BATCH

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """How one factor becomes a stack of matrices: a transpose, then a reshape."""

    perm: Shape
    shape: Shape


@dataclass(frozen=True)
class ProductPlan:
    """A product as matmul.

    Attributes:
        sides: of both factors: (kept apart ..., rows, summed) and (kept apart ..., summed, columns).
        product_shape: of the matmul's result.
        split_shape: the same with every letter a dimension again.
        perm: from there to the order of the result.
    """

    sides: tuple[Side, Side]
    product_shape: Shape
    split_shape: Shape
    perm: Shape


def parse_product(equation: str, shapes: Sequence[Shape]) -> ProductPlan | None:
    """Return how to compute an einsum of two tensors, None for one that is no such product.

    Args:
        equation: with "->", one letter per dimension.
        shapes: of the two; dimension 0 may be the batch.

    Example:
        >>> plan = parse_product("bnc,bmc->bnm", [(-1, 5, 4), (-1, 6, 4)])
        >>> plan.sides[1].perm, plan.product_shape
        ((0, 2, 1), (-1, 5, 6))
    """
    text, _, result = equation.replace(" ", "").partition("->")
    terms = text.split(",")
    letters = [*terms, result]
    if len(terms) != 2 or "." in equation or any(len(set(term)) != len(term) for term in letters):
        return None
    if any(len(term) != len(shape) for term, shape in zip(terms, shapes, strict=True)):
        return None
    size = {
        letter: n
        for term, shape in zip(terms, shapes, strict=True)
        for letter, n in zip(term, shape, strict=True)
    }
    a, b = terms
    apart = [x for x in result if x in a and x in b]
    rows, columns = ([x for x in term if x in result and x not in apart] for term in (a, b))
    summed = [x for x in a if x in b and x not in result]
    if sorted((*apart, *rows, *summed)) != sorted(a) or sorted((*apart, *columns, *summed)) != sorted(b):
        return None
    batched = [x for x in result if size[x] == BATCH]
    if batched and batched[0] not in apart:
        return _batch_in_rows(a, b, size, (apart, rows, columns, summed), result)
    sides = (
        _side(a, (apart, rows, summed), size),
        _side(b, (apart, summed, columns), size),
    )
    product = (*(size[x] for x in apart), _joined(rows, size), _joined(columns, size))
    order = [*apart, *rows, *columns]
    return ProductPlan(sides, product, tuple(size[x] for x in order), tuple(order.index(x) for x in result))


def _batch_in_rows(
    a: str,
    b: str,
    size: dict[str, int],
    parts: tuple[list[str], list[str], list[str], list[str]],
    result: str,
) -> ProductPlan | None:
    """Return the plan where the second factor is a matrix for all images alike."""
    apart, rows, columns, summed = parts
    if apart or size[rows[0] if rows else summed[0]] != BATCH:
        return None
    first = (rows[:1], rows[1:], summed)
    sides = (_side(a, first, size), _side(b, ([], summed, columns), size))
    product = (BATCH, _joined(rows[1:], size), _joined(columns, size))
    order = [*rows, *columns]
    return ProductPlan(sides, product, tuple(size[x] for x in order), tuple(order.index(x) for x in result))


def _side(term: str, parts: tuple[list[str], list[str], list[str]], size: dict[str, int]) -> Side:
    apart, first, second = parts
    perm = tuple(term.index(x) for x in (*apart, *first, *second))
    return Side(perm, (*(size[x] for x in apart), _joined(first, size), _joined(second, size)))


def _joined(letters: Sequence[str], size: dict[str, int]) -> int:
    return prod(size[x] for x in letters)
