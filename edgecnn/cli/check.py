"""The command `edgecnn check`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edgecnn.cli.options import POSITIVE, ValuesCommand
from edgecnn.errors import BudgetError, DataError


@click.command(cls=ValuesCommand, short_help="Hold budgets against reports; exit code 3 if one is missed.")
@click.argument("reports", metavar="REPORT|DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--max-drop", type=click.FloatRange(min=0), metavar="POINTS", help="Of top-1, against float.")
@click.option("--max-latency-ms", type=POSITIVE, metavar="MS", help="Of each file's median.")
@click.option("--max-size-mb", type=POSITIVE, metavar="MB", help="Of each file, 1 MB = 1,000,000 bytes.")
@click.option(
    "--min-speedup", type=POSITIVE, metavar="RATIO", help="The interval's lower end, against the baseline."
)
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write JUnit XML.")
def check(values: Mapping[str, Any]) -> None:
    """Hold budgets against REPORTs, files that compress or bench wrote, or folders of them.

    One line per check on stdout. A figure that is missing fails its check, and so does latency from an
    emulated board. Where bench reports are given, latency is theirs and not that of compress.
    """
    from edgecnn.artifact import write_file_atomically
    from edgecnn.report.budgets import Budgets, run_checks
    from edgecnn.report.junit import render_junit
    from edgecnn.report.reading import read_reports

    names = ("max_drop", "max_latency_ms", "max_size_mb", "min_speedup")
    budgets = Budgets(**{name: values[name] for name in names})
    if budgets.is_empty:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise click.UsageError(f"nothing to check, give at least one of {options}")
    reports = [found for path in values["reports"] for found in read_reports(path)]
    checks = run_checks(reports, budgets)
    if not checks:
        raise DataError("the reports hold no file to check")
    for entry in checks:
        click.echo(entry.line)
    if values["junit"]:
        write_file_atomically(values["junit"], render_junit(checks).encode())
    failed = sum(not entry.passed for entry in checks)
    if failed:
        raise BudgetError(f"{failed} of {len(checks)} checks failed")
