"""What one check found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

LEVELS = ("problem", "warning", "note")
"""From "int8 cannot work like this" to "taken care of, good to know"."""


@dataclass(frozen=True)
class Finding:
    """One thing to know before a network becomes int8.

    Attributes:
        check: short name, the same in every version ("concat_ranges").
        level: one of LEVELS.
        title: what was found, in a few words.
        layers: names of the layers, in execution order.
        why: what it does to accuracy or latency in int8.
        action: what edgecnn does about it, or what the user can do.
    """

    check: str
    level: str
    title: str
    layers: tuple[str, ...]
    why: str
    action: str

    def to_dict(self) -> dict[str, Any]:
        """Return the finding, JSON-ready."""
        return {**asdict(self), "layers": list(self.layers)}


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Return layer names without their operators, each once, in order.

    Example:
        >>> unique(["a.0 (aten.relu.default)", "a.0 (aten.add.Tensor)", "b"])
        ('a.0', 'b')
    """
    return tuple(dict.fromkeys(name.partition(" (")[0] for name in names))
