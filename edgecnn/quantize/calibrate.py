"""Run the network over the calibration images and watch the values that will be held in int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from edgecnn.data import Dataset, iterate_batches
from edgecnn.errors import DataError
from edgecnn.graph.nodes import aten, layer_name
from edgecnn.model import Model
from edgecnn.pipeline import Progress
from edgecnn.quantize.observers import Observer

BATCH_ELEMENTS = 32 * 3 * 96 * 96
"""Calibration batches hold about this many input values: 32 images of 96x96, 6 of 224x224."""


@dataclass
class Statistics:
    """What calibration saw.

    Attributes:
        observers: per observed node.
        ranges: (low, high) that each observer chose, once all images were seen.
        input_means: layer node -> mean of its input per channel, float64 (c_in,).
        num_images: images seen.
    """

    observers: dict[fx.Node, Observer]
    ranges: dict[fx.Node, tuple[float, float]] = field(default_factory=dict)
    input_means: dict[fx.Node, npt.NDArray[np.float64]] = field(default_factory=dict)
    num_images: int = 0


class _Watcher(fx.Interpreter):
    """Runs the graph, shows values to their observers and sums layer inputs per channel."""

    def __init__(self, graph: fx.GraphModule, statistics: Statistics, layers: frozenset[fx.Node]) -> None:
        super().__init__(graph)
        self.statistics = statistics
        self.layers = layers
        self._means: dict[fx.Node, npt.NDArray[np.float64]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.layers:
            x = self.env[n.args[0]]  # type: ignore[index]
            axis = x.dim() - 1 if n.target is aten.linear.default else 1
            dims = [d for d in range(x.dim()) if d != axis]
            mean = x.mean(dim=dims).double().numpy() * len(x)
            held = self.statistics.input_means
            held[n] = held[n] + mean if n in held else mean
        value = super().run_node(n)
        observer = self.statistics.observers.get(n)
        if observer is not None:
            observer.observe(value)
        return value


def calibration_batch_size(model: Model) -> int:
    """Return how many images to run at once: few large ones, many small ones, at most 64."""
    if model.fixed_batch is not None:
        return model.fixed_batch
    shape = model.spec.inputs[0].shape[1:]
    elements = int(np.prod([d or 1 for d in shape]))
    return int(np.clip(BATCH_ELEMENTS // max(elements, 1), 1, 64))


def calibrate(
    model: Model,
    statistics: Statistics,
    layers: frozenset[fx.Node],
    dataset: Dataset,
    indices: Sequence[int],
    progress: Progress,
) -> None:
    """Fill `statistics` from the images at `indices`; memory does not grow with their number.

    Args:
        model: float, batch norms folded.
        statistics: its observers are keyed by nodes of `model.graph`.
        layers: nodes of which the mean input per channel is wanted.
        dataset: gives float32 (n, c, h, w).
        indices: images to use.
        progress: told about every batch.

    Raises:
        DataError: if the network gives NaN or infinite values for an image.
    """
    batch_size = calibration_batch_size(model)
    watcher = _Watcher(model.graph, statistics, layers)
    progress.start("calibrate", len(indices))
    with torch.inference_mode():
        for batch, _ in iterate_batches(dataset, indices, batch_size):
            if not np.isfinite(batch).all():
                raise DataError(
                    f"{dataset.name}: calibration images hold NaN or infinite values after preprocessing"
                )
            if model.fixed_batch is not None and len(batch) < batch_size:
                batch = np.resize(batch, (batch_size, *batch.shape[1:]))  # repeats images to fill the batch
            watcher.run(torch.from_numpy(np.ascontiguousarray(batch)))
            statistics.num_images += len(batch)
            progress.advance(len(batch))
    progress.finish()
    statistics.ranges = {node: observer.range() for node, observer in statistics.observers.items()}
    _check_finite(statistics)
    for node in statistics.input_means:
        statistics.input_means[node] = statistics.input_means[node] / max(statistics.num_images, 1)


def _check_finite(statistics: Statistics) -> None:
    for node, (low, high) in statistics.ranges.items():
        if not np.isfinite([low, high]).all():
            raise DataError(
                f"{layer_name(node)} gives values from {low} to {high} in calibration, expected finite ones",
                hint="check the preprocess and the weights",
            )
