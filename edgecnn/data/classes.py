"""Which label a class folder stands for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from edgecnn.errors import DataError

_INDEX = re.compile(r"(\d+)(?=$|[_\-. ])")
_NUM_SHOWN = 3


@dataclass(frozen=True)
class ClassMapping:
    """Labels of class folders.

    Attributes:
        indices: for each folder, in the order given, the class index.
        class_names: name of each class by index.
        warnings: doubts about the order.
    """

    indices: tuple[int, ...]
    class_names: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def _normalized(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def _label_lookup(labels: Sequence[str]) -> dict[str, int]:
    """Return normalized label -> index; a label's first synonym counts too, ambiguous ones do not."""
    found: dict[str, set[int]] = {}
    for index, label in enumerate(labels):
        for text in (label, label.split(",")[0]):
            found.setdefault(_normalized(text), set()).add(index)
    return {text: next(iter(indices)) for text, indices in found.items() if len(indices) == 1 and text}


def _by_label(source: str, folders: Sequence[str], labels: tuple[str, ...]) -> ClassMapping | None:
    lookup = _label_lookup(labels)
    matches = [lookup.get(_normalized(folder)) for folder in folders]
    known = [match for match in matches if match is not None]
    if len(known) == len(folders) and len(set(known)) == len(known):
        return ClassMapping(tuple(known), labels)
    if 2 * len(known) > len(folders):
        stranger = next(folder for folder, match in zip(folders, matches, strict=True) if match is None)
        close = difflib.get_close_matches(stranger, labels, n=1)
        raise DataError(
            f"{source}: {len(folders) - len(known)} of {len(folders)} class folders are not among "
            f"the network's {len(labels)} labels, the first is '{stranger}'",
            hint=f"did you mean '{close[0]}'?" if close else "rename or remove the folder",
        )
    return None


def _by_number(folders: Sequence[str], class_count: int | None) -> ClassMapping | None:
    numbers = [_INDEX.match(folder) for folder in folders]
    indices = [int(number.group(1)) for number in numbers if number is not None]
    if len(indices) < len(folders) or len(set(indices)) < len(indices):
        return None
    limit = class_count if class_count is not None else max(indices) + 1
    if max(indices) >= limit:
        return None
    names = [str(index) for index in range(limit)]
    for index, folder in zip(indices, folders, strict=True):
        names[index] = folder
    warnings: tuple[str, ...] = ()
    if indices != sorted(indices):
        first = ", ".join(
            f"'{folder}' is class {index}" for folder, index in zip(folders, indices, strict=True)
        )[:60]
        message = (
            "class folders are numbered without leading zeros; the number is taken as the class "
            f"({first} ...), not the alphabetical position"
        )
        warnings = (message,)
    return ClassMapping(tuple(indices), tuple(names), warnings)


def map_classes(
    source: str, folders: Sequence[str], class_count: int | None, labels: tuple[str, ...] | None
) -> ClassMapping:
    """Say which class each folder holds.

    Folder names that are the network's labels (case and punctuation aside) mean those; names that all
    begin with a number below class_count ("0007_cock", "7-cock", "7") mean that number, so that a sample
    of a few classes works; otherwise the position in alphabetical order counts.

    Args:
        source: the data source, for messages.
        folders: folder names, sorted.
        class_count: classes the network tells apart, or None where unknown.
        labels: the network's class names, or None.

    Raises:
        DataError: if most folders are labels of the network but some are not, or there are too many.

    Example:
        >>> map_classes("data", ["002_shark", "007_cock"], class_count=1000, labels=None).indices
        (2, 7)
        >>> map_classes("data", ["cat", "dog"], class_count=2, labels=("dog", "cat")).indices
        (1, 0)
    """
    mapping = (_by_label(source, folders, labels) if labels else None) or _by_number(folders, class_count)
    if mapping is not None:
        return mapping
    shown = ", ".join(folders[:_NUM_SHOWN]) + (", ..." if len(folders) > _NUM_SHOWN else "")
    if class_count is not None and len(folders) > class_count:
        raise DataError(
            f"{source}: found {len(folders)} class folders ({shown}), the network has {class_count} classes",
            hint="is this the data set that the network was trained for?",
        )
    warnings: tuple[str, ...] = ()
    if class_count is not None and len(folders) != class_count:
        message = (
            f"{source}: found {len(folders)} class folders ({shown}) for a network of {class_count} classes; "
            "labels follow the alphabetical order and may be wrong, begin each name with its class index"
        )
        warnings = (message,)
    elif class_count is not None and all(_INDEX.match(folder) for folder in folders):
        message = (
            f"{source}: class folders are numbered, but not within 0 to {class_count - 1} ({shown}); "
            "labels follow the alphabetical order"
        )
        warnings = (message,)
    names = [*folders, *(str(index) for index in range(len(folders), class_count or 0))]
    return ClassMapping(tuple(range(len(folders))), tuple(names), warnings)
