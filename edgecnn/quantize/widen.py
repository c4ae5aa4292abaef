"""The pass `widen_activations`: int8 activations become int16, symmetric; weights stay int8, biases int32.

    scale = max(|low|, |high|) / 32767      zero_point = 0      [low, high] what the int8 parameters cover
    bias  q = round(b / (scale_x scale_w[c]))

One step is some 1/256 of what it was, so rounding activations costs next to nothing and what is left is the
weights'. Sigmoid, softmax and tanh get 1/32768, as the 16-bit kernels of TFLite have it.

This is for accelerators that compute it (Arm Ethos-U, Qualcomm Hexagon) and for accuracy. On a CPU nothing
computes it fast: LiteRT has plain loops outside XNNPACK, ONNX Runtime computes in float between its 16-bit
QuantizeLinear and DequantizeLinear. The recipe `static_wi8_ai16` calibrates ranges by their ends
(observer = "min_max"): with 65,536 levels there is nothing to gain from cutting them off.

Source: TensorFlow Lite's 16x8 quantization specification (2020); Jacob et al. 2018, arXiv:1712.05877.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (registers torch.ops.quantized_decomposed)

from edgecnn.errors import PassError
from edgecnn.graph.nodes import add_constant, argument, copy_graph, fetch, finish, is_constant, layer_name
from edgecnn.model import Model
from edgecnn.pipeline import Need, PassContext
from edgecnn.quantize.annotate import spec_of
from edgecnn.quantize.leaky_relu import SOURCE_SLOPE
from edgecnn.quantize.parameters import quantize_bias

qd = torch.ops.quantized_decomposed
_PER_TENSOR = (qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default)

LEVELS = (-32768, 32767)
PRESCRIBED = ((1.0 / 256.0, -128), (1.0 / 128.0, 0))
"""Int8 parameters of sigmoid, softmax and tanh."""

_LARGEST_BIAS = 2.0**30


def widened_scale(scale: float, zero_point: int) -> float:
    """Return the int16 scale for what int8 parameters cover, a float32 value.

    Example: -1.28 to 1.27 in steps of 0.01.
        >>> round(widened_scale(0.01, 0) * 32767, 6), widened_scale(1 / 256, -128) * 32768
        (1.28, 1.0)
    """
    if (scale, zero_point) in PRESCRIBED:
        return 2.0**-15
    reach = max(abs(-128 - zero_point), abs(127 - zero_point)) * scale
    return float(np.float32(reach / LEVELS[1]))


@dataclass(frozen=True)
class WidenActivations:
    """Pass: int16 activations for an int8 network (`static_wi8_ai16`).

    Source: TensorFlow Lite's 16x8 quantization specification (2020).
    """

    name: ClassVar[str] = "widen_activations"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def requires(self, model: Model) -> None:
        """Refuse a graph whose activations are not int8."""
        held = [n for n in model.graph.graph.nodes if n.target is qd.quantize_per_tensor.default]
        if not held:
            raise PassError(
                "the model has no int8 activations", hint="put quantize_static ahead of widen_activations"
            )
        if any(node.args[5] is not torch.int8 for node in held):
            raise PassError("the model has int16 activations already", hint="start from the float model")

    def run(self, model: Model, context: PassContext) -> Model:  # noqa: ARG002 (the Pass protocol's signature)
        """Return the model with int16 activations."""
        work = model.with_graph(copy_graph(model.graph))
        graph = work.graph
        for node in list(graph.graph.nodes):
            spec = spec_of(node) if node.op == "call_function" else None
            if spec is not None and spec.weight_axis is not None:
                _rescale(graph, node)
        for node in list(graph.graph.nodes):
            if node.target in _PER_TENSOR:
                _widen(graph, node)
            elif SOURCE_SLOPE in node.meta:  # no kernel has 8 bits for it here
                node.args = (node.args[0], node.meta[SOURCE_SLOPE], *node.args[2:])
        return work.with_graph(finish(graph))

    def ensures(self, before: Model, after: Model) -> None:  # noqa: ARG002
        """Check that no activation is int8."""
        for node in after.graph.graph.nodes:
            if node.target in _PER_TENSOR and node.args[5] is torch.int8:
                raise PassError(f"{layer_name(node)} is int8 after widen_activations")


def _widen(graph: fx.GraphModule, node: fx.Node) -> None:
    """Give a quantize or dequantize int16 parameters, and an operand that is constant int16 values."""
    x, scale, zero_point = node.args[0], float(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    wide = widened_scale(scale, zero_point)
    if is_constant(x):
        real = (fetch(graph, x).double() - zero_point) * scale  # type: ignore[arg-type]
        q = torch.clamp(torch.round(real / wide), *LEVELS).to(torch.int16)
        x = add_constant(graph, node, f"{x.target}_int16", q)  # type: ignore[union-attr]
    node.args = (x, wide, 0, *LEVELS, torch.int16)


def _rescale(graph: fx.GraphModule, layer: fx.Node) -> None:
    """Express a layer's bias in the finer steps of its input.

    A weight channel so small that the bias would not fit into int32 gets a larger scale.
    """
    held, weight, bias = layer.args[0], layer.args[1], argument(layer, 2, "bias")
    if bias is None or not isinstance(held, fx.Node) or not isinstance(weight, fx.Node):
        return
    if held.target not in _PER_TENSOR or weight.target is not qd.dequantize_per_channel.default:
        return  # a layer that computes in float
    x_scale = np.float32(widened_scale(float(held.args[1]), int(held.args[2])))  # type: ignore[arg-type]
    q_bias, bias_scale = (fetch(graph, bias.args[i]) for i in (0, 1))
    real = (q_bias.double() * bias_scale.double()).numpy()
    q_weight, scales = (fetch(graph, weight.args[i]) for i in (0, 1))  # type: ignore[arg-type]
    channels = np.resize(scales.numpy(), len(real)).astype(np.float64)  # a group's scales repeat
    growth = np.maximum(np.abs(real) / (float(x_scale) * _LARGEST_BIAS) / channels, 1.0)
    if (growth > 1.0).any():
        _coarsen(layer, q_weight, scales, growth)
        channels = np.resize(scales.numpy(), len(real)).astype(np.float64)
    fine: npt.NDArray[np.float32] = (x_scale * channels.astype(np.float32)).astype(np.float32)
    q_bias.copy_(torch.from_numpy(quantize_bias(real.astype(np.float32), fine)))
    bias_scale.copy_(torch.from_numpy(fine))


def _coarsen(layer: fx.Node, q_weight: torch.Tensor, scales: torch.Tensor, growth: npt.NDArray[Any]) -> None:
    """Multiply the scales of some weight channels, in place."""
    axis = int(layer.args[1].args[3])  # type: ignore[union-attr,arg-type]
    factor = torch.from_numpy(growth.reshape(-1, len(scales)).max(axis=0))  # of all groups
    shape = [1] * q_weight.dim()
    shape[axis] = -1
    q_weight.copy_(torch.round(q_weight.double() / factor.reshape(shape)).to(torch.int8))
    scales.copy_((scales.double() * factor).float())
