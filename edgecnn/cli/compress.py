"""The command `edgecnn compress`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from edgecnn.cli.options import ValuesCommand, load_options, make_load_options
from edgecnn.errors import BudgetError

if TYPE_CHECKING:
    from edgecnn.recipe import Recipe
    from edgecnn.report import Report

INT8_RECIPE = "static_wi8_ai8"
FORMATS = ("onnx", "tflite")
POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command(
    cls=ValuesCommand, short_help="Make one int8 ONNX and one int8 TFLite file of a trained network."
)
@click.argument("model")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out"),
    show_default=True,
    help="Directory of the results.",
)
@click.option(
    "--int8", is_flag=True, help=f"Static int8, the recipe {INT8_RECIPE}; also what is done without a word."
)
@click.option(
    "--recipe", metavar="NAME|FILE", help="Another recipe; `edgecnn recipes list` names those there are."
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    help="Only this format; may be repeated.  [default: both]",
)
@click.option(
    "--io",
    type=click.Choice(["float32", "int8", "uint8"]),
    default="float32",
    show_default=True,
    help="Type of the files' inputs and outputs.",
)
@click.option(
    "--data", metavar="SOURCE", help="Folder of images, FILE.npz, digits, or package.module:factory."
)
@click.option(
    "--num-samples", type=click.IntRange(min=1), help="Calibration images, at most.  [default: the recipe's]"
)
@load_options
@click.option(
    "--target",
    metavar="DEVICE",
    default="local_cpu",
    show_default=True,
    help="Device profile the files are made for.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads of the latency measurement.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    metavar="POINTS",
    help="Fail with exit code 3 if top-1 falls by more.",
)
@click.option(
    "--max-latency-ms", type=POSITIVE, metavar="MS", help="Fail with exit code 3 if the median is higher."
)
@click.option("--max-size-mb", type=POSITIVE, metavar="MB", help="Fail with exit code 3 if a file is larger.")
@click.option("--seed", type=click.IntRange(min=0), help="Of everything random.  [default: the recipe's]")
@click.option("--force", is_flag=True, help="Replace earlier results, those of other formats too.")
@click.option("--dry-run", is_flag=True, help="Print the recipe and what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print report.json instead of the table.")
def compress(values: Mapping[str, Any]) -> None:
    """Make one int8 ONNX and one int8 TFLite file of a trained network, prove that both compute the same
    integers, and time them against float.

    MODEL is a file (.pt2, or a state dict .pt .pth .safetensors with --arch), torchvision:NAME, timm:NAME or
    package.module:factory. Without --data the scales come from made-up images, and accuracy stays unmeasured.
    """
    if values["int8"] and values["recipe"]:
        raise click.UsageError("--int8 is the recipe static_wi8_ai8; give --int8 or --recipe, not both")
    from edgecnn.devices.profile import load_device

    recipe = _recipe(values)
    load_device(values["target"])  # a misspelt target is said now, not after the loading
    if values["dry_run"]:
        click.echo(_plan(values, recipe) + recipe.to_toml(), nl=False)
        return
    from edgecnn.cli.progress import TerminalProgress
    from edgecnn.compress import CompressOptions, CompressResult
    from edgecnn.compress import compress as run

    options = CompressOptions(
        load=make_load_options(values, recipe.seed),
        formats=_formats(values),
        io=values["io"],
        target=values["target"],
        num_samples=_num_samples(recipe),
        max_drop=values["max_drop"],
        max_latency_ms=values["max_latency_ms"],
        max_size_mb=values["max_size_mb"],
        seed=recipe.seed,
        force=values["force"],
        threads=values["threads"],
    )
    try:
        with TerminalProgress() as progress:
            result = run(
                values["model"],
                recipe=recipe,
                data=values["data"],
                out=values["out"],
                options=options,
                progress=progress,
            )
    except BudgetError as error:
        if isinstance(error.result, CompressResult):
            _print(error.result.report, values["as_json"])
        raise
    _print(result.report, values["as_json"])


def _print(report: Report, as_json: bool) -> None:
    """Print a report as JSON or as a table."""
    if as_json:
        click.echo(report.to_json(), nl=False)
        return
    from edgecnn.report.terminal import print_report

    print_report(report)


def _recipe(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with what the command line says put into it."""
    from edgecnn.recipe import Recipe

    recipe = Recipe.load(values["recipe"] or INT8_RECIPE)
    if values["num_samples"] is not None:
        changed = tuple(
            replace(cast(Any, step), num_samples=values["num_samples"]) if _takes_samples(step) else step
            for step in recipe.passes
        )
        recipe = replace(recipe, passes=changed)
    return recipe if values["seed"] is None else replace(recipe, seed=values["seed"])


def _takes_samples(step: Any) -> bool:
    """Return whether a pass has a number of calibration images."""
    return any(parameter.name == "num_samples" for parameter in fields(step))


def _num_samples(recipe: Recipe) -> int | None:
    """Return the most calibration images any pass asks for, or None."""
    return max((cast(Any, step).num_samples for step in recipe.passes if _takes_samples(step)), default=None)


def _formats(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the formats asked for, each once, in a fixed order."""
    return tuple(name for name in FORMATS if name in values["formats"] or not values["formats"])


def _plan(values: Mapping[str, Any], recipe: Recipe) -> str:
    """Say in TOML comments what would be done, so that the whole output is a recipe again."""
    source = values["data"] or "images made up from the network's own statistics (accuracy unmeasured)"
    files = ", ".join(str(values["out"] / f"model.{name}") for name in _formats(values))
    steps = [
        f"load         {values['model']}",
        f"calibrate on {source}, at most {_num_samples(recipe) or 0} images",
        f"run          {', '.join(step.name for step in recipe.passes)}",
        f"write        {files}, {values['out'] / 'model.pt2'}, {values['out'] / 'report.json'}",
        f"for          {values['target']}, input and output {values['io']}",
        f"prove        parity, agreement with float, latency here on {values['threads']} thread(s)",
    ]
    return (
        "".join(f"# {line}\n" for line in ["edgecnn compress would", *(f"  {step}" for step in steps)]) + "\n"
    )
