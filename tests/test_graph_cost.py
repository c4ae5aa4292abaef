"""Parameters and multiply-accumulates, against numbers worked out by hand."""

from __future__ import annotations

import nets
import torch.nn.functional as F
from torch import nn

from edgecnn.graph.build import build_program
from edgecnn.graph.cost import layer_costs
from edgecnn.model import Model


def totals(model: Model) -> tuple[int, int]:
    costs = layer_costs(build_program(model))
    return sum(c.params for c in costs), sum(c.macs for c in costs)


def test_lenet5() -> None:
    """LeCun et al. 1998 with dense connections: 61,706 parameters, 416,520 MACs on 32x32."""
    net = nn.Sequential(
        nn.Conv2d(1, 6, 5),  # 156 parameters, 28 * 28 * 6 * 25 = 117,600
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),  # 2,416 parameters, 10 * 10 * 16 * 150 = 240,000
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),  # 48,120 and 48,000
        nn.ReLU(),
        nn.Linear(120, 84),  # 10,164 and 10,080
        nn.ReLU(),
        nn.Linear(84, 10),  # 850 and 840
    )
    model = nets.as_model(net, (1, 32, 32))
    costs = [c for c in layer_costs(build_program(model)) if c.macs]
    assert [c.macs for c in costs] == [117_600, 240_000, 48_000, 10_080, 840]
    assert [c.params for c in costs] == [156, 2_416, 48_120, 10_164, 850]
    assert totals(model) == (61_706, 416_520)
    assert costs[0].layer == "0 (aten.conv2d.default)"
    assert costs[0].output_shape == (-1, 6, 28, 28)


def test_groups_divide_the_work() -> None:
    """3 to 6 to 12 channels, the second in 3 groups, kernel 3, 8x8 outputs: 12 * 64 * 2 * 9."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 12, 3, groups=3, bias=False))
    cost = layer_costs(build_program(nets.as_model(net)))[1]
    assert (cost.params, cost.macs) == (12 * 2 * 9, 12 * 64 * 2 * 9)


def test_transposed_convolution_works_per_input_pixel() -> None:
    """Each of 3 * 9 * 9 inputs meets 6 / 3 * 2 * 2 weights."""
    model = nets.as_model(nn.ConvTranspose2d(3, 6, 2, 2, groups=3), (3, 9, 9))
    assert totals(model) == (3 * 2 * 4 + 6, 3 * 81 * 8)


def test_numbers_are_no_parameters() -> None:
    net = nets.Net({"scale": nets.Scale(3)}, lambda net, x: F.relu(net.scale(x) * 2.0 + 1.0))
    assert totals(nets.as_model(net)) == (6, 0)


def test_int8_costs_what_float_costs() -> None:
    float_costs = {
        c.layer: (c.params, c.macs) for c in layer_costs(build_program(nets.folded("depthwise"))) if c.macs
    }
    int8_costs = {
        c.layer: (c.params, c.macs) for c in layer_costs(nets.quantized_program("depthwise")) if c.macs
    }
    assert int8_costs == float_costs
