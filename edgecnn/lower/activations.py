"""Write composite activations as the arithmetic that integer kernels have.

    silu(x)         = x * sigmoid(x)
    hard_sigmoid(x) = relu6(x + 3) / 6
    hard_swish(x)   = x * relu6(x + 3) / 6

As single int8 operators they are slow or missing: ONNX Runtime runs HardSwish between Q/DQ in float, and
XNNPACK's delegate breaks at TFLite's int8 HARD_SWISH. `lower.factors` moves the 1/6 into later weights.

Source: Howard et al. 2019, arXiv:1905.02244, section 5.2 (hard_swish); Ramachandran et al. 2017,
arXiv:1710.05941.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from edgecnn.errors import PassError
from edgecnn.graph.nodes import aten, copy_graph, finish, insert_call, layer_name
from edgecnn.graph.same_outputs import refuse_changed_outputs
from edgecnn.lower.factors import absorb_factors
from edgecnn.model import Model

_COMPOSITE = (aten.silu.default, aten.hardswish.default, aten.hardsigmoid.default)


@dataclass(frozen=True)
class DecomposeActivations:
    """Pass: no silu, hard_swish or hard_sigmoid is left; outputs equal up to float rounding.

    Multiplications by a number, these and the network's own, move into the layers that read them.

    Source: arXiv:1905.02244, section 5.2.
    """

    name: ClassVar[str] = "decompose_activations"
    needs: ClassVar[frozenset[Any]] = frozenset()

    def requires(self, model: Model) -> None:
        """Accept every model."""

    def run(self, model: Model, context: Any) -> Model:  # noqa: ARG002 (the Pass protocol's signature)
        """Return the model with the activations written out."""
        graph = copy_graph(model.graph)
        for node in list(graph.graph.nodes):
            if node.target in _COMPOSITE:
                node.replace_all_uses_with(_decompose(graph, node))
                graph.graph.erase_node(node)
        absorb_factors(graph)
        return model.with_graph(finish(graph))

    def ensures(self, before: Model, after: Model) -> None:
        """Check that none is left, and that noise gives the same outputs."""
        left = [n for n in after.graph.graph.nodes if n.target in _COMPOSITE]
        if left:
            raise PassError(f"{len(left)} composite activations are left, first {layer_name(left[0])}")
        refuse_changed_outputs(before, after, self.name)


def _decompose(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    x = node.args[0]

    def call(target: Any, *args: Any) -> fx.Node:
        return insert_call(graph, node, target, args, like=node)

    if node.target is aten.silu.default:
        return call(aten.mul.Tensor, x, call(aten.sigmoid.default, x))
    gate = call(aten.clamp.default, call(aten.add.Tensor, x, 3.0), 0.0, 6.0)
    value = gate if node.target is aten.hardsigmoid.default else call(aten.mul.Tensor, x, gate)
    return call(aten.mul.Tensor, value, 1.0 / 6.0)
