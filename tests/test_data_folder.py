"""Folders of images: order of classes, geometry, damaged files."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgecnn.data import iterate_batches, open_dataset, require_labels, resize_and_crop
from edgecnn.data.classes import map_classes
from edgecnn.errors import DataError
from edgecnn.runner.preprocess import Preprocess

RAW = Preprocess((4, 4), scale=1.0)
SHARED = Path(__file__).parents[2] / "shared" / "data"


def save(path: Path, value: int = 0, size: tuple[int, int] = (6, 6)) -> Path:
    """Write an image of one gray level, size (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def fill(folder: Path, count: int) -> list[Path]:
    return [save(folder / f"{index:03}.png", index) for index in range(count)]


def test_class_folders_are_labelled_in_sorted_order(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "a.png", 20)
    save(tmp_path / "cat" / "deep" / "a.JPEG", 10)
    data = open_dataset(tmp_path, RAW, class_count=2)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1]
    assert data.labels.dtype == np.int64
    assert data.class_names == ("cat", "dog")
    assert data.warnings == ()
    assert data.inputs([1, 0])[:, 0, 0, 0].tolist() == [20.0, 10.0]
    assert data.inputs([0]).shape == (1, 3, 4, 4)
    assert data.inputs([]).shape == (0, 3, 4, 4)


def test_class_folders_follow_the_labels_of_the_network(tmp_path: Path) -> None:
    for name in ("Cat", "sea_lion"):
        save(tmp_path / name / "a.png")
    data = open_dataset(tmp_path, RAW, class_count=3, labels=("sea lion, otary", "dog", "cat"))
    assert data.labels is not None
    assert data.labels.tolist() == [2, 0]
    assert data.class_names == ("sea lion, otary", "dog", "cat")


def test_a_folder_that_is_no_label_is_refused_with_the_nearest(tmp_path: Path) -> None:
    for name in ("cat", "dgo", "bird"):
        save(tmp_path / name / "a.png")
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path, RAW, labels=("bird", "cat", "dog"))
    assert "1 of 3 class folders are not among the network's 3 labels, the first is 'dgo'" in str(
        caught.value
    )
    assert caught.value.hint == "did you mean 'dog'?"


@pytest.mark.parametrize("names", [["002_n1", "007_n2"], ["2-shark", "7-cock"], ["2", "7"]])
def test_numbered_folders_mean_their_number(names: list[str]) -> None:
    assert map_classes("data", names, 1000, None).indices == (2, 7)
    assert map_classes("data", names, 8, None).class_names[7] == names[1]


def test_doubtful_orders_are_warned_about() -> None:
    one_based = map_classes("data", ["1", "2", "3"], 3, None)
    assert one_based.indices == (0, 1, 2)
    assert "not within 0 to 2" in one_based.warnings[0]
    unpadded = map_classes("data", ["0", "10", "2"], 11, None)
    assert unpadded.indices == (0, 10, 2)
    assert "without leading zeros" in unpadded.warnings[0]
    fewer = map_classes("data", ["n01440764", "n01443537"], 1000, None)
    assert fewer.indices == (0, 1)
    assert "found 2 class folders (n01440764, n01443537) for a network of 1000 classes" in fewer.warnings[0]


def test_more_folders_than_classes_are_refused() -> None:
    with pytest.raises(DataError, match=r"found 3 class folders \(a, b, c\), the network has 2 classes"):
        map_classes("data", ["a", "b", "c"], 2, None)


def test_flat_folder_of_mixed_sizes_is_unlabelled(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 1, (9, 5))
    save(tmp_path / "b.bmp", 2, (4, 30))
    (tmp_path / "notes.txt").write_text("not an image")
    data = open_dataset(str(tmp_path), RAW)
    assert (len(data), data.labels, data.class_names) == (2, None, None)
    assert data.inputs([0, 1])[:, 2, 3, 3].tolist() == [1.0, 2.0]
    with pytest.raises(DataError, match="accuracy needs labels, found 2 images without any"):
        require_labels(data, "accuracy")


def test_images_beside_class_folders_and_empty_classes_are_reported(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png")
    save(tmp_path / "c" / "0.png")
    (tmp_path / "b").mkdir()
    save(tmp_path / "stray.png")
    data = open_dataset(tmp_path, RAW, class_count=3)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 2]
    assert any("1 images beside the class folders" in text for text in data.warnings)
    assert any("1 class folders hold no images (b)" in text for text in data.warnings)


def test_a_wrapping_folder_is_entered(tmp_path: Path) -> None:
    save(tmp_path / "pictures" / "cat" / "0.png")
    save(tmp_path / "pictures" / "dog" / "0.png")
    data = open_dataset(tmp_path, RAW)
    assert data.class_names == ("cat", "dog")
    assert data.warnings == (f"{tmp_path}: using the only folder in it, pictures",)


def test_parts_of_a_data_set_are_refused_with_the_better_one(tmp_path: Path) -> None:
    for part in ("train", "val"):
        save(tmp_path / part / "cat" / "0.png")
    with pytest.raises(DataError, match=r"holds the parts of a data set \(train, val\)") as caught:
        open_dataset(tmp_path, RAW)
    assert caught.value.hint == f"choose one: {tmp_path / 'val'}"


def test_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path / "imagse", RAW)
    assert f"data source '{tmp_path / 'imagse'}' does not exist" in caught.value.message
    assert caught.value.hint == f"did you mean '{tmp_path / 'images'}'?"


def test_empty_folder_and_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder is empty, expected images or one subfolder per class"):
        open_dataset(tmp_path, RAW)
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(DataError, match=r"found no images among 1 files \(a.csv\)"):
        open_dataset(tmp_path, RAW)


def test_a_file_is_no_data_source(tmp_path: Path) -> None:
    archive = tmp_path / "images.tar.gz"
    archive.write_bytes(b"")
    with pytest.raises(DataError, match="is a file, expected a folder of images") as caught:
        open_dataset(archive, RAW)
    assert caught.value.hint == "extract the archive first and give the folder"


def test_forbidden_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DataError, match="cannot list the folder: Permission denied"):
        open_dataset(tmp_path, RAW)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file(tmp_path: Path) -> None:
    save(tmp_path / "a.png").chmod(0)
    with pytest.raises(DataError, match="permission denied"):
        open_dataset(tmp_path, RAW)


def test_one_percent_of_broken_images_is_left_out_with_a_warning(tmp_path: Path) -> None:
    files = fill(tmp_path, 100)
    files[7].write_bytes(files[7].read_bytes()[:40])
    data = open_dataset(tmp_path, RAW)
    assert len(data) == 99
    assert data.warnings[0].startswith(f"{tmp_path}: 1 of 100 images cannot be read (007.png: ")
    assert data.warnings[0].endswith("; left out")
    assert data.inputs([7])[0, 0, 0, 0] == 8.0


def test_more_broken_images_are_an_error(tmp_path: Path) -> None:
    files = fill(tmp_path, 100)
    files[3].write_bytes(b"")
    files[5].write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path, RAW)
    assert "2 of 100 images cannot be read (003.png: the file is empty; 005.png: not an image" in str(
        caught.value
    )
    assert "expected at most 1%" in str(caught.value)


def break_inside(path: Path) -> None:
    """Damage compressed pixels and leave both ends alone."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    whole = bytearray(buffer.getvalue())
    whole[60:90] = bytes(30)
    path.write_bytes(whole)


def test_damage_inside_is_found_while_reading(tmp_path: Path) -> None:
    break_inside(fill(tmp_path, 100)[1])
    data = open_dataset(tmp_path, RAW)
    assert (len(data), data.warnings) == (100, ())
    with pytest.raises(DataError, match=r"001\.png: "):
        data.inputs([0, 1])
    batches = [batch for batch, _ in iterate_batches(data, [0, 1, 2, 3], 2)]
    assert [len(batch) for batch in batches] == [1, 2]
    assert "1 of 100 images cannot be read (001.png" in data.warnings[0]


def test_much_damage_inside_stops_the_reading(tmp_path: Path) -> None:
    for file in fill(tmp_path, 100)[1:3]:
        break_inside(file)
    data = open_dataset(tmp_path, RAW)
    with pytest.raises(DataError, match="2 of 100 images cannot be read"):
        list(iterate_batches(data, range(100), 10))


def test_truncated_jpeg_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / "photo.jpg"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"1 of 1 images cannot be read \(photo.jpg: image file is truncated"):
        open_dataset(tmp_path, RAW)


def test_bytes_after_the_end_of_a_jpeg_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    save(path, 50)
    path.write_bytes(path.read_bytes() + b"made by a camera")
    assert open_dataset(tmp_path, RAW).inputs([0])[0, 0, 0, 0] == 50.0


@pytest.mark.parametrize("limit", [30, 10])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    save(tmp_path / "bomb.png")
    data = open_dataset(tmp_path, RAW)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(
        DataError, match=rf"bomb.png: more than {limit} pixels, which may be a decompression bomb"
    ):
        data.inputs([0])


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4), np.uint8)
    pixels[:, 2:] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    gray = Preprocess((4, 2), channel_order="gray", scale=1.0, mean=(0.0,), std=(1.0,))
    assert open_dataset(tmp_path, gray).inputs([0])[0, 0].tolist() == [[0, 0], [0, 0], [200, 200], [200, 200]]


def test_sixteen_bits_keep_their_upper_half(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)).save(tmp_path / "a.png")
    assert open_dataset(tmp_path, RAW).inputs([0]).max() == 0x80


def test_resize_short_and_center_crop_by_hand() -> None:
    image = np.zeros((8, 12), np.uint8)
    image[:, 4:8] = 100
    geometry = Preprocess((4, 2), resize_short=4, channel_order="gray")
    # (8, 12) -> (4, 6); columns 2 and 3 remain; their filters reach one source column outside.
    assert resize_and_crop(image, geometry)[..., 0].tolist() == [[88, 88]] * 4
    padded = resize_and_crop(np.full((2, 2), 9, np.uint8), Preprocess((4, 4), 2, "gray"))[..., 0]
    assert padded.tolist() == [[0, 0, 0, 0], [0, 9, 9, 0], [0, 9, 9, 0], [0, 0, 0, 0]]


def test_channel_orders() -> None:
    image = np.zeros((1, 1, 3), np.uint8)
    image[0, 0] = (10, 20, 30)
    assert resize_and_crop(image, Preprocess((1, 1))).tolist() == [[[10, 20, 30]]]
    luma = round(0.299 * 10 + 0.587 * 20 + 0.114 * 30)
    assert resize_and_crop(image, Preprocess((1, 1), channel_order="gray")).tolist() == [[[luma]]]


def test_imagenet_samples_get_their_class_index(tmp_path: Path) -> None:
    archive = SHARED / "imagenet_samples.tar.gz"
    if not archive.exists():
        pytest.skip("../shared/data/imagenet_samples.tar.gz is absent")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    data = open_dataset(tmp_path, Preprocess((224, 224), 256), class_count=1000)
    assert data.labels is not None
    assert len(data) == 400
    assert data.labels[:4].tolist() == [0, 2, 5, 7]
    assert data.inputs([0]).shape == (1, 3, 224, 224)
