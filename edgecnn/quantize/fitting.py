"""Scales of slots while they are fitted to each other: each is settled once and for all.

What an operator's scales must fulfil (`ties`, `leaky_relu`) binds those it reads to the one it writes. Once
it holds, all of them are settled, so that no later fit undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from edgecnn.quantize.annotate import Slots


@dataclass
class Fitting:
    """Scales by slot, and which of them may still change.

    Attributes:
        slots: of the graph.
        by_root: (scale, zero_point) per slot root, changed in place.
        settled: roots whose scale stays; at first those that their operator prescribes.
        nearest: change every scale as little as it takes, be it to a smaller one.
    """

    slots: Slots
    by_root: dict[fx.Node, tuple[float, int]]
    settled: set[fx.Node]
    nearest: bool = False

    def root(self, value: object) -> fx.Node | None:
        """Return the slot of a value, None for a number, a parameter or a value in float."""
        return self.slots.root(value) if isinstance(value, fx.Node) and value in self.slots.parent else None

    def scale(self, root: fx.Node) -> float:
        """Return the scale of a slot."""
        return self.by_root[root][0]

    def is_free(self, root: fx.Node) -> bool:
        """Whether the scale of a slot may still change."""
        return root not in self.settled

    def settle(self, root: fx.Node, scale: float | None = None) -> None:
        """Let a slot keep its scale from now on, or the given one; the zero point stays."""
        if scale is not None and self.is_free(root):
            self.by_root[root] = (scale, self.by_root[root][1])
        self.settled.add(root)
