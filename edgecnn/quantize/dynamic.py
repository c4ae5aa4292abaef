"""The pass `quantize_dynamic`: int8 weights, activations quantized to int8 by the runtime, image by image.

    s = (max(x, 0) - min(x, 0)) / 255     x_q = round(x / s) + z     y = s s_w sum (x_q - z) w_q + b

The range is that of the very image, so nothing is calibrated and nothing saturates; what stands between two
layers stays float32. Dense convolutions and linear layers are marked so; other weights (depthwise, grouped,
transposed) are int8 as well and computed in float, since no runtime has such kernels for them. Which of the
marked layers a runtime gains from is a matter of the file's format: `edgecnn.export.dynamic`.

In PyTorch the range is that of the batch.

Source: Krishnamoorthi 2018, arXiv:1806.08342, section 3.1.3 (weights per channel, activations at run time);
Jacob et al. 2018, arXiv:1712.05877, equation 3.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (registers torch.ops.quantized_decomposed)

from edgecnn.errors import PassError, RecipeError
from edgecnn.graph.nodes import argument, aten, finish, insert_call, layer_name
from edgecnn.model import Model
from edgecnn.pipeline import Need, PassContext
from edgecnn.quantize.annotate import spec_of
from edgecnn.quantize.weights import StoreWeights, narrow_weights, refuse_unfolded

qd = torch.ops.quantized_decomposed

LEVELS = (-128, 127)
SMALLEST_SCALE = 2.0**-40
"""Of an image of zeros, in PyTorch."""


@dataclass(frozen=True)
class QuantizeDynamic:
    """Pass: int8 weights and activations whose scales the runtime takes from each image (`dynamic_wi8_ai8`).

    Attributes:
        weight_bits: 8, or 7 for x86 without VNNI, whose u8 * s8 pair sums saturate at 16 bits.

    Source: arXiv:1806.08342 section 3.1.3.
    """

    weight_bits: int = 8

    name: ClassVar[str] = "quantize_dynamic"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def check(self) -> None:
        """Check the parameters.

        Raises:
            RecipeError: naming the parameter, what was found and what was expected.
        """
        if self.weight_bits not in (7, 8):
            raise RecipeError(f"weight_bits is {self.weight_bits}, expected 7 or 8")

    def requires(self, model: Model) -> None:
        """Refuse a graph that is quantized already or still has batch norms."""
        refuse_unfolded(model, self.name)

    def run(self, model: Model, context: PassContext) -> Model:  # noqa: ARG002 (the Pass protocol's signature)
        """Return the model with int8 weights and its dense layers' inputs quantized at run time."""
        work = narrow_weights(model, "int8", self.weight_bits)
        graph = work.graph
        held: dict[fx.Node, fx.Node] = {}
        for node in list(graph.graph.nodes):
            if not is_dense(node):
                continue
            x: Any = node.args[0]
            if x not in held:
                held[x] = _quantize_at_run_time(graph, x, node)
            node.replace_input_with(x, held[x])
        return work.with_graph(finish(graph))

    def ensures(self, before: Model, after: Model) -> None:
        """Check that weights are int8 and that every dense layer's input is quantized."""
        StoreWeights("int8").ensures(before, after)
        for node in after.graph.graph.nodes:
            if is_dense(node) and node.args[0].target is not qd.dequantize_per_tensor.tensor:
                raise PassError(f"{layer_name(node)} reads float32 after quantize_dynamic")


def is_dense(node: fx.Node) -> bool:
    """Whether a node is a convolution without groups, or a linear layer."""
    spec = spec_of(node) if node.op == "call_function" else None
    if spec is None or spec.weight_axis is None or node.target is aten.conv_transpose2d.input:
        return False
    return node.target is aten.linear.default or int(argument(node, 6, "groups", 1)) == 1


def _quantize_at_run_time(graph: fx.GraphModule, x: fx.Node, layer: fx.Node) -> fx.Node:
    """Insert choose_qparams, quantize and dequantize of `x` ahead of `layer` and return the last."""
    arguments: list[Any] = [x, *LEVELS, SMALLEST_SCALE, torch.int8]
    chosen = insert_call(graph, layer, qd.choose_qparams.tensor, arguments, like=layer)
    parameters = [insert_call(graph, layer, operator.getitem, [chosen, i], like=layer) for i in (0, 1)]
    held = x
    for target in (qd.quantize_per_tensor.tensor, qd.dequantize_per_tensor.tensor):
        held = insert_call(graph, layer, target, [held, *parameters, *LEVELS, torch.int8], like=layer)
    return held
