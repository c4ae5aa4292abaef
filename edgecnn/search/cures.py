"""Other parameters for the quantizing end of a recipe, and the words for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from edgecnn.making import Plan
from edgecnn.pipeline import Pass
from edgecnn.quantize.observers import OBSERVERS
from edgecnn.recipe import load_pass

QUANTIZER = "quantize_static"
TRAINER = "quantize_aware_training"
_SHARED = (
    *("observer", "weight_observer", "weight_bits", "num_samples"),
    *("float_layers", "split_concats", "unsupported"),
)
"""Parameters that the two passes have in common: of the same values they leave the same operators."""

FIRST_OBSERVERS = ("mse", "percentile", "min_max", "entropy")
"""Those worth trying first; a moving average is for streams of images, which calibration is not."""

IMAGES_TO_TIME = 16
"""Calibration images of files that are only timed."""

Cure = tuple[str, Plan]


def quantizer_of(plan: Plan) -> Any:
    """Return the pass that quantizes activations, with training or without; None where there is none."""
    return next((step for step in plan.passes if step.name in (QUANTIZER, TRAINER)), None)


def is_static(plan: Plan) -> bool:
    """Whether activations are quantized without training."""
    return any(step.name == QUANTIZER for step in plan.passes)


def _quantized_by(plan: Plan, name: str) -> Plan:
    """Return the plan with the other pass that quantizes, of the same parameters."""
    now, kind = quantizer_of(plan), cast(Any, load_pass(name))
    step = kind(**{parameter: getattr(now, parameter) for parameter in _SHARED})
    return replace(plan, passes=tuple(step if old is now else old for old in plan.passes))


def with_quantizer(plan: Plan, changes: Mapping[str, Any]) -> Plan:
    """Return the plan with other parameters of the pass that quantizes."""
    return replace(plan, passes=tuple(_changed(step, changes) for step in plan.passes))


def _changed(step: Pass, changes: Mapping[str, Any]) -> Pass:
    return replace(step, **changes) if step.name in (QUANTIZER, TRAINER) else step  # type: ignore[type-var]


def observers(plan: Plan) -> list[Cure]:
    """Return the plan with every other way to choose ranges."""
    now = quantizer_of(plan)
    names = [name for name in FIRST_OBSERVERS if name in OBSERVERS and name != now.observer]
    found = [(f"observer {name}", with_quantizer(plan, {"observer": name})) for name in names]
    other = "mse" if now.weight_observer == "min_max" else "min_max"
    return [*found, (f"weight observer {other}", with_quantizer(plan, {"weight_observer": other}))]


def equalization(plan: Plan) -> list[Cure]:
    """Return the plan with ranges balanced between layers, where it does not do that yet."""
    names = [step.name for step in plan.passes]
    if "equalize" in names or "fold_batch_norm" not in names:
        return []
    place = names.index("fold_batch_norm") + 1
    passes = (*plan.passes[:place], load_pass("equalize")(), *plan.passes[place:])
    return [("cross-layer equalization", replace(plan, passes=passes))]


def bias_corrections(plan: Plan) -> list[Cure]:
    """Return the plan with biases corrected layer by layer in the quantized network."""
    if quantizer_of(plan).bias_method == "in_order":
        return []
    return [
        (
            "bias correction in order",
            with_quantizer(plan, {"bias_correction": True, "bias_method": "in_order"}),
        )
    ]


def roundings(plan: Plan) -> list[Cure]:
    """Return the plan with learned rounding of the weights."""
    if quantizer_of(plan).rounding != "nearest":
        return []
    return [
        ("AdaRound", with_quantizer(plan, {"rounding": "adaround"})),
        ("BRECQ", with_quantizer(plan, {"rounding": "brecq"})),
    ]


def training(plan: Plan) -> list[Cure]:
    """Return the plan with quantization-aware training in place of static quantization."""
    layers = quantizer_of(plan).float_layers
    words = "quantization-aware training" + (f", {in_words(layers)}" if layers else "")
    return [(words, _quantized_by(plan, TRAINER))]


def wide_activations(plan: Plan) -> list[Cure]:
    """Return the plan with int16 activations, calibrated as the recipe static_wi8_ai16 does."""
    names = [step.name for step in plan.passes]
    if not is_static(plan) or "widen_activations" in names:
        return []
    wide = with_quantizer(plan, {"observer": "min_max", "weight_bits": 8})
    place = names.index(QUANTIZER) + 1
    passes = (*wide.passes[:place], load_pass("widen_activations")(), *wide.passes[place:])
    return [("int16 activations", replace(wide, passes=passes))]


def with_float_layers(plan: Plan, layers: Sequence[str]) -> Plan:
    """Return the plan with more layers left in float."""
    before = quantizer_of(plan).float_layers
    return with_quantizer(plan, {"float_layers": tuple(dict.fromkeys((*before, *layers)))})


def to_be_timed(plan: Plan) -> Plan:
    """Return a plan whose files take as long as the plan's, sooner made: other integers, the same operators.

    Ranges come from a few images, weights are rounded to the nearest integer, nothing is trained.
    """
    if quantizer_of(plan) is None:
        return plan
    plan = plan if is_static(plan) else _quantized_by(plan, QUANTIZER)
    now = quantizer_of(plan)
    few = {"num_samples": min(now.num_samples, IMAGES_TO_TIME)}
    return with_quantizer(plan, {**few, "rounding": "nearest", "bias_method": "mean_input"})


def in_words(layers: Sequence[str]) -> str:
    """Say which layers are left in float.

    Example:
        >>> in_words(["stem (aten.conv2d)", "head (aten.linear)", "a", "b"])
        '4 layers in float: stem, head, a ...'
    """
    named = ", ".join(layer.split(" (")[0] for layer in layers[:3])
    count = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    return f"{count} in float: {named}{' ...' if len(layers) > 3 else ''}"
