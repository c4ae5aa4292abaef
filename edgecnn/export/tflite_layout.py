"""Stored orders of dimensions, and reshapes between them with as few transposes as possible.

The Program speaks PyTorch's dimension order; the file stores each tensor in an `order`: stored dimension i is
the Program's dimension order[i]. NHWC is (0, 2, 3, 1), plain is (0, 1, ..., r-1), and the batch stays first.
A transpose then costs nothing, as it only renames the dimensions of what is stored.

A reshape from dimensions I to dimensions O is taken apart into factors, the finest division of which both are
made by joining neighbours: (c, h, w) -> (g, c/g, h, w) has the factors g, c/g, h, w. The stored order of I
gives a stored order of the factors; if those of each dimension of O lie side by side in it, a RESHAPE is
enough, else one TRANSPOSE of factors must come first, or two for a channel shuffle, which is faster. So a
flatten of 1x1 images becomes a single RESHAPE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from edgecnn.graph.program import BATCH

Order = tuple[int, ...]


def plain_order(num_dims: int) -> Order:
    """Return the order in which the file stores dimensions as the Program counts them."""
    return tuple(range(num_dims))


def default_order(num_dims: int) -> Order:
    """Return NHWC for four dimensions and the plain order for any other number.

    Example:
        >>> default_order(4), default_order(3)
        ((0, 2, 3, 1), (0, 1, 2))
    """
    return (0, 2, 3, 1) if num_dims == 4 else plain_order(num_dims)


def stored_shape(shape: Sequence[int], order: Order) -> tuple[int, ...]:
    """Return `shape` as the file stores it.

    Example:
        >>> stored_shape((BATCH, 3, 8, 9), (0, 2, 3, 1))
        (-1, 8, 9, 3)
    """
    return tuple(shape[dim] for dim in order)


def same_memory(shape: Sequence[int], a: Order, b: Order) -> bool:
    """Whether the two orders put the elements at the same places, as dimensions of size 1 do not count.

    Example:
        >>> same_memory((BATCH, 8, 1, 1), (0, 2, 3, 1), (0, 1, 2, 3))
        True
    """
    return [dim for dim in a if shape[dim] != 1] == [dim for dim in b if shape[dim] != 1]


def complete_order(shape: Sequence[int], wide: Sequence[int]) -> Order:
    """Return an order of all dimensions in which those that are not of size 1 follow each other as in `wide`.

    The default order is taken if it fits, then the plain one; else dimensions of size 1 follow the batch.

    Example:
        >>> complete_order((BATCH, 8, 1, 1), (0, 1)), complete_order((BATCH, 1, 4, 5), (0, 3, 2))
        ((0, 2, 3, 1), (0, 1, 3, 2))
    """
    wanted = tuple(dim for dim in wide if shape[dim] != 1)
    for candidate in (default_order(len(shape)), plain_order(len(shape))):
        if tuple(dim for dim in candidate if shape[dim] != 1) == wanted:
            return candidate
    narrow = [dim for dim in range(1, len(shape)) if shape[dim] == 1]
    return (0, *narrow, *(dim for dim in wanted if dim != 0))


@dataclass(frozen=True)
class ReshapePlan:
    """How stored memory becomes the reshaped tensor's.

    Attributes:
        factors: stored shape of the factors, batch first.
        perm: transpose of the factors, None when the memory stays as it is.
        order: stored order of the result.
    """

    factors: tuple[int, ...]
    perm: Order | None
    order: Order


def plan_reshape(shape: Sequence[int], order: Order, new_shape: Sequence[int]) -> ReshapePlan | None:
    """Return how to reshape `shape`, stored in `order`, to `new_shape`, whatever order the result then has.

    Args:
        shape: the Program's shape before, BATCH first.
        order: how it is stored.
        new_shape: the Program's shape after, BATCH first.

    Returns:
        The plan, or None where the shapes have no common factors ((6,) dims 2x3 to 3x2) and the plain order
        is needed on both sides.

    Example:
        >>> plan_reshape((BATCH, 8, 4, 5), (0, 2, 3, 1), (BATCH, 2, 4, 4, 5)).order
        (0, 3, 4, 1, 2)
        >>> plan_reshape((BATCH, 8, 4, 5), (0, 2, 3, 1), (BATCH, 160))
        ReshapePlan(factors=(-1, 4, 5, 8), perm=(0, 3, 1, 2), order=(0, 1))
    """
    sizes = _common_factors(shape[1:], new_shape[1:])
    if sizes is None:
        return None
    members = _members(sizes, shape[1:])
    new_members = _members(sizes, new_shape[1:])
    stored = [factor for dim in order[1:] for factor in members[dim - 1]]
    position = {factor: place for place, factor in enumerate(stored)}
    wide = sorted(
        (dim for dim in range(1, len(new_shape)) if new_members[dim - 1]),
        key=lambda dim: position[new_members[dim - 1][-1]],
    )
    wanted = [factor for dim in wide for factor in new_members[dim - 1]]
    perm = None if wanted == stored else (0, *(position[factor] + 1 for factor in wanted))
    factors = (BATCH, *(sizes[factor] for factor in stored))
    return ReshapePlan(factors, perm, complete_order(new_shape, (0, *wide)))


def _common_factors(sizes: Sequence[int], new_sizes: Sequence[int]) -> list[int] | None:
    """Return the sizes of the finest division that both shapes are joined from, None if there is none."""
    ends = sorted(_ends(sizes) | _ends(new_sizes) | {1})
    if any(after % before for before, after in pairwise(ends)):
        return None
    return [after // before for before, after in pairwise(ends)]


def _ends(sizes: Sequence[int]) -> set[int]:
    """Return the products of the leading 1, 2, ... dimensions."""
    found, product = set(), 1
    for size in sizes:
        product *= size
        found.add(product)
    return found


def _members(factors: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Return for each dimension the indices of the factors it is joined from, none for a size of 1."""
    members: list[list[int]] = []
    taken = 0
    for size in sizes:
        product, mine = 1, []
        while product < size:
            product *= factors[taken]
            mine.append(taken)
            taken += 1
        members.append(mine)
    return members
