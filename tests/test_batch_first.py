"""Networks that hold the batch elsewhere than in dimension 0, and values that no image changes."""

from __future__ import annotations

from typing import Any

import nets
import numpy as np
import pytest
import torch
from mixing import check_files
from torch import Tensor, nn

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.batch_first import put_batch_first
from edgecnn.graph.build import build_program
from edgecnn.graph.forms import Form, plain_form, reshape_form, settle
from edgecnn.graph.inference_form import to_inference_form
from edgecnn.graph.shapes import infer_shapes
from edgecnn.quantize.static import QuantizeStatic


def windows(x: Tensor, size: int) -> Tensor:
    """(n, c, h, w) -> (n * windows, size * size, c), as Swin does."""
    n, c, h, w = x.shape
    x = x.view(n, c, h // size, size, w // size, size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, size * size, c)


def joined(t: Tensor, shape: Any, size: int) -> Tensor:
    """The way back."""
    n, c, h, w = shape
    t = t.view(n, h // size, w // size, size, size, c)
    return t.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def window_attention(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    t = windows(torch.roll(x, (-2, -2), (2, 3)), 5)
    q, k, v = net.qkv(t).reshape(-1, 25, 3, 2, 4).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) + net.table
    blocked = scores.view(-1, 4, 2, 25, 25) + net.mask.unsqueeze(1).unsqueeze(0)
    y = (blocked.view(-1, 2, 25, 25).softmax(-1) @ v).transpose(1, 2).reshape(t.shape)
    return joined(net.norm(y + t), x.shape, 5)


def tokens_first(net: Any, x: Tensor) -> Tensor:
    """`nn.MultiheadAttention` on (tokens, n, channels)."""
    t = net.stem(x).flatten(2).permute(2, 0, 1)
    return net.out((t + net.attention(t, t, t, need_weights=False)[0]).mean(0))


def class_token(net: Any, x: Tensor) -> Tensor:
    t = net.stem(x).flatten(2).transpose(1, 2)
    t = torch.cat([net.token.expand(x.shape[0], -1, -1), t], 1) + net.table
    return net.out(net.attention(t, t, t, need_weights=False)[0][:, 0])


def convolved_windows(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    n, c, h, w = x.shape
    t = x.view(n, c, 2, 5, 2, 5).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 5, 5)
    t = torch.relu(net.norm(net.inner(t)))
    return t.view(n, 2, 2, c, 5, 5).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def made_of_size(net: Any, x: Tensor) -> Tensor:
    """Positions computed from the shape alone, the same for every image."""
    x = net.stem(x)
    ones = torch.ones(x.shape[0], 10, 10)
    rows = ones.cumsum(1) / 10.0
    return x + torch.stack([rows, x.new_zeros(x.shape[0], 10, 10)], 1).repeat(1, 4, 1, 1)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "window attention": (
        window_attention,
        {
            "qkv": nn.Linear(8, 24),
            "table": parameter(2, 25, 25),
            "mask": parameter(4, 25, 25),
            "norm": nn.LayerNorm(8),
        },
    ),
    "tokens first": (tokens_first, {"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 3)}),
    "class token": (
        class_token,
        {
            "attention": nn.MultiheadAttention(8, 2, batch_first=True),
            "token": parameter(1, 1, 8),
            "table": parameter(1, 101, 8),
            "out": nn.Linear(8, 3),
        },
    ),
    "convolved windows": (
        convolved_windows,
        {"inner": nn.Conv2d(8, 8, 3, padding=1), "norm": nn.BatchNorm2d(8)},
    ),
    "made of size": (made_of_size, {}),
}


class WithParameters(nets.Net):
    """A network with parameters beside its layers."""

    def __init__(self, layers: dict[str, Any], function: Any) -> None:
        super().__init__({k: v for k, v in layers.items() if isinstance(v, nn.Module)}, function)
        for name, value in layers.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)


def loaded(name: str) -> tuple[nn.Module, Any]:
    function, layers = CASES[name]
    torch.manual_seed(0)
    net = WithParameters({"stem": nn.Conv2d(3, 8, 3), **layers}, function).eval()
    return net, nets.as_model(net)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_values(name: str, batch: int) -> None:
    net, model = loaded(name)
    rewritten = to_inference_form(model)
    x = nets.held_out(batch)
    expected = nets.outputs_of(net, x)[0]
    np.testing.assert_allclose(nets.outputs_of(rewritten.graph, x)[0], expected, atol=1e-5)
    assert all(
        shape[0] == -1
        for node in rewritten.graph.graph.nodes
        if node.op == "call_function" and isinstance(shape := infer_shapes(rewritten).get(node.name), tuple)
    )


@pytest.mark.parametrize("name", CASES)
def test_both_files_in_int8(name: str) -> None:
    model = nets.prepare(loaded(name)[1])
    step = QuantizeStatic(observer="min_max", bias_correction=False, weight_bits=nets.STEP.weight_bits)
    check_files(build_program(step.run(model, nets.context(16))), nets.held_out(3))


def test_what_needs_nothing_is_returned_as_it_is() -> None:
    model = nets.model("residual")
    assert put_batch_first(model) is model
    assert to_inference_form(model) is model


def test_permutes_and_reshapes_of_windows_cost_little() -> None:
    """Two permutes and the reshapes around them, there and back; heads are only named."""
    model = to_inference_form(loaded("window attention")[1])
    targets = [str(n.target) for n in model.graph.graph.nodes if n.op == "call_function"]
    assert targets.count("aten.permute.default") <= 6
    assert not any("view" in target or "sym_size" in target for target in targets)


def test_forms_by_hand() -> None:
    tokens = plain_form((-1, 5, 6)).permuted((1, 0, 2))  # (tokens, n, c)
    assert tokens == Form((-1, 5, 6), ((1,), (0,), (2,)))
    assert (tokens.batch_dim, tokens.axis(0), tokens.axis(1), tokens.is_plain) == (1, 1, None, False)
    heads = reshape_form(tokens, (5, -2, 3))
    assert heads == Form((-1, 5, 2, 3), ((1,), (0, 2), (3,)))
    assert settle(heads.permuted((1, 0, 2))).perm == (0, 2, 1, 3)
    assert settle(heads.permuted((1, 0, 2))).form == Form((-1, 2, 5, 3), ((0, 1), (2,), (3,)))
    assert reshape_form(plain_form((-1, 6)), (-1, 2, 3)) == plain_form((-1, 2, 3))
    assert reshape_form(plain_form((-1, 2, 3)), (-1, 3, 2)) is None, "no common division"
    assert reshape_form(plain_form((-1, 4, 1)), (-4,)) == Form((-1, 4), ((0, 1),))


class Refused:
    """Networks that mix the images of a batch."""

    @staticmethod
    def mean_of_batch(net: Any, x: Tensor) -> Tensor:
        return net.stem(x) - net.stem(x).mean(0, keepdim=True)

    @staticmethod
    def attends_over_the_batch(net: Any, x: Tensor) -> Tensor:
        t = net.stem(x).mean((2, 3))
        return torch.softmax(t @ t.transpose(0, 1), 1) @ t

    @staticmethod
    def differs_by_image(net: Any, x: Tensor) -> Tensor:
        return net.stem(x) + torch.arange(x.shape[0]).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean_of_batch", r"mean.*reduces over the batch"),
        ("attends_over_the_batch", r"gives shapes \(2, 2\) and \(3, 3\) for batches of 2 and 3"),
        ("differs_by_image", r"differs from image to image of a batch"),
    ],
)
def test_networks_that_mix_images_are_refused(name: str, message: str) -> None:
    net = nets.Net({"stem": nn.Conv2d(3, 8, 3)}, getattr(Refused, name)).eval()
    with pytest.raises(UnsupportedOpError, match=message):
        build_program(nets.prepare(nets.as_model(net)))
