"""The command `edgecnn inspect`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edgecnn.cli.options import ValuesCommand, load_options, make_load_options


@click.command(cls=ValuesCommand, short_help="Show a network's layers and cost, and what could be pruned.")
@click.argument("model")
@load_options
@click.option(
    "--groups", is_flag=True, help="Show the groups of channels that pruning can remove, or why not."
)
@click.option(
    "--draw",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.svg",
    help="Draw which layers the groups tie together.",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Measure what leaving a part of each group out does to the answers; with --int8, which layers int8 "
    "hurts and what some in float bring.",
)
@click.option(
    "--int8", is_flag=True, help="Say what stands in the way of int8, layer by layer, without compressing."
)
@click.option(
    "--target", metavar="DEVICE", default="local_cpu", show_default=True, help="Device profile for --int8."
)
@click.option(
    "--data",
    metavar="SOURCE",
    help="Images for --sensitivity or --int8.  [default: a few made up; BatchNorm statistics]",
)
@click.option(
    "--importance", default="l2", show_default=True, metavar="NAME", help="Decides what goes first."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(values: Mapping[str, Any]) -> None:
    """Show what MODEL takes and gives, what each layer costs, and operators that cannot be exported; or, with
    --groups, --draw or --sensitivity, which channels can be pruned, what ties them together and which matter;
    or, with --int8, what int8 would do to its accuracy and speed on a target, in seconds.
    """
    if values["data"] is not None and not (values["sensitivity"] or values["int8"]):
        raise click.UsageError("--data is for --sensitivity and --int8; leave it out, or add one of them")
    if values["int8"] and (values["groups"] or values["draw"]):
        raise click.UsageError("--int8 goes without --groups and --draw: run them apart")
    if values["target"] != "local_cpu" and not values["int8"]:
        raise click.UsageError("--target is for --int8; leave it out, or add --int8")
    if values["int8"]:
        _show_diagnosis(values)
        return
    if values["groups"] or values["draw"] or values["sensitivity"]:
        _show_groups(values)
        return
    from edgecnn.inspection import inspect_model

    found = inspect_model(values["model"], make_load_options(values))
    if values["as_json"]:
        click.echo(json.dumps(found, indent=1, allow_nan=False))
        return
    from edgecnn.report.terminal import print_inspection

    print_inspection(found)


def _show_diagnosis(values: Mapping[str, Any]) -> None:
    """Print what stands in the way of int8."""
    from edgecnn.diagnosis.letter import diagnose
    from edgecnn.report.diagnosis import print_diagnosis

    options = make_load_options(values)
    found = diagnose(values["model"], options, data=values["data"], target=values["target"])
    if values["sensitivity"]:
        from edgecnn.cli.progress import TerminalProgress
        from edgecnn.diagnosis.precision import inspect_precision

        with TerminalProgress() as progress:
            measured = inspect_precision(values["model"], options, data=values["data"], progress=progress)
        found["sensitivity"] = measured
    if values["as_json"]:
        click.echo(json.dumps(found, indent=1, allow_nan=False))
        return
    print_diagnosis(found)


def _show_groups(values: Mapping[str, Any]) -> None:
    """Print the groups, and draw them if asked to."""
    from edgecnn.artifact import write_file_atomically
    from edgecnn.prunability import inspect_groups, inspect_sensitivity
    from edgecnn.report.groups import draw_groups, print_groups

    options = make_load_options(values)
    if values["sensitivity"]:
        from edgecnn.cli.progress import TerminalProgress

        with TerminalProgress() as progress:
            found = inspect_sensitivity(
                values["model"],
                options,
                data=values["data"],
                importance=values["importance"],
                progress=progress,
            )
    else:
        found = inspect_groups(values["model"], options)
    if values["draw"] is not None:
        write_file_atomically(values["draw"], draw_groups(found).encode())
    if values["as_json"]:
        click.echo(json.dumps(found, indent=1, allow_nan=False))
        return
    print_groups(found)
    if values["draw"] is not None:
        click.echo(f"drawn: {values['draw']}", err=True)
