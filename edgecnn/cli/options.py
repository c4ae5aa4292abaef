"""Options that several commands share, and how their texts become values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from edgecnn.load import LoadOptions

Command = TypeVar("Command", bound=Callable[..., Any])


class ValuesCommand(click.Command):
    """A command whose function takes all its values as one mapping, so that twenty options stay readable."""

    def invoke(self, ctx: click.Context) -> Any:
        """Call the function with the values by name."""
        return None if self.callback is None else ctx.invoke(self.callback, ctx.params)


class ShapeType(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """Text such as "3x224x224" as (channels, height, width)."""

    name = "CxHxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return three positive integers."""
        if isinstance(value, tuple):
            return value
        parts = str(value).lower().split("x")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a shape, expected CxHxW such as 3x224x224", param, ctx)
        return tuple(int(part) for part in parts)


class NumbersType(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """Text such as "0.485,0.456,0.406" as one number per channel."""

    name = "M,M,M"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return one or more numbers."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(map(math.isfinite, numbers)):
            message = (
                f"{value!r} is not a list of numbers, expected one per channel such as 0.485,0.456,0.406"
            )
            self.fail(message, param, ctx)
        return numbers


def load_options(command: Command) -> Command:
    """Add the options that say how a model is loaded."""
    options = [
        click.option(
            "--arch",
            metavar="SPEC",
            help="Network of a state dict: torchvision:NAME, timm:NAME or package.module:factory.",
        ),
        click.option("--weights", metavar="FILE", help="State dict for a MODEL that is an architecture."),
        click.option("--input-shape", type=ShapeType(), help="One image, channels first, such as 3x224x224."),
        click.option(
            "--preprocess", metavar="NAME|FILE", help="imagenet, unit, symmetric, raw, or a TOML file."
        ),
        click.option("--mean", type=NumbersType(), help="Per channel, subtracted after scaling to 0..1."),
        click.option("--std", type=NumbersType(), help="Per channel, divided by after subtracting."),
        click.option(
            "--channel-order", type=click.Choice(["rgb", "bgr"]), help="Order the network was trained with."
        ),
        click.option(
            "--trust", is_flag=True, help="Let a pickled model run its code. Only for files you made."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def make_load_options(values: Mapping[str, Any], seed: int = 0) -> LoadOptions:
    """Build LoadOptions from the values of a command that has `load_options`."""
    from edgecnn.load import LoadOptions

    return LoadOptions(
        arch=values["arch"],
        weights=values["weights"],
        input_shape=values["input_shape"],
        preprocess=values["preprocess"],
        mean=values["mean"],
        std=values["std"],
        channel_order=values["channel_order"],
        trust=values["trust"],
        seed=seed,
    )
