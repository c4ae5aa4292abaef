"""The table from ATen operators to Program operators.

The lowerings stand in `build_layers` and `build_shapes`.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph import build_float as floats
from edgecnn.graph import build_layers as layers
from edgecnn.graph import build_shapes as shapes
from edgecnn.graph.build import Handler, ProgramBuilder, qd
from edgecnn.graph.nodes import argument, aten, layer_name


def _relu(builder: ProgramBuilder, node: fx.Node) -> str:
    return builder.fuse_clamp(node, 0.0, None)


def _relu6(builder: ProgramBuilder, node: fx.Node) -> str:
    return builder.fuse_clamp(node, 0.0, 6.0)


def _hardtanh(builder: ProgramBuilder, node: fx.Node) -> str:
    low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    return builder.fuse_clamp(node, float(low), float(high))


def _clamp(builder: ProgramBuilder, node: fx.Node) -> str:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    return builder.fuse_clamp(
        node, None if low is None else float(low), None if high is None else float(high)
    )


def _unary(kind: str) -> Handler:
    def lower(builder: ProgramBuilder, node: fx.Node) -> str:
        return builder.emit(node, kind, [builder.tensor(node.args[0])])

    return lower


def _silu(builder: ProgramBuilder, node: fx.Node) -> str:
    x = builder.tensor(node.args[0])
    return builder.emit(node, "mul", [x, builder.emit(node, "sigmoid", [x])])


def _leaky_relu(builder: ProgramBuilder, node: fx.Node) -> str:
    slope = float(argument(node, 1, "negative_slope", 0.01))
    return builder.emit(node, "leaky_relu", [builder.tensor(node.args[0])], {"negative_slope": slope})


def _softmax(builder: ProgramBuilder, node: fx.Node) -> str:
    x = builder.tensor(node.args[0])
    axis = int(argument(node, 1, "dim")) % len(builder.tensors[x].shape)
    return builder.emit(node, "softmax", [x], {"axis": axis})


def _binary(kind: str) -> Handler:
    def lower(builder: ProgramBuilder, node: fx.Node) -> str:
        alpha = argument(node, 2, "alpha", 1)
        if alpha != 1:
            raise UnsupportedOpError(f"{layer_name(node)} has alpha={alpha}, expected 1")
        return builder.emit(node, kind, [builder.tensor(node.args[0]), builder.tensor(node.args[1])])

    return lower


def _reversed_sub(builder: ProgramBuilder, node: fx.Node) -> str:
    return builder.emit(node, "sub", [builder.tensor(node.args[1]), builder.tensor(node.args[0])])


def _div(builder: ProgramBuilder, node: fx.Node) -> str:
    divisor: Any = node.args[1]
    known = builder.constant_value(divisor)
    if isinstance(divisor, (int, float)):
        factor: Any = 1.0 / divisor
        other = builder.tensor(factor)
    elif known is not None:
        other = builder.constant((1.0 / known.float()).numpy(), f"{node.name}_reciprocal")
    else:
        return floats.divide(builder, node)
    return builder.emit(node, "mul", [builder.tensor(node.args[0]), other])


def _negate(builder: ProgramBuilder, node: fx.Node) -> str:
    return builder.emit(node, "mul", [builder.tensor(node.args[0]), builder.tensor(-1.0)])


def _run_time_parameters(builder: ProgramBuilder, node: fx.Node) -> list[str]:  # noqa: ARG001 (a Handler)
    """Give names that no tensor has to scale and zero point: they exist in the runtime's layer alone."""
    return ["", ""]


HANDLERS: dict[Any, Handler] = {
    aten.conv2d.default: layers.conv2d,
    aten.conv2d.padding: layers.conv2d,
    aten.conv_transpose2d.input: layers.conv_transpose2d,
    aten.linear.default: layers.linear,
    aten.batch_norm.default: layers.batch_norm,
    aten.max_pool2d.default: layers.max_pool2d,
    aten.max_pool2d_with_indices.default: layers.max_pool2d_with_indices,
    aten.avg_pool2d.default: layers.avg_pool2d,
    aten.adaptive_avg_pool2d.default: layers.adaptive_avg_pool2d,
    aten.adaptive_max_pool2d.default: layers.adaptive_max_pool2d,
    aten.mean.dim: layers.mean,
    aten.amax.default: layers.amax,
    aten.max.dim: layers.max_dim,
    aten.relu.default: _relu,
    aten.relu6.default: _relu6,
    aten.hardtanh.default: _hardtanh,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.leaky_relu.default: _leaky_relu,
    aten.sigmoid.default: _unary("sigmoid"),
    aten.silu.default: _silu,
    aten.hardsigmoid.default: _unary("hard_sigmoid"),
    aten.hardswish.default: _unary("hard_swish"),
    aten.tanh.default: _unary("tanh"),
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.add.Tensor: _binary("add"),
    aten.sub.Tensor: _binary("sub"),
    aten.rsub.Scalar: _reversed_sub,
    aten.mul.Tensor: _binary("mul"),
    aten.mul.Scalar: _binary("mul"),
    aten.add.Scalar: _binary("add"),
    aten.div.Tensor: _div,
    aten.neg.default: _negate,
    aten.cat.default: shapes.concat,
    aten.flatten.using_ints: shapes.reshape,
    aten.view.default: shapes.reshape,
    aten.reshape.default: shapes.reshape,
    aten._unsafe_view.default: shapes.reshape,
    aten.squeeze.dim: shapes.reshape,
    aten.squeeze.dims: shapes.reshape,
    aten.unsqueeze.default: shapes.reshape,
    aten.permute.default: shapes.permute,
    aten.transpose.int: shapes.transpose,
    aten.slice.Tensor: shapes.slice_tensor,
    aten.narrow.default: shapes.narrow,
    aten.select.int: shapes.select,
    aten.unbind.int: shapes.unbind,
    aten.index.Tensor: shapes.index,
    aten.unflatten.int: shapes.reshape,
    aten.linalg_vector_norm.default: floats.vector_norm,
    aten.split.Tensor: shapes.split,
    aten.split_with_sizes.default: shapes.split,
    aten.chunk.default: shapes.split,
    aten.pad.default: shapes.pad,
    aten.constant_pad_nd.default: shapes.pad,
    aten.upsample_nearest2d.vec: shapes.resize,
    aten.upsample_nearest2d.default: shapes.resize,
    aten.upsample_bilinear2d.vec: shapes.resize,
    aten.upsample_bilinear2d.default: shapes.resize,
    aten.expand.default: shapes.expand,
    aten.unfold.default: shapes.unfold,
    aten.expand_as.default: shapes.expand,
    shapes.GETITEM: shapes.getitem,
    aten.layer_norm.default: floats.layer_norm,
    aten.group_norm.default: floats.group_norm,
    aten.instance_norm.default: floats.instance_norm,
    aten.gelu.default: floats.gelu,
    aten.elu.default: floats.elu,
    aten.mish.default: floats.mish,
    aten.prelu.default: floats.prelu,
    aten.softplus.default: floats.softplus,
    aten.matmul.default: floats.matmul,
    aten.bmm.default: floats.matmul,
    aten.scaled_dot_product_attention.default: floats.attention,
    aten.einsum.default: floats.einsum,
    aten.roll.default: floats.roll,
    aten.sum.dim_IntList: floats.total,
    aten.pow.Tensor_Scalar: floats.power,
    aten.square.default: floats.square,
    **{
        getattr(aten, kind).default: floats.function(kind)
        for kind in ("abs", "cos", "exp", "log", "rsqrt", "sin", "sqrt")
    },
    qd.choose_qparams.tensor: _run_time_parameters,
    qd.quantize_per_tensor.tensor: shapes.identity,
    qd.dequantize_per_tensor.tensor: shapes.identity,
    **dict.fromkeys(
        (
            aten.dropout.default,
            aten.feature_dropout.default,
            aten.contiguous.default,
            aten.clone.default,
            aten.alias.default,
            aten.detach.default,
        ),
        shapes.identity,
    ),
}


def unsupported_nodes(nodes: list[fx.Node], tensor_names: set[str]) -> list[fx.Node]:
    """Return the calls on tensors that no lowering takes, in order."""
    return [
        node
        for node in nodes
        if node.op == "call_function"
        and node.name in tensor_names
        and node.target not in HANDLERS
        and "quantized_decomposed" not in str(node.target)
    ]
