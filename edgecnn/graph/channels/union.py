"""Which channel ids go together: a disjoint-set forest over integers, joined in bulk.

    find(i) = the least id of i's class        join(a, b): the classes of a[k] and b[k] become one, for
    every k

Each round hooks the larger root of every open pair under the smaller one and then flattens the forest, so
that a chain of n joins takes O(log n) rounds of NumPy rather than n steps of Python.

Source: Shiloach and Vishkin 1982, "An O(log n) parallel connectivity algorithm".
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

NONE = -1
"""Stands for "no channel" wherever an id is expected."""


class Classes:
    """Disjoint sets of channel ids, issued one after the other.

    Example:
        >>> classes = Classes()
        >>> a, b = classes.issue(3), classes.issue(3)
        >>> classes.join(a, b)
        >>> classes.find(np.array([5, 1, NONE])).tolist()
        [2, 1, -1]
    """

    def __init__(self) -> None:
        self._parent: Ints = np.zeros(0, np.int64)
        self._count = 0

    def __len__(self) -> int:
        """Return how many ids were issued."""
        return self._count

    def issue(self, count: int) -> Ints:
        """Return `count` new ids, each in a class of its own, shape (count,)."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            grown = np.arange(max(2 * len(self._parent), self._count, 1024), dtype=np.int64)
            grown[: len(self._parent)] = self._parent
            self._parent = grown
        return np.arange(start, self._count, dtype=np.int64)

    def find(self, ids: Ints) -> Ints:
        """Return the least id of each id's class, NONE for NONE; any shape."""
        if self._count == 0:
            return np.asarray(ids)
        return np.where(ids < 0, NONE, self._parent[np.maximum(ids, 0)])

    def join(self, a: Ints, b: Ints) -> None:
        """Join the classes of a[k] and b[k] for every k where both are ids; equal shapes."""
        a, b = np.ravel(a), np.ravel(b)
        both = (a >= 0) & (b >= 0)
        a, b = self._parent[a[both]], self._parent[b[both]]
        while True:
            open_pairs = a != b
            if not open_pairs.any():
                return
            a, b = a[open_pairs], b[open_pairs]
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))
            self._flatten()
            a, b = self._parent[a], self._parent[b]

    def _flatten(self) -> None:
        while True:
            above = self._parent[self._parent]
            if np.array_equal(above, self._parent):
                return
            self._parent = above
