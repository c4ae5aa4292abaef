"""What every pass keeps to, over all of `edgecnn.recipe.PASSES`.

A pass leaves its input as it was, gives the same bytes for the same seed, survives TOML, names its source,
keeps what it promises, and runs on every tiny net that it accepts.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import nets
import numpy as np
import pytest
import torch

from edgecnn.errors import PassError
from edgecnn.graph.build import build_program
from edgecnn.model import Model
from edgecnn.pipeline import Need, Pass, PassContext, parameters, run_passes
from edgecnn.quantize.reference import run_program
from edgecnn.recipe import PASSES, Recipe, load_pass

SOURCE = re.compile(r"^\s*Source: .*(arXiv:\d{4}\.\d{4,5}|\(\d{4}\)|\b(19|20)\d\d\b)", re.MULTILINE)

KEEPS_THE_FUNCTION = {"fold_batch_norm", "decompose_activations", "averages_to_convolutions"}
"""Passes whose outputs are the same up to float rounding."""


TRAINS = ("fine_tune", "distill", "quantize_aware_training")
TRAINED_NETS = list(nets.NETS)[::5]
"""Training takes seconds, so every fifth net stands for all."""


class LabelledImages(nets.Images):
    """The nets' images with labels drawn from so many classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nets.images(64, 1))
        self.labels = np.random.default_rng(0).integers(0, num_classes, 64)


def make(name: str) -> Pass:
    return load_pass(name)()


def brief(name: str) -> Pass:
    """Return the pass with as little training as shows that it trains."""
    step = make(name)
    if name in TRAINS:
        changed: Any = dataclasses.replace(step, epochs=1.0, batch_size=32)  # type: ignore[type-var]
        return changed  # type: ignore[no-any-return]
    return step


def context_for(name: str, net: str, model: Model) -> PassContext:
    """Return what the pass needs: for training also labelled images and a teacher."""
    if name not in TRAINS:
        return nets.context()
    if net not in TRAINED_NETS:
        pytest.skip(f"{name} is tried on {', '.join(TRAINED_NETS)}")
    if model.spec.task != "classification":
        pytest.skip(f"{name}: labels of images say nothing about {net}")
    images = LabelledImages(model.spec.outputs[0].shape[1] or 1)
    return dataclasses.replace(
        nets.context(),
        train=images,
        train_indices=tuple(range(48)),
        validation_indices=tuple(range(48, 64)),
        teacher=nets.model(net),
    )


def accepted(step: Pass, net: str) -> Model:
    """Return the net as the pass takes it: exported, prepared for quantization, or in int8."""
    for form in (nets.model, nets.folded, nets.quantized):
        model = form(net)
        try:
            step.requires(model)
        except PassError:
            continue
        return model
    pytest.skip(f"{step.name} takes {net} in no form")


def state(model: Model) -> tuple[str, dict[str, bytes], Any]:
    """Return everything that a pass might have changed."""
    tensors = {k: v.detach().contiguous().numpy().tobytes() for k, v in model.graph.state_dict().items()}
    described = [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in model.graph.graph.nodes]
    return (
        model.graph.code,
        tensors,
        (described, model.spec, model.history, model.warnings, model.fixed_batch),
    )


@pytest.mark.parametrize("name", PASSES)
def test_declaration(name: str) -> None:
    kind = load_pass(name)
    assert kind.name == name
    assert isinstance(kind.needs, frozenset)
    assert all(isinstance(need, Need) for need in kind.needs)
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__init__" not in vars(kind) or "dataclass" in inspect.getsource(inspect.getmodule(kind) or kind)
    assert make(name) == make(name), "parameters and nothing else"
    assert set(vars(make(name))) == {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PASSES)
def test_source_is_named(name: str) -> None:
    assert SOURCE.search(load_pass(name).__doc__ or ""), f"{name}: no Source line with a paper and its year"


@pytest.mark.parametrize("name", PASSES)
def test_parameters_are_documented_and_survive_toml(name: str) -> None:
    step = make(name)
    documentation = load_pass(name).__doc__ or ""
    for parameter in parameters(step):
        assert f"{parameter}:" in documentation
    recipe = Recipe("round_trip", (step,), seed=7)
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize("net", nets.NETS)
@pytest.mark.parametrize("name", PASSES)
def test_runs_changes_nothing_given_and_repeats_itself(name: str, net: str) -> None:
    step = brief(name)
    model = accepted(step, net)
    before = state(model)
    given = context_for(name, net, model)
    first, second = (step.run(model, given) for _ in range(2))
    step.ensures(model, first)
    assert state(model) == before
    assert state(first) == state(second)
    assert first.graph is not model.graph
    shared = {t.data_ptr() for t in model.graph.state_dict().values()}
    with torch.no_grad():
        for tensor in first.graph.state_dict().values():
            if tensor.is_floating_point() and tensor.data_ptr() not in shared:
                tensor.add_(1)
    assert state(model) == before
    program = build_program(second)
    x = nets.held_out(2)
    found = run_program(program, {program.inputs[0]: x})
    assert [o.name for o in second.spec.outputs] == [public for public, _ in program.outputs]
    if name in KEEPS_THE_FUNCTION:
        expected = nets.outputs_of(model.graph, x)
        for (public, _), values in zip(program.outputs, expected, strict=True):
            np.testing.assert_allclose(found[public], values, rtol=1e-4, atol=1e-5)


def test_the_shipped_recipe_runs_and_records_every_pass() -> None:
    recipe = Recipe.load("static_wi8_ai8")
    model = nets.model("hard_swish")
    after = run_passes(model, recipe.passes, nets.context(), lambda m: {"nodes": len(m.graph.graph.nodes)})
    assert [record.name for record in after.history] == [step.name for step in recipe.passes]
    assert [record.parameters for record in after.history] == [
        {name: list(v) if isinstance(v, tuple) else v for name, v in parameters(step).items()}
        for step in recipe.passes
    ]
    for earlier, later in zip(after.history, after.history[1:], strict=False):
        assert earlier.after == later.before
    assert model.history == ()
