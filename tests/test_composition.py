"""Flags become one recipe, in the one order that makes sense, or an error that names the flag."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch", reason="recipes import their passes")

from edgecnn.composition import RecipeFlags, recipe_from_flags
from edgecnn.errors import RecipeError
from edgecnn.pipeline import parameters
from edgecnn.recipe import Recipe

INT8 = ["fold_batch_norm", "decompose_activations", "averages_to_convolutions", "quantize_static"]
QAT = [*INT8[:-1], "quantize_aware_training"]
IMAGES = RecipeFlags(has_images=True)


def names(recipe: Recipe) -> list[str]:
    return [step.name for step in recipe.passes]


def test_nothing_said_is_static_int8() -> None:
    assert recipe_from_flags(RecipeFlags()) == recipe_from_flags(RecipeFlags(int8=True))
    assert recipe_from_flags(RecipeFlags()) == Recipe.load("static_wi8_ai8")


@pytest.mark.parametrize(
    ("flags", "name", "passes"),
    [
        ({"prune": 0.5, "int8": True}, "prune50_wi8_ai8", ["prune_channels", "fine_tune", *INT8]),
        (
            {"prune": 0.5, "distill": True, "int8": True},
            "prune50_distill_wi8_ai8",
            ["prune_channels", "distill", *INT8],
        ),
        ({"prune": 0.5}, "prune50", ["prune_channels", "fine_tune", "fold_batch_norm"]),
        ({"prune": 0.125, "epochs": 0}, "prune12p5_untrained", ["prune_channels", "fold_batch_norm"]),
        ({"prune": 0.3, "has_images": False}, "prune30_untrained", ["prune_channels", "fold_batch_norm"]),
        ({"prune_macs": 0.5}, "prune_macs50", ["prune_channels", "fine_tune", "fold_batch_norm"]),
        ({"prune_to_mb": 0.5}, "prune_to0p5mb", ["prune_channels", "fine_tune", "fold_batch_norm"]),
        ({"fp16": True}, "fp16", ["fold_batch_norm", "store_weights"]),
        (
            {"prune": 0.5, "fp16": True},
            "prune50_fp16",
            ["prune_channels", "fine_tune", "fold_batch_norm", "store_weights"],
        ),
        ({"int16x8": True}, "static_wi8_ai16", [*INT8, "widen_activations"]),
        (
            {"prune": 0.5, "int16x8": True},
            "prune50_wi8_ai16",
            ["prune_channels", "fine_tune", *INT8, "widen_activations"],
        ),
        ({"int8": True, "qat": True}, "qat_wi8_ai8", QAT),
        (
            {"prune": 0.5, "distill": True, "int8": True, "qat": True},
            "prune50_distill_qat_wi8_ai8",
            ["prune_channels", "distill", *QAT],
        ),
        ({"distill": True, "has_teacher": True}, "distill", ["distill", "fold_batch_norm"]),
    ],
)
def test_parts_in_their_order(flags: dict[str, Any], name: str, passes: list[str]) -> None:
    recipe = recipe_from_flags(replace(IMAGES, **flags))
    assert (recipe.name, names(recipe)) == (name, passes)
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize("name", ["prune50", "prune50_wi8_ai8", "prune50_distill_wi8_ai8"])
def test_a_shipped_recipe_is_what_the_flags_of_its_name_give(name: str) -> None:
    flags = replace(IMAGES, prune=0.5, distill="distill" in name, int8="wi8" in name)
    assert recipe_from_flags(flags) == Recipe.load(name)


def test_the_flags_say_what_goes_and_the_pass_what_is_left() -> None:
    kept = [
        parameters(recipe_from_flags(replace(IMAGES, **{flag: 0.3})).passes[0])
        for flag in ("prune", "prune_macs", "prune_params", "prune_to_mb")
    ]
    found = [tuple(step[name] for name in ("ratio", "macs_left", "params_left", "size_mb")) for step in kept]
    assert found == [
        (0.3, None, None, None), (None, 0.7, None, None), (None, None, 0.7, None), (None, None, None, 0.3),
    ]  # fmt: skip


def test_training_flags_reach_the_pass_that_trains_and_no_other() -> None:
    flags = replace(IMAGES, prune=0.5, epochs=1.5, learning_rate=0.1, batch_size=32, seed=4)
    recipe = recipe_from_flags(flags)
    pruned, tuned, _ = (parameters(step) for step in recipe.passes)
    assert (tuned["epochs"], tuned["learning_rate"], tuned["batch_size"]) == (1.5, 0.1, 32)
    assert pruned["learning_rate"] != 0.1
    assert recipe.seed == 4


def test_the_rate_of_the_training_before_it_is_not_that_of_qat() -> None:
    alone = replace(IMAGES, int8=True, qat=True, epochs=0.5, learning_rate=0.1)
    first, second = (recipe_from_flags(flags).passes for flags in (alone, replace(alone, prune=0.5)))
    assert (parameters(first[-1])["epochs"], parameters(first[-1])["learning_rate"]) == (0.5, 0.1)
    assert parameters(second[1])["learning_rate"] == 0.1
    assert (parameters(second[-1])["epochs"], parameters(second[-1])["learning_rate"] < 0.01) == (0.5, True)


def test_a_named_recipe_can_be_changed_too() -> None:
    flags = RecipeFlags(recipe="prune50_wi8_ai8", epochs=2.0, importance="l1", num_samples=32)
    steps = [parameters(step) for step in recipe_from_flags(flags).passes]
    assert (steps[0]["importance"], steps[1]["epochs"], steps[-1]["num_samples"]) == ("l1", 2.0, 32)
    assert names(recipe_from_flags(replace(flags, epochs=0))) == ["prune_channels", *INT8]


@pytest.mark.parametrize(
    ("flags", "importance", "allocation"),
    [
        (RecipeFlags(prune=0.5), "l2", "uniform"),
        (RecipeFlags(prune=0.5, importance="random"), "random", "uniform"),
        (replace(IMAGES, prune=0.5, importance="l1"), "l1", "uniform"),
        (replace(IMAGES, prune=0.5), "taylor", None),
        (replace(IMAGES, prune=0.5, importance="obd"), "obd", None),
    ],
)
def test_weights_alone_do_not_compare_groups(
    flags: RecipeFlags, importance: str, allocation: str | None
) -> None:
    step = parameters(recipe_from_flags(flags).passes[0])
    assert step["importance"] == importance
    assert (step["allocation"] == "uniform") is (allocation == "uniform")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prune": 1.0}, "--prune is 1, expected a fraction between 0 and 1, both excluded"),
        ({"prune": 0.0}, "--prune is 0, expected"),
        ({"prune": 1.5}, "--prune is 1.5, expected"),
        ({"prune_macs": -0.5}, "--prune-macs is -0.5, expected"),
        ({"prune": float("nan")}, "--prune is nan, expected"),
        ({"prune": 0.5, "prune_params": 0.5}, "--prune and --prune-params are both given"),
        ({"prune_macs": 0.5, "prune_to_mb": 1.0}, "--prune-macs and --prune-to-mb are both given"),
        ({"prune_to_mb": 0.0}, "--prune-to-mb is 0, expected megabytes, a number above 0"),
        ({"prune_to_mb": float("inf")}, "--prune-to-mb is inf, expected megabytes"),
        ({"recipe": "static_wi8_ai8", "prune": 0.5}, "--prune and --recipe static_wi8_ai8 are both given"),
        ({"recipe": "static_wi8_ai8", "fp16": True}, "--fp16 and --recipe static_wi8_ai8 are both given"),
        ({"int8": True, "fp16": True}, "--int8 and --fp16 are both given"),
        ({"int8": True, "int16x8": True}, "--int8 and --int16x8 are both given"),
        ({"recipe": "fp16", "int16x8": True}, "--int16x8 and --recipe fp16 are both given"),
        ({"qat": True, "int16x8": True}, "--qat without --int8"),
        ({"distill": True}, "the network would learn from itself"),
        ({"distill": True, "prune": 0.5, "epochs": 0}, "--distill trains, and --epochs is 0"),
        ({"prune": 0.5, "epochs": 2, "has_images": False}, "--epochs is 2, and there are no images"),
        ({"int8": True, "epochs": 2}, "--epochs is 2, but no pass of the recipe static_wi8_ai8 trains"),
        ({"learning_rate": 0.1}, "--lr is 0.1, but no pass"),
        ({"qat": True}, "--qat without --int8"),
        ({"qat": True, "fp16": True}, "--qat without --int8"),
        ({"qat": True, "int8": True, "epochs": 0}, "--qat trains, and --epochs is 0"),
        ({"qat": True, "int8": True, "has_images": False}, "--qat trains, and there are no images to train"),
        ({"recipe": "qat_wi8_ai8", "qat": True}, "--qat and --recipe qat_wi8_ai8 are both given"),
        ({"recipe": "qat_wi8_ai8", "epochs": 0}, "--epochs is 0, and the recipe qat_wi8_ai8 quantizes by"),
        ({"importance": "l1"}, "--importance is l1, but no pass of the recipe static_wi8_ai8 prunes"),
        ({"prune": 0.5, "importance": "tailor"}, "importance is 'tailor', expected one of 'l1'"),
        ({"prune": 0.5, "epochs": float("inf")}, "--epochs is inf, expected a finite number"),
        ({"prune": 0.5, "epochs": -1}, "--epochs is -1, expected a finite number, 0 or more"),
        ({"prune": 0.5, "learning_rate": 0.0}, "learning_rate is 0.0, expected a number above 0"),
    ],
)
def test_flags_that_do_not_go_together(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as found:
        recipe_from_flags(replace(IMAGES, **flags))
    assert message in found.value.message
