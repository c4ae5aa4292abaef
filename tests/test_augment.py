"""Augmentation: what each one does to pixels, and that it follows from its generator alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgecnn.data import ArrayDataset
from edgecnn.data.augment import MAX_NOISE, Augmentation
from edgecnn.data.memory import MemoryImages
from edgecnn.errors import DataError, MissingDependencyError
from edgecnn.runner.preprocess import Preprocess

PLAIN = Preprocess((16, 16))
IMAGENET = Preprocess((16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def pixels(count: int = 8, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def inputs(preprocess: Preprocess = PLAIN, count: int = 8) -> torch.Tensor:
    return torch.from_numpy(preprocess.apply(pixels(count)))


def apply(name: str, x: torch.Tensor, preprocess: Preprocess = PLAIN, seed: int = 0) -> torch.Tensor:
    return Augmentation((name,), preprocess).apply(x, np.random.default_rng(seed))


@pytest.mark.parametrize("name", ["flip", "crop", "rotation", "colour", "noise"])
@pytest.mark.parametrize("preprocess", [PLAIN, IMAGENET], ids=["plain", "imagenet"])
def test_the_same_generator_gives_the_same_images(name: str, preprocess: Preprocess) -> None:
    if name in ("rotation", "colour"):
        pytest.importorskip("kornia")
    x = inputs(preprocess)
    before = x.clone()
    torch.manual_seed(1)
    first = apply(name, x, preprocess, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, apply(name, x, preprocess, seed=3)), "PyTorch's own generator plays no part"
    assert not torch.equal(first, apply(name, x, preprocess, seed=4))
    assert torch.equal(x, before), "the images given stay as they are"
    assert first.shape == x.shape
    assert first.dtype == torch.float32


@pytest.mark.parametrize("name", ["rotation", "colour", "noise"])
def test_pixels_stay_pixels(name: str) -> None:
    """Whatever the normalization, the result is that of the pixels in 0..1."""
    if name != "noise":
        pytest.importorskip("kornia")
    plain = apply(name, inputs(PLAIN), PLAIN)
    assert 0.0 <= float(plain.min()) <= float(plain.max()) <= 1.0
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (IMAGENET.mean, IMAGENET.std))
    normalized = apply(name, inputs(IMAGENET), IMAGENET)
    torch.testing.assert_close(normalized * std + mean, plain, rtol=0, atol=2e-6)


def test_flip_mirrors_about_half_of_the_images() -> None:
    x = inputs(count=400)
    y = apply("flip", x)
    mirrored = [bool(torch.equal(b, a.flip(2))) for a, b in zip(x, y, strict=True)]
    kept = [bool(torch.equal(b, a)) for a, b in zip(x, y, strict=True)]
    assert all(a or b for a, b in zip(mirrored, kept, strict=True))
    assert 150 < sum(mirrored) < 250


def test_crop_moves_images_by_up_to_an_eighth_over_black() -> None:
    x = torch.ones(300, 1, 16, 16)
    preprocess = Preprocess((16, 16), channel_order="gray", mean=(0.5,), std=(0.25,))
    y = apply("crop", x, preprocess)
    assert {float(v) for v in y.unique()} == {-2.0, 1.0}, "black is (0 - 0.5) / 0.25"
    rows = {int((image[0] == 1).any(1).sum()) for image in y}
    assert rows == {14, 15, 16}, "2 pixels at most"
    marked = torch.zeros(1, 1, 16, 16)
    marked[0, 0, 8, 8] = 1.0
    places = set()
    for seed in range(200):
        places.add(
            tuple(
                apply(
                    "crop", marked, Preprocess((16, 16), channel_order="gray", mean=(0.0,), std=(1.0,)), seed
                )[0, 0]
                .nonzero()[0]
                .tolist()
            )
        )
    assert places == {(r, c) for r in range(6, 11) for c in range(6, 11)}


def test_noise_is_as_strong_as_said() -> None:
    x = torch.full((200, 3, 16, 16), 0.5)
    deviation = (apply("noise", x) - x).std(dim=(1, 2, 3))
    assert 0.0 <= float(deviation.min()) < 0.1 * MAX_NOISE
    assert 0.9 * MAX_NOISE < float(deviation.max()) < 1.15 * MAX_NOISE


def test_rotation_turns_about_the_center() -> None:
    pytest.importorskip("kornia")
    x = torch.zeros(64, 3, 17, 17)
    x[:, :, 8, 8] = 1.0
    turned = apply("rotation", x, Preprocess((17, 17)))
    assert float(turned[:, :, 8, 8].min()) > 0.99
    assert not torch.equal(apply("rotation", inputs()), inputs())


def test_colour_of_bgr_images_is_that_of_rgb_images() -> None:
    pytest.importorskip("kornia")
    bgr = Preprocess((16, 16), channel_order="bgr")
    torch.testing.assert_close(
        apply("colour", inputs(bgr), bgr).flip(1), apply("colour", inputs(PLAIN), PLAIN)
    )


def test_mixup_mixes_images_and_targets_alike() -> None:
    x = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()
    targets = torch.eye(4)
    mixed, soft = Augmentation((), PLAIN, mixup=1.0).mix(x, targets, np.random.default_rng(0))
    assert soft is not None
    assert soft.sum(1).tolist() == pytest.approx([1.0] * 4)
    torch.testing.assert_close(mixed[:, 0, 0, 0], soft @ torch.arange(4.0))
    assert torch.equal(targets, torch.eye(4))


def test_cutmix_pastes_a_rectangle_and_counts_its_pixels() -> None:
    x = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 8, 8).contiguous()
    seen = set()
    for seed in range(20):
        mixed, soft = Augmentation((), PLAIN, cutmix=1.0).mix(x, torch.eye(4), np.random.default_rng(seed))
        assert soft is not None
        for image, target in zip(mixed, soft, strict=True):
            shares = [float((image == k).float().mean()) for k in range(4)]
            assert target.tolist() == pytest.approx(shares)
            seen.add(round(max(shares), 3))
    assert len(seen) > 5


def test_unlabelled_images_are_mixed_too() -> None:
    mixed, targets = Augmentation((), PLAIN, mixup=0.4).mix(inputs(), None, np.random.default_rng(0))
    assert targets is None
    assert not torch.equal(mixed, inputs())


def test_kornia_is_asked_for_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kornia", None)
    Augmentation(("flip", "crop", "noise"), PLAIN).check()
    with pytest.raises(MissingDependencyError, match=r"need kornia.*edgecnn\[train\]"):
        Augmentation(("colour",), PLAIN).check()


class Counting(ArrayDataset):
    """Counts how many images are asked for."""

    reads = 0

    def inputs(self, indices: object) -> np.ndarray:
        chosen = list(indices)  # type: ignore[call-overload]
        self.reads += len(chosen)
        return super().inputs(chosen)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_memory_gives_the_datasets_bits_and_reads_once(order: str) -> None:
    preprocess = Preprocess((16, 16), channel_order=order, mean=IMAGENET.mean, std=IMAGENET.std)
    plain = ArrayDataset("plain", pixels(), preprocess)
    counted = Counting("counted", pixels(), preprocess)
    memory = MemoryImages(counted, preprocess)
    for indices in ([3, 1], [1, 2, 3, 7], [0], list(range(8)), [5, 5, 0]):
        assert np.array_equal(memory.inputs(indices), plain.inputs(indices))
    assert counted.reads == 8
    assert memory.num_kept == 8
    assert memory.bytes_per_image == 16 * 16 * 3, "uint8"
    assert memory.readable_inputs([4, 2])[1] == [4, 2]


def test_memory_keeps_what_fits() -> None:
    counted = Counting("counted", pixels(), PLAIN)
    memory = MemoryImages(counted, PLAIN, max_bytes=3 * 16 * 16 * 3 + 10)
    for _ in range(2):
        assert np.array_equal(memory.inputs(range(8)), ArrayDataset("p", pixels(), PLAIN).inputs(range(8)))
    assert memory.num_kept == 3
    assert counted.reads == 8 + 5


def test_memory_keeps_inputs_that_are_no_pixels_as_they_are() -> None:
    from edgecnn.data.arrays import InputsDataset

    values = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    memory = MemoryImages(InputsDataset("mine", values, PLAIN), PLAIN)
    assert np.array_equal(memory.inputs([2, 0]), values[[2, 0]])
    assert np.array_equal(memory.inputs([0, 3]), values[[0, 3]])
    assert memory.bytes_per_image == 4 * 3 * 16 * 16


def test_memory_leaves_out_what_cannot_be_read(tmp_path: object) -> None:
    class Broken(Counting):
        def readable_inputs(self, indices: list[int]) -> tuple[np.ndarray, list[int]]:
            kept = [index for index in indices if index != 2]
            return self.inputs(kept), kept

        def inputs(self, indices: object) -> np.ndarray:
            if 2 in list(indices):  # type: ignore[call-overload]
                raise DataError("image 2 is broken")
            return super().inputs(indices)

    broken = Broken("broken", pixels(), PLAIN)
    memory = MemoryImages(broken, PLAIN)
    for _ in range(2):
        x, kept = memory.readable_inputs([1, 2, 3])
        assert kept == [1, 3]
        assert np.array_equal(x, ArrayDataset("p", pixels(), PLAIN).inputs([1, 3]))
    assert broken.reads == 2
