"""A recipe put together from what the command line says, in the one order that makes sense.

    prune_channels -> fine_tune or distill -> fold_batch_norm -> ... -> quantize_static, or training with it

The quantizing end is that of a shipped recipe (static_wi8_ai8, qat_wi8_ai8, fp16, static_wi8_ai16), so that
there is one int8.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from edgecnn.errors import RecipeError
from edgecnn.pipeline import Need, Pass
from edgecnn.recipe import Recipe, load_pass

FP16_RECIPE = "fp16"
INT16X8_RECIPE = "static_wi8_ai16"
INT16X8_SUFFIX = "wi8_ai16"
INT8_RECIPE = "static_wi8_ai8"
INT8_SUFFIX = "wi8_ai8"
QAT_RECIPE = "qat_wi8_ai8"
QAT = "quantize_aware_training"

DATA_FREE_IMPORTANCE = "l2"
"""What a channel is worth where there are no images to ask."""

DATA_FREE_DISTILLATION = {"epochs": 40.0, "batch_size": 48, "learning_rate": 0.005}
"""Distillation on made-up images: they are few, and large steps lead away from what real ones need."""

LOSS_BASED = ("taylor", "obd")
"""Importances that are changes of one loss, which groups can be compared by; by others all lose alike."""


@dataclass(frozen=True)
class RecipeFlags:
    """What a recipe is put together from, or what changes a named one.

    Attributes:
        recipe: name or file of a recipe, instead of parts.
        int8: quantize; without any other part that is what is done anyway.
        qat: train with the rounding of int8.
        fp16: store the weights in float16 and compute in float.
        int16x8: quantize to int8 weights and int16 activations.
        prune: fraction of the channels to remove, 0 < prune < 1.
        prune_macs: fraction of the MACs to remove.
        prune_params: fraction of the parameters to remove.
        prune_to_mb: size of the larger file to come down to, 1 MB = 1,000,000 bytes.
        importance: what a channel is worth, by name.
        distill: learn from a teacher instead of from labels.
        epochs: of training; 0 leaves it out; None leaves it to the pass.
        learning_rate, batch_size: of training.
        num_samples: calibration images at most, of every pass that takes some.
        seed: of everything random.
        has_images: whether there is anything to train on.
        has_teacher: whether a teacher other than the network itself was named.
    """

    recipe: str | None = None
    int8: bool = False
    qat: bool = False
    fp16: bool = False
    int16x8: bool = False
    prune: float | None = None
    prune_macs: float | None = None
    prune_params: float | None = None
    prune_to_mb: float | None = None
    importance: str | None = None
    distill: bool = False
    epochs: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    num_samples: int | None = None
    seed: int | None = None
    has_images: bool = False
    has_teacher: bool = False

    @property
    def prunes(self) -> bool:
        """Whether channels are to be removed."""
        return self._target is not None

    @property
    def _target(self) -> tuple[str, float] | None:
        """Return what is to be removed and how much of it."""
        for name, value in self._targets():
            if value is not None:
                return name, value
        return None

    def _targets(self) -> tuple[tuple[str, float | None], ...]:
        """Return each target's name in the pass's parameters, and the fraction to remove, or the size."""
        return (
            ("ratio", self.prune),
            ("macs_left", self.prune_macs),
            ("params_left", self.prune_params),
            ("size_mb", self.prune_to_mb),
        )

    def check(self) -> None:
        """Check that the flags go together.

        Raises:
            RecipeError: naming the flag, what was found and what was expected.
        """
        targets = list(zip(PRUNING_FLAGS, self._targets(), strict=True))
        given = [flag for flag, (_, value) in targets if value is not None]
        if len(given) > 1:
            raise RecipeError(f"{' and '.join(given)} are both given, expected one of them")
        for flag, (name, value) in targets:
            if value is None:
                continue
            if name == "size_mb" and not (math.isfinite(value) and value > 0):
                raise RecipeError(f"{flag} is {value:g}, expected megabytes, a number above 0")
            if name != "size_mb" and not 0 < value < 1:
                raise RecipeError(
                    f"{flag} is {value:g}, expected a fraction between 0 and 1, both excluded",
                    hint="0.5 removes half; 1 would leave nothing",
                )
        names = (*FORMAT_FLAGS, "qat", "distill")
        parts = [*given, *(f"--{name}" for name in names if getattr(self, name))]
        formats = [f"--{name}" for name in FORMAT_FLAGS if getattr(self, name)]
        if len(formats) > 1:
            raise RecipeError(
                f"{formats[0]} and {formats[1]} are both given, expected one of them",
                hint="--int8 is the smallest and fastest, --fp16 hardly changes an answer, --int16x8 is for "
                "accelerators",
            )
        if self.recipe is not None and parts:
            part = parts[0]
            raise RecipeError(
                f"{part} and --recipe {self.recipe} are both given, expected one of them",
                hint="a recipe says all passes; `edgecnn recipes show NAME` prints one to change",
            )
        if self.epochs is not None and not (math.isfinite(self.epochs) and self.epochs >= 0):
            raise RecipeError(f"--epochs is {self.epochs:g}, expected a finite number, 0 or more")
        if self.recipe is None:
            self._check_parts()

    def _check_parts(self) -> None:
        if self.qat:
            self._check_qat()
        if self.distill and self.epochs == 0:
            raise RecipeError("--distill trains, and --epochs is 0", hint="leave one of the two out")
        if self.distill and not (self.prunes or self.has_teacher):
            raise RecipeError(
                "--distill without --prune or --teacher: the network would learn from itself",
                hint="name another network with --teacher, or prune it first with --prune 0.5",
            )
        if self.prunes and self.epochs and not (self.has_images or self.distill):
            raise RecipeError(
                f"--epochs is {self.epochs:g}, and there are no images to train on",
                hint="give labelled ones with --data or --train-data, or leave --epochs out",
            )

    def _check_qat(self) -> None:
        if not self.int8:
            raise RecipeError("--qat without --int8: it trains with the rounding of int8", hint="add --int8")
        if self.epochs == 0:
            raise RecipeError("--qat trains, and --epochs is 0", hint="leave one of the two out")
        if not self.has_images:
            raise RecipeError(
                "--qat trains, and there are no images to train on",
                hint="give some with --data or --train-data; they need no labels",
            )


FORMAT_FLAGS = ("int8", "fp16", "int16x8")
"""Types that weights and activations can get, one of them."""

PRUNING_FLAGS = ("--prune", "--prune-macs", "--prune-params", "--prune-to-mb")

TRAINING_FLAGS = {"epochs": "--epochs", "learning_rate": "--lr", "batch_size": "--batch-size"}


def recipe_from_flags(flags: RecipeFlags) -> Recipe:
    """Return the recipe that flags ask for, checked.

    Args:
        flags: none at all give static int8.

    Raises:
        RecipeError: if they do not go together, are out of range, or change what the recipe does not have.

    Example:
        >>> recipe = recipe_from_flags(RecipeFlags(int8=True))
        >>> recipe.name, recipe.passes[-1].name
        ('static_wi8_ai8', 'quantize_static')
    """
    flags.check()
    if flags.recipe is not None:
        recipe = Recipe.load(flags.recipe)
    elif not (flags.prunes or flags.distill):
        recipe = Recipe.load(_format_recipe(flags))
    else:
        recipe = _compose(flags)
    recipe = dataclasses.replace(recipe, passes=tuple(_changed(recipe, flags)))
    if flags.seed is not None:
        recipe = dataclasses.replace(recipe, seed=flags.seed)
    recipe.check()
    return recipe


def _compose(flags: RecipeFlags) -> Recipe:
    """Put the passes together from parts."""
    passes: list[Pass] = []
    names: list[str] = []
    if flags._target is not None:
        target, value = flags._target
        passes.append(_prune(flags, target, value))
        what = {"ratio": f"{100 * value:g}", "size_mb": f"_to{value:g}mb"}.get(
            target, f"_{target.removesuffix('_left')}{100 * value:g}"
        )
        names.append(f"prune{what}".replace(".", "p"))
    if flags.distill:
        distill: Any = load_pass("distill")
        passes.append(distill(**({} if flags.has_images else DATA_FREE_DISTILLATION)))
        names.append("distill")
    elif flags.has_images and flags.epochs != 0:
        passes.append(load_pass("fine_tune")())
    else:
        names.append("untrained")
    if flags.int8:
        passes += Recipe.load(_int8_recipe(flags)).passes
        names.append(QAT_RECIPE if flags.qat else INT8_SUFFIX)
    elif flags.fp16 or flags.int16x8:
        passes += Recipe.load(_format_recipe(flags)).passes
        names.append(FP16_RECIPE if flags.fp16 else INT16X8_SUFFIX)
    else:
        passes.append(load_pass("fold_batch_norm")())
    return Recipe("_".join(names), tuple(passes))


def _int8_recipe(flags: RecipeFlags) -> str:
    return QAT_RECIPE if flags.qat else INT8_RECIPE


def _format_recipe(flags: RecipeFlags) -> str:
    if flags.fp16:
        return FP16_RECIPE
    return INT16X8_RECIPE if flags.int16x8 else _int8_recipe(flags)


def _prune(flags: RecipeFlags, target: str, value: float) -> Pass:
    """Return the pass that removes channels; it counts MACs and parameters by what is left."""
    kind: Any = load_pass("prune_channels")
    values: dict[str, Any] = {target: value if target in ("ratio", "size_mb") else round(1 - value, 6)}
    importance = flags.importance or (None if flags.has_images else DATA_FREE_IMPORTANCE)
    if importance is not None:
        values["importance"] = importance
    if importance not in (None, *LOSS_BASED):
        values["allocation"] = "uniform"
    pruned: Pass = kind(**values)
    return pruned


def _changed(recipe: Recipe, flags: RecipeFlags) -> list[Pass]:
    """Return the passes with the parameters that flags set.

    Raises:
        RecipeError: if a flag changes what no pass has.
    """
    training = {name: getattr(flags, name) for name in TRAINING_FLAGS if getattr(flags, name) is not None}
    if training.get("epochs") == 0:
        del training["epochs"]
    trainers = [step for step in recipe.passes if step.needs & {Need.TRAIN, Need.TRAIN_IMAGES}]
    if training and not trainers:
        name = next(iter(training))
        raise RecipeError(
            f"{TRAINING_FLAGS[name]} is {training[name]:g}, but no pass of the recipe {recipe.name} trains",
            hint="add --prune or --distill, with images to train on, or leave it out",
        )
    if flags.importance and not any(_takes(step, "importance") for step in recipe.passes):
        raise RecipeError(
            f"--importance is {flags.importance}, but no pass of the recipe {recipe.name} prunes",
            hint="add --prune 0.5, or leave it out",
        )
    found = []
    for step in recipe.passes:
        if flags.epochs == 0 and step.name == QAT:
            raise RecipeError(
                f"--epochs is 0, and the recipe {recipe.name} quantizes by training",
                hint=f"use the recipe {INT8_RECIPE}, which does not train",
            )
        if flags.epochs == 0 and step in trainers and not _takes(step, "importance"):
            continue
        changes = dict(training) if step in trainers else {}
        if step.name == QAT and len(trainers) > 1:  # its rate is far below that of the training before it
            changes.pop("learning_rate", None)
        for name in ("importance", "num_samples"):
            if getattr(flags, name) is not None and _takes(step, name):
                changes[name] = getattr(flags, name)
        found.append(dataclasses.replace(step, **changes) if changes else step)  # type: ignore[type-var]
    return found


def _takes(step: Pass, name: str) -> bool:
    """Return whether a pass has a parameter."""
    return any(parameter.name == name for parameter in dataclasses.fields(step))  # type: ignore[arg-type]
