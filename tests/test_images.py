"""How one source, or two, are shared out between training, calibration and judgement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import nets
import numpy as np
import pytest

from edgecnn.data import ArrayDataset, Dataset
from edgecnn.errors import DataError
from edgecnn.images import Images, Sources, choose_images
from edgecnn.pipeline import Need, SilentProgress


@dataclass(frozen=True)
class Tunes:
    """Trains, and says so."""

    num_samples: int = 512

    name: ClassVar[str] = "tunes"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TRAIN})


@dataclass(frozen=True)
class Learns:
    """Trains on images without labels."""

    num_samples: int = 512

    name: ClassVar[str] = "learns"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TRAIN_IMAGES})


@dataclass(frozen=True)
class Measures:
    num_samples: int = 512

    name: ClassVar[str] = "measures"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CALIBRATION})


MODEL = nets.model("residual")


def dataset(count: int, labelled: bool = True, name: str = "set") -> ArrayDataset:
    pixels = np.zeros((count, 12, 12, 3), np.uint8)
    labels = np.arange(count) % 3 if labelled else None
    return ArrayDataset(name, pixels, MODEL.spec.preprocess, labels=labels, class_count=None)


def _pass(step: Any) -> Any:
    return step


def choose(data: Any, train_data: Any = None, step: Any = None) -> Images:
    steps: Any = [step or Tunes()]
    return choose_images(MODEL, Sources(data, train_data), steps, 0, SilentProgress())


def parts(images: Images) -> tuple[set[int], set[int], set[int], set[int]]:
    train = images.train
    assert train is not None
    return (
        set(images.split.held_out),
        set(images.split.calibration),
        set(train.validation),
        set(train.indices),
    )


@pytest.mark.parametrize(("count", "sizes"), [
    (16, (4, 2, 1, 9)),
    (1000, (250, 125, 50, 575)),
    (50_000, (2000, 512, 1000, 46_488)),
])  # fmt: skip
def test_one_source_is_shared_out_without_overlap(count: int, sizes: tuple[int, ...]) -> None:
    images = choose(dataset(count))
    found = parts(images)
    assert tuple(map(len, found)) == sizes
    assert set.union(*found) == set(range(count))
    assert images.train is not None and images.train.dataset is images.dataset


def test_the_classes_keep_their_proportions() -> None:
    data = dataset(600)
    assert data.labels is not None
    for part in parts(choose(data)):
        shares = np.bincount(data.labels[sorted(part)], minlength=3) / len(part)
        assert np.abs(shares - 1 / 3).max() < 0.06


def test_two_sources_stay_apart() -> None:
    judged, trained = dataset(300), dataset(400, name="more")
    images = choose(judged, trained)
    held_out, calibration, validation, train = parts(images)
    assert images.dataset is judged and images.train is not None and images.train.dataset is trained
    assert (len(held_out), len(calibration)) == (150, 150)
    assert (len(validation), len(train)) == (20, 380)
    assert not held_out & calibration and not validation & train


def test_a_source_named_twice_is_one(tmp_path: Any) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, images=np.zeros((80, 12, 12, 3), np.uint8), labels=np.arange(80) % 3)
    assert Sources(path, str(path)).is_one
    assert not Sources("digits:train", "digits:test").is_one
    found = parts(choose(str(path), path))
    assert sum(map(len, found)) == len(set.union(*found)) == 80


def test_images_to_train_on_alone_serve_for_everything() -> None:
    images = choose(None, dataset(100))
    assert images.train is not None and images.train.dataset is images.dataset


def test_what_does_not_train_gets_no_training_images() -> None:
    images = choose(dataset(100), step=Measures())
    assert images.train is None
    assert (len(images.split.calibration), len(images.split.held_out)) == (50, 50)


def test_labels_are_needed_by_what_learns_from_them() -> None:
    with pytest.raises(DataError, match="set: tunes needs labels, found 100 images without any") as found:
        choose(dataset(100, labelled=False))
    assert "--distill" in str(found.value.hint)
    images = choose(dataset(100, labelled=False), step=Learns())
    assert images.train is not None and images.train.dataset.labels is None


def test_labels_of_images_say_nothing_about_a_network_of_pixels() -> None:
    segmenting = replace(MODEL, spec=replace(MODEL.spec, task="segmentation"))
    with pytest.raises(DataError, match=r"say nothing about .*, a network of task 'segmentation'") as found:
        choose_images(segmenting, Sources(dataset(50)), [_pass(Tunes())], 0, SilentProgress())
    assert "--distill" in str(found.value.hint)
    images = choose_images(segmenting, Sources(dataset(50)), [_pass(Learns())], 0, SilentProgress())
    assert images.train is not None
    for opened in (images.dataset, images.train.dataset):
        assert opened.labels is None
        assert isinstance(opened, Dataset)
        assert opened.inputs([3, 4]).shape == (2, 3, 12, 12)


@pytest.mark.parametrize(
    ("data", "train_data", "step", "message"),
    [
        (None, None, Tunes(), "the pass tunes trains the network, and there are no images to train on"),
        (dataset(9), None, Tunes(), "set: 9 images, expected at least 16 for tunes"),
        (dataset(50), dataset(9), Tunes(), "set: 9 images, expected at least 16 for tunes"),
        (dataset(50), dataset(50), Measures(), "but no pass of the recipe trains"),
    ],
)
def test_what_cannot_be_shared_out(data: Any, train_data: Any, step: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose(data, train_data, step)
