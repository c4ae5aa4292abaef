"""Which values are held in int8 and which of them share parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.build import build_program
from edgecnn.graph.build_ops import HANDLERS
from edgecnn.graph.program import Program, QuantParams
from edgecnn.model import Model
from edgecnn.quantize.annotate import Slots, assign_slots, spec_of
from edgecnn.quantize.scheme import CLAMPS, POOL_TO_MEAN, SCHEME, Holds
from edgecnn.quantize.static import QuantizeStatic

Function = Callable[[Any, Tensor], Any]


def net(function: Function, **layers: nn.Module) -> Model:
    torch.manual_seed(0)
    return nets.as_model(nets.Net({"stem": nn.Conv2d(3, 4, 3), **layers}, function).eval())


def slots_of(model: Model) -> Slots:
    return assign_slots(model.graph)


def int8(model: Model, observer: str = "mse") -> Program:
    return build_program(QuantizeStatic(observer).run(nets.prepare(model), nets.context()))


def quant(program: Program, kind: str, index: int = 0) -> QuantParams:
    found = [op for op in program.ops if op.kind == kind][index]
    parameters = program.tensors[found.output].quant
    assert parameters is not None
    return parameters


def names(nodes: list[Any]) -> list[str]:
    return [str(n.target).split(".")[1] if n.op == "call_function" else n.op for n in nodes]


def test_the_scheme_is_consistent() -> None:
    for target, spec in SCHEME.items():
        assert (spec.fixed is not None) == (spec.holds is Holds.FIXED), target
        assert spec.weight_axis is None or spec.holds is Holds.OWN
    assert all(SCHEME[clamp].holds is Holds.SHARED for clamp in CLAMPS)
    assert POOL_TO_MEAN not in SCHEME
    assert set(SCHEME) <= set(HANDLERS), "what is quantized can be exported"


def test_a_fused_clamp_is_held_in_place_of_its_convolution() -> None:
    slots = slots_of(net(lambda net, x: F.relu(net.stem(x))))
    assert names(slots.held) == ["placeholder", "relu"]
    assert slots.sources == slots.held


def test_a_clamp_beside_another_reader_shares() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x)
        return F.relu(y) * y

    slots = slots_of(net(forward))
    assert names(slots.held) == ["placeholder", "conv2d", "relu", "mul"]
    assert names(slots.sources) == ["placeholder", "conv2d", "mul"]
    assert slots.root(slots.held[1]) is slots.root(slots.held[2])


def test_moving_values_share_one_slot() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        a, b = net.stem(x).chunk(2, 1)
        return torch.cat([F.max_pool2d(b, 2), F.avg_pool2d(a, 2)], 1).flatten(1)

    slots = slots_of(net(forward))
    roots = {slots.root(node) for node in slots.held[1:]}
    assert len(roots) == 1
    assert names(slots.sources) == ["placeholder", "conv2d"]


def test_global_pool_has_its_own_parameters_and_a_window_shares() -> None:
    model = net(lambda net, x: (F.adaptive_avg_pool2d(net.stem(x), 1), F.adaptive_avg_pool2d(net.stem(x), 5)))
    specs = [spec_of(n) for n in model.graph.graph.nodes if n.target is POOL_TO_MEAN]
    assert [spec.holds for spec in specs if spec] == [Holds.OWN, Holds.SHARED]


def test_prescribed_parameters() -> None:
    program = int8(net(lambda net, x: torch.sigmoid(net.stem(x)) * torch.tanh(net.stem(x))))
    assert (float(quant(program, "sigmoid").scale), quant(program, "sigmoid").zero_point) == (1 / 256, -128)
    assert (float(quant(program, "tanh").scale), quant(program, "tanh").zero_point) == (1 / 128, 0)


@pytest.mark.parametrize("sigmoid_first", [True, False])
def test_a_sigmoid_does_not_clip_what_it_is_concatenated_with(sigmoid_first: bool) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x)
        parts = [torch.sigmoid(y), 0.8 * y]
        return torch.cat(parts if sigmoid_first else parts[::-1], 1)

    model = net(forward)
    program = int8(model, "min_max")  # which itself clips nothing
    concat = quant(program, "concat")
    assert float(concat.scale) > 1 / 128
    assert [op.kind for op in program.ops].count("requantize") == 1
    x = nets.images(64, 1)
    assert float(concat.scale) * (127 - concat.zero_point) >= 0.95 * nets.outputs_of(model.graph, x)[0].max()


def test_sigmoids_alone_keep_their_parameters_through_a_concat() -> None:
    program = int8(
        net(lambda net, x: torch.cat([torch.sigmoid(net.stem(x)), torch.sigmoid(x[:, :, 1:-1, 1:-1])], 1))
    )
    assert float(quant(program, "concat").scale) == 1 / 256
    assert "requantize" not in {op.kind for op in program.ops}


def test_sigmoid_and_tanh_concatenated_cover_both() -> None:
    program = int8(net(lambda net, x: torch.cat([torch.sigmoid(net.stem(x)), torch.tanh(net.stem(x))], 1)))
    concat = quant(program, "concat")
    assert float(concat.scale) * (-128 - concat.zero_point) < -0.5
    assert [op.kind for op in program.ops].count("requantize") == 2


def test_padding_with_a_number_is_covered() -> None:
    model = net(
        lambda net, x: net.last(F.pad(torch.relu(net.stem(x)), (1, 1), value=-30.0)), last=nn.Conv2d(4, 2, 1)
    )
    pad = quant(int8(model), "pad")
    assert float(pad.scale) * (-128 - pad.zero_point) < -25.0


def test_expanded_gate() -> None:
    """expand_as only spells out what a multiplication broadcasts."""
    program = int8(
        net(lambda net, x: net.stem(x) * torch.sigmoid(net.stem(x).mean((2, 3), True)).expand(-1, 4, 10, 10))
    )
    assert [op.kind for op in program.ops][-3:] == ["sigmoid", "mul", "dequantize"]


def test_expand_before_something_else_is_made_of_copies() -> None:
    model = net(
        lambda net, x: torch.cat([net.stem(x).mean((2, 3), True).expand(-1, 4, 10, 10), net.stem(x)], 1)
    )
    for build in (build_program, int8):
        copies = [op for op in build(model).ops if op.kind == "concat"]
        assert [len(op.inputs) for op in copies] == [10, 10, 2]


def test_unknown_operator_is_named() -> None:
    model = nets.as_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()))
    with pytest.raises(
        UnsupportedOpError, match=r"^1 \(aten\.gelu\.default\) is not in the int8 scheme.*inspect MODEL"
    ):
        assign_slots(model.graph)


def test_weight_computed_from_the_input_is_refused() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x)
        return F.conv2d(y, net.other.weight * y.mean((0, 1, 2, 3), keepdim=True))

    model = net(forward, other=nn.Conv2d(4, 2, 1))
    with pytest.raises(UnsupportedOpError, match=r"aten\.(conv2d|mean)"):
        int8(model)


def test_numbers_are_held_exactly() -> None:
    """x * 0.3 - 2: each number is 127 or -127 steps of its own."""
    program = int8(net(lambda net, x: net.stem(x) * 0.3 + -2.0))
    held = [t for t in program.constants() if t.shape == ()]
    values = sorted(float(t.quant.dequantize(t.data)) for t in held if t.quant)
    np.testing.assert_allclose(values, [-2.0, 0.3], rtol=1e-6)
    assert sorted(int(t.data) for t in held if t.data is not None) == [-127, 127]


def test_grouped_transposed_convolution_has_one_scale_for_all_groups() -> None:
    program = nets.quantized_program("transposed")
    op = next(op for op in program.ops if op.kind == "conv_transpose2d")
    scales = program.tensors[op.inputs[1]].quant.scale
    assert scales.shape == (3,)
    assert len(set(scales.tolist())) == 1
    assert program.tensors[op.inputs[2]].shape == (6,)


def test_grouped_transposed_convolution_with_a_huge_bias_is_widened() -> None:
    layer = nn.ConvTranspose2d(3, 6, 2, groups=3)
    with torch.no_grad():
        layer.weight.mul_(1e-9)
        layer.bias[:] = torch.arange(6) * 100.0
    program = int8(nets.as_model(layer.eval()))
    bias = next(t for t in program.constants() if t.dtype == "int32")
    assert np.abs(bias.data).max() <= 2**30 + 1
    np.testing.assert_allclose(bias.quant.dequantize(bias.data), np.arange(6) * 100.0, rtol=1e-5)
