"""Build the Program from an exported graph, float or with quantize/dequantize nodes.

The graph's q/dq nodes are not operators here: they say in which parameters a value is held. An operator
between dequantized inputs and a quantized output becomes one integer operator; what has no such form is
left float, with explicit quantize and dequantize around it (`float_islands` lists those).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (registers torch.ops.quantized_decomposed)

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.nodes import fetch, is_constant, layer_name
from edgecnn.graph.program import FLOAT_KINDS, Array, Op, Program, QuantParams, Tensor
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model

qd = torch.ops.quantized_decomposed
Handler = Callable[["ProgramBuilder", fx.Node], Any]

LAYERS = frozenset({"conv2d", "conv_transpose2d", "linear"})
BOUNDARY_KINDS = frozenset({"quantize", "dequantize", "requantize"})
FUSES_CLAMP = frozenset({"conv2d", "conv_transpose2d", "linear", "add", "sub", "mul"})


class ProgramBuilder:
    """Collects tensors and ops while the graph is walked.

    Attributes:
        tensors: by name, in order of definition.
        ops: in execution order.
        values: graph node -> tensor name, or a list of them for a node that gives several.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.shapes = infer_shapes(model)
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []
        self.values: dict[fx.Node, Any] = {}
        self._folded: dict[fx.Node, torch.Tensor] = {}
        self._makers: dict[str, fx.Node] = {}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return a tensor node's shape, BATCH first where it is batched."""
        return tuple(self.shapes[node.name])

    def tensor(self, node: Any) -> str:
        """Return the name of the tensor a graph argument stands for.

        Raises:
            UnsupportedOpError: if it is not a single tensor.
        """
        if isinstance(node, (int, float)):
            return self.constant(np.asarray(node, np.float32), "scalar")
        value = self.values.get(node)
        if value is None and node in self._folded:
            value = self.values[node] = self.constant(
                self._folded[node].float().numpy(), str(node.target if node.op == "get_attr" else node.name)
            )
        if not isinstance(value, str):
            raise UnsupportedOpError(f"{layer_name(node)} is used as a tensor but has no single tensor value")
        return value

    def weight(self, node: Any) -> str:
        """Return the name of a layer's weight; float16 behind a conversion to float32 stays float16."""
        if node not in self.values and isinstance(node, fx.Node) and node.target is torch.ops.aten.to.dtype:
            source: Any = node.args[0]
            stored = self.constant_value(source)
            if stored is not None and stored.dtype is torch.float16:
                self.values[node] = self.constant(stored.numpy(), str(source.target))
        return self.tensor(node)

    def constant(self, data: Array, name: str, quant: QuantParams | None = None) -> str:
        """Add a constant under a free name and return the name."""
        free = self._free(name)
        self.tensors[free] = Tensor(free, tuple(data.shape), str(data.dtype), quant, data)
        return free

    def constant_value(self, node: Any) -> torch.Tensor | None:
        """Return the tensor if the value is known now, else None."""
        return self._folded.get(node) if isinstance(node, fx.Node) else None

    def emit(
        self,
        node: fx.Node,
        kind: str,
        inputs: list[str],
        attributes: dict[str, Any] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> str:
        """Append an op for `node` and return its output's name; the shape is the node's unless given."""
        output = self._free(node.name)
        self.tensors[output] = Tensor(output, self.shape(node) if shape is None else shape)
        self.ops.append(Op(kind, tuple(inputs), output, MappingProxyType(attributes or {}), layer_name(node)))
        self._makers[output] = node
        return output

    def emit_moved(
        self, node: fx.Node, kind: str, inputs: list[str], attributes: dict[str, Any], shape: tuple[int, ...]
    ) -> str:
        """Append an op that only moves values, on its way to `node`: it stays in the input's integers."""
        output = self.emit(node, kind, inputs, attributes, shape)
        x = self.tensors[inputs[0]]
        if x.data is None and all(self.tensors[name].quant == x.quant for name in inputs[1:]):
            self.tensors[output] = replace(self.tensors[output], dtype=x.dtype, quant=x.quant)
        return output

    def producer(self, name: str) -> int | None:
        """Return the index of the op that makes a tensor, None for inputs and constants."""
        for index in range(len(self.ops) - 1, -1, -1):
            if self.ops[index].output == name:
                return index
        return None

    def fuse_clamp(self, node: fx.Node, low: float | None, high: float | None) -> str:
        """Bound a value, inside the op that makes it where that op can and nobody else reads it."""
        x = self.tensor(node.args[0])
        index = self.producer(x)
        source = node.args[0]
        if (
            index is not None
            and isinstance(source, fx.Node)
            and self._makers.get(x) is source  # not through a copy, which other nodes may have been spared
            and len(source.users) == 1
            and self.tensors[x].quant is None
            and self.ops[index].kind in FUSES_CLAMP
            and "clamp" not in self.ops[index].attributes
        ):
            op = self.ops[index]
            attributes = MappingProxyType({**op.attributes, "clamp": (low, high)})
            self.ops[index] = replace(op, attributes=attributes)
            return x
        return self.emit(node, "clamp", [x], {"clamp": (low, high)})

    def quantize(self, node: fx.Node) -> str:
        """Say in which parameters a value is held, or convert it."""
        source = node.args[0]
        x = self.tensor(source)
        scale, zero_point = np.float32(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
        dtype, num_bits = ("int16", 16) if node.args[5] is torch.int16 else ("int8", 8)
        quant = QuantParams(np.asarray(scale, np.float32), zero_point, num_bits=num_bits)
        held = self.tensors[x].quant
        if held is not None:
            if held.zero_point == zero_point and np.array_equal(held.scale, quant.scale):
                return x
            output = self.emit(node, "requantize", [x])
        elif self.producer(x) is not None and isinstance(source, fx.Node) and len(source.users) == 1:
            output = x
        else:
            output = self.emit(node, "quantize", [x])
        self.tensors[output] = replace(self.tensors[output], dtype=dtype, quant=quant)
        return output

    def quantized_constant(self, node: fx.Node) -> str:
        """Return the constant behind a dequantize of known integers (weights, biases, scalars)."""
        values = fetch(self.model.graph, node.args[0]).numpy()  # type: ignore[arg-type]
        name = str(node.args[0].target)  # type: ignore[union-attr]
        if node.target is qd.dequantize_per_channel.default:
            scale = fetch(self.model.graph, node.args[1]).float().numpy()  # type: ignore[arg-type]
            axis = int(node.args[3])  # type: ignore[arg-type]
            return self.constant(values, name, QuantParams(scale, 0, axis))
        scale = np.asarray(node.args[1], np.float32)
        num_bits = 16 if values.dtype == np.int16 else 8
        quant = QuantParams(scale, int(node.args[2]), num_bits=num_bits)  # type: ignore[arg-type]
        return self.constant(values, name, quant)

    def fold(self, node: fx.Node) -> bool:
        """Evaluate a node whose inputs are all known; return whether it was."""
        if node.op == "get_attr":
            self._folded[node] = fetch(self.model.graph, node)
            return True
        sources = node.all_input_nodes
        if not sources or any(source not in self._folded for source in sources):
            return False
        arguments = fx.map_arg(node.args, lambda n: self._folded[n])
        keywords = fx.map_arg(node.kwargs, lambda n: self._folded[n])
        value = node.target(*arguments, **keywords)  # type: ignore[operator]
        if isinstance(value, torch.Tensor):
            self._folded[node] = value
            return True
        return False

    def _free(self, name: str) -> str:
        free, count = name, 0
        while free in self.tensors:
            count += 1
            free = f"{name}_{count}"
        return free


def build_program(model: Model) -> Program:
    """Return the Program of a model's graph.

    Args:
        model: float (batch norms folded or not) or quantized by `quantize_static`.

    Returns:
        A Program with the model's public input and output names.

    Raises:
        UnsupportedOpError: naming the layer and the operator that has no lowering.
    """
    from edgecnn.graph.build_ops import HANDLERS

    builder = ProgramBuilder(model)
    inputs: list[str] = []
    outputs: list[tuple[str, str]] = []
    for node in model.graph.graph.nodes:
        if node.op == "placeholder":
            spec = model.spec.inputs[len(inputs)]
            builder.tensors[spec.name] = Tensor(spec.name, builder.shape(node))
            builder.values[node] = spec.name
            inputs.append(spec.name)
        elif node.op == "output":
            flat = _flatten(node.args[0])
            outputs = [
                (spec.name, builder.tensor(n)) for spec, n in zip(model.spec.outputs, flat, strict=True)
            ]
        elif is_constant(node):
            builder.fold(node)
        elif node.name in builder.shapes:
            _handle(builder, node, HANDLERS)
    return _with_boundaries(model.spec.name, inputs, outputs, builder)


def _handle(builder: ProgramBuilder, node: fx.Node, handlers: dict[Any, Handler]) -> None:
    """Lower one call."""
    if node.target in (qd.dequantize_per_channel.default, qd.dequantize_per_tensor.default):
        source = node.args[0]
        known = is_constant(source)
        builder.values[node] = builder.quantized_constant(node) if known else builder.tensor(source)
    elif node.target is qd.quantize_per_tensor.default:
        builder.values[node] = builder.quantize(node)
    elif not builder.fold(node):
        handler = handlers.get(node.target)
        if handler is None:
            raise UnsupportedOpError(
                f"{layer_name(node)} has no lowering to ONNX and TFLite",
                hint="`edgecnn inspect MODEL` lists every operator that has none",
            )
        builder.values[node] = handler(builder, node)


def _flatten(value: Any) -> list[fx.Node]:
    """Return the output nodes in order, out of nested lists and dicts."""
    if isinstance(value, fx.Node):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [node for item in value for node in _flatten(item)]
    return []


def _with_boundaries(
    name: str, inputs: list[str], outputs: list[tuple[str, str]], builder: ProgramBuilder
) -> Program:
    """Insert quantize/dequantize where an op is not integer throughout, and at the outputs."""
    tensors = dict(builder.tensors)
    ops: list[Op] = []
    dequantized: dict[str, str] = {}

    def as_float(source: str, layer: str) -> str:
        tensor = tensors[source]
        if tensor.quant is None:
            return source
        if source not in dequantized:
            free = f"{source}_float"
            if tensor.data is not None:
                values = tensor.quant.dequantize(tensor.data)
                tensors[free] = Tensor(free, tensor.shape, "float32", None, values)
            else:
                tensors[free] = Tensor(free, tensor.shape)
                ops.append(Op("dequantize", (source,), free, layer=layer))
            dequantized[source] = free
        return dequantized[source]

    for op in builder.ops:
        held = [tensors[n].quant is not None for n in (*op.inputs, op.output)]
        is_integer = all(held) and op.kind not in FLOAT_KINDS
        if op.kind in BOUNDARY_KINDS or is_integer or not any(held) or _holds_weight_only(op, held):
            ops.append(op)
            continue
        sources = tuple(as_float(n, op.layer) for n in op.inputs)
        output = tensors[op.output]
        if output.quant is None:
            ops.append(replace(op, inputs=sources))
            continue
        free = f"{op.output}_real"
        tensors[free] = Tensor(free, output.shape)
        ops.append(replace(op, inputs=sources, output=free))
        ops.append(Op("quantize", (free,), op.output, layer=op.layer))
    float_outputs = tuple((public, as_float(tensor, public)) for public, tensor in outputs)
    used = {n for op in ops for n in (*op.inputs, op.output)} | {n for _, n in float_outputs} | set(inputs)
    kept = {n: t for n, t in tensors.items() if n in used}
    return Program(name, tuple(inputs), float_outputs, MappingProxyType(kept), tuple(ops))


def _holds_weight_only(op: Op, held: list[bool]) -> bool:
    """Return whether a layer computes in float with an int8 weight (its second input)."""
    return op.kind in LAYERS and held[1] and sum(held) == 1


def float_islands(program: Program) -> list[str]:
    """Return the layers of a quantized Program that compute in float.

    Returns:
        Layer names in execution order; empty for a full-int8 Program and for one that computes in float.
    """
    if program.computes_in_float:
        return []
    return [
        op.layer
        for op in program.ops
        if op.kind not in BOUNDARY_KINDS and program.tensors[op.output].quant is None
    ]
