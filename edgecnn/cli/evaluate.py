"""The command `edgecnn evaluate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from edgecnn.cli.options import ValuesCommand, load_options, make_load_options

FRACTIONS = ("top1", "top5")


@click.command(cls=ValuesCommand, short_help="Measure the accuracy of a file or a network.")
@click.argument("artifact")
@click.option(
    "--data",
    metavar="SOURCE",
    required=True,
    help="Labelled images: folder, FILE.npz, digits or package.module:factory.",
)
@load_options
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of the runtime."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(values: Mapping[str, Any]) -> None:
    """Measure the accuracy of ARTIFACT, a file that compress wrote or any MODEL that it takes."""
    from edgecnn.cli.progress import TerminalProgress
    from edgecnn.evaluation import evaluate as run
    from edgecnn.options import CompressOptions

    options = CompressOptions(load=make_load_options(values), threads=values["threads"])
    with TerminalProgress() as progress:
        figures = run(values["artifact"], data=values["data"], options=options, progress=progress)
    if values["as_json"]:
        click.echo(json.dumps(figures, indent=1, allow_nan=False))
        return
    width = max(map(len, figures))
    for name, value in figures.items():
        click.echo(f"{name:<{width}}  {_text(name, value)}")


def _text(name: str, value: Any) -> str:
    """Return a figure for people: fractions in percent, what was not measured in words."""
    if value is None:
        return "not measured"
    if isinstance(value, Mapping):
        from edgecnn.report.terminal import preprocess_text

        return preprocess_text(value)
    return f"{100 * value:.2f} %" if name in FRACTIONS else str(value)
