"""The ONNX graph while it grows: names, initializers, and the QuantizeLinear and DequantizeLinear around ops.

A quantized tensor `t` of the Program is the integer value `t` of the file, in the activation dtype:

    int8:   q_file = q          zero_point_file = zero_point
    uint8:  q_file = q + 128    zero_point_file = zero_point + 128
    int16:  like int8, of a Program whose activations are int16

so that scale * (q_file - zero_point_file) is the same real number either way. An operator reads it through a
DequantizeLinear of its own (a shared one can keep a runtime from fusing either operator) and its result goes
through one QuantizeLinear. Weights stay int8 and biases int32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgecnn.errors import ExportError
from edgecnn.export.onnx_islands import borders_to_shield
from edgecnn.graph.program import Array, Op, Program, QuantParams, Tensor

_FLOAT = int(onnx.TensorProto.FLOAT)

UINT8_SHIFT = 128
"""What is added to an int8 value and its zero point to make them uint8."""


class GraphBuilder:
    """Nodes and initializers of one ONNX graph under construction.

    Args:
        program: the network being written.
        activation_dtype: "int8", "uint8" or "int16", the file's dtype of quantized activations.
        opset: the ONNX operator set being written.
        kept: tensors that the file must hold under their own name.

    Attributes:
        consumers: for each tensor of the Program the ops that read it.
        producers: for each tensor that an op of the Program makes, that op.
        nodes: in execution order.
        initializers: by name.
        value_names: the file's name of a tensor that is not called as in the Program.
        absorbed: (tensor made by a requantize that is left out) -> the tensor it requantizes.
        kept: tensors that an output or debug output gives out.
        shielded: outputs of quantize operators that ONNX Runtime must not move or fuse.
    """

    def __init__(
        self, program: Program, activation_dtype: str, opset: int, kept: Collection[str] = ()
    ) -> None:
        self.program = program
        self.consumers = program.consumers()
        self.producers = {op.output: op for op in program.ops}
        self.activation_dtype = activation_dtype
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.value_names: dict[str, str] = {}
        self.absorbed: dict[str, str] = {}
        self.kept = frozenset(kept) | {name for _, name in program.outputs}
        self.shielded = borders_to_shield(program)
        self._taken: set[str] = set(program.tensors) | {public for public, _ in program.outputs}
        self._node_names: set[str] = set()
        self._shared_names: dict[tuple[str, str, bytes], str] = {}

    def unique(self, wanted: str) -> str:
        """Return the first of wanted, wanted_1, wanted_2 ... that no value has; the name is then taken."""
        return _first_free(wanted, self._taken)

    def tensor(self, name: str) -> Tensor:
        """Return the Program's tensor of that name."""
        return self.program.tensors[name]

    def value(self, name: str) -> str:
        """Return the file's name of a Program tensor; a constant becomes an initializer."""
        data, value = self.tensor(name).data, self.value_names.get(name, name)
        if data is not None and value not in self.initializers:
            self.initializers[value] = numpy_helper.from_array(np.asarray(data, order="C"), value)
        return value

    def constant(self, wanted: str, data: Array) -> str:
        """Add an initializer under a free name like `wanted` and return its name."""
        name = self.unique(wanted)
        self.initializers[name] = numpy_helper.from_array(np.asarray(data, order="C"), name)
        return name

    def node(
        self,
        op: Op,
        op_type: str,
        inputs: Sequence[str],
        output: str | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> str:
        """Append a node that stands for (a part of) `op` and return the name of its output value."""
        output = self.unique(f"{op.output}/{op_type}") if output is None else output
        self.split_node(op, op_type, inputs, [output], attributes)
        return output

    def split_node(
        self,
        op: Op,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Append a node with any number of outputs."""
        where = op.layer.split(" (")[0] or op.output
        name = _first_free(f"{where}/{op_type}", self._node_names)
        self.nodes.append(
            helper.make_node(op_type, list(inputs), list(outputs), name=name, **(attributes or {}))
        )

    def shifted(self, quant: QuantParams, dtype: str | None = None) -> tuple[Array, Array]:
        """Return scale () or (channels,) float32 and zero point () in `dtype`, the activations' if None."""
        dtype = self.activation_dtype if dtype is None else dtype
        zero_point = quant.zero_point + (UINT8_SHIFT if dtype == "uint8" else 0)
        return np.asarray(quant.scale, np.float32), np.asarray(zero_point, dtype)

    def dequantize(self, op: Op, value: str, quant: QuantParams, dtype: str | None = None) -> str:
        """Append a DequantizeLinear of an activation's integers and return the float value's name."""
        parameters = self.parameters(value, quant, dtype)
        return self.node(op, "DequantizeLinear", [value, *parameters], self.unique(f"{value}/real"))

    def quantize(self, op: Op, value: str, quant: QuantParams, output: str, dtype: str | None = None) -> str:
        """Append a QuantizeLinear that makes the integer value `output`."""
        return self.node(op, "QuantizeLinear", [value, *self.parameters(output, quant, dtype)], output)

    def real(self, op: Op, name: str) -> str:
        """Return a float value of a Program tensor; a quantized one gets a DequantizeLinear."""
        tensor = self.tensor(name)
        if tensor.quant is None:
            return self.value(name)
        if tensor.data is None:
            return self.dequantize(op, self.value(name), tensor.quant)
        return self.real_parameter(op, tensor)

    def real_parameter(self, op: Op, tensor: Tensor) -> str:
        """Return a float value of a constant kept as it is: int8 weights, int32 biases, float32 anything.

        Weights of a layer that computes in float are converted by Cast (and Mul), which ONNX Runtime folds
        when it loads the file; a DequantizeLinear it would run again for every image.
        """
        stored = self.value(tensor.name)
        if tensor.dtype == "float16":
            return self.node(op, "Cast", [stored], self.unique(f"{tensor.name}/real"), {"to": _FLOAT})
        if tensor.quant is None:
            return stored
        if tensor.dtype == "int8" and self.tensor(op.output).quant is None:
            return self._scaled(op, stored, tensor.quant, len(tensor.shape))
        scale = np.asarray(tensor.quant.scale, np.float32)
        inputs = [stored, self._shared(f"{tensor.name}/scale", scale)]
        if tensor.dtype != "int32":
            zero_point = np.full(scale.shape, tensor.quant.zero_point, tensor.dtype)
            inputs.append(self._shared(f"{tensor.name}/zero_point", zero_point))
        attributes = {} if tensor.quant.axis is None else {"axis": tensor.quant.axis}
        output = self.unique(f"{tensor.name}/real")
        return self.node(op, "DequantizeLinear", inputs, output, attributes)

    def _scaled(self, op: Op, stored: str, quant: QuantParams, num_dims: int) -> str:
        """Return scale * q of symmetric integers, in nodes that are folded when the file is loaded."""
        real = self.node(op, "Cast", [stored], self.unique(f"{stored}/cast"), {"to": _FLOAT})
        scale = self.constant(f"{stored}/scale", quant.broadcast_scale(num_dims))
        return self.node(op, "Mul", [real, scale], self.unique(f"{stored}/real"))

    def real_operand(self, op: Op, name: str, *, negated: bool = False) -> str:
        """Return a float value of an operand of add, sub or mul, or of its opposite if it is a constant.

        A quantized constant is stored in the activation dtype, since the runtime's integer kernels want one
        dtype; its opposite is exact: -(q - z) = (-1 - q) - (-1 - z), and -1 - q is in int8 when q is.
        """
        tensor = self.tensor(name)
        if tensor.data is None or (tensor.quant is None and not negated):
            return self.real(op, name)
        if tensor.quant is None:
            return self.constant(f"{name}/negated", -tensor.data)
        quant, q = tensor.quant, tensor.data
        if negated:
            quant, q = replace(quant, zero_point=-1 - quant.zero_point), np.int8(-1) - q
        stored = self.constant(f"{name}/{'negated' if negated else 'operand'}", self.shift(q))
        if quant.axis is None:
            return self.dequantize(op, stored, quant)
        scale, zero_point = self.shifted(quant)
        inputs = [
            stored,
            self.constant(f"{name}/scale", scale),
            self.constant(f"{name}/zero_point", np.full(scale.shape, zero_point)),
        ]
        return self.node(op, "DequantizeLinear", inputs, self.unique(f"{name}/real"), {"axis": quant.axis})

    def integers(self, name: str) -> str:
        """Return the value of a tensor for ops that only move values: integers if it is quantized."""
        tensor = self.tensor(name)
        if tensor.data is None or tensor.quant is None:
            return self.value(name)
        return self._shared(f"{name}/operand", self.shift(tensor.data))

    def shift(self, q: Array) -> Array:
        """Return a Program's integers in the activation dtype."""
        if self.activation_dtype != "uint8":
            return q.astype(self.activation_dtype)
        return (q.astype(np.int16) + UINT8_SHIFT).astype(np.uint8)

    def move(
        self,
        op: Op,
        op_type: str,
        extra: Sequence[str] = (),
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Append a node that moves op's values, integers or floats, unchanged to other places.

        Of 16-bit integers ONNX Runtime moves floats, as far as it has no kernels for them.
        """
        if self.moves_floats(op_type):
            self.store(op, op_type, [self.real(op, op.inputs[0]), *extra], attributes)
            return
        self.node(op, op_type, [self.integers(op.inputs[0]), *extra], self.value(op.output), attributes)

    def moves_floats(self, op_type: str) -> bool:
        """Whether ONNX Runtime has no kernel of this type for the file's integers."""
        return self.activation_dtype == "int16" and op_type in ("MaxPool", "Pad", "ReduceMax")

    def store(
        self, op: Op, op_type: str, inputs: Sequence[str], attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Append the node whose float result, clamped and quantized as the Program says, is op's output."""
        tensor = self.tensor(op.output)
        if tensor.quant is not None:
            self.store_quantized(op, self.node(op, op_type, inputs, None, attributes))
            return
        low, high = op.attributes.get("clamp") or (None, None)
        final = self.value(op.output)
        if op_type == "Clamp":
            self._clamp_real(op, inputs[0], final)
        elif low is None and high is None:
            self.node(op, op_type, inputs, final, attributes)
        else:
            self._clamp_real(op, self.node(op, op_type, inputs, None, attributes), final)

    def store_quantized(self, op: Op, real: str, quant: QuantParams | None = None) -> None:
        """Append QuantizeLinear of a float value, with the output's parameters or `quant`, and op's clamp.

        A clamp that saturation already implies costs nothing. Another one clips the integers: a Relu or Clip
        before QuantizeLinear would keep the runtime from fusing the operator.

        Raises:
            ExportError: the Program gives op's output no quantization parameters.
        """
        tensor = self.tensor(op.output)
        quant = tensor.quant if quant is None else quant
        if quant is None or tensor.quant is None:
            raise ExportError(
                f"{op.layer or op.output}: {op.kind} makes {op.output!r}, "
                "which has no quantization parameters"
            )
        low, high = integer_bounds(op, tensor.quant)
        final = self.value(op.output)
        if tensor.quant.num_bits == 16 and (low, high) != (tensor.quant.low, tensor.quant.high):
            bounded = self.unique(f"{op.output}/bounded")  # ONNX Runtime has no 16-bit Clip
            self._clamp_real(op, real, bounded)
            self.quantize(op, bounded, quant, final)
            return
        if (low, high) == (tensor.quant.low, tensor.quant.high):
            self.quantize(op, real, quant, final)
            return
        self.clip_integers(
            op, self.quantize(op, real, quant, self.unique(f"{op.output}/unclamped")), (low, high)
        )

    def clip_integers(self, op: Op, value: str, bounds: tuple[int, int]) -> None:
        """Append a Clip of an integer value to `bounds` (in int8 terms) that makes op's output."""
        low, high = (self.shift(np.asarray(bound)) for bound in bounds)
        inputs = [
            value,
            self.constant(f"{op.output}/low", low) if bounds[0] > -128 else "",
            self.constant(f"{op.output}/high", high) if bounds[1] < 127 else "",
        ]
        self.node(op, "Clip", _without_trailing_gaps(inputs), self.value(op.output))

    def _clamp_real(self, op: Op, value: str, final: str) -> None:
        low, high = op.attributes["clamp"]
        if low == 0 and high is None:
            self.node(op, "Relu", [value], final)
            return
        limits = [
            "" if limit is None else self.constant(f"{op.output}/{which}", np.asarray(limit, np.float32))
            for which, limit in (("low", low), ("high", high))
        ]
        self.node(op, "Clip", _without_trailing_gaps([value, *limits]), final)

    def parameters(self, value: str, quant: QuantParams, dtype: str | None = None) -> list[str]:
        """Return the names of the initializers scale and zero point of an integer value."""
        scale, zero_point = self.shifted(quant, dtype)
        return [
            self._shared(f"{value}/scale", scale),
            self._shared(f"{value}/zero_point", zero_point),
        ]

    def _shared(self, wanted: str, data: Array) -> str:
        """Return the name of an initializer with these values, added when they are first asked for."""
        key = (wanted, data.dtype.str, data.tobytes())
        if key not in self._shared_names:
            self._shared_names[key] = self.constant(wanted, data)
        return self._shared_names[key]


def integer_bounds(op: Op, quant: QuantParams) -> tuple[int, int]:
    """Return (q_lo, q_hi): what the attribute `clamp` of an op allows its int8 output.

    Example:
        >>> relu6 = Op("clamp", ("x",), "y", {"clamp": (0, 6)})
        >>> integer_bounds(relu6, QuantParams(np.float32(0.1), zero_point=-100))
        (-100, -40)
    """
    low, high = op.attributes.get("clamp") or (None, None)
    q_low, q_high = quant.low, quant.high
    if low is not None:
        q_low = int(quant.quantize(np.asarray(low, np.float32)))
    if high is not None:
        q_high = int(quant.quantize(np.asarray(high, np.float32)))
    return q_low, q_high


def same_params(a: QuantParams, b: QuantParams) -> bool:
    """Return whether two tensors hold the same real numbers by the same integers."""
    return bool(np.array_equal(a.scale, b.scale)) and a.zero_point == b.zero_point and a.axis == b.axis


def _without_trailing_gaps(inputs: Sequence[str]) -> list[str]:
    last = max(index for index, name in enumerate(inputs) if name)
    return list(inputs[: last + 1])


def _first_free(wanted: str, taken: set[str]) -> str:
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name
