"""Arrays, .npz files, digits and Python factories; splitting and batching."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgecnn.data import ArrayDataset, Dataset, iterate_batches, open_dataset, split_indices
from edgecnn.errors import DataError
from edgecnn.runner.preprocess import Preprocess

RAW = Preprocess((4, 4), scale=1.0)
GRAY = Preprocess((4, 4), channel_order="gray", scale=1.0, mean=(0.0,), std=(1.0,))


def ramp(count: int, size: int = 4, channels: int = 3) -> Any:
    """Return images whose every pixel is the image's own index."""
    values = np.arange(count, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, size, size, channels)).copy()


def write_npz(folder: Path, **arrays: Any) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("data", "y")])
def test_npz(tmp_path: Path, keys: tuple[str, str]) -> None:
    path = write_npz(tmp_path, **{keys[0]: ramp(3), keys[1]: np.array([[2], [0], [1]], np.uint8)})
    data = open_dataset(path, RAW, class_count=3, labels=("a", "b", "c"))
    assert isinstance(data, Dataset)
    assert data.labels is not None
    assert (data.labels.tolist(), data.labels.dtype) == ([2, 0, 1], np.int64)
    assert (data.name, data.class_names, data.warnings) == (str(path), ("a", "b", "c"), ())
    assert data.inputs([2, 0])[:, 0, 0, 0].tolist() == [2.0, 0.0]
    assert data.inputs([]).shape == (0, 3, 4, 4)


def test_npz_without_labels_in_gray_of_another_size(tmp_path: Path) -> None:
    data = open_dataset(str(write_npz(tmp_path, x=ramp(2, 8, 1)[..., 0])), RAW)
    assert data.labels is None
    assert data.inputs([1]).tolist() == np.ones((1, 3, 4, 4)).tolist()
    assert "images are 8x8 pixels, resized to the network's 4x4" in data.warnings[0]
    assert "gray images for a colour network" in data.warnings[1]


def test_arrays_of_the_right_size_are_not_cropped() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    expected = images.transpose(0, 3, 1, 2).astype(np.float32)
    with_crop = Preprocess((4, 4), resize_short=8, scale=1.0)
    assert (open_dataset(images, with_crop).inputs([0, 1]) == expected).all()
    to_gray = Preprocess((4, 4), 8, "gray", scale=1.0, mean=(0.0,), std=(1.0,))
    assert open_dataset(images, to_gray).inputs([0]).shape == (1, 1, 4, 4)


BAD_ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"x": ramp(2) / 255.0}, "images are float64, expected uint8 pixels 0..255"),
    ({"x": ramp(2).astype(np.int64)}, "images are int64, expected uint8 pixels"),
    ({"x": ramp(2).transpose(0, 3, 1, 2)}, r"shape \(2, 3, 4, 4\).*channels come last: images.transpose"),
    ({"x": ramp(2)[:, 0, 0]}, r"shape \(2, 3\), expected \(n, h, w, c\)"),
    ({"x": ramp(0)}, r"shape \(0, 4, 4, 3\), expected at least one image"),
    ({"x": ramp(2), "y": [0]}, "found 1 labels for 2 images, expected one each"),
    ({"x": ramp(2), "y": [0.0, 1.0]}, "labels are float64, expected integers"),
    ({"x": ramp(2), "y": np.eye(2, dtype=int)}, r"labels have shape \(2, 2\).*argmax"),
    ({"x": ramp(2), "y": [0, -1]}, r"1 of 2 labels are out of range, the first is labels\[1\] = -1"),
    ({"pixels": ramp(2)}, "found the arrays pixels, expected images under one of images, x, data"),
    ({"x": ramp(2), "images": ramp(2)}, "found the arrays images and x, expected only one"),
    ({"x": np.array([{}, {}], dtype=object)}, "'x' is a pickle of Python objects, which may run code"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS)
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = write_npz(tmp_path, **arrays)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(path, RAW)
    assert str(path) in str(caught.value)


def test_labels_beyond_the_networks_classes() -> None:
    with pytest.raises(DataError) as caught:
        open_dataset((ramp(5), np.array([0, 9, 10, 3, 11])), RAW, class_count=10)
    assert caught.value.message == (
        "data: 2 of 5 labels are out of range, the first is labels[2] = 10, expected 0 to 9, "
        "as the network has 10 classes"
    )


@pytest.mark.parametrize("keep", [0, 10, 300, 0.6, 0.99])
def test_truncated_npz(tmp_path: Path, keep: float) -> None:
    path = write_npz(tmp_path, x=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    with pytest.raises(DataError, match=r"not a whole \.npz file"):
        open_dataset(path, RAW)


def test_damage_inside_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8))
    whole = bytearray(path.read_bytes())
    whole[1000:1200] = bytes(200)
    path.write_bytes(whole)
    with pytest.raises(DataError, match="the array 'x' is damaged"):
        open_dataset(path, RAW)


def test_pickle_named_npz_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "data.npz"
    path.write_bytes(b"cpathlib\nPath.touch\n(cpathlib\nPath\n(S'%s'\ntRtR." % str(marker).encode())
    with pytest.raises(DataError, match=r"not a whole \.npz file"):
        open_dataset(path, RAW)
    assert not marker.exists()


def test_digits() -> None:
    whole, train, test = (
        open_dataset(f"digits{part}", GRAY, class_count=10) for part in ("", ":train", ":test")
    )
    assert (len(whole), len(train), len(test)) == (1797, 1437, 360)
    assert whole.labels is not None
    assert test.labels is not None
    assert whole.labels[1437:].tolist() == test.labels.tolist()
    assert whole.class_names == tuple("0123456789")
    full = Preprocess((8, 8), channel_order="gray", scale=1.0, mean=(0.0,), std=(1.0,))
    # The first digit's second row in 0..16 is 0 0 13 15 10 15 5 0.
    row = open_dataset("digits", full).inputs([0])[0, 0, 1]
    assert row.tolist() == [0, 0, 207, 239, 159, 239, 80, 0]
    with pytest.raises(
        DataError, match="digits has no part 'val', expected digits, digits:train or digits:test"
    ):
        open_dataset("digits:val", GRAY)
    with pytest.raises(DataError, match="labels are out of range"):
        open_dataset("digits", GRAY, class_count=9)


FACTORIES = """
import numpy as np
from PIL import Image

calls = []
images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 4, 3), np.uint8)
inputs = images.transpose(0, 3, 1, 2).astype(np.float32)

def arrays(): return images, np.array([0, 1, 0, 1])
def label_list(): return images, [0, 1, 0, 1]
def only_images(): return images
def only_inputs(): return inputs
def loader(): return ((inputs[i:i + 2], np.array([i, i + 1])) for i in (0, 2))
def items(): return ((image, index) for index, image in enumerate(inputs))
def pictures(): return [Image.fromarray(image) for image in images]
def broken(): raise KeyError("bucket")
def nothing(): return iter(())
def wrong(): return 7
def wrong_shape(): return [np.zeros((3, 5, 5), np.float32)]
def not_finite(): return np.full((2, 3, 4, 4), np.nan, np.float32)

class MapStyle:
    targets = [3, 2, 1, 0]
    def __len__(self): return 4
    def __getitem__(self, index):
        calls.append(index)
        return Image.fromarray(images[index]), self.targets[index]
"""


@pytest.fixture
def factory_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_factories"
    sys.modules.pop("my_factories", None)


@pytest.mark.parametrize(
    ("attribute", "labels", "num_warnings"),
    [
        ("arrays", [0, 1, 0, 1], 0),
        ("label_list", [0, 1, 0, 1], 0),
        ("only_images", None, 0),
        ("only_inputs", None, 1),
        ("loader", [0, 1, 2, 3], 1),
        ("items", [0, 1, 2, 3], 1),
        ("pictures", None, 0),
        ("MapStyle", [3, 2, 1, 0], 0),
    ],
)
def test_factories(factory_module: str, attribute: str, labels: list[int] | None, num_warnings: int) -> None:
    data = open_dataset(f"{factory_module}:{attribute}", RAW, class_count=4)
    assert (None if data.labels is None else data.labels.tolist()) == labels
    assert data.inputs([3, 1])[:, 0, 0, 0].tolist() == [3.0, 1.0]
    assert (data.inputs([0]).dtype, len(data)) == (np.float32, 4)
    assert len(data.warnings) == num_warnings


def test_map_style_is_read_only_when_asked(factory_module: str) -> None:
    data = open_dataset(f"{factory_module}:MapStyle", RAW)
    module = sys.modules[factory_module]
    module.calls.clear()
    data.inputs([2])
    assert module.calls == [2]


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("broken", "data source my_factories:broken: the factory raised KeyError: 'bucket'"),
        ("absent", "the factory raised AttributeError: module 'my_factories' has no attribute 'absent'"),
        ("nothing", "found no images, expected at least 1"),
        ("wrong", "got a int, expected a Dataset, uint8 images"),
        ("not_finite", "2 inputs hold NaN or infinity, the first is input 0"),
    ],
)
def test_bad_factories(factory_module: str, attribute: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(f"{factory_module}:{attribute}", RAW)
    assert message in str(caught.value)


def test_factory_module_that_does_not_exist() -> None:
    with pytest.raises(DataError, match="raised ModuleNotFoundError: No module named 'no_such_module'"):
        open_dataset("no_such_module:data", RAW)


def test_inputs_of_the_wrong_shape(factory_module: str) -> None:
    data = open_dataset(f"{factory_module}:wrong_shape", RAW)
    with pytest.raises(DataError, match=r"shape \(n, 3, 5, 5\), expected \(n, 3, 4, 4\)"):
        data.inputs([0])


def test_a_dataset_passes_through_with_its_labels_checked() -> None:
    data = ArrayDataset("mine", ramp(2), RAW, labels=[0, 5])
    assert open_dataset(data, RAW) is data
    with pytest.raises(DataError, match="labels are out of range"):
        open_dataset(data, RAW, class_count=5)


def test_torch_tensors_are_taken() -> None:
    torch = pytest.importorskip("torch")
    data = open_dataset((torch.ones(2, 3, 4, 4), torch.tensor([0, 1])), RAW)
    assert data.labels is not None
    assert data.inputs([1]).sum() == 48.0


def test_sources_need_no_torch() -> None:
    code = (
        "import sys, numpy as np, edgecnn.data as d; from edgecnn.runner.preprocess import Preprocess;"
        "d.open_dataset(np.zeros((2, 4, 4, 3), np.uint8), Preprocess((4, 4))).inputs([0]);"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 200),
    st.integers(1, 150),
    st.integers(0, 150),
    st.integers(0, 10),
    st.booleans(),
    st.data(),
)
def test_splits_are_disjoint_stratified_and_repeatable(
    total: int, num_calibration: int, num_held_out: int, seed: int, labelled: bool, draw: st.DataObject
) -> None:
    labels = np.array(draw.draw(st.lists(st.integers(0, 4), min_size=total, max_size=total)))
    images = np.zeros((total, 1, 1, 3), np.uint8)
    data = ArrayDataset("data", images, Preprocess((1, 1)), labels=labels if labelled else None)
    split = split_indices(data, num_calibration, num_held_out, seed)
    both = split.calibration + split.held_out
    assert len(set(both)) == len(both) <= total
    assert split == split_indices(data, num_calibration, num_held_out, seed)
    assert len(split.calibration) >= 1
    assert bool(split.held_out) == bool(num_held_out)
    if num_calibration + num_held_out <= total:
        assert (len(split.calibration), len(split.held_out), split.warnings) == (
            num_calibration,
            num_held_out,
            (),
        )
    else:
        assert "fewer than the" in split.warnings[0]
    if labelled:
        for value in range(5):
            share = len(split.calibration) * (labels == value).mean()
            assert abs((labels[list(split.calibration)] == value).sum() - share) <= 5


def test_a_split_of_one_image_gives_it_to_both() -> None:
    split = split_indices(ArrayDataset("one.npz", ramp(1), RAW), 64, 32, seed=0)
    assert (split.calibration, split.held_out) == ((0,), (0,))
    assert split.warnings[0].startswith("one.npz: one image only; it is calibrated on and judged on")


def test_a_small_set_is_shared_out() -> None:
    split = split_indices(ArrayDataset("few", ramp(10), RAW), 60, 40, seed=0)
    assert (len(split.calibration), len(split.held_out)) == (6, 4)
    assert split.warnings == (
        "few: 10 images, fewer than the 60 calibration and 40 held-out images asked for; using 6 and 4",
    )
    with pytest.raises(DataError, match="asked for 0 calibration and 3 held-out images"):
        split_indices(ArrayDataset("few", ramp(10), RAW), 0, 3, seed=0)


class Counting:
    """A Dataset that notes what it reads and fails at image 9."""

    name, labels, class_names, warnings = "counting", None, None, ()

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 10

    def inputs(self, indices: Sequence[int]) -> Any:
        self.read.extend(indices)
        if 9 in indices:
            raise DataError("image 9 is broken")
        return np.array(indices, np.float32).reshape(-1, 1, 1, 1)


def num_readers() -> int:
    return sum(thread.name.startswith("edgecnn-data") for thread in threading.enumerate())


def test_batches_come_in_order_with_their_labels() -> None:
    data = ArrayDataset("data", ramp(7), RAW, labels=np.arange(7))
    batches = list(iterate_batches(data, [6, 5, 4, 3, 0], 2))
    assert [len(batch) for batch, _ in batches] == [2, 2, 1]
    for batch, labels in batches:
        assert labels is not None
        assert batch[:, 0, 0, 0].tolist() == labels.tolist()
    assert list(iterate_batches(data, [], 2)) == []
    with pytest.raises(DataError, match="batch size is 0, expected at least 1"):
        next(iterate_batches(data, [0], 0))


def test_batches_are_read_one_ahead_and_stop_when_closed() -> None:
    data = Counting()
    batches = iterate_batches(data, range(8), 2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert data.read in ([0, 1], [0, 1, 2, 3])
    assert num_readers() == 0


def test_an_error_while_reading_comes_out_and_ends_the_thread() -> None:
    with pytest.raises(DataError, match="image 9 is broken"):
        list(iterate_batches(Counting(), range(10), 3))
    assert num_readers() == 0


def test_ctrl_c_between_batches_ends_the_thread() -> None:
    def consume() -> None:
        for _ in iterate_batches(Counting(), range(8), 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert num_readers() == 0


def test_gray_levels_survive_from_picture_to_input(tmp_path: Path) -> None:
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(tmp_path / "a.png")
    assert open_dataset(tmp_path, GRAY).inputs([0]).ravel().tolist() == list(range(16))
