"""The graph of a Model: functional, eval mode, any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from edgecnn.errors import LoadError
from edgecnn.load import LoadOptions, load_model


class Lambda(nn.Module):
    """A function of this module and 4 channels, made of the 3 of an image."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(4, 4, 1)
        self.register_buffer("table", torch.arange(4.0).reshape(1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, torch.cat([x, x[:, :1]], 1))


def relu_then_reuse(net: Lambda, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    z = y * 2
    y.relu_()
    return z + y


def view_taken_before(net: Lambda, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    flat = y.flatten(1)
    y.add_(1.0)
    return flat * 2


def base_read_after_view_changed(net: Lambda, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    y[:, :2].mul_(3.0)
    return y


def slice_assigned(net: Lambda, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    y[:, 1] = 0.5
    y[:, :, 2:4, 0] = y[:, :, 0:2, 1]
    return y


def chain(net: Lambda, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    y += x
    nn.functional.hardtanh(y, -1.0, 1.0, inplace=True).mul_(2.0)
    a, b = y.chunk(2, dim=1)
    return torch.cat([nn.functional.silu(a, inplace=True), b], 1)


def input_changed(net: Lambda, x: torch.Tensor) -> torch.Tensor:
    x.mul_(2.0)
    return net.conv(x) + x


def branches(net: Lambda, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    first = torch.nn.functional.relu(y, inplace=True)
    second = torch.nn.functional.leaky_relu(y, 0.1, inplace=True)
    return first + second + y


IN_PLACE = [
    relu_then_reuse,
    view_taken_before,
    base_read_after_view_changed,
    slice_assigned,
    chain,
    input_changed,
    branches,
]


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda f: f.__name__)
def test_in_place_becomes_functional(function: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    net = Lambda(function).eval()
    model = load_model(net, _options())
    for node in model.graph.graph.nodes:
        assert not getattr(getattr(node.target, "_schema", None), "is_mutable", False), node.format_node()
    for batch in (1, 3):
        x = torch.randn(batch, 3, 6, 6)
        kept = x.clone()
        with torch.no_grad():
            found, expected = model.graph(x), net(x.clone())
        torch.testing.assert_close(found, expected)
        assert torch.equal(x, kept), "a graph does not change its input"


def _options() -> LoadOptions:
    return LoadOptions(input_shape=(3, 6, 6))


def test_own_buffer_changed_is_refused() -> None:
    def counting(net: Lambda, x: torch.Tensor) -> torch.Tensor:
        net.table.add_(1.0)
        return net.conv(x) + net.table

    with pytest.raises(LoadError, match=r"in-place operation without a functional form.*add_.*table"):
        load_model(Lambda(counting), _options())


def test_dropout_and_copies_are_dropped() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Dropout2d(0.5), nn.Flatten(), nn.Dropout(0.5, inplace=True))
    names = _op_names(load_model(net, _options()))
    assert names == ["conv2d", "flatten"]

    def copies(net: Lambda, x: torch.Tensor) -> torch.Tensor:
        y = net.conv(x).permute(0, 2, 3, 1).contiguous().clone().detach()
        return y.view(y.shape[0], -1).to(torch.float32)

    net = Lambda(copies)
    model = load_model(net, _options())
    assert not {"contiguous", "clone", "detach", "to"} & set(_op_names(model))
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(model.graph(x), net(x).detach())


def _op_names(model: Any) -> list[str]:
    return [
        n.target._schema.name[6:]
        for n in model.graph.graph.nodes
        if isinstance(n.target, torch._ops.OpOverload)
    ]


def test_layers_stay_whole() -> None:
    body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = load_model(net, _options())
    assert _op_names(model) == [
        "conv2d",
        "batch_norm",
        "hardtanh",
        "adaptive_avg_pool2d",
        "flatten",
        "linear",
    ]
    flags = [n.args[5] for n in model.graph.graph.nodes if "batch_norm" in str(n.target)]
    assert flags == [False]


def test_program_exported_in_training_mode_becomes_eval() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
    net.train()(torch.randn(8, 3, 6, 6) * 3)
    batch = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(net.train(), (torch.randn(2, 3, 6, 6),), dynamic_shapes=({0: batch},))
    model = load_model(program)
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(model.graph(x), net.eval()(x).detach())


def test_batch_norm_without_statistics_keeps_its_flag() -> None:
    """Weight standardisation is written as batch_norm of the weight in training mode."""

    def standardised(net: Lambda, x: torch.Tensor) -> torch.Tensor:
        flat = net.conv.weight.reshape(1, 4, -1)
        weight = nn.functional.batch_norm(flat, None, None, training=True).reshape(4, 4, 1, 1)
        return nn.functional.conv2d(x, weight)

    net = Lambda(standardised)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(load_model(net, _options()).graph(x), net(x).detach())


def test_tied_weights_are_one_parameter() -> None:
    def twice(net: Lambda, x: torch.Tensor) -> torch.Tensor:
        return net.other(net.conv(x))

    net = Lambda(twice)
    net.other = nn.Conv2d(4, 4, 1)
    net.other.weight = net.conv.weight
    model = load_model(net, _options())
    names = [n.target for n in model.graph.graph.nodes if n.op == "get_attr"]
    assert sorted(names) == ["conv.bias", "other.bias", "other.weight"]
    assert sum(p.numel() for p in model.graph.parameters()) == 16 + 4 + 4


def test_literal_batch_of_one_is_made_dynamic() -> None:
    def literal(net: Lambda, x: torch.Tensor) -> torch.Tensor:
        return net.conv(x).view(1, 4 * 36)

    model = load_model(Lambda(literal), _options())
    assert (model.fixed_batch, model.warnings) == (None, ())
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(model.graph(x)[1:2], model.graph(x[1:2]))


def test_static_program_is_made_dynamic() -> None:
    def literal(net: Lambda, x: torch.Tensor) -> torch.Tensor:
        return net.conv(x).view(2, 2, 2, 36).mean(2)

    net = Lambda(literal).eval()
    model = load_model(torch.export.export(net, (torch.randn(2, 3, 6, 6),)))
    assert (model.fixed_batch, model.spec.outputs[0].shape) == (None, (None, 2, 36))
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(model.graph(x), net(x).detach())
    assert model.graph(torch.randn(5, 3, 6, 6)).shape == (5, 2, 36)


def test_batch_that_cannot_be_dynamic_is_fixed_and_said() -> None:
    def mixes_rows(net: Lambda, x: torch.Tensor) -> torch.Tensor:
        return net.conv(x).reshape(4, 36).softmax(0).reshape(1, 144)

    model = load_model(Lambda(mixes_rows), _options())
    assert model.fixed_batch == 1
    assert "the network accepts a batch of 1 only" in model.warnings[0]
    assert model.graph(torch.randn(1, 3, 6, 6)).shape == (1, 144)


def test_open_image_size_asks_for_the_shape() -> None:
    dims = {i: torch.export.Dim(name, min=4, max=64) for i, name in ((2, "h"), (3, "w"))}
    net = nn.Conv2d(3, 2, 1)
    program = torch.export.export(
        net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("n"), **dims},)
    )
    with pytest.raises(LoadError, match=r"images of any size \(3x\?x\?\).*--input-shape"):
        load_model(program)
    assert load_model(program, LoadOptions(input_shape=(3, 5, 7))).spec.outputs[0].shape == (None, 2, 5, 7)


class TwoInputs(nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + right


def test_several_inputs_are_refused() -> None:
    with pytest.raises(
        LoadError, match=r"TwoInputs.forward takes 2 inputs \(left, right\), expected one image"
    ):
        load_model(TwoInputs(), _options())
    example = torch.zeros(2, 3, 6, 6)
    with pytest.raises(LoadError, match=r"takes 2 inputs \(left, right\), expected one"):
        load_model(torch.export.export(TwoInputs(), (example, example)))
    with pytest.raises(
        LoadError, match=r"input 'input' is torch.float32 \(2, 3\), expected a float32 image batch"
    ):
        load_model(torch.export.export(nn.Linear(3, 2), (torch.zeros(2, 3),)))


def test_wrong_input_shape_gives_the_networks_own_words() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(
        LoadError, match=r"does not run or export with input 3x8x8 .*reduction dim.*--input-shape"
    ):
        load_model(net, LoadOptions(input_shape=(3, 8, 8)))
    with pytest.raises(LoadError, match=r"size of the input image is not known.*--input-shape 3xHxW"):
        load_model(net)
    with pytest.raises(LoadError, match=r"input shape is .*, expected channels x height x width"):
        load_model(net, LoadOptions(input_shape=(3, 8)))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        net[0].weight[0, 0] = value
        net[1].running_var[2] = value
    with pytest.raises(LoadError, match=r"weights are not finite: 0\.weight \(.* of 12\), 1\.running_var"):
        load_model(net, _options())


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        "torchvision:densenet121", "torchvision:googlenet", "torchvision:shufflenet_v2_x1_0",
        "torchvision:deeplabv3_mobilenet_v3_large", "timm:efficientnet_b0", "timm:ghostnet_100",
    ],
)  # fmt: skip
def test_families(spec: str) -> None:
    pytest.importorskip(spec.split(":")[0])
    model = load_model(spec)
    assert model.fixed_batch is None
    x = torch.randn(3, *(size or 1 for size in model.spec.inputs[0].shape[1:]))
    with torch.no_grad():
        together = torch.utils._pytree.tree_leaves(model.graph(x))
        alone = torch.utils._pytree.tree_leaves(model.graph(x[1:2]))
    for rows, row in zip(together, alone, strict=True):
        torch.testing.assert_close(rows[1:2], row, rtol=1e-3, atol=1e-4)
