"""The command `edgecnn compare`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgecnn.cli.options import ValuesCommand
from edgecnn.errors import DataError

if TYPE_CHECKING:
    from edgecnn.report.reading import FoundReport
    from edgecnn.report.side_by_side import Row


@click.command(cls=ValuesCommand, short_help="Put two reports side by side.")
@click.argument("first", metavar="REPORT", type=click.Path(path_type=Path))
@click.argument("second", metavar="REPORT", type=click.Path(path_type=Path))
@click.option("--across-devices", is_flag=True, help="Show latencies of different devices, without a change.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(values: Mapping[str, Any]) -> None:
    """Put two REPORTs of compress, or two of bench, side by side: size, latency, accuracy, parity.

    A folder stands for its report.json, or for its bench report where it has one only.
    """
    from edgecnn.report.side_by_side import compare_reports

    first, second = _one(values["first"]), _one(values["second"])
    rows, warnings = compare_reports(first, second, across_devices=values["across_devices"])
    if values["as_json"]:
        click.echo(json.dumps(_values(rows, warnings), indent=1, allow_nan=False))
        return
    from edgecnn.report.bench_terminal import print_rows

    print_rows(rows, (str(values["first"]), str(values["second"])), warnings)


def _one(path: Path) -> FoundReport:
    """Return the report of a file or folder."""
    from edgecnn.report.reading import read_reports

    found = read_reports(path)
    if len(found) > 1 and path.is_dir() and found[0].name == "report.json":
        return found[0]
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found)
        raise DataError(f"{path} holds {len(found)} reports, expected one", hint=f"give one of {names}")
    return found[0]


def _values(rows: Sequence[Row], warnings: Sequence[str]) -> dict[str, Any]:
    """Return what is printed as JSON."""
    names = ("figure", "file", "unit", "first", "second", "is_comparable", "change")
    return {"rows": [{name: getattr(row, name) for name in names} for row in rows], "warnings": [*warnings]}
