"""Random streams that depend on (seed, purpose, step) and nothing else.

A step draws from streams of its own, so that a run which was killed and resumed draws at step t what
the unbroken run drew there.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Purpose = Literal["order", "augment", "dropout", "split", "statistics"]
_CODES: dict[str, int] = {"order": 1, "augment": 2, "dropout": 3, "split": 4, "statistics": 5}


def stream(seed: int, purpose: Purpose, step: int, rank: int = 0) -> np.random.Generator:
    """Return the generator of one purpose in one step (or epoch) of one process.

    Example:
        >>> draws = [int(stream(0, "order", step).integers(1000)) for step in (3, 3, 4)]
        >>> draws[0] == draws[1], draws[0] == draws[2]
        (True, False)
    """
    return np.random.default_rng(np.random.SeedSequence([seed, _CODES[purpose], step, rank]))


def torch_seed(seed: int, purpose: Purpose, step: int, rank: int = 0) -> int:
    """Return a seed in [0, 2**63) for PyTorch's own generator."""
    return int(stream(seed, purpose, step, rank).integers(2**63))
