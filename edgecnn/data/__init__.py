"""Where images come from: folders, .npz files, digits, Python factories and images made from nothing.

Every source is a Dataset, and every Dataset hands out the network's input, already through the model's
Preprocess. Names are imported when first used, so that a folder of images needs no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecnn.data.arrays import ArrayDataset as ArrayDataset
    from edgecnn.data.dataset import Dataset as Dataset
    from edgecnn.data.dataset import Split as Split
    from edgecnn.data.dataset import iterate_batches as iterate_batches
    from edgecnn.data.dataset import require_labels as require_labels
    from edgecnn.data.dataset import split_indices as split_indices
    from edgecnn.data.geometry import resize_and_crop as resize_and_crop
    from edgecnn.data.noise import noise_images as noise_images
    from edgecnn.data.source import open_dataset as open_dataset
    from edgecnn.data.synthetic import distill_images as distill_images

_HOMES = {
    "ArrayDataset": "arrays",
    "Dataset": "dataset",
    "Split": "dataset",
    "distill_images": "synthetic",
    "iterate_batches": "dataset",
    "noise_images": "noise",
    "open_dataset": "source",
    "require_labels": "dataset",
    "resize_and_crop": "geometry",
    "split_indices": "dataset",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(_HOMES)
