"""Images to distil on where there are none: made up from what the teacher's BatchNorm layers remember."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgecnn.data import Dataset, distill_images
from edgecnn.data.dataset import Inputs
from edgecnn.errors import DataError
from edgecnn.graph.modes import batch_norm_nodes
from edgecnn.model import Model
from edgecnn.pipeline import Progress

MAX_ROUNDS = 8


class JoinedImages:
    """Several unlabelled datasets one after the other.

    Args:
        name: for messages.
        parts: at least one.
        warnings: to carry along.
    """

    labels = None
    class_names = None

    def __init__(self, name: str, parts: Sequence[Dataset], warnings: tuple[str, ...] = ()) -> None:
        self.name = name
        self.warnings = warnings
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self._starts[-1])

    def inputs(self, indices: Sequence[int]) -> Inputs:
        """Return the images as float32 (n, c, h, w)."""
        wanted = np.asarray(indices, np.int64)
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        rows = [
            self._parts[owner].inputs([int(index - self._starts[owner])])
            for owner, index in zip(owners, wanted, strict=True)
        ]
        return np.concatenate(rows)


def synthesize_images(teacher: Model, num_images: int, seed: int, progress: Progress) -> JoinedImages:
    """Make unlabelled images that the teacher's BatchNorm layers take for its training data.

    One round of `edgecnn.data.distill_images` gives as many as its work budget allows; there are as many
    rounds as it takes, at most MAX_ROUNDS, each from noise of its own.

    Args:
        teacher: the network to please.
        num_images: how many, at least 1.
        seed: of the noise.
        progress: told about the images.

    Returns:
        At most num_images images, with a warning that says what they are.

    Raises:
        DataError: if the teacher has no BatchNorm to learn from.
    """
    if not batch_norm_nodes(teacher.graph):
        raise DataError(
            f"{teacher.spec.name}: there are no images to distil on, and no BatchNorm to make some up from",
            hint="give images with --data or --train-data; they need no labels",
        )
    progress.start("no training images: make some up from the teacher, images", num_images)
    parts: list[Dataset] = []
    missing = num_images
    for round_seed in np.random.SeedSequence(seed).generate_state(MAX_ROUNDS):
        if missing < 1:
            break
        parts.append(distill_images(teacher, missing, int(round_seed)))
        missing -= len(parts[-1])
        progress.advance(len(parts[-1]))
    progress.finish()
    count = sum(map(len, parts))
    warning = (
        f"distilled on {count} images made up from the BatchNorm statistics of the teacher "
        f"{teacher.spec.name}, without any real one: give --train-data, labels are not needed"
    )
    return JoinedImages("made-up images", parts, (warning,))
