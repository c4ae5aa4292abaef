"""The pass `store_weights`: weights in float16 or int8, everything computed in float32.

    float16   w_h = round_to_nearest(w)                        half the size
    int8      w_q = round(w / scale[c]), scale[c] = max|w[c]| / 127      about a quarter of the size

The files hold the narrow weights and a conversion to float32, which ONNX Runtime and XNNPACK carry out once
when they load a file. So it gets smaller and neither faster nor slower; biases and activations stay float32.
Nothing is calibrated.

Source: IEEE 754-2008 (binary16); Krishnamoorthi 2018, arXiv:1806.08342, section 3.1.1 (weight only, per
channel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from edgecnn.errors import PassError, RecipeError, UnsupportedOpError
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
from edgecnn.model import Model
from edgecnn.pipeline import Need, PassContext
from edgecnn.quantize.annotate import spec_of
from edgecnn.quantize.constants import dequantized
from edgecnn.quantize.parameters import quantize_weight, weight_scales

DTYPES = ("float16", "int8")

REFUSED = {
    "int4": "no runtime here computes convolutions with int4 weights any faster: ONNX Runtime widens them "
    "when it loads a file, LiteRT runs them outside XNNPACK, in 1.15 to 3.4 times the latency of float",
}
"""What is not done for a dtype that could be asked for."""

LARGEST_HALF = float(np.finfo(np.float16).max)

MOST_HALF_ERROR = 2.0**-10
"""Of a layer's weights, root mean square: normal numbers lose at most 2^-11, those below 6e-5 more."""


@dataclass(frozen=True)
class StoreWeights:
    """Pass: narrow weights, float arithmetic (`fp16`, `weight_only_wi8_afp32`).

    Attributes:
        dtype: "float16", or "int8" with one scale per output channel.

    Source: arXiv:1806.08342 section 3.1.1.
    """

    dtype: str = "float16"

    name: ClassVar[str] = "store_weights"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def check(self) -> None:
        """Check the parameters.

        Raises:
            RecipeError: naming the parameter, what was found and what was expected.
        """
        if self.dtype not in DTYPES:
            raise RecipeError(
                f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}", hint=REFUSED.get(self.dtype)
            )

    def requires(self, model: Model) -> None:
        """Refuse a graph whose weights are narrow already, or a batch norm that would be folded into them."""
        refuse_unfolded(model, self.name)

    def run(self, model: Model, context: PassContext) -> Model:  # noqa: ARG002 (the Pass protocol's signature)
        """Return the model with narrow weights behind conversions to float32."""
        return narrow_weights(model, self.dtype)

    def ensures(self, before: Model, after: Model) -> None:  # noqa: ARG002
        """Check that every layer reads a converted weight."""
        for node in after.graph.graph.nodes:
            spec = spec_of(node) if node.op == "call_function" else None
            if spec is not None and spec.weight_axis is not None and is_constant(node.args[1]):
                raise PassError(f"{layer_name(node)} has a float32 weight after store_weights")


def narrow_weights(model: Model, dtype: str, num_bits: int = 8) -> Model:
    """Return a model whose layers read narrow weights behind conversions to float32.

    Args:
        model: float, batch norms folded.
        dtype: "float16" or "int8".
        num_bits: of int8 values.

    Raises:
        UnsupportedOpError: if a weight is no parameter.
        PassError: if one is too large for float16.
    """
    work = model.with_graph(copy_graph(model.graph))
    coarse: list[str] = []
    stored: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in list(work.graph.graph.nodes):
        spec = spec_of(node) if node.op == "call_function" else None
        if spec is None or spec.weight_axis is None:
            continue
        weight = argument(node, 1, "weight")
        if not is_constant(weight):
            raise UnsupportedOpError(
                f"{layer_name(node)} has a weight computed from the input, expected a parameter"
            )
        key = (weight, spec.weight_axis)
        if key not in stored:
            values = fetch(work.graph, weight).float()
            if dtype == "float16":
                stored[key] = _as_half(work.graph, node, weight, values)
                if _half_error(values) > MOST_HALF_ERROR:
                    coarse.append(layer_name(node))
            else:
                stored[key] = _as_int8(work.graph, node, values, spec.weight_axis, num_bits)
        node.args = (node.args[0], stored[key], argument(node, 2, "bias"), *node.args[3:])
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}
    done = work.with_graph(finish(work.graph))
    return done.with_warning(_coarse_text(coarse)) if coarse else done


def _half_error(values: torch.Tensor) -> float:
    """Return what rounding to float16 changes, as a share of the values, root mean square.

    Example:
        >>> _half_error(torch.tensor([1e-9])), _half_error(torch.tensor([0.5]))
        (1.0, 0.0)
    """
    exact = values.double()
    norm = float(exact.norm())
    return float((values.half().double() - exact).norm()) / norm if norm > 0 else 0.0


def _coarse_text(layers: list[str]) -> str:
    """Say which layers have weights too small for float16."""
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return (
        f"weights too small for float16 in {layers[0]}{more}: below 6e-5 it has fewer digits, and what is "
        "below 3e-8 becomes 0; the recipe weight_only_wi8_afp32 has a scale per channel"
    )


def _as_int8(graph: fx.GraphModule, node: fx.Node, values: torch.Tensor, axis: int, num_bits: int) -> fx.Node:
    """Add an int8 weight and its conversion to float32."""
    given = values.numpy()
    scales = weight_scales(given, axis, num_bits=num_bits, minimize_mse=False)
    q = quantize_weight(given, scales, axis, num_bits=num_bits)
    name = f"{argument(node, 1, 'weight').target}_int8"
    return dequantized(graph, node, name, q, scales, axis)


def refuse_unfolded(model: Model, name: str) -> None:
    """Refuse a graph that is quantized already, or one whose batch norms are yet to be folded.

    Args:
        model: what the pass `name` is given.
        name: of the pass, for the message.

    Raises:
        PassError: naming the layer.
    """
    for node in model.graph.graph.nodes:
        if "quantized_decomposed" in str(node.target):
            raise PassError("the model is quantized already", hint="start from the float model")
        if node.target is aten.batch_norm.default:
            raise PassError(f"{layer_name(node)} is not folded", hint=f"put fold_batch_norm ahead of {name}")


def _as_half(graph: fx.GraphModule, node: fx.Node, weight: fx.Node, values: torch.Tensor) -> fx.Node:
    """Add a float16 weight and its conversion to float32.

    Raises:
        PassError: if a weight is too large for float16.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest > LARGEST_HALF:
        where = layer_name(node)
        raise PassError(
            f"{where} has a weight of {largest:.4g}, expected at most {LARGEST_HALF:g} in float16",
            hint="use the recipe weight_only_wi8_afp32, whose weights have scales",
        )
    half = add_constant(graph, node, f"{weight.target}_float16", values.half())
    arguments: list[Any] = [half, torch.float32]
    return insert_call(graph, node, aten.to.dtype, arguments, like=node)
