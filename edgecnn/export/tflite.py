"""Writes a Program as a TFLite file: NHWC, full int8 where the Program is quantized, no other tools needed.

    file = to_tflite(program, TfliteOptions(io="float32"))

Each op kind has one lowering, listed in `LOWERINGS`; see `tflite_layout` for how transposes are avoided and
`tflite_padding` for paddings. The bytes depend on nothing but the Program and the options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, get_args

from edgecnn.errors import ExportError, UnsupportedOpError
from edgecnn.export import tflite_convolution as convolution
from edgecnn.export import tflite_elementwise as elementwise
from edgecnn.export import tflite_movement as movement
from edgecnn.export import tflite_pooling as pooling
from edgecnn.export import tflite_transposed as transposed
from edgecnn.export.tflite_float import FLOAT_LOWERINGS
from edgecnn.export.tflite_graph import FileGraph
from edgecnn.export.tflite_layout import Order, default_order, plain_order, stored_shape
from edgecnn.export.tflite_lowering import Lowering
from edgecnn.graph.program import Op, Program, QuantParams

IoType = Literal["float32", "int8", "uint8"]

LOWERINGS: Mapping[str, Callable[[Lowering, Op], None]] = MappingProxyType(
    {
        "conv2d": convolution.conv2d,
        "conv_transpose2d": transposed.conv_transpose2d,
        "linear": convolution.linear,
        "add": elementwise.binary,
        "sub": elementwise.binary,
        "mul": elementwise.binary,
        "clamp": elementwise.clamp,
        "leaky_relu": elementwise.leaky_relu,
        "sigmoid": elementwise.sigmoid,
        "tanh": elementwise.tanh,
        "hard_swish": elementwise.hard_swish,
        "hard_sigmoid": elementwise.hard_sigmoid,
        "softmax": elementwise.softmax,
        "max_pool2d": pooling.max_pool2d,
        "avg_pool2d": pooling.avg_pool2d,
        "mean": pooling.mean,
        "amax": pooling.amax,
        "concat": movement.concat,
        "slice": movement.slice_axis,
        "gather": movement.gather,
        "pad": movement.pad,
        "reshape": movement.reshape,
        "transpose": movement.transpose,
        "resize": pooling.resize,
        "quantize": elementwise.quantize,
        "dequantize": elementwise.dequantize,
        "requantize": elementwise.requantize,
        **FLOAT_LOWERINGS,
    }
)
"""Op kind -> what writes it."""


@dataclass(frozen=True)
class TfliteOptions:
    """How to write the file.

    Attributes:
        io: type of inputs and outputs; int8 and uint8 leave out the QUANTIZE and DEQUANTIZE at the boundary.
        metadata: name -> text of metadata entries.
        debug_outputs: names of Program tensors that become outputs too, after the real ones, in this order.
            The signature names each once; one that is an output under its own name is found by its place.
    """

    io: IoType = "float32"
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    debug_outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class TfliteFile:
    """A written file.

    Attributes:
        data: the file's bytes.
        layouts: name of each input, output and debug output -> "nhwc" or "nchw", how it is stored ("nchw"
            stands for the Program's own order where it has not four dimensions).
    """

    data: bytes
    layouts: Mapping[str, str]


def to_tflite(program: Program, options: TfliteOptions | None = None) -> TfliteFile:
    """Write a Program as a TFLite file.

    Args:
        program: float or quantized.
        options: how to write it.

    Raises:
        UnsupportedOpError: an op has no TFLite form; the message names layer and op kind.
        ExportError: integer inputs or outputs were asked for where the Program is float there, a debug output
            names no activation, `io` is unknown, or the file would pass 2 GiB.
        MissingDependencyError: ai-edge-litert is not installed.

    Example:
        >>> from edgecnn.graph.program import BATCH, Tensor
        >>> tensors = {name: Tensor(name, (BATCH, 3, 8, 8)) for name in ("x", "y")}
        >>> relu = Op("clamp", ("x",), "y", {"clamp": (0.0, None)})
        >>> file = to_tflite(Program("relu", ("x",), (("image", "y"),), tensors, (relu,)))
        >>> file.data[4:8], dict(file.layouts)
        (b'TFL3', {'x': 'nhwc', 'image': 'nhwc'})
    """
    options = options or TfliteOptions()
    if options.io not in get_args(IoType):
        raise ExportError(f"io is '{options.io}', expected one of {', '.join(get_args(IoType))}")
    lowering = Lowering(program, FileGraph(program.name))
    boundary = _Boundary(lowering, options)
    inputs = [(name, boundary.write_input(name)) for name in program.inputs]
    for op in program.ops:
        if op.output in boundary.skipped:
            continue
        lower = LOWERINGS.get(op.kind)
        if lower is None:
            known = ", ".join(sorted(LOWERINGS))
            raise UnsupportedOpError(
                f"{op.layer or op.output}: op '{op.kind}' has no TFLite form, expected one of {known}"
            )
        lower(lowering, op)
    outputs = [(public, boundary.write_output(public, name)) for public, name in program.outputs]
    outputs += [(name, boundary.write_debug_output(name)) for name in options.debug_outputs]
    return TfliteFile(
        lowering.graph.serialize(inputs, outputs, options.metadata), MappingProxyType(boundary.layouts)
    )


class _Boundary:
    """Inputs and outputs of the file in the asked type.

    Attributes:
        skipped: outputs of the Program's boundary ops that integer inputs and outputs make needless.
        layouts: public name -> layout.
    """

    def __init__(self, lowering: Lowering, options: TfliteOptions) -> None:
        self.lowering = lowering
        self.io = options.io
        self.layouts: dict[str, str] = {}
        self.skipped: set[str] = set()
        self._producers = {op.output: op for op in lowering.program.ops}
        self._consumers = lowering.program.consumers()
        self._taken: set[int] = set()
        if options.io != "float32":
            self._find_skipped()

    def _find_skipped(self) -> None:
        program = self.lowering.program
        for name in program.inputs:
            self.skipped |= {op.output for op in self._consumers[name] if op.kind == "quantize"}
        for public, name in program.outputs:
            if self.lowering.tensor(name).quant is not None:
                continue
            producer = self._producers.get(name)
            if producer is None or producer.kind != "dequantize":
                kind = producer.kind if producer is not None else "an input"
                raise ExportError(
                    f"output '{public}' of '{program.name}' is float32 (made by {kind}), expected an int8"
                    f" tensor for {self.io} inputs and outputs",
                    hint="write the file with float32 inputs and outputs, or leave the layer there in int8",
                )
            if not self._consumers[name]:
                self.skipped.add(name)

    def write_input(self, name: str) -> int:
        """Add an input and return its index."""
        lowering, tensor = self.lowering, self.lowering.tensor(name)
        order = default_order(len(tensor.shape))
        self.layouts[name] = _layout(order)
        if self.io == "float32" or tensor.quant is not None:
            index = lowering.new_tensor(name, order)
            lowering.place(name, index, order)
            self._taken.add(index)
            return index
        quantized = [op.output for op in self._consumers[name] if op.kind == "quantize"]
        parameters = [lowering.tensor(output).quant for output in quantized]
        quant = parameters[0] if parameters else None
        if (
            quant is None
            or len(quantized) != len(self._consumers[name])
            or any(
                other is None or other.scale != quant.scale or other.zero_point != quant.zero_point
                for other in parameters
            )
        ):
            kinds = sorted({op.kind for op in self._consumers[name]})
            raise ExportError(
                f"input '{name}' of '{lowering.program.name}' is read as float32 by {', '.join(kinds)},"
                f" expected one quantize for {self.io} inputs and outputs",
                hint="write the file with float32 inputs and outputs, or leave the layer there in int8",
            )
        shape = stored_shape(tensor.shape, order)
        index = int8 = lowering.graph.add_tensor(name, shape, self.io, self._io_quant(quant))
        if self.io == "uint8":
            int8 = lowering.graph.add_tensor(name + "/int8", shape, "int8", quant)
            lowering.graph.add_operator("QUANTIZE", (index,), int8)
        self._taken.add(index)
        for output in quantized:
            lowering.place(output, int8, order)
        return index

    def _io_quant(self, quant: QuantParams) -> QuantParams:
        return replace(quant, zero_point=quant.zero_point + 128) if self.io == "uint8" else quant

    def write_output(self, public: str, name: str) -> int:
        """Return the index of an output in the asked type."""
        lowering = self.lowering
        if self.io != "float32" and lowering.tensor(name).quant is None:
            name = self._producers[name].inputs[0]
        index, order = self._stored_output(name)
        self.layouts[public] = _layout(order)
        quant = lowering.tensor(name).quant
        if self.io == "uint8" and quant is not None:
            stored = lowering.graph.tensors[index]
            output = lowering.graph.add_tensor(
                stored.name + "/uint8", stored.shape, "uint8", self._io_quant(quant)
            )
            index = lowering.graph.add_operator("QUANTIZE", (index,), output)
        return self._unshared(index)

    def write_debug_output(self, name: str) -> int:
        """Return the index of a debug output, raw int8 if the tensor is quantized.

        Raises:
            ExportError: no such activation.
        """
        tensor = self.lowering.program.tensors.get(name)
        is_written = name not in self.skipped or (tensor is not None and tensor.quant is not None)
        if tensor is None or tensor.is_constant or not is_written:
            raise ExportError(
                f"debug output '{name}' is no activation in the file of '{self.lowering.program.name}',"
                " expected the name of one"
            )
        index, order = self._stored_output(name)
        self.layouts[name] = _layout(order)
        return self._unshared(index)

    def _stored_output(self, name: str) -> tuple[int, Order]:
        num_dims = len(self.lowering.tensor(name).shape)
        order = self.lowering.order(name)
        if order not in (default_order(num_dims), plain_order(num_dims)):
            order = default_order(num_dims)
        return self.lowering.read(name, order), order

    def _unshared(self, index: int) -> int:
        """Return `index`, or a copy where the tensor is already an input, an output or a constant."""
        graph = self.lowering.graph
        if index in self._taken or graph.tensors[index].buffer:
            stored = graph.tensors[index]
            index = self.lowering.reshape(index, stored.shape, f"/copy{len(graph.tensors)}")
        self._taken.add(index)
        return index


def _layout(order: Order) -> str:
    return "nhwc" if order == default_order(4) else "nchw"
