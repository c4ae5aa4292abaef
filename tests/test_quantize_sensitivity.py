"""Which layer int8 hurts: the one made to be hurt, and what leaving it in float brings."""

from __future__ import annotations

import json

import nets
import numpy as np
import pytest
import torch
from torch import nn

from edgecnn.errors import PassError
from edgecnn.export.parity import sqnr_db
from edgecnn.model import Model
from edgecnn.pipeline import SilentProgress
from edgecnn.quantize.sensitivity import LayerNoise, find_units, judge, layer_sensitivity, pareto
from edgecnn.quantize.static import QuantizeStatic


def spoiled() -> tuple[Model, Model]:
    """Return float and int8 of three layers, the second of which has inputs a thousand times apart."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Flatten()
    ).eval()
    with torch.no_grad():
        net[2].weight[:, 0] *= 1000.0
        net[0].weight[0] /= 1000.0
        net[0].bias[0] /= 1000.0
    model = nets.as_model(net)
    return model, QuantizeStatic().run(model, nets.context())


def test_the_layers_at_fault_come_first() -> None:
    """A channel of the first drowns in the scale of the others; so do weights of the second."""
    model, quantized = spoiled()
    found = layer_sensitivity(model, quantized, nets.held_out(16), SilentProgress())
    assert {found[0].name, found[1].name} == {"relu", "relu_1"}
    assert {entry.name for entry in found} == {"input_1", "relu", "relu_1", "conv2d_2"}
    assert found[1].sqnr_db < found[2].sqnr_db - 10.0
    by_name = {entry.name: entry for entry in found}
    assert (by_name["relu"].macs, by_name["relu"].weights) == (4 * 3 * 9 * 100, 4 * 3 * 9)
    assert (by_name["input_1"].macs, by_name["input_1"].weights) == (0, 0)
    json.dumps([entry.to_dict() for entry in found])


def test_float_where_it_pays_most() -> None:
    model, quantized = spoiled()
    x = nets.held_out(16)
    found = layer_sensitivity(model, quantized, x, SilentProgress())
    points = pareto(model, quantized, x, found, SilentProgress())
    assert points[0]["float_layers"] == []
    assert [point["sqnr_db"] for point in points] == sorted(point["sqnr_db"] for point in points)
    assert [point["float_macs"] for point in points] == sorted(point["float_macs"] for point in points)
    assert points[-1]["sqnr_db"] == 200.0, "everything in float is the float network"
    assert points[-1]["float_macs_share"] == 1.0
    json.dumps(points)


@pytest.mark.parametrize("name", ["residual", "inception", "se_conv", "splits", "multi_output", "transposed"])
def test_all_layers_together_are_the_quantized_network(name: str) -> None:
    float_model, quantized = nets.folded(name), nets.quantized(name)
    x = nets.held_out(16)
    units = find_units(quantized.graph)
    entries = [LayerNoise(unit.source.name, "", 0.0, None, 1, 0) for unit in units]
    point = pareto(float_model, quantized, x, entries, SilentProgress())[0]
    expected = nets.outputs_of(float_model.graph, x)[0]
    whole = sqnr_db(expected, nets.outputs_of(quantized.graph, x)[0])
    assert point["sqnr_db"] == pytest.approx(whole, abs=0.5)


def test_images_agree_or_not() -> None:
    """One of two images changes its class; 10 log10(13 / 5) dB."""
    a = np.array([[3.0, 0.0], [0.0, 2.0]], np.float32)
    b = np.array([[3.0, 0.0], [1.0, 0.0]], np.float32)
    assert judge(a, b) == (pytest.approx(10 * np.log10(13 / 5)), 0.5)
    assert judge(a, a) == (200.0, 1.0)
    assert judge(a[:, :, None], a[:, :, None]) == (200.0, None)


def test_a_float_graph_is_refused() -> None:
    model = nets.folded("residual")
    with pytest.raises(PassError, match=r"the graph is not quantized.*run quantize_static first"):
        layer_sensitivity(model, model, nets.held_out(4), SilentProgress())
