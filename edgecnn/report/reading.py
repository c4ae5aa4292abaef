"""Reports read back from files and folders, of `compress` and of `bench` alike."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecnn.errors import DataError
from edgecnn.report.bench_results import KIND, BenchReport
from edgecnn.report.results import Report


@dataclass(frozen=True)
class FoundReport:
    """A report and where it was.

    Attributes:
        name: of the file, with a number where the file holds several.
        report: of `compress` or of `bench`.
    """

    name: str
    report: Report | BenchReport


def read_reports(path: Path) -> list[FoundReport]:
    """Read a report file, or report.json and bench-*.json of a folder.

    Args:
        path: what compress or bench wrote, or what they print with --json.

    Returns:
        At least one report.

    Raises:
        DataError: if there is none, or one cannot be read.
    """
    if not path.is_dir():
        return _read(path)
    files = [file for file in [path / "report.json", *sorted(path.glob("bench-*.json"))] if file.is_file()]
    if not files:
        raise DataError(
            f"{path} holds neither report.json nor bench-DEVICE.json",
            hint="give a folder that compress or `bench -o` wrote",
        )
    return [found for file in files for found in _read(file)]


def _read(path: Path) -> list[FoundReport]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"report {path} cannot be read: {error.strerror}") from error
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}", hint="it may have been cut short") from error
    try:
        if not isinstance(values, list):
            return [FoundReport(path.name, _build(values, text))]
        if not values:
            raise DataError("an empty list, expected a report")
        return [
            FoundReport(f"{path.name}[{index}]", BenchReport.from_values(value))
            for index, value in enumerate(values)
        ]
    except DataError as error:
        raise DataError(f"{path}: {error.message}", hint=error.hint) from error


def _build(values: Any, text: bytes) -> Report | BenchReport:
    is_bench = isinstance(values, dict) and values.get("kind") == KIND
    return BenchReport.from_values(values) if is_bench else Report.from_json(text)
