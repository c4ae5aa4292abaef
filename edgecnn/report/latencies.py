"""The raw latencies of a run, however many: a sequence that a report holds and JSON packs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

from edgecnn.runner.samples import Int64Array, pack_json, unpack_json
from edgecnn.runner.statistics import Distribution

ITERATED = 65_536
"""Latencies that become Python's numbers at a time."""


class Latencies(Sequence[int]):
    """Nanoseconds in the order they were measured, 8 bytes each.

    Args:
        values: whole numbers.

    Example:
        >>> latencies = Latencies([30, 10, 20])
        >>> latencies[0], list(latencies[1:]), latencies.total_ns, latencies == (30, 10, 20)
        (30, [10, 20], 60, True)
    """

    def __init__(self, values: Iterable[int] = ()) -> None:
        given = values if isinstance(values, np.ndarray) else list(values)
        self._array: Int64Array = np.asarray(given, np.int64).reshape(-1).view()
        self._array.flags.writeable = False

    @property
    def array(self) -> Int64Array:
        """The same as an array (n,) that cannot be written to."""
        return self._array

    @property
    def total_ns(self) -> int:
        """Their sum."""
        return int(self._array.sum())

    @cached_property
    def distribution(self) -> Distribution:
        """They without their order; there is none of no latencies."""
        return Distribution.of(self._array)

    def to_json(self) -> Any:
        """Return a list, or of many a packed form, see `edgecnn.runner.samples`."""
        return pack_json(self._array)

    @classmethod
    def from_json(cls, value: Any) -> Latencies:
        """Read either form back.

        Raises:
            ValueError: if it is neither, or damaged.
        """
        return cls(unpack_json(value))

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Latencies: ...
    def __getitem__(self, index: int | slice) -> int | Latencies:
        return Latencies(self._array[index]) if isinstance(index, slice) else int(self._array[index])

    def __iter__(self) -> Iterator[int]:
        for start in range(0, len(self), ITERATED):
            yield from self._array[start : start + ITERATED].tolist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Latencies):
            return np.array_equal(self._array, other._array)
        if isinstance(other, (tuple, list)):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        return hash((len(self), self.total_ns))

    def __repr__(self) -> str:
        return f"Latencies({self._array[:4].tolist()}{f' and {len(self) - 4} more' if len(self) > 4 else ''})"
