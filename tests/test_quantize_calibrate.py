"""Calibration: batches run side by side, and what comes out does not depend on how many do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from edgecnn.data import open_dataset
from edgecnn.errors import DataError
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.load import LoadOptions, load_model
from edgecnn.model import Model
from edgecnn.pipeline import PassContext, SilentProgress
from edgecnn.quantize.annotate import assign_slots
from edgecnn.quantize.calibrate import Statistics, calibrate
from edgecnn.quantize.observers import OBSERVERS, make_observer
from edgecnn.runner.preprocess import Preprocess


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Model:
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 6 * 6, 5)
    )
    loaded = load_model(module, LoadOptions(input_shape=(3, 8, 8)))
    return FoldBatchNorm().run(loaded, PassContext())


def run(model: Model, images: np.ndarray, observer: str, threads: int) -> Statistics:
    torch.set_num_threads(threads)
    statistics = Statistics({n: make_observer(observer) for n in assign_slots(model.graph).sources})
    layers = frozenset(n for n in model.graph.graph.nodes if "conv2d" in str(n.target))
    dataset = open_dataset(images, Preprocess((8, 8)))
    calibrate(model, statistics, layers, dataset, range(len(images)), SilentProgress())
    return statistics


@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_number_of_threads_changes_nothing(model: Model, observer: str) -> None:
    images = np.random.default_rng(0).normal(size=(300, 3, 8, 8)).astype(np.float32)  # five batches
    one, three = run(model, images, observer, 1), run(model, images, observer, 3)
    assert list(one.ranges.values()) == list(three.ranges.values())
    means = [[v.tobytes() for v in found.input_means.values()] for found in (one, three)]
    assert means[0] == means[1]
    assert one.num_images == three.num_images == 300


def test_ranges_and_means_are_those_of_all_images(model: Model) -> None:
    images = np.random.default_rng(1).normal(size=(130, 3, 8, 8)).astype(np.float32)
    found = run(model, images, "min_max", 2)
    low, high = next(iter(found.ranges.values()))
    assert (low, high) == (float(images.min()), float(images.max()))
    np.testing.assert_allclose(next(iter(found.input_means.values())), images.mean((0, 2, 3)), atol=1e-6)


def test_the_thread_count_is_given_back(model: Model) -> None:
    images = np.zeros((3, 3, 8, 8), np.float32)
    run(model, images, "mse", 2)
    assert torch.get_num_threads() == 2
    images[2, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN or infinity"):
        run(model, images, "mse", 2)
    assert torch.get_num_threads() == 2
