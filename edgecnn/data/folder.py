"""A folder of images, decoded when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from edgecnn.data.classes import map_classes
from edgecnn.data.dataset import Inputs, Labels
from edgecnn.data.decode import UnreadableImage, decode_image, why_broken
from edgecnn.data.geometry import Pixels, import_pillow
from edgecnn.errors import DataError
from edgecnn.runner.preprocess import Preprocess

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
MAX_UNREADABLE_FRACTION = 0.01
_NUM_SHOWN = 3
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "eval"})


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return (image files, subfolders) of a folder, sorted, hidden ones left out.

    Raises:
        DataError: if the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry.name, entry.is_dir()) for entry in found)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot list the folder: {error.strerror or error}",
            hint="check who may read it: ls -ld" if isinstance(error, PermissionError) else None,
        ) from error
    shown = [(folder / name, is_dir) for name, is_dir in entries if not name.startswith((".", "__MACOSX"))]
    images = [path for path, is_dir in shown if not is_dir and path.suffix.lower() in SUFFIXES]
    return images, [path for path, is_dir in shown if is_dir]


def _walk(folder: Path) -> Iterator[Path]:
    images, subfolders = _entries(folder)
    yield from images
    for subfolder in subfolders:
        if not subfolder.is_symlink():
            yield from _walk(subfolder)


def _refuse_splits(root: Path, subfolders: list[Path]) -> None:
    names = [folder.name for folder in subfolders]
    if len(names) > 1 and all(name.casefold() in _SPLIT_NAMES for name in names):
        best = next((name for name in names if name.casefold() not in {"train", "training"}), names[0])
        raise DataError(
            f"{root}: holds the parts of a data set ({', '.join(names)}), expected class folders or images",
            hint=f"choose one: {root / best}",
        )


def _describe_unreadable(root: Path, failures: Iterable[tuple[str, str]], total: int) -> str:
    listed = list(failures)
    first = "; ".join(f"{Path(name).relative_to(root)}: {why}" for name, why in listed[:_NUM_SHOWN])
    more = "; ..." if len(listed) > _NUM_SHOWN else ""
    return f"{root}: {len(listed)} of {total} images cannot be read ({first}{more})"


class FolderDataset:
    """Images in class subfolders (labelled) or side by side (unlabelled).

    Every file's beginning and end are looked at on opening, so that empty and truncated files are
    known at once; pixels are decoded on demand and not kept. Up to 1 % of the images may be
    unreadable, they are left out with a warning.

    Args:
        path: the folder; a folder that holds nothing but one folder stands for that one.
        preprocess: of the network.
        class_count: classes the network tells apart, or None where unknown.
        labels: the network's class names, or None.

    Raises:
        DataError: if there are no images, too many unreadable ones, or the classes do not fit.
    """

    def __init__(
        self,
        path: Path,
        preprocess: Preprocess,
        *,
        class_count: int | None = None,
        labels: tuple[str, ...] | None = None,
    ) -> None:
        import_pillow()
        self.name = str(path)
        self.labels: Labels | None = None
        self.class_names: tuple[str, ...] | None = None
        self._preprocess = preprocess
        self._notes: list[str] = []
        self._failures: dict[str, str] = {}
        self._root = self._descend(path)
        files, self._num_files = self._list_files(class_count, labels)
        self._paths = [str(file) for file in files]

    def _descend(self, path: Path) -> Path:
        root = path
        images, subfolders = _entries(root)
        while len(subfolders) == 1 and not images and _entries(subfolders[0])[1]:
            root = subfolders[0]
            images, subfolders = _entries(root)
        if root != path:
            self._notes.append(f"{path}: using the only folder in it, {root.relative_to(path)}")
        return root

    def _list_files(self, class_count: int | None, labels: tuple[str, ...] | None) -> tuple[list[Path], int]:
        loose, subfolders = _entries(self._root)
        _refuse_splits(self._root, subfolders)
        by_class = {folder.name: list(_walk(folder)) for folder in subfolders}
        empty = [name for name, files in by_class.items() if not files]
        by_class = {name: files for name, files in by_class.items() if files}
        if not by_class:
            if not loose:
                self._refuse_empty()
            return self._whole(loose), len(loose)
        if loose:
            self._notes.append(f"{self.name}: {len(loose)} images beside the class folders are left out")
        if empty:
            shown = ", ".join(empty[:_NUM_SHOWN])
            self._notes.append(f"{self.name}: {len(empty)} class folders hold no images ({shown})")
        names = sorted([*by_class, *empty])
        mapping = map_classes(self.name, names, class_count, labels)
        self._notes.extend(mapping.warnings)
        self.class_names = mapping.class_names
        index_of = dict(zip(names, mapping.indices, strict=True))
        files = [file for name in sorted(by_class) for file in by_class[name]]
        folder_of = {file: name for name, members in by_class.items() for file in members}
        kept = self._whole(files)
        self.labels = np.array([index_of[folder_of[file]] for file in kept], np.int64)
        return kept, len(files)

    def _refuse_empty(self) -> None:
        others = sorted(file.name for file in self._root.rglob("*") if file.is_file())
        if not others:
            raise DataError(f"{self.name}: the folder is empty, expected images or one subfolder per class")
        raise DataError(
            f"{self.name}: found no images among {len(others)} files ({', '.join(others[:_NUM_SHOWN])})",
            hint="images end in " + ", ".join(sorted(SUFFIXES)),
        )

    def _whole(self, files: list[Path]) -> list[Path]:
        """Return the files that look complete.

        Raises:
            DataError: if too many do not.
        """
        kept = []
        for file in files:
            reason = why_broken(file)
            if reason is None:
                kept.append(file)
            else:
                self._failures[str(file)] = reason
        self._check_failures(len(files))
        return kept

    def _check_failures(self, total: int) -> None:
        if len(self._failures) > MAX_UNREADABLE_FRACTION * total:
            raise DataError(
                _describe_unreadable(self._root, self._failures.items(), total)
                + f", expected at most {MAX_UNREADABLE_FRACTION:.0%}",
                hint="remove or replace these files",
            )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know, unreadable images found so far included."""
        if not self._failures:
            return tuple(self._notes)
        failures = list(self._failures.items())
        return (*self._notes, _describe_unreadable(self._root, failures, self._num_files) + "; left out")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._paths)

    def _apply(self, pixels: list[Pixels]) -> Inputs:
        shape = (0, *self._preprocess.size, self._preprocess.num_channels)
        stacked = np.stack(pixels) if pixels else np.empty(shape, np.uint8)
        return np.asarray(self._preprocess.apply(stacked), np.float32)

    def inputs(self, indices: Sequence[int]) -> Inputs:
        """Return the images as float32 (n, c, h, w), through the Preprocess.

        Raises:
            DataError: naming the file, if one cannot be decoded.
        """
        try:
            return self._apply([decode_image(self._paths[index], self._preprocess) for index in indices])
        except UnreadableImage as error:
            raise DataError(f"{error.path}: {error.reason}", hint="remove or replace this file") from error

    def readable_inputs(self, indices: Sequence[int]) -> tuple[Inputs, list[int]]:
        """Return (float32 (m, c, h, w), the m <= n indices that could be decoded).

        Raises:
            DataError: if more than 1 % of the folder's images turned out unreadable.
        """
        pixels, kept = [], []
        for index in indices:
            image = self._decode_or_note(self._paths[index])
            if image is not None:
                pixels.append(image)
                kept.append(int(index))
        return self._apply(pixels), kept

    def _decode_or_note(self, path: str) -> Pixels | None:
        try:
            return decode_image(path, self._preprocess)
        except UnreadableImage as error:
            self._failures[path] = error.reason
            self._check_failures(self._num_files)
            return None
