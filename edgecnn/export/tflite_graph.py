"""Writes a TFLite flatbuffer: tensors, deduplicated buffers, operators, signature, metadata.

This module knows the file format and nothing of networks; the generated schema comes with the
ai-edge-litert package, no TensorFlow is needed.

Source: the TFLite schema, https://github.com/google-ai-edge/LiteRT (tflite/converter/schema/schema.fbs), file
identifier TFL3, schema version 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from edgecnn.errors import ExportError, MissingDependencyError
from edgecnn.export.tflite_versions import OperandType, minimum_runtime, operator_version
from edgecnn.graph.program import BATCH, Array, QuantParams

_ALIGNMENT_BYTES = 16
_MAX_FILE_BYTES = 2**31 - 1
_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})

_OPTION_TABLES = {
    "ADD": "AddOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "ABS": "AbsOptions",
    "CONCATENATION": "ConcatenationOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "DEPTH_TO_SPACE": "DepthToSpaceOptions",
    "DEQUANTIZE": "DequantizeOptions",
    "DIV": "DivOptions",
    "EXP": "ExpOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "GATHER": "GatherOptions",
    "GELU": "GeluOptions",
    "HARD_SWISH": "HardSwishOptions",
    "LEAKY_RELU": "LeakyReluOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "MIRROR_PAD": "MirrorPadOptions",
    "MUL": "MulOptions",
    "PAD": "PadOptions",
    "PADV2": "PadV2Options",
    "QUANTIZE": "QuantizeOptions",
    "REDUCE_MAX": "ReducerOptions",
    "RESHAPE": "ReshapeOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions",
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighborOptions",
    "SLICE": "SliceOptions",
    "SOFTMAX": "SoftmaxOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
    "SUB": "SubOptions",
    "SUM": "ReducerOptions",
    "TRANSPOSE": "TransposeOptions",
    "TRANSPOSE_CONV": "TransposeConvOptions",
}


def load_schema() -> Any:
    """Return the generated TFLite schema module.

    Raises:
        MissingDependencyError: ai-edge-litert or flatbuffers is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        package = "flatbuffers" if (error.name or "").startswith("flatbuffers") else "ai-edge-litert"
        raise MissingDependencyError(
            f"reading and writing TFLite files needs the package {package}, which is not installed",
            hint='pip install "edgecnn[tflite]"',
        ) from error
    return schema_py_generated


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file: its dimensions are in stored order, an activation's first is BATCH."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    quant: QuantParams | None = None
    buffer: int = 0

    def operand_type(self) -> OperandType:
        """Return what operator versions depend on."""
        scale = self.quant.scale if self.quant is not None else None
        per_tensor = float(scale) if scale is not None and np.ndim(scale) == 0 else None
        return OperandType(self.dtype, len(self.shape), per_tensor, scale is not None and np.ndim(scale) > 0)


@dataclass(frozen=True)
class _Operator:
    name: str
    version: int
    inputs: tuple[int, ...]
    output: int
    options: Mapping[str, Any]


@dataclass
class FileGraph:
    """The single subgraph of a TFLite file while it is being written.

    Attributes:
        name: of the subgraph.
        tensors: by index.
        operators: in execution order.
        buffers: contents by index; index 0 is the empty buffer that the format reserves.
    """

    name: str
    tensors: list[StoredTensor] = field(default_factory=list)
    operators: list[_Operator] = field(default_factory=list)
    buffers: list[bytes] = field(default_factory=lambda: [b""])
    _buffer_index: dict[bytes, int] = field(default_factory=dict)
    _constant_index: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def add_tensor(self, name: str, shape: Sequence[int], dtype: str, quant: QuantParams | None) -> int:
        """Add an activation and return its index."""
        self.tensors.append(StoredTensor(name, tuple(shape), dtype, quant))
        return len(self.tensors) - 1

    def add_constant(self, name: str, data: Array, quant: QuantParams | None = None) -> int:
        """Add a constant, or find the equal one; `quant.axis` counts stored dimensions."""
        content = np.ascontiguousarray(data)
        buffer = self._add_buffer(content.tobytes())
        parameters = None if quant is None else (quant.scale.tobytes(), quant.zero_point, quant.axis)
        key = (buffer, data.dtype.str, data.shape, parameters)
        if key not in self._constant_index:
            self.tensors.append(StoredTensor(name, data.shape, data.dtype.name, quant, buffer))
            self._constant_index[key] = len(self.tensors) - 1
        return self._constant_index[key]

    def add_operator(
        self, name: str, inputs: Sequence[int], output: int, options: Mapping[str, Any] = _NO_OPTIONS
    ) -> int:
        """Add an operator that writes tensor `output` and return `output`."""
        operands = [self.tensors[index].operand_type() for index in (*inputs, output)]
        version = operator_version(name, operands, options)
        self.operators.append(_Operator(name, version, tuple(inputs), output, options))
        return output

    def _add_buffer(self, content: bytes) -> int:
        digest = hashlib.sha256(content).digest()
        if digest not in self._buffer_index:
            self.buffers.append(content)
            self._buffer_index[digest] = len(self.buffers) - 1
        return self._buffer_index[digest]

    def serialize(
        self,
        inputs: Sequence[tuple[str, int]],
        outputs: Sequence[tuple[str, int]],
        metadata: Mapping[str, str],
    ) -> bytes:
        """Return the file.

        Args:
            inputs: (public name, tensor index) of the signature's inputs, in order.
            outputs: the same of its outputs.
            metadata: name -> text of further metadata entries.

        Raises:
            ExportError: the file would pass the format's limit of 2 GiB.
        """
        import flatbuffers

        schema = load_schema()
        codes = sorted({(op.name, op.version) for op in self.operators})
        texts = {"min_runtime_version": minimum_runtime(codes).ljust(16, "\0"), **metadata}
        metadata_buffers = {name: self._add_buffer(text.encode()) for name, text in texts.items()}
        size_bytes = sum(len(content) + _ALIGNMENT_BYTES for content in self.buffers)
        if size_bytes > _MAX_FILE_BYTES:
            raise ExportError(
                f"network '{self.name}': its constants take {size_bytes} bytes, expected at most"
                f" {_MAX_FILE_BYTES} in a TFLite file",
                hint="quantize it, or leave TFLite out with --format onnx",
            )
        model = schema.ModelT()
        model.version = 3
        model.description = "edgecnn"
        model.operatorCodes = [_operator_code(schema, *code) for code in codes]
        model.buffers = [_aligned_buffer(schema, content) for content in self.buffers]
        model.subgraphs = [self._subgraph(schema, codes, inputs, outputs)]
        model.signatureDefs = [_signature(schema, inputs, outputs)]
        model.metadata = [_metadata(schema, name, index) for name, index in metadata_buffers.items()]
        builder = flatbuffers.Builder(size_bytes + 1024 * (len(self.tensors) + 1))
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _subgraph(
        self,
        schema: Any,
        codes: Sequence[tuple[str, int]],
        inputs: Sequence[tuple[str, int]],
        outputs: Sequence[tuple[str, int]],
    ) -> Any:
        subgraph = schema.SubGraphT()
        subgraph.name = self.name
        subgraph.tensors = [_tensor(schema, tensor) for tensor in self.tensors]
        subgraph.inputs = [index for _, index in inputs]
        subgraph.outputs = [index for _, index in outputs]
        code_index = {code: index for index, code in enumerate(codes)}
        subgraph.operators = [_operator(schema, op, code_index[op.name, op.version]) for op in self.operators]
        return subgraph


def _aligned_buffer(schema: Any, content: bytes) -> Any:
    """Return a buffer whose bytes start on a multiple of 16, which the generated code forgets."""

    class AlignedBuffer(schema.BufferT):  # type: ignore[misc]
        def Pack(self, builder: Any) -> Any:  # noqa: N802 (the generated code's name)
            vector = None
            if content:
                builder.StartVector(1, len(content), _ALIGNMENT_BYTES)
                builder.head = builder.head - len(content)
                builder.Bytes[builder.head : builder.head + len(content)] = content
                vector = builder.EndVector()
            schema.BufferStart(builder)
            if vector is not None:
                schema.BufferAddData(builder, vector)
            return schema.BufferEnd(builder)

    return AlignedBuffer()


def _operator_code(schema: Any, name: str, version: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, name)
    # Readers older than the 32-bit field take the code from the 8-bit one, where 127 means "see the other".
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = version
    return code


def _tensor(schema: Any, tensor: StoredTensor) -> Any:
    stored = schema.TensorT()
    stored.name = tensor.name
    stored.shape = [1 if size == BATCH else size for size in tensor.shape]
    if BATCH in tensor.shape:
        stored.shapeSignature = list(tensor.shape)
    stored.type = getattr(schema.TensorType, tensor.dtype.upper())
    stored.buffer = tensor.buffer
    stored.hasRank = True
    if tensor.quant is not None:
        parameters = schema.QuantizationParametersT()
        scales = np.atleast_1d(np.asarray(tensor.quant.scale, np.float32))
        parameters.scale = scales
        parameters.zeroPoint = np.full(scales.shape, tensor.quant.zero_point, np.int64)
        parameters.quantizedDimension = tensor.quant.axis or 0
        stored.quantization = parameters
    return stored


def _operator(schema: Any, op: _Operator, code_index: int) -> Any:
    stored = schema.OperatorT()
    stored.opcodeIndex = code_index
    stored.inputs = list(op.inputs)
    stored.outputs = [op.output]
    table = _OPTION_TABLES.get(op.name)
    if table is not None:
        stored.builtinOptionsType = getattr(schema.BuiltinOptions, table)
        stored.builtinOptions = getattr(schema, table + "T")()
        for key, value in op.options.items():
            if key != "groups":
                setattr(stored.builtinOptions, key, value)
    return stored


def _signature(schema: Any, inputs: Sequence[tuple[str, int]], outputs: Sequence[tuple[str, int]]) -> Any:
    signature = schema.SignatureDefT()
    signature.signatureKey = "serving_default"
    signature.inputs = [_tensor_map(schema, name, index) for name, index in inputs]
    named: dict[str, int] = {}
    for name, index in outputs:
        named.setdefault(name, index)
    signature.outputs = [_tensor_map(schema, name, index) for name, index in named.items()]
    return signature


def _tensor_map(schema: Any, name: str, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name = name
    entry.tensorIndex = index
    return entry


def _metadata(schema: Any, name: str, buffer: int) -> Any:
    entry = schema.MetadataT()
    entry.name = name
    entry.buffer = buffer
    return entry
