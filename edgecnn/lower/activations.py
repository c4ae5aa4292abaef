"""Write composite activations as the arithmetic that integer kernels have.

    silu(x)         = x * sigmoid(x)
    hard_sigmoid(x) = relu6(x + 3) / 6
    hard_swish(x)   = x * relu6(x + 3) / 6
    prelu(x; a)     = relu(x) + a[c] min(x, 0), with one slope a for all channels leaky_relu(x; a)

As single int8 operators they are slow or missing: ONNX Runtime runs HardSwish between Q/DQ in float, and
XNNPACK's delegate breaks at TFLite's int8 HARD_SWISH. `lower.factors` moves the 1/6 into later weights. PReLU
would stay in float, between conversions: three convolutions of 32 channels on 56x56, each with one behind it,
are 2.0 times as fast as float in ONNX Runtime then, and 2.4 times as written here (LiteRT: 2.8 and 2.7), at
the same SQNR.

Source: Howard et al. 2019, arXiv:1905.02244, section 5.2 (hard_swish); Ramachandran et al. 2017,
arXiv:1710.05941; He et al. 2015, arXiv:1502.01852 (PReLU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from edgecnn.errors import PassError
from edgecnn.graph.nodes import (
    add_constant,
    argument,
    aten,
    copy_graph,
    fetch,
    finish,
    insert_call,
    is_constant,
    layer_name,
)
from edgecnn.graph.same_outputs import refuse_changed_outputs
from edgecnn.graph.shapes import infer_shapes
from edgecnn.lower.factors import absorb_factors
from edgecnn.model import Model

_COMPOSITE = (aten.silu.default, aten.hardswish.default, aten.hardsigmoid.default)
_PRELU = aten.prelu.default


@dataclass(frozen=True)
class DecomposeActivations:
    """Pass: no silu, hard_swish, hard_sigmoid or prelu is left; outputs equal up to float rounding.

    A prelu whose slopes are computed from the image stays. Multiplications by a number, these and the
    network's own, move into the layers that read them.

    Source: arXiv:1905.02244, section 5.2.
    """

    name: ClassVar[str] = "decompose_activations"
    needs: ClassVar[frozenset[Any]] = frozenset()

    def requires(self, model: Model) -> None:
        """Accept every model."""

    def run(self, model: Model, context: Any) -> Model:  # noqa: ARG002 (the Pass protocol's signature)
        """Return the model with the activations written out."""
        graph = copy_graph(model.graph)
        has_prelu = any(node.target is _PRELU for node in graph.graph.nodes)
        shapes = infer_shapes(model) if has_prelu else {}
        for node in list(graph.graph.nodes):
            if _is_composite(node):
                rank = len(shapes.get(node.name, ()))
                found = _split_prelu(graph, node, rank) if node.target is _PRELU else _decompose(graph, node)
                node.replace_all_uses_with(found)
                graph.graph.erase_node(node)
        absorb_factors(graph)
        return model.with_graph(finish(graph))

    def ensures(self, before: Model, after: Model) -> None:
        """Check that none is left, and that noise gives the same outputs."""
        left = [node for node in after.graph.graph.nodes if _is_composite(node)]
        if left:
            raise PassError(f"{len(left)} composite activations are left, first {layer_name(left[0])}")
        refuse_changed_outputs(before, after, self.name)


def _is_composite(node: fx.Node) -> bool:
    return node.target in _COMPOSITE or (node.target is _PRELU and is_constant(argument(node, 1, "weight")))


def _split_prelu(graph: fx.GraphModule, node: fx.Node, rank: int) -> fx.Node:
    """Return what a prelu of values (n, c, ...) with `rank` dimensions becomes."""
    x, slopes = node.args[0], fetch(graph, argument(node, 1, "weight")).detach().float()

    def call(target: Any, *args: Any) -> fx.Node:
        return insert_call(graph, node, target, args, like=node)

    first = float(slopes.flatten()[0])
    if bool((slopes == first).all()) and 0.0 < first <= 1.0:
        return call(aten.leaky_relu.default, x, first)
    shaped = add_constant(graph, node, f"{node.name}_slopes", slopes.reshape(-1, *([1] * (rank - 2))))
    below = call(aten.mul.Tensor, call(aten.clamp.default, x, None, 0.0), shaped)
    return call(aten.add.Tensor, call(aten.relu.default, x), below)


def _decompose(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    x = node.args[0]

    def call(target: Any, *args: Any) -> fx.Node:
        return insert_call(graph, node, target, args, like=node)

    if node.target is aten.silu.default:
        return call(aten.mul.Tensor, x, call(aten.sigmoid.default, x))
    gate = call(aten.clamp.default, call(aten.add.Tensor, x, 3.0), 0.0, 6.0)
    value = gate if node.target is aten.hardsigmoid.default else call(aten.mul.Tensor, x, gate)
    return call(aten.mul.Tensor, value, 1.0 / 6.0)
