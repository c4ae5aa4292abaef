"""The command `edgecnn inspect`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from edgecnn.cli.options import ValuesCommand, load_options, make_load_options


@click.command(cls=ValuesCommand, short_help="Show a network's layers, cost and what cannot be exported.")
@click.argument("model")
@load_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(values: Mapping[str, Any]) -> None:
    """Show what MODEL takes and gives, what each layer costs, and operators that cannot be exported."""
    from edgecnn.inspection import inspect_model

    found = inspect_model(values["model"], make_load_options(values))
    if values["as_json"]:
        click.echo(json.dumps(found, indent=1, allow_nan=False))
        return
    from edgecnn.report.terminal import print_inspection

    print_inspection(found)
