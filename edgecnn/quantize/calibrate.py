"""Run the network over the calibration images and watch the values that will be held in int8."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
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
from edgecnn.quantize.observers import MovingAverageObserver, Observer

BATCH_ELEMENTS = 20 * 3 * 96 * 96
"""Calibration batches hold about this many input values: 20 images of 96x96, 3 of 224x224."""

IN_PLACE = {aten.relu.default: aten.relu_.default, aten.hardtanh.default: aten.hardtanh_.default}
"""What writes the same values over its input, which saves a tenth of the time."""

FRESH = frozenset({aten.conv2d.default, aten.linear.default, aten.add.Tensor})
"""Operators whose result is memory of its own."""

MAX_WORKERS = 8
"""Batches run at once, at most: each holds its own activations."""

Sums = dict[fx.Node, npt.NDArray[np.float64]]


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


@dataclass(frozen=True)
class _Shared:
    """An observer that several threads show values to, one at a time."""

    observer: Observer
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Watcher(fx.Interpreter):
    """Runs the graph, shows values to their observers and sums layer inputs per channel."""

    def __init__(
        self, graph: fx.GraphModule, observers: Mapping[fx.Node, _Shared], layers: frozenset[fx.Node]
    ) -> None:
        super().__init__(graph)
        self.observers = observers
        self.layers = layers
        self.sums: Sums = {}

    def watch(self, batch: torch.Tensor) -> Sums:
        """Run one batch (n, c, h, w); return layer node -> its input's mean per channel times n."""
        self.sums = {}
        with torch.inference_mode():
            self.run(batch)
        return self.sums

    def run_node(self, n: fx.Node) -> Any:
        if n in self.layers:
            x = self.env[n.args[0]]  # type: ignore[index]
            axis = x.dim() - 1 if n.target is aten.linear.default else 1
            dims = [d for d in range(x.dim()) if d != axis]
            self.sums[n] = x.mean(dim=dims).double().numpy() * len(x)
        value = self._overwrite(n) if self._may_overwrite(n) else super().run_node(n)
        shared = self.observers.get(n)
        if shared is not None:
            with shared.lock:
                shared.observer.observe(value)
        return value

    def _may_overwrite(self, n: fx.Node) -> bool:
        """Whether nothing else reads the memory that this clamp reads."""
        x = n.args[0] if n.target in IN_PLACE else None
        return isinstance(x, fx.Node) and x.target in FRESH and len(x.users) == 1

    def _overwrite(self, n: fx.Node) -> Any:
        arguments, keywords = self.fetch_args_kwargs_from_env(n)
        return IN_PLACE[n.target](*arguments, **keywords)  # type: ignore[index]


def calibration_batch_size(model: Model) -> int:
    """Return how many images to run at once: few large ones, many small ones, at most 64."""
    if model.fixed_batch is not None:
        return model.fixed_batch
    shape = model.spec.inputs[0].shape[1:]
    elements = int(np.prod([d or 1 for d in shape]))
    return int(np.clip(BATCH_ELEMENTS // max(elements, 1), 1, 64))


def calibration_batches(model: Model, dataset: Dataset, indices: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield the images as float32 (n, c, h, w).

    Raises:
        DataError: if they hold NaN or infinite values.
    """
    batch_size = calibration_batch_size(model)
    for batch, _ in iterate_batches(dataset, indices, batch_size):
        if not np.isfinite(batch).all():
            raise DataError(
                f"{dataset.name}: calibration images hold NaN or infinite values after preprocessing"
            )
        if model.fixed_batch is not None and len(batch) < batch_size:
            batch = np.resize(batch, (batch_size, *batch.shape[1:]))  # repeats images to fill the batch
        yield torch.from_numpy(np.ascontiguousarray(batch))


class _Pool:
    """Runs whole batches side by side, each on one thread, in place of all threads on one operator.

    The threads then wait for each other once in a network, not at every operator, which matters most on a
    machine that has other work. The results do not depend on how many there are: an operator on one thread
    always adds in the same order, observers that care for the order of batches get one thread, and sums are
    handed out in the order of the batches.
    """

    def __init__(self, graph: fx.GraphModule, statistics: Statistics, layers: frozenset[fx.Node]) -> None:
        self._threads = torch.get_num_threads()
        ordered = any(isinstance(o, MovingAverageObserver) for o in statistics.observers.values())
        self._workers = 1 if ordered else min(self._threads, MAX_WORKERS)
        shared = {node: _Shared(observer) for node, observer in statistics.observers.items()}
        self._watchers: SimpleQueue[_Watcher] = SimpleQueue()
        for _ in range(self._workers):
            self._watchers.put(_Watcher(graph, shared, layers))
        self._executor = ThreadPoolExecutor(self._workers, "edgecnn-calibrate", torch.set_num_threads, (1,))

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._threads)  # the workers' setting is the default of threads to come

    def watch_all(self, batches: Iterable[torch.Tensor]) -> Iterator[tuple[Sums, int]]:
        """Yield (sums, images) of each batch in order; one batch more than there are threads is held."""
        pending: deque[tuple[Future[Sums], int]] = deque()
        for batch in batches:
            pending.append((self._executor.submit(self._watch, batch), len(batch)))
            if len(pending) > self._workers:
                future, count = pending.popleft()
                yield future.result(), count
        for future, count in pending:
            yield future.result(), count

    def _watch(self, batch: torch.Tensor) -> Sums:
        watcher = self._watchers.get()
        try:
            return watcher.watch(batch)
        finally:
            self._watchers.put(watcher)


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
    progress.start("calibrate", len(indices))
    with _Pool(model.graph, statistics, layers) as pool:
        for sums, count in pool.watch_all(calibration_batches(model, dataset, indices)):
            for node, values in sums.items():
                held = statistics.input_means
                held[node] = held[node] + values if node in held else values
            statistics.num_images += count
            progress.advance(count)
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
