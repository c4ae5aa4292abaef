"""One small network for every way in which operators tie channels together, for the tests of coupling and
surgery.

NETS        name -> (network, whether zeroed and absent channels are the same there)
model(net)  the network as a Model with inputs (n, 3, 8, 8), no parameter or statistic at its initial constant
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecnn.load import LoadOptions, load_model
from edgecnn.model import Model

SHAPE = (3, 8, 8)


class Lambda(nn.Module):
    """A stem of `width` channels, a function of it and of layers, and a head of 5 outputs."""

    def __init__(
        self, function: Callable[[Lambda, Tensor], Tensor], width: int = 8, **layers: object
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        for name, layer in layers.items():
            if isinstance(layer, nn.Module):
                setattr(self, name, layer)
            elif isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            elif isinstance(layer, Tensor):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        self.function = function
        with torch.no_grad():
            shape = self._features(torch.zeros(1, *SHAPE)).shape
        self.head = nn.Linear(shape[1], 5)

    def _features(self, x: Tensor) -> Tensor:
        y = self.function(self, F.relu(self.norm(self.stem(x))))
        return y.mean((2, 3)) if y.dim() == 4 else y.mean(1) if y.dim() == 3 else y

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._features(x))


def model(net: nn.Module) -> Model:
    """Return a network as a Model."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if (
                tensor.is_floating_point()
                and tensor.numel() > 1
                and float(tensor.min()) == float(tensor.max())
            ):
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.5)
    return load_model(net.eval(), LoadOptions(input_shape=SHAPE))


def tokens(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, h w, c)."""
    return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of tokens (n, t, c), spelled out or fused, with a bias table per head."""

    def __init__(self, width: int, heads: int, fused: bool = False, table: bool = False) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(7, heads)) if table else None
        self.register_buffer(
            "index", torch.randint(0, 7, (64, 64), generator=torch.Generator().manual_seed(0))
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
            if self.table is not None:
                bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1)
                scores = scores + bias.unsqueeze(0)
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, t, c))


class Standardized(nn.Conv2d):
    """A convolution whose weights are standardized on the way."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, padding=1)


def conv(c_in: int, c_out: int, kernel: int = 1, **options: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


def _se(s: Lambda, x: Tensor) -> Tensor:
    return x * torch.sigmoid(s.b(F.relu(s.a(x.mean((2, 3), keepdim=True)))))


def _cbam(s: Lambda, x: Tensor) -> Tensor:
    pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * torch.sigmoid(s.a(pooled))


def _shuffle(s: Lambda, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    a, b = x.chunk(2, dim=1)
    y = torch.cat([a, s.a(b)], 1)
    return s.b(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def _option_a(s: Lambda, x: Tensor) -> Tensor:
    return s.a(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))


def _split(s: Lambda, x: Tensor) -> Tensor:
    a, b, c = torch.split(x, [2, 3, 3], dim=1)
    return torch.cat([s.a(a), b, c * torch.sigmoid(b)], 1)


def _window(s: Lambda, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = torch.roll(x.permute(0, 2, 3, 1), (-2, -2), (1, 2))
    y = y.view(n, 2, h // 2, 2, w // 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n * 4, -1, c)
    y = s.a(y).view(n, 2, 2, h // 2, w // 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
    return torch.roll(y, (2, 2), (1, 2)).permute(0, 3, 1, 2) + x


def _non_local(s: Lambda, x: Tensor) -> Tensor:
    q, k, v = (f(x).flatten(2) for f in (s.a, s.b, s.c))  # (n, c', h w)
    return (
        s.d(
            torch.bmm(v, torch.bmm(q.transpose(1, 2), k).softmax(-1).transpose(1, 2)).view(
                x.shape[0], -1, 8, 8
            )
        )
        + x
    )


def _einsum(s: Lambda, x: Tensor) -> Tensor:
    return s.b(torch.einsum("nchw,nkhw->nck", x, s.a(x)).mean(2)[:, :, None, None])


def _class_token(s: Lambda, x: Tensor) -> Tensor:
    y = torch.cat([s.token.expand(x.shape[0], -1, -1), tokens(x)], 1) + s.places
    return y + s.a(F.layer_norm(y, [8]))


def _mixer(s: Lambda, x: Tensor) -> Tensor:
    y = tokens(x)
    return y + s.b(F.gelu(s.a(y.transpose(1, 2)))).transpose(1, 2)


def _shared(s: Lambda, x: Tensor) -> Tensor:
    return s.b(s.a(x)) + s.b(s.a(F.relu(x)))


def _pixels(s: Lambda, x: Tensor) -> Tensor:
    return s.a(F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2))


def _own_pixels(s: Lambda, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return s.a(x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w))


def _resize(s: Lambda, x: Tensor) -> Tensor:
    y = F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    return s.a(y) + F.interpolate(x, size=(8, 8), mode="nearest")


def _eca(s: Lambda, x: Tensor) -> Tensor:
    y = x.mean((2, 3)).view(x.shape[0], 1, -1)
    return x * torch.sigmoid(s.a(y)).view(x.shape[0], -1, 1, 1)


def _channels_last(s: Lambda, x: Tensor) -> Tensor:
    y = s.a(x).permute(0, 2, 3, 1)
    y = s.scale * s.c(F.gelu(s.b(F.layer_norm(y, [8], s.gamma, s.beta))))
    return y.permute(0, 3, 1, 2) + x


def _sk(s: Lambda, x: Tensor) -> Tensor:
    both = torch.stack([s.a(x), s.b(x)], 1)  # (n, 2, c, h, w)
    n, _, c = both.shape[:3]
    gate = s.c(both.sum(1).mean((2, 3), keepdim=True)).view(n, 2, c, 1, 1).softmax(1)
    return (both * gate).sum(1)


def _linear_attention(s: Lambda, x: Tensor) -> Tensor:
    q, k, v = s.a(x).reshape(x.shape[0], 2, 12, 64).split(4, dim=2)
    return s.b((v @ F.relu(k).transpose(-1, -2) @ F.relu(q)).reshape(x.shape[0], -1, 8, 8))


Entry = tuple[Callable[[], nn.Module], bool]

NETS: dict[str, Entry] = {
    "residual": (
        lambda: Lambda(lambda s, x: s.b(F.relu(s.a(x))) + x, a=conv(8, 6, 3), b=conv(6, 8, 3)),
        True,
    ),
    "concat": (
        lambda: Lambda(lambda s, x: s.b(torch.cat([x, s.a(x)], 1)), a=conv(8, 4), b=conv(12, 6)),
        True,
    ),
    "split": (lambda: Lambda(_split, a=conv(2, 4)), True),
    "slices": (
        lambda: Lambda(lambda s, x: s.a(x[:, 1::2]) + s.b(x[:, 2:6]), a=conv(4, 6), b=conv(4, 6)),
        True,
    ),
    "unbind": (lambda: Lambda(lambda s, x: s.a(x.unflatten(1, (2, 4)).unbind(1)[1]), a=conv(4, 6)), True),
    "option a": (lambda: Lambda(_option_a, a=conv(8, 16, 3, stride=2)), True),
    "pad here, crop there": (
        lambda: Lambda(lambda s, x: s.b(F.pad(s.a(x), (0, 0, 0, 0, 3, -3))), a=conv(8, 8), b=conv(8, 6)),
        True,
    ),
    "shuffle": (lambda: Lambda(_shuffle, a=conv(4, 4), b=conv(8, 8)), True),
    "channel shuffle": (
        lambda: Lambda(lambda s, x: s.a(F.channel_shuffle(x, 2)), a=conv(8, 6, groups=2)),
        True,
    ),
    "flatten": (
        lambda: Lambda(lambda s, x: F.relu(s.a(F.max_pool2d(x, 4).flatten(1))), a=nn.Linear(32, 7)),
        True,
    ),
    "permute": (
        lambda: Lambda(lambda s, x: s.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), a=nn.Linear(8, 6)),
        True,
    ),
    "depthwise": (lambda: Lambda(lambda s, x: s.b(s.a(x)), a=conv(8, 8, 3, groups=8), b=conv(8, 6)), True),
    "multiplier": (lambda: Lambda(lambda s, x: s.b(s.a(x)), a=conv(8, 16, 3, groups=8), b=conv(16, 6)), True),
    "grouped": (lambda: Lambda(lambda s, x: s.b(s.a(x)), a=conv(8, 12, 3, groups=2), b=conv(12, 6)), True),
    "whole groups": (
        lambda: Lambda(lambda s, x: s.b(s.a(x)), 16, a=conv(16, 16, 3, groups=8), b=conv(16, 6)),
        True,
    ),
    "squeeze-excitation": (lambda: Lambda(_se, a=conv(8, 4), b=conv(4, 8)), True),
    "cbam": (lambda: Lambda(_cbam, a=conv(2, 1, 7)), False),
    "eca": (lambda: Lambda(_eca, a=nn.Conv1d(1, 1, 3, padding=1, bias=False)), False),
    "selective kernel": (lambda: Lambda(_sk, a=conv(8, 6), b=conv(8, 6, 3), c=conv(6, 12)), True),
    "pixel shuffle": (lambda: Lambda(_pixels, a=conv(8, 6)), True),
    "own pixel shuffle": (lambda: Lambda(_own_pixels, 16, a=conv(4, 6)), True),
    "resize": (lambda: Lambda(_resize, a=conv(8, 8)), True),
    "group norm": (lambda: Lambda(lambda s, x: s.b(s.a(x)), 16, a=nn.GroupNorm(8, 16), b=conv(16, 6)), True),
    "one group norm": (lambda: Lambda(lambda s, x: s.b(s.a(x)), a=nn.GroupNorm(1, 8), b=conv(8, 6)), False),
    "instance norm": (lambda: Lambda(lambda s, x: s.a(x) * x, a=nn.InstanceNorm2d(8, affine=True)), True),
    "prelu": (lambda: Lambda(lambda s, x: s.b(s.a(x - 0.5)), a=nn.PReLU(8), b=conv(8, 6)), True),
    "layer scale": (
        lambda: Lambda(lambda s, x: x + s.g * s.a(x), a=conv(8, 8), g=nn.Parameter(torch.rand(8, 1, 1))),
        True,
    ),
    "plain batch norm": (
        lambda: Lambda(lambda s, x: s.b(s.a(x)), a=nn.BatchNorm2d(8, affine=False), b=conv(8, 6)),
        True,
    ),
    "transposed": (
        lambda: Lambda(lambda s, x: s.b(s.a(x)), a=nn.ConvTranspose2d(8, 6, 2, 2), b=conv(6, 4)),
        True,
    ),
    "grouped transposed": (
        lambda: Lambda(lambda s, x: s.a(x), a=nn.ConvTranspose2d(8, 12, 2, 2, groups=2)),
        True,
    ),
    "attention": (lambda: Lambda(lambda s, x: s.a(tokens(x)), a=Attention(8, 4)), True),
    "fused attention": (lambda: Lambda(lambda s, x: s.a(tokens(x)), a=Attention(8, 4, fused=True)), True),
    "one head": (lambda: Lambda(lambda s, x: s.a(tokens(x)), a=Attention(8, 1, fused=True)), True),
    "one spelled head": (lambda: Lambda(lambda s, x: s.a(tokens(x)), a=Attention(8, 1)), True),
    "bias table": (lambda: Lambda(lambda s, x: s.a(tokens(x)), a=Attention(8, 4, table=True)), True),
    "linear attention": (lambda: Lambda(_linear_attention, a=conv(8, 24), b=conv(8, 8)), True),
    "windows": (lambda: Lambda(_window, a=Attention(8, 2)), True),
    "non-local": (lambda: Lambda(_non_local, a=conv(8, 4), b=conv(8, 4), c=conv(8, 6), d=conv(6, 8)), True),
    "einsum": (lambda: Lambda(_einsum, a=conv(8, 4), b=conv(8, 6)), True),
    "channel softmax": (
        lambda: Lambda(lambda s, x: s.b(s.a(x).softmax(1)), a=conv(8, 6), b=conv(6, 6)),
        True,
    ),
    "class token": (
        lambda: Lambda(
            _class_token,
            a=nn.Linear(8, 8),
            token=nn.Parameter(torch.rand(1, 1, 8)),
            places=nn.Parameter(torch.rand(1, 65, 8)),
        ),
        False,
    ),
    "channels last": (
        lambda: Lambda(
            _channels_last,
            a=conv(8, 8, 7, groups=8),
            b=nn.Linear(8, 16),
            c=nn.Linear(16, 8),
            **{name: nn.Parameter(torch.rand(8)) for name in ("scale", "gamma", "beta")},
        ),
        False,
    ),
    "token mixing": (lambda: Lambda(_mixer, a=nn.Linear(64, 9), b=nn.Linear(9, 64)), True),
    "shared weights": (lambda: Lambda(_shared, a=conv(8, 6), b=conv(6, 8)), True),
    "standardized": (lambda: Lambda(lambda s, x: s.b(s.a(x)), a=Standardized(8, 6, 3), b=conv(6, 6)), False),
    "roll": (
        lambda: Lambda(
            lambda s, x: s.a(torch.roll(x, 1, 2)) + s.b(torch.roll(x, 1, 1)), a=conv(8, 6), b=conv(8, 6)
        ),
        True,
    ),
    "buffers": (
        lambda: Lambda(lambda s, x: s.a(x * s.k + torch.ones(8, 1, 1)), a=conv(8, 6), k=torch.rand(8, 1, 1)),
        True,
    ),
    "index": (
        lambda: Lambda(
            lambda s, x: s.a(x.index_select(1, s.order)),
            a=conv(8, 6),
            order=torch.tensor([3, 1, 2, 0, 7, 6, 5, 4]),
        ),
        True,
    ),
}
