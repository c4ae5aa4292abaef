"""Shapes read off a graph, and networks that move the batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.program import BATCH
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model, copy_graph


def model_of(function: Callable[[Any, Tensor], Any]) -> Model:
    return nets.as_model(nets.Net({"stem": nn.Conv2d(3, 4, 3)}, function).eval())


def test_shapes_of_every_value() -> None:
    model = model_of(lambda net, x: torch.cat(net.stem(x).chunk(2, 1), 1).flatten(1))
    shapes = infer_shapes(model)
    by_target = {str(n.target): shapes[n.name] for n in model.graph.graph.nodes if n.name in shapes}
    assert by_target["aten.conv2d.default"] == (BATCH, 4, 10, 10)
    assert [(BATCH, 2, 10, 10)] * 2 in shapes.values(), "chunk gives a list"
    assert by_target["aten.cat.default"] == (BATCH, 4, 10, 10)
    assert (BATCH, 400) in shapes.values()
    assert (4, 3, 3, 3) in shapes.values(), "a weight has no batch"


def test_a_weight_as_long_as_the_batch_stays_a_weight() -> None:
    """Batches of 2 and 3 are tried; a weight with 2 or 3 channels is not mistaken for one."""
    model = nets.as_model(nn.Conv2d(3, 2, 3))
    assert (2, 3, 3, 3) in infer_shapes(model).values()


def test_fixed_batch_is_the_batch() -> None:
    model = replace(model_of(lambda net, x: net.stem(x)), fixed_batch=5)
    assert (BATCH, 4, 10, 10) in infer_shapes(model).values()


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net.stem(x).flatten(0, 1),
        lambda net, x: net.stem(x).permute(1, 0, 2, 3),
        lambda net, x: net.stem(x).reshape(-1, 100),
        lambda net, x: torch.cat([x, x], 0),
    ],
    ids=["flatten", "permute", "reshape", "concat"],
)
def test_batch_elsewhere_is_refused_with_a_hint(function: Callable[[Any, Tensor], Any]) -> None:
    with pytest.raises(UnsupportedOpError, match=r"aten\..*expected the batch.*view\(x\.shape\[0\]"):
        infer_shapes(model_of(function))


def test_an_operator_that_cannot_run_is_named() -> None:
    model = model_of(lambda net, x: net.stem(x).flatten(1))
    broken = replace(
        model, spec=replace(model.spec, inputs=(replace(model.spec.inputs[0], shape=(None, 5, 12, 12)),))
    )
    with pytest.raises(
        UnsupportedOpError, match=r"stem \(aten\.conv2d\.default\) cannot be traced for shapes"
    ):
        infer_shapes(broken)


def test_copying_a_graph_is_quiet_and_leaves_the_users_filters_alone() -> None:
    model = model_of(lambda net, x: net.stem(x).relu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        edited = copy_graph(model.graph)
        infer_shapes(model)
        assert warnings.filters == before
        with pytest.raises(FutureWarning, match="of somebody else"):
            warnings.warn("of somebody else", FutureWarning, stacklevel=1)
    assert edited is not model.graph
    edited.stem.weight.data.zero_()
    assert model.graph.stem.weight.abs().sum() > 0
