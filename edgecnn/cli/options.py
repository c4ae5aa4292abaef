"""Options that several commands share, and how their texts become values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

if TYPE_CHECKING:
    from edgecnn.load import LoadOptions

Command = TypeVar("Command", bound=Callable[..., Any])

POSITIVE = click.FloatRange(min=0, min_open=True)
SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
"""Of the units of a duration."""


class ValuesCommand(click.Command):
    """A command whose function takes all its values as one mapping, so that twenty options stay readable."""

    def invoke(self, ctx: click.Context) -> Any:
        """Call the function with the values by name."""
        return None if self.callback is None else ctx.invoke(self.callback, ctx.params)


class TextType(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """A value that is given as text; a default is taken as it is.

    Attributes:
        expected: what is said of a text that is none, after the text itself.
    """

    expected: ClassVar[str]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value, or end the command with what was expected."""
        if not isinstance(value, str):
            return value
        found = self.read(value)
        if found is None:
            self.fail(f"{value!r} {self.expected}", param, ctx)
        return found

    def read(self, text: str) -> Any:
        """Return the value of a text, or None if it is none."""
        raise NotImplementedError


class ShapeType(TextType):
    """Text such as "3x224x224" as (channels, height, width)."""

    name = "CxHxW"
    expected = "is not a shape, expected CxHxW such as 3x224x224"

    def read(self, text: str) -> tuple[int, ...] | None:
        """Return three positive integers."""
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            return None
        return tuple(int(part) for part in parts)


class NumbersType(TextType):
    """Text such as "0.485,0.456,0.406" as one number per channel."""

    name = "M,M,M"
    expected = "is not a list of numbers, expected one per channel such as 0.485,0.456,0.406"

    def read(self, text: str) -> tuple[float, ...] | None:
        """Return one or more numbers."""
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            return None
        return numbers if all(map(math.isfinite, numbers)) else None


class ThreadsType(TextType):
    """Text such as "1,2,4" as numbers of threads."""

    name = "N,N"
    expected = "is no list of threads, expected whole numbers such as 1,2,4"

    def read(self, text: str) -> tuple[int, ...] | None:
        """Return one or more whole numbers, each once."""
        parts = [part.strip() for part in text.split(",")]
        if not all(re.fullmatch(r"[1-9][0-9]{0,3}", part) for part in parts) or len(set(parts)) < len(parts):
            return None
        return tuple(int(part) for part in parts)


class DurationType(TextType):
    """Text such as "90", "90s", "10m" or "1h" as seconds."""

    name = "TIME"
    expected = "is no duration, expected something like 90s or 10m"

    def read(self, text: str) -> float | None:
        """Return seconds above 0."""
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smh]?)", text.strip())
        return None if found is None else float(found[1]) * SECONDS[found[2]] or None


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


def recipe_options(command: Command) -> Command:
    """Add the options that put a recipe together, or change one: what is pruned, and how it is trained."""
    options = [
        click.option(
            "--int8",
            is_flag=True,
            help="Static int8, the recipe static_wi8_ai8; also what is done without a word.",
        ),
        click.option(
            "--qat", is_flag=True, help="With --int8: train with its rounding; labels are not needed."
        ),
        click.option(
            "--fp16", is_flag=True, help="Weights in float16, computed in float: half the size, not faster."
        ),
        click.option(
            "--int16x8",
            is_flag=True,
            help="int8 weights, int16 activations (static_wi8_ai16): for accelerators, slow on CPUs.",
        ),
        click.option("--prune", type=float, metavar="RATIO", help="Remove this fraction of the channels."),
        click.option(
            "--prune-macs", type=float, metavar="FRACTION", help="Remove this fraction of the MACs."
        ),
        click.option(
            "--prune-params", type=float, metavar="FRACTION", help="Remove this fraction of the parameters."
        ),
        click.option(
            "--prune-to-mb",
            type=float,
            metavar="MB",
            help="Remove what it takes to bring the larger file down to about this size.",
        ),
        click.option(
            "--importance",
            metavar="NAME",
            help="What a channel is worth: taylor, l1, l2, bn_scale, fpgm, lamp, obd, activation, random.  "
            "[default: taylor; l2 without images]",
        ),
        click.option(
            "--distill", is_flag=True, help="Train against a teacher's answers; labels are not needed."
        ),
        click.option("--teacher", metavar="MODEL", help="To learn from.  [default: MODEL before pruning]"),
        click.option("--teacher-arch", metavar="SPEC", help="Network of a teacher that is a state dict."),
        click.option(
            "--epochs",
            type=float,
            metavar="N",
            help="Epochs of training; 0 for none.  [default: the pass's]",
        ),
        click.option("--lr", "learning_rate", type=float, help="Peak learning rate.  [default: the pass's]"),
        click.option("--batch-size", type=int, help="Images per training step.  [default: the pass's]"),
        click.option(
            "--recipe",
            metavar="NAME|FILE",
            help="Another recipe, instead of parts; `edgecnn recipes list` names those there are.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command
