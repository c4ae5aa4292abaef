"""Lowerings of operators that compute in float alone: normalization, attention, products of activations, and
functions without an integer kernel.

Each becomes a few Program operators that both runtimes have fast float kernels for.
"""

from __future__ import annotations

import math
from math import prod
from typing import Any

import numpy as np
from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.build import Handler, ProgramBuilder
from edgecnn.graph.build_layers import reduction
from edgecnn.graph.einsum import parse_product
from edgecnn.graph.nodes import argument, layer_name
from edgecnn.graph.program import BATCH

Shape = tuple[int, ...]


def function(kind: str) -> Handler:
    """Return the lowering of a function of each value."""

    def lower(builder: ProgramBuilder, node: fx.Node) -> str:
        return builder.emit(node, kind, [builder.tensor(node.args[0])])

    return lower


def gelu(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.gelu, exact or by tanh."""
    approximate = argument(node, 1, "approximate", "none") == "tanh"
    return builder.emit(node, "gelu", [builder.tensor(node.args[0])], {"approximate": approximate})


def elu(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.elu with the slopes of PyTorch's default."""
    slopes = [float(argument(node, i + 1, name, 1.0)) for i, name in enumerate(("alpha", "scale"))]
    if slopes != [1.0, 1.0] or float(argument(node, 3, "input_scale", 1.0)) != 1.0:
        raise UnsupportedOpError(f"{layer_name(node)} has slopes {slopes}, expected 1")
    return builder.emit(node, "elu", [builder.tensor(node.args[0])])


def softplus(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower log(1 + exp(x)) as max(x, 0) + log(1 + exp(-|x|)), which never overflows.

    Beyond its threshold PyTorch gives x, which is the same in float32.
    """
    if float(argument(node, 1, "beta", 1.0)) != 1.0:
        raise UnsupportedOpError(f"{layer_name(node)} has another beta, expected 1")
    return _softplus(builder, node, builder.tensor(node.args[0]))


def mish(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower x * tanh(softplus(x))."""
    x = builder.tensor(node.args[0])
    gate = builder.emit(node, "tanh", [_softplus(builder, node, x)])
    return builder.emit(node, "mul", [x, gate])


def _softplus(builder: ProgramBuilder, node: fx.Node, x: str) -> str:
    size = builder.emit(node, "abs", [x])
    decay = builder.emit(node, "exp", [builder.emit(node, "mul", [size, builder.tensor(-1.0)])])
    tail = builder.emit(node, "log", [builder.emit(node, "add", [decay, builder.tensor(1.0)])])
    return builder.emit(node, "add", [builder.emit(node, "clamp", [x], {"clamp": (0.0, None)}), tail])


def prelu(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower max(x, 0) + w min(x, 0), w per channel."""
    x = builder.tensor(node.args[0])
    slope = builder.constant_value(node.args[1])
    if slope is None:
        raise UnsupportedOpError(f"{layer_name(node)} has a slope computed from the input")
    rank = len(builder.shape(node))
    values = slope.float().numpy().reshape(-1, *([1] * (rank - 2)))
    low = builder.emit(node, "clamp", [x], {"clamp": (None, 0.0)})
    scaled = builder.emit(node, "mul", [low, builder.constant(values, f"{node.name}_slope")])
    high = builder.emit(node, "clamp", [x], {"clamp": (0.0, None)})
    return builder.emit(node, "add", [high, scaled])


def power(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower x to the power of 2, 1/2 or -1/2."""
    x, exponent = builder.tensor(node.args[0]), node.args[1]
    if exponent == 2:
        return builder.emit(node, "mul", [x, x])
    if exponent in (0.5, -0.5):
        return builder.emit(node, "sqrt" if exponent == 0.5 else "rsqrt", [x])
    if exponent == 3:
        return builder.emit(node, "mul", [builder.emit(node, "mul", [x, x]), x])
    raise UnsupportedOpError(f"{layer_name(node)} has exponent {exponent}, expected 2, 3, 0.5 or -0.5")


def square(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower x * x."""
    x = builder.tensor(node.args[0])
    return builder.emit(node, "mul", [x, x])


def divide(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower a quotient of two activations."""
    return builder.emit(node, "div", [builder.tensor(node.args[0]), builder.tensor(node.args[1])])


def total(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower a sum over dimensions."""
    return reduction(builder, node, "sum", builder.shape(node))


def vector_norm(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower the root of the sum of squares over dimensions."""
    if argument(node, 1, "ord", 2) != 2 or argument(node, 2, "dim") is None:
        raise UnsupportedOpError(f"{layer_name(node)} is another norm, expected the root of a sum of squares")
    x = builder.tensor(node.args[0])
    rank = len(builder.tensors[x].shape)
    dims: Any = argument(node, 2, "dim")
    axes = tuple(sorted(int(d) % rank for d in dims))
    if 0 in axes:
        raise UnsupportedOpError(f"{layer_name(node)} reduces over the batch")
    square = builder.emit(node, "mul", [x, x], None, builder.tensors[x].shape)
    attributes = {"axes": axes, "keepdim": bool(argument(node, 3, "keepdim", False))}
    return builder.emit(node, "sqrt", [builder.emit(node, "sum", [square], attributes)])


def layer_norm(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.layer_norm over the last dimensions."""
    x = builder.tensor(node.args[0])
    count, rank = len(node.args[1]), len(builder.shape(node))  # type: ignore[arg-type]
    axes = tuple(range(rank - count, rank))
    if 0 in axes:
        raise UnsupportedOpError(f"{layer_name(node)} normalizes over the batch")
    eps = float(argument(node, 4, "eps", 1e-5))
    y = builder.emit(node, "normalize", [x], {"axes": axes, "eps": eps})
    return _scaled(builder, node, y, (argument(node, 2, "weight"), argument(node, 3, "bias")), None)


def group_norm(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.group_norm: (n, c, ...) as (n, g, c / g, ...), normalized over all but n and g."""
    x, shape = builder.tensor(node.args[0]), builder.shape(node)
    groups, eps = int(node.args[1]), float(argument(node, 4, "eps", 1e-5))  # type: ignore[arg-type]
    split = shape if groups == 1 else (shape[0], groups, shape[1] // groups, *shape[2:])
    if groups > 1:
        x = builder.emit(node, "reshape", [x], {"shape": split}, split)
    axes = tuple(range(1 if groups == 1 else 2, len(split)))
    y = builder.emit(node, "normalize", [x], {"axes": axes, "eps": eps}, split)
    if groups > 1:
        y = builder.emit(node, "reshape", [y], {"shape": shape}, shape)
    affine = (argument(node, 2, "weight"), argument(node, 3, "bias"))
    return _scaled(builder, node, y, affine, (-1, *([1] * (len(shape) - 2))))


def instance_norm(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.instance_norm by each image's own statistics."""
    if not argument(node, 5, "use_input_stats", True):
        raise UnsupportedOpError(f"{layer_name(node)} uses running statistics, expected the image's own")
    x, rank = builder.tensor(node.args[0]), len(builder.shape(node))
    eps = float(argument(node, 7, "eps", 1e-5))
    y = builder.emit(node, "normalize", [x], {"axes": tuple(range(2, rank)), "eps": eps})
    affine = (argument(node, 1, "weight"), argument(node, 2, "bias"))
    return _scaled(builder, node, y, affine, (-1, *([1] * (rank - 2))))


def _scaled(
    builder: ProgramBuilder, node: fx.Node, y: str, affine: tuple[Any, Any], shape: tuple[int, ...] | None
) -> str:
    """Emit y * weight + bias as far as there are such, reshaped to `shape`."""
    for kind, parameter in zip(("mul", "add"), affine, strict=True):
        if parameter is None:
            continue
        known = builder.constant_value(parameter)
        if known is None:
            raise UnsupportedOpError(f"{layer_name(node)} has a weight computed from the input")
        values = known.float().numpy()
        constant = builder.constant(values if shape is None else values.reshape(shape), f"{node.name}_{kind}")
        y = builder.emit(node, kind, [y, constant])
    return y


def matmul(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower a product of matrices over the last two dimensions."""
    return builder.emit(node, "matmul", [builder.tensor(node.args[0]), builder.tensor(node.args[1])])


def attention(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.scaled_dot_product_attention: softmax(scale q k^T + mask) v.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1.
    """
    q, k, v = (builder.tensor(node.args[i]) for i in range(3))
    mask = argument(node, 3, "attn_mask")
    if argument(node, 5, "is_causal", False) or argument(node, 7, "enable_gqa", False):
        raise UnsupportedOpError(f"{layer_name(node)} is causal or grouped, expected plain attention")
    q_shape, k_shape = builder.tensors[q].shape, builder.tensors[k].shape
    scale = argument(node, 6, "scale")
    factor = 1.0 / math.sqrt(q_shape[-1]) if scale is None else float(scale)
    q = builder.emit(node, "mul", [q, builder.tensor(factor)], None, q_shape)
    rank = len(k_shape)
    perm = (*range(rank - 2), rank - 1, rank - 2)
    turned = builder.emit(node, "transpose", [k], {"perm": perm}, tuple(k_shape[i] for i in perm))
    scores_shape = (*q_shape[:-1], k_shape[-2])
    scores = builder.emit(node, "matmul", [q, turned], None, scores_shape)
    if mask is not None:
        scores = builder.emit(node, "add", [scores, _mask(builder, mask)], None, scores_shape)
    weights = builder.emit(node, "softmax", [scores], {"axis": rank - 1}, scores_shape)
    return builder.emit(node, "matmul", [weights, v])


def _mask(builder: ProgramBuilder, mask: Any) -> str:
    """Return the tensor to add to the scores: of a mask of truths, -inf where it is false."""
    known = builder.constant_value(mask)
    if known is None or known.dtype.is_floating_point:
        return builder.tensor(mask)
    lowest = np.float32(np.finfo(np.float32).min)
    return builder.constant(np.where(known.numpy(), np.float32(0), lowest), "mask")


def einsum(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower a product of two tensors given by letters, as one matmul between reshapes and transposes."""
    operands: Any = node.args[1]
    names = [builder.tensor(operand) for operand in operands]
    shapes = [builder.tensors[name].shape for name in names]
    plan = parse_product(str(node.args[0]), shapes) if len(names) == 2 else None
    if plan is None:
        raise UnsupportedOpError(f"{layer_name(node)} has the equation {node.args[0]!r}, expected a product")
    factors = []
    for name, side in zip(names, plan.sides, strict=True):
        factors.append(moved(builder, node, name, side.perm, side.shape))
    y = builder.emit(node, "matmul", factors, None, plan.product_shape)
    y = _reshaped(builder, node, y, plan.split_shape)
    return moved(builder, node, y, plan.perm, builder.shape(node))


def moved(builder: ProgramBuilder, node: fx.Node, name: str, perm: Shape, shape: Shape) -> str:
    """Transpose and reshape a tensor, as far as there is something to do."""
    old = builder.tensors[name].shape
    if perm != tuple(range(len(perm))):
        if old[0] == BATCH and perm[0] != 0:
            raise UnsupportedOpError(f"{layer_name(node)} moves the batch out of dimension 0")
        new = tuple(old[i] for i in perm)
        name = builder.emit(node, "transpose", [name], {"perm": perm}, new)
    return _reshaped(builder, node, name, shape)


def _reshaped(builder: ProgramBuilder, node: fx.Node, name: str, shape: Shape) -> str:
    old = builder.tensors[name].shape
    if old == shape:
        return name
    if (old[0] == BATCH) != (shape[0] == BATCH) or prod(old) != prod(shape):
        raise UnsupportedOpError(f"{layer_name(node)} gives shape {shape}, expected the batch in dimension 0")
    return builder.emit(node, "reshape", [name], {"shape": shape}, shape)


def roll(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.roll as two slices joined the other way round, dimension by dimension."""
    x = builder.tensor(node.args[0])
    shape = builder.shape(node)
    shifts: Any = node.args[1]
    dims: Any = argument(node, 2, "dims", [])
    if not dims or any(d % len(shape) == 0 for d in dims):
        raise UnsupportedOpError(f"{layer_name(node)} rolls the batch or all dimensions as one")
    for shift, dim in zip(shifts, dims, strict=True):
        axis = dim % len(shape)
        size = shape[axis]
        cut = (size - shift) % size
        if cut:
            parts = [_cut(builder, node, x, axis, bounds) for bounds in ((cut, size), (0, cut))]
            x = builder.emit_moved(node, "concat", parts, {"axis": axis}, shape)
    return x


def _cut(builder: ProgramBuilder, node: fx.Node, x: str, axis: int, bounds: tuple[int, int]) -> str:
    start, stop = bounds
    shape = list(builder.tensors[x].shape)
    shape[axis] = stop - start
    attributes = {"axis": axis, "start": start, "stop": stop, "step": 1}
    return builder.emit_moved(node, "slice", [x], attributes, tuple(shape))
