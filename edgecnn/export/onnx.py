"""Program -> ONNX file.

A float Program becomes plain float ONNX, a quantized one QDQ: integers between operators, each operator
between DequantizeLinear and QuantizeLinear, int8 weights and int32 biases straight into DequantizeLinear.
ONNX Runtime fuses each such group into one integer kernel; `onnx_ops` says which ONNX form every kind of
operator takes.

Opset 13, the oldest with per_channel quantization, is read by ONNX Runtime 1.6 and later. A network with GELU
or layer normalization is written in opset 20 (ONNX Runtime 1.17), which has them as nodes: between integers
ONNX Runtime reads every operand through a DequantizeLinear of its own and does not find them in their parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import onnx
from onnx import helper

from edgecnn.errors import ExportError
from edgecnn.export.onnx_alignment import align_channels
from edgecnn.export.onnx_boundary import Boundary
from edgecnn.export.onnx_graph import GraphBuilder
from edgecnn.export.onnx_ops import write_op
from edgecnn.graph.program import BATCH, Program, Tensor

BATCH_NAME = "batch"
"""The symbolic name of dimension 0 of every input and output."""

MIN_OPSET = 13
MAX_OPSET = 21
FUSED_OPSET, FUSED_KINDS = 20, frozenset({"gelu", "normalize"})
"""The oldest that has these kinds as single nodes."""
INT16_OPSET = 21
"""The oldest whose QuantizeLinear makes 16-bit integers."""

_ELEMENT_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "int8": onnx.TensorProto.INT8,
    "uint8": onnx.TensorProto.UINT8,
    "int16": onnx.TensorProto.INT16,
}


@dataclass(frozen=True)
class OnnxOptions:
    """How the file is written.

    Attributes:
        activation_dtype: "uint8" (for x86) or "int8" (for ARM): the same numbers, with zero points 128 apart.
            On x86 ONNX Runtime leaves parts of an int8 file in float, with the same result; it fuses them all
            where the session's `session.qdqisint8allowed` is "1", the default on ARM.
        io: dtype of the file's inputs and outputs. "int8" and "uint8" leave out the quantize and dequantize
            at the network's boundary.
        opset: ONNX operator set, 13 to 21; by default 20 for networks with GELU or layer normalization, 21
            for 16-bit activations, else 13. The IR version is the one released with it.
        metadata: written into the file's metadata_props.
        debug_outputs: Program tensors that the file also gives out, quantized ones as raw integers in
            `activation_dtype`.
        align: widen channels of a uint8 file to what ONNX Runtime's kernels on x86 work in.
        max_opset: newest that the target's ONNX Runtime reads; None for any.

    Raises:
        ExportError: a value that is not one of those above.
    """

    activation_dtype: str = "uint8"
    io: str = "float32"
    opset: int | None = None
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    debug_outputs: tuple[str, ...] = ()
    align: bool = True
    max_opset: int | None = None

    def __post_init__(self) -> None:
        if self.activation_dtype not in ("uint8", "int8"):
            raise ExportError(
                f"ONNX activation_dtype is {self.activation_dtype!r}, expected 'uint8' or 'int8'"
            )
        if self.io not in _ELEMENT_TYPES:
            raise ExportError(f"ONNX io is {self.io!r}, expected 'float32', 'int8' or 'uint8'")
        if self.opset is not None and not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise ExportError(
                f"ONNX opset is {self.opset}, expected {MIN_OPSET} to {MAX_OPSET}",
                hint=f"{MIN_OPSET} is the oldest with per_channel quantization",
            )


def to_onnx(program: Program, options: OnnxOptions | None = None) -> onnx.ModelProto:
    """Write a Program as ONNX; the same Program and options give the same bytes.

    Args:
        program: float or quantized.
        options: how; by default uint8 activations between float32 inputs and outputs.

    Returns:
        the model, which `SerializeToString` makes the file's content.

    Raises:
        UnsupportedOpError: an operator with no ONNX form, naming its layer and kind.
        ExportError: integer inputs or outputs asked of a network that has no quantize or dequantize there, or
            a debug output that is no activation of the Program.

    Example:
        >>> from edgecnn.graph.program import Op
        >>> tensors = {name: Tensor(name, (BATCH, 3)) for name in ("x", "y")}
        >>> relu = Op("clamp", ("x",), "y", {"clamp": (0, None)}, "relu")
        >>> model = to_onnx(Program("tiny", ("x",), (("y", "y"),), tensors, (relu,)))
        >>> [node.op_type for node in model.graph.node], model.ir_version
        (['Relu'], 7)
    """
    options = OnnxOptions() if options is None else options
    _check_debug_outputs(program, options)
    dtype = options.activation_dtype
    if program.activation_bits == 16:
        dtype = "int16"
    elif options.align and dtype == "uint8":  # for x86
        program = align_channels(program, options.debug_outputs)
    graph = GraphBuilder(program, dtype, _opset(program, options), options.debug_outputs)
    boundary = Boundary(graph, options.io, frozenset(options.debug_outputs))
    boundary.write_inputs()
    for op in program.ops:
        if op.output not in boundary.replaced:
            write_op(graph, op)
    boundary.write_outputs()
    return _model(graph, options)


def _opset(program: Program, options: OnnxOptions) -> int:
    """Return the opset asked for, or the oldest that serves the network; at least 21 for 16 bits."""
    newest = options.max_opset or MAX_OPSET
    if program.activation_bits == 16:
        if newest < INT16_OPSET:
            raise ExportError(
                f"the target's ONNX Runtime reads opset {newest}, 16-bit activations need {INT16_OPSET}",
                hint="update onnxruntime on the device to 1.18, or leave ONNX out with --format tflite",
            )
        return max(options.opset or MIN_OPSET, INT16_OPSET)
    fused = newest >= FUSED_OPSET and any(op.kind in FUSED_KINDS for op in program.ops)
    return options.opset or (FUSED_OPSET if fused else MIN_OPSET)


def _check_debug_outputs(program: Program, options: OnnxOptions) -> None:
    for name in options.debug_outputs:
        tensor = program.tensors.get(name)
        if tensor is None or tensor.is_constant:
            what = "a constant" if tensor is not None else "no tensor of the network"
            raise ExportError(f"{program.name}: debug output {name!r} is {what}, expected an activation")


def _model(graph: GraphBuilder, options: OnnxOptions) -> onnx.ModelProto:
    program = graph.program
    inputs = [_info(name, program.tensors[name], options.io) for name in program.inputs]
    outputs = [_info(public, program.tensors[name], options.io) for public, name in program.outputs]
    public = {name for name, _ in program.outputs} | set(program.inputs)
    for name in options.debug_outputs:
        tensor = program.tensors[name]
        if name not in public:
            outputs.append(_info(name, tensor, graph.activation_dtype if tensor.quant else "float32"))
    used = {name for node in graph.nodes for name in node.input}
    initializers = [tensor for name, tensor in graph.initializers.items() if name in used]
    body = helper.make_graph(graph.nodes, program.name or "model", inputs, outputs, initializers)
    opset = helper.make_opsetid("", graph.opset)
    model = helper.make_model(
        body, opset_imports=[opset], ir_version=helper.find_min_ir_version_for([opset], ignore_unknown=True)
    )
    model.producer_name = "edgecnn"
    for key in sorted(options.metadata):
        model.metadata_props.add(key=key, value=options.metadata[key])
    return model


def _info(name: str, tensor: Tensor, dtype: str) -> onnx.ValueInfoProto:
    shape = [BATCH_NAME if size == BATCH else size for size in tensor.shape]
    return helper.make_tensor_value_info(name, _ELEMENT_TYPES[dtype], shape)
