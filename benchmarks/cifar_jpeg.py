"""JPEG CIFAR-10, decoded once: what the benchmarks of pruning and distillation train and judge on."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from edgecnn.data import ArrayDataset
from edgecnn.model import Model

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def decode(archive: Path, cache: Path) -> Path:
    """Return an .npz of an archive's JPEGs, made the first time: images uint8 (n, 32, 32, 3), labels."""
    path = cache / f"{archive.name.split('.')[0]}.npz"
    if path.is_file():
        return path
    images, labels = [], []
    with tarfile.open(archive) as tar:
        for member in sorted(tar, key=lambda entry: entry.name):
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None:
                images.append(np.asarray(Image.open(BytesIO(file.read())).convert("RGB")))
                labels.append(CLASSES.index(Path(member.name).parent.name))
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, images=np.stack(images), labels=np.array(labels, np.int64))
    temporary.replace(path)
    return path


def open_jpeg_cifar(which: str, model: Model, cache: Path, data: Path = DATA) -> ArrayDataset:
    """Return "train" (50,000 images) or "test" (5,000) as a network's inputs."""
    with np.load(decode(data / "cifar10" / f"{which}_jpeg.tar.gz", cache)) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    return ArrayDataset(
        f"{which}_jpeg", images, model.spec.preprocess, labels=labels, class_count=10, class_names=CLASSES
    )
