"""The command `edgecnn compress`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgecnn.cli.options import POSITIVE, ValuesCommand, load_options, make_load_options, recipe_options
from edgecnn.errors import BudgetError, EdgeCNNError

if TYPE_CHECKING:
    from edgecnn.composition import RecipeFlags
    from edgecnn.options import CompressOptions
    from edgecnn.recipe import Recipe
    from edgecnn.report import Report

FORMATS = ("onnx", "tflite")


@click.command(
    cls=ValuesCommand, short_help="Prune, train and quantize a network: one ONNX and one TFLite file."
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
@recipe_options
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
    "--train-data",
    metavar="SOURCE",
    help="To train on.  [default: what judgement and calibration leave of --data]",
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
    help="Search for what keeps top-1 within so many points of float; exit code 3 if nothing does.",
)
@click.option(
    "--max-latency-ms", type=POSITIVE, metavar="MS", help="Fail with exit code 3 if the median is higher."
)
@click.option(
    "--must-be-faster", is_flag=True, help="Fail with exit code 3 unless every file is faster than float."
)
@click.option(
    "--no-search",
    is_flag=True,
    help="Keep the recipe as it is, even if a file is slower or misses --max-drop.",
)
@click.option("--max-size-mb", type=POSITIVE, metavar="MB", help="Fail with exit code 3 if a file is larger.")
@click.option("--seed", type=click.IntRange(min=0), help="Of everything random.  [default: the recipe's]")
@click.option("--force", is_flag=True, help="Replace earlier results, and an unfinished run.")
@click.option("--resume", is_flag=True, help="Go on where an unfinished run into the same directory stopped.")
@click.option("--dry-run", is_flag=True, help="Print the recipe and what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print report.json instead of the table.")
def compress(values: Mapping[str, Any]) -> None:
    """Prune a trained network, win the accuracy back by training, and quantize it; write one ONNX and one
    TFLite file, prove that both compute the same, and time them against float.

    MODEL is a file (.pt2, or a state dict .pt .pth .safetensors with --arch), torchvision:NAME, timm:NAME or
    package.module:factory. Without --data the scales come from made-up images, and accuracy stays unmeasured.
    Images that judge the result are never trained on.
    """
    parts = (
        "int8",
        "qat",
        "fp16",
        "int16x8",
        "prune",
        "prune_macs",
        "prune_params",
        "prune_to_mb",
        "distill",
    )
    given = [f"--{name.replace('_', '-')}" for name in parts if values[name] not in (None, False)]
    if given and values["recipe"]:
        message = f"{given[0]} makes a recipe of its own; give {given[0]} or --recipe, not both"
        raise click.UsageError(message)
    from edgecnn.composition import recipe_from_flags
    from edgecnn.devices.profile import load_device

    recipe = recipe_from_flags(_flags(values))
    load_device(values["target"])  # a misspelt target is said now, not after the loading
    if values["dry_run"]:
        click.echo(_plan(values, recipe) + recipe.to_toml(), nl=False)
        return
    from edgecnn.cli.progress import TerminalProgress
    from edgecnn.compress import CompressResult
    from edgecnn.compress import compress as run

    try:
        with TerminalProgress() as progress:
            result = run(
                values["model"],
                recipe=recipe,
                data=values["data"],
                out=values["out"],
                options=_options(values, recipe),
                progress=progress,
            )
    except BudgetError as error:
        if isinstance(error.result, CompressResult):
            _print(error.result.report, values["as_json"])
        raise
    except (EdgeCNNError, KeyboardInterrupt) as error:
        again = hasattr(error, "good_step")  # a loss that became NaN: to go on would end at the same step
        if not again and "--resume" not in (getattr(error, "hint", None) or ""):
            _say_resumable(values["out"])
        raise
    _print(result.report, values["as_json"])


def _flags(values: Mapping[str, Any]) -> RecipeFlags:
    """Return what the command line says about the recipe."""
    from edgecnn.composition import RecipeFlags

    return RecipeFlags(
        recipe=values["recipe"],
        int8=values["int8"],
        qat=values["qat"],
        fp16=values["fp16"],
        int16x8=values["int16x8"],
        prune=values["prune"],
        prune_macs=values["prune_macs"],
        prune_params=values["prune_params"],
        prune_to_mb=values["prune_to_mb"],
        importance=values["importance"],
        distill=values["distill"],
        epochs=values["epochs"],
        learning_rate=values["learning_rate"],
        batch_size=values["batch_size"],
        num_samples=values["num_samples"],
        seed=values["seed"],
        has_images=(values["data"] or values["train_data"]) is not None,
        has_teacher=values["teacher"] is not None,
    )


def _options(values: Mapping[str, Any], recipe: Recipe) -> CompressOptions:
    """Return the options of the run."""
    from edgecnn.options import CompressOptions

    return CompressOptions(
        load=make_load_options(values, recipe.seed),
        formats=_formats(values),
        io=values["io"],
        target=values["target"],
        max_drop=values["max_drop"],
        max_latency_ms=values["max_latency_ms"],
        max_size_mb=values["max_size_mb"],
        must_be_faster=values["must_be_faster"],
        search=not values["no_search"],
        seed=recipe.seed,
        force=values["force"],
        threads=values["threads"],
        train_data=values["train_data"],
        teacher=values["teacher"],
        teacher_arch=values["teacher_arch"],
        resume=values["resume"],
    )


def _say_resumable(out: Path) -> None:
    """Say that what was trained so far is kept, if it is."""
    from edgecnn.resume import FOLDER

    if (out / FOLDER).is_dir():
        click.echo(f"kept: {out / FOLDER}, to go on from with --resume, or to drop with --force", err=True)


def _print(report: Report, as_json: bool) -> None:
    """Print a report as JSON or as a table."""
    if as_json:
        click.echo(report.to_json(), nl=False)
        return
    from edgecnn.report.terminal import print_report

    print_report(report)


def _formats(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the formats asked for, each once, in a fixed order."""
    return tuple(name for name in FORMATS if name in values["formats"] or not values["formats"])


def _plan(values: Mapping[str, Any], recipe: Recipe) -> str:
    """Say in TOML comments what would be done, so that the whole output is a recipe again."""
    from edgecnn.pipeline import Need

    made_up = "images made up from the network's own statistics (accuracy unmeasured)"
    source = values["data"] or values["train_data"] or made_up
    num_samples = max((getattr(step, "num_samples", None) or 0 for step in recipe.passes), default=0)
    files = ", ".join(str(values["out"] / f"model.{name}") for name in _formats(values))
    trained = any(step.needs & {Need.TRAIN, Need.TRAIN_IMAGES} for step in recipe.passes)
    taught = any(Need.TEACHER in step.needs for step in recipe.passes)
    steps = [f"load         {values['model']}"]
    if trained:
        own = values["train_data"] or f"{source}, less the images held out"
        steps.append(f"train on     {own}")
    if taught:
        steps.append(f"learn from   {values['teacher'] or 'the network as it was given'}")
    if num_samples:
        steps.append(f"calibrate on {source}, at most {num_samples} images")
    steps += [
        f"run          {', '.join(step.name for step in recipe.passes)}",
        f"write        {files}, {values['out'] / 'model.pt2'}, {values['out'] / 'report.json'}",
        f"for          {values['target']}, input and output {values['io']}",
        f"prove        parity, agreement with float, latency here on {values['threads']} thread(s)",
    ]
    return (
        "".join(f"# {line}\n" for line in ["edgecnn compress would", *(f"  {step}" for step in steps)]) + "\n"
    )
