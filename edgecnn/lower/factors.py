"""Move multiplications by a number into the weights of the layers that read them.

    conv(c x; W, b) = conv(x; c W, b)        mean(c x) = c mean(x)        (c x) t = c (x t)
    max_pool(c x) = c max_pool(x)   for c > 0

The factor 1/6 of hard_swish(x) = x relu6(x + 3) / 6 passes through squeeze-and-excitation (mean and product)
and pools until it reaches convolutions, which then cost nothing more. Where an addition or output is in the
way, it stays where it is: on a gate of one value per channel it costs less than on the gated image.

Source: Howard et al. 2019, arXiv:1905.02244, section 5.2 (the factor of hard_swish).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from edgecnn.graph.nodes import add_constant, argument, aten, fetch, insert_call, is_constant

_LAYERS = frozenset(
    {aten.conv2d.default, aten.conv2d.padding, aten.conv_transpose2d.input, aten.linear.default}
)
_LINEAR = frozenset(
    {
        aten.mean.dim,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten.flatten.using_ints,
        aten.view.default,
        aten.reshape.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.permute.default,
        aten.transpose.int,
        aten.slice.Tensor,
        aten.dropout.default,
    }
)
_POSITIVELY_HOMOGENEOUS = frozenset({aten.relu.default, aten.max_pool2d.default})


def absorb_factors(graph: fx.GraphModule) -> int:
    """Move every multiplication by a number as far down as it goes, in place.

    Args:
        graph: functional, batch norms folded; edited, to be cleaned up with `nodes.finish`.

    Returns:
        How many readers no longer multiply.
    """
    moved = 0
    node = next(iter(graph.graph.nodes))
    while node.op != "root":  # the loop also visits the products that it inserts on the way
        following = node.next
        if _factor(node) is not None:
            moved += sum(_absorbs(node, user) and _move_past(graph, node, user) for user in list(node.users))
            following = node.next
            if not node.users:
                graph.graph.erase_node(node)
        node = following
    return moved


def _factor(node: fx.Node) -> float | None:
    """Return c of mul(x, c) with a number c, else None."""
    if node.op != "call_function" or node.target not in (aten.mul.Tensor, aten.mul.Scalar):
        return None
    factor = argument(node, 1, "other")
    usable = isinstance(factor, (int, float)) and not isinstance(factor, bool) and factor != 0
    return float(factor) if usable and isinstance(node.args[0], fx.Node) else None


def _absorbs(product: fx.Node, user: fx.Node) -> bool:
    """Whether a factor that moves past `user` ends in weights or in a multiplication that is there anyway."""
    if _factor(user) is not None:
        return True
    if user.target in _LAYERS:
        return is_constant(argument(user, 1, "weight")) and user.args[0] is product
    if user.target is aten.mul.Tensor:
        others = [a for a in user.args if isinstance(a, fx.Node) and a is not product]
        if any(_factor(other) is not None for other in others):
            return True
    elif user.target not in _LINEAR and user.target not in _POSITIVELY_HOMOGENEOUS:
        return False
    return bool(user.users) and all(_absorbs(user, reader) for reader in user.users)


def _move_past(graph: fx.GraphModule, product: fx.Node, user: fx.Node) -> bool:
    """Let one reader of a product read the value itself; return whether that was possible."""
    x, c = product.args[0], float(_factor(product) or 0.0)
    own = _factor(user)
    if own is not None:
        user.args = (x, c * own)
        return True
    if user.target in _LAYERS:
        return _scale_weight(graph, product, user, c)
    if user.target is aten.mul.Tensor:
        c **= sum(operand is product for operand in user.args)
    elif user.target not in _LINEAR and (user.target not in _POSITIVELY_HOMOGENEOUS or c < 0):
        return False
    user.replace_input_with(product, x)  # type: ignore[arg-type]
    scaled = insert_call(graph, user.next, aten.mul.Tensor, (user, c), like=user)
    user.replace_all_uses_with(scaled, delete_user_cb=lambda reader: reader is not scaled)
    return True


def _scale_weight(graph: fx.GraphModule, product: fx.Node, layer: fx.Node, c: float) -> bool:
    """Write c W into a layer that reads c x as its data."""
    weight: Any = argument(layer, 1, "weight")
    if not is_constant(weight) or layer.args[0] is not product:
        return False
    scaled = (fetch(graph, weight).double() * c).float()
    constant = add_constant(graph, layer, f"{layer.name}_weight", scaled)
    layer.args = (product.args[0], constant, *layer.args[2:])
    return True
