"""Where the dimensions of a value lie while a graph is rewritten so that the batch comes first.

A value that a network holds as (tokens, n, channels), or as (n * windows, tokens, channels), is held in the
rewritten graph with axes of its own, the batch first:

    (tokens, n, c)        axes (n, tokens, c)              dims ((1,), (0,), (2,))
    (n * w, tokens, c)    axes (n, w, tokens, c)           dims ((0, 1), (2,), (3,))

Each dimension of the network's value is a product of axes in row-major order; one of no axes has size 1. A
permute only reorders `dims`, and a reshape only divides axes, so that most of them cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from edgecnn.graph.program import BATCH

Dims = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Form:
    """How a value of the network lies in the rewritten graph.

    Attributes:
        axes: sizes; axis 0 is BATCH.
        dims: the axes that each dimension of the network's value is joined from.
    """

    axes: tuple[int, ...]
    dims: Dims

    @property
    def is_plain(self) -> bool:
        """Whether axes and dimensions are the same."""
        return self.dims == tuple((i,) for i in range(len(self.axes)))

    @property
    def batch_dim(self) -> int:
        """The dimension that the batch is part of."""
        return next(i for i, dim in enumerate(self.dims) if 0 in dim)

    def axis(self, dim: int) -> int | None:
        """Return the axis that a dimension is, None where it is several, none, or holds the batch."""
        axes = self.dims[dim % len(self.dims)]
        return axes[0] if len(axes) == 1 and axes[0] != 0 else None

    def without(self, dim: int) -> Form:
        """Return the form when a dimension that is one axis, or none, is dropped."""
        dim %= len(self.dims)
        gone = self.dims[dim]
        axes = tuple(size for i, size in enumerate(self.axes) if i not in gone)
        dims = tuple(
            tuple(a - sum(g < a for g in gone) for a in axes_of)
            for i, axes_of in enumerate(self.dims)
            if i != dim
        )
        return Form(axes, dims)

    def resized(self, axis: int, size: int) -> Form:
        """Return the form when an axis gets another size."""
        return Form((*self.axes[:axis], size, *self.axes[axis + 1 :]), self.dims)

    def permuted(self, order: Sequence[int]) -> Form:
        """Return the form when the network permutes its dimensions."""
        return Form(self.axes, tuple(self.dims[i] for i in order))


def plain_form(shape: Sequence[int]) -> Form:
    """Return the form of a value whose batch is in dimension 0 already."""
    return Form(tuple(shape), tuple((i,) for i in range(len(shape))))


@dataclass(frozen=True)
class Settled:
    """How to bring axes into the order of the dimensions, the batch first.

    Attributes:
        perm: of the axes.
        form: afterwards, dimensions joined; the batch's own may still have axes ahead of it and behind it.
    """

    perm: tuple[int, ...]
    form: Form


def settle(form: Form) -> Settled:
    """Return how to make one axis of every dimension.

    Example:
        >>> settle(Form((-1, 8, 4, 3), ((1,), (0, 2), (3,)))).form
        Form(axes=(-1, 8, 4, 3), dims=((1,), (0, 2), (3,)))
        >>> settle(Form((-1, 8, 4, 3), ((0,), (2, 1), (3,)))).form
        Form(axes=(-1, 32, 3), dims=((0,), (1,), (2,)))
    """
    place = form.batch_dim
    mine = form.dims[place]
    left, right = mine[: mine.index(0)], mine[mine.index(0) + 1 :]
    groups = [*form.dims[:place], *(part for part in (left, right) if part), *form.dims[place + 1 :]]
    perm = (0, *(axis for group in groups for axis in group))
    axes = (BATCH, *(prod(form.axes[a] for a in group) for group in groups))
    dims: list[tuple[int, ...]] = []
    after = 1
    for i in range(len(form.dims)):
        if i != place:
            dims.append((after,))
            after += 1
            continue
        before = (after,) if left else ()
        after += len(before)
        behind = (after,) if right else ()
        after += len(behind)
        dims.append((*before, 0, *behind))
    return Settled(perm, Form(axes, tuple(dims)))


def reshape_form(form: Form, shape: Sequence[int]) -> Form | None:
    """Return the form after a reshape, axes divided where the new dimensions need it; None if none fits.

    Args:
        form: before.
        shape: the network's new shape, -k for k times the batch.

    Example:
        >>> reshape_form(Form((-1, 5, 6), ((1,), (0,), (2,))), (5, -2, 3))
        Form(axes=(-1, 5, 2, 3), dims=((1,), (0, 2), (3,)))
    """
    pieces: list[list[int]] = [[size] for size in form.axes]  # of each axis, its divisions
    queue = [(axis, 0) for dim in form.dims for axis in dim if form.axes[axis] != 1]
    dims: list[list[tuple[int, int]]] = []
    for size in shape:
        dim: list[tuple[int, int]] = []
        left, wants_batch = abs(size), size < 0
        while left > 1 or wants_batch:
            if not queue:
                return None
            axis, part = queue[0]
            found = pieces[axis][part]
            if found == BATCH:
                if not wants_batch:
                    return None
                wants_batch = False
            elif left % found == 0:
                left //= found
            elif found % left == 0 and left > 1:
                pieces[axis][part : part + 1] = [left, found // left]
                queue.insert(1, (axis, part + 1))
                left = 1
            else:
                return None
            dim.append(queue.pop(0))
        dims.append(dim)
    if queue:
        return None
    first = [sum(len(p) for p in pieces[:axis]) for axis in range(len(pieces))]
    axes = tuple(size for piece in pieces for size in piece)
    return _without_ones(Form(axes, tuple(tuple(first[a] + p for a, p in dim) for dim in dims)))


def _without_ones(form: Form) -> Form:
    """Return the form without the axes that no dimension names, which are of size 1."""
    used = sorted({axis for dim in form.dims for axis in dim})
    number = {axis: i for i, axis in enumerate(used)}
    return Form(tuple(form.axes[a] for a in used), tuple(tuple(number[a] for a in dim) for dim in form.dims))
