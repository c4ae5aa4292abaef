"""Scales of a network with other layers in float, from the ranges that the int8 one carries."""

from __future__ import annotations

import mixing
import nets
import pytest
import torch
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (registers torch.ops.quantized_decomposed)

from edgecnn.graph.nodes import copy_graph
from edgecnn.model import Model
from edgecnn.quantize.constants import fold_constants
from edgecnn.quantize.float_layers import layer_names, match_layers
from edgecnn.quantize.islands import plan_islands
from edgecnn.quantize.slot_parameters import kept_ranges, mixed_parameters

qd = torch.ops.quantized_decomposed


def held(model: Model) -> dict[str, tuple[float, int]]:
    """Return (scale, zero_point) of what a quantized graph holds."""
    nodes = [n for n in model.graph.graph.nodes if n.target is qd.quantize_per_tensor.default]
    return {n.args[0].name: n.args[1:3] for n in nodes if "dequantize" not in n.args[0].name}


@pytest.mark.parametrize("name", ["inception", "mlp", "splits", "hard_swish", "se_conv", "leaky_relu"])
def test_they_are_those_that_calibration_chooses(name: str) -> None:
    model, ranges = nets.folded(name), kept_ranges(copy_graph(nets.quantized(name).graph))
    assert ranges is not None
    graph, names = fold_constants(copy_graph(model.graph)), layer_names(model)
    for layers in (names[:1], names[1::2], names[-2:]):
        plan = plan_islands(graph, match_layers(graph, [n.replace("[", "[[]") for n in layers]))
        found, expected = mixed_parameters(graph, plan, ranges), held(mixing.leave(model, *layers))
        assert {key: found[key] for key in expected} == expected


def test_a_float_graph_carries_none() -> None:
    assert kept_ranges(nets.folded("residual").graph) is None
