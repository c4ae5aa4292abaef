"""The Model: an exported PyTorch graph with what edgecnn knows about it."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgecnn.runner.preprocess import Preprocess

if TYPE_CHECKING:
    import torch

TREE_SPEC_WARNING = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
"""PyTorch 2.13 says so of its own class whenever a graph is copied, which asks nothing of anybody."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a network input or output.

    Attributes:
        name: as the network's own forward signature or output keys say it.
        shape: the batch dimension is None; images are (None, c, h, w).
        dtype: NumPy name, "float32" for all images.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class ModelSpec:
    """What a network takes and gives.

    Attributes:
        name: short name for reports and file names ("resnet18", "model").
        inputs: one image input.
        outputs: in the order the network returns them.
        task: "classification" (one (n, classes) output), "segmentation" ((n, classes, h, w)) or "other".
        labels: class names in output order, or None.
        preprocess: how an image becomes the input.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    task: str
    labels: tuple[str, ...] | None
    preprocess: Preprocess


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its parameters, the time it took and figures before and after it."""

    name: str
    parameters: dict[str, Any]
    seconds: float
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A network as every pass sees it.

    Attributes:
        graph: functional ATen graph in eval mode: `torch.export`'s graph module with parameters as
            attributes, in-place ops made functional, and a dynamic batch. A pass copies it before it edits.
        spec: inputs, outputs, labels and preprocess.
        history: the passes that made it, oldest first.
        fixed_batch: None, or the only batch size the graph accepts (a .pt2 exported without a dynamic batch).
        warnings: what the user should know, collected on the way to the report.
    """

    graph: torch.fx.GraphModule
    spec: ModelSpec
    history: tuple[PassRecord, ...] = ()
    fixed_batch: int | None = None
    warnings: tuple[str, ...] = ()

    def with_graph(self, graph: torch.fx.GraphModule) -> Model:
        """Return this model with another graph."""
        return replace(self, graph=graph)

    def with_warning(self, *messages: str) -> Model:
        """Return this model with further warnings."""
        return replace(self, warnings=(*self.warnings, *messages))


def copy_graph(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a deep copy that can be edited; parameters are copied too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", TREE_SPEC_WARNING, FutureWarning)
        return copy.deepcopy(graph)
