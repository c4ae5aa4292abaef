"""From a Program to the files of each format, and to how each stores its inputs and outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from edgecnn.artifact import FileTensor
from edgecnn.errors import ExportError
from edgecnn.export.dynamic import as_computed
from edgecnn.graph.program import BATCH, Program, QuantParams
from edgecnn.model import ModelSpec

FORMATS = ("onnx", "tflite")
SUFFIXES: Mapping[str, str] = MappingProxyType({"onnx": ".onnx", "tflite": ".tflite"})


@dataclass(frozen=True)
class FileOptions:
    """How files are written.

    Attributes:
        io: "float32", "int8" or "uint8".
        activation_dtype: of the ONNX file, "uint8" or "int8".
        align: let the ONNX file for x86 have the channels that ONNX Runtime's kernels work in.
        max_opset: newest ONNX opset that the target's ONNX Runtime reads; None for any.
    """

    io: str = "float32"
    activation_dtype: str = "uint8"
    align: bool = True
    max_opset: int | None = None


@dataclass(frozen=True)
class ModelFile:
    """A file's bytes and how it stores its inputs and outputs."""

    format: str
    data: bytes
    inputs: tuple[FileTensor, ...]
    outputs: tuple[FileTensor, ...]


def write_model(program: Program, format: str, spec: ModelSpec, options: FileOptions) -> ModelFile:  # noqa: A002
    """Write a Program in one format; the preprocess and labels go into the file's metadata.

    Args:
        program: float or quantized.
        format: "onnx" or "tflite".
        spec: of the network.
        options: how.

    Raises:
        UnsupportedOpError: an operator has no form in the format.
        ExportError: for an unknown format.
    """
    program = as_computed(program, format)
    metadata = {"edgecnn": json.dumps(_metadata(spec), sort_keys=True)}
    if format == "onnx":
        from edgecnn.export.onnx import OnnxOptions, to_onnx

        chosen = OnnxOptions(
            options.activation_dtype,
            options.io,
            metadata=metadata,
            align=options.align,
            max_opset=options.max_opset,
        )
        data = to_onnx(program, chosen).SerializeToString(deterministic=True)
        layouts: Mapping[str, str] = {}
    elif format == "tflite":
        from edgecnn.export.tflite import TfliteOptions, to_tflite

        file = to_tflite(program, TfliteOptions(options.io, metadata))  # type: ignore[arg-type]
        data, layouts = file.data, file.layouts
    else:
        raise ExportError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    inputs = tuple(_file_tensor(program, n, n, options.io, layouts.get(n, "nchw")) for n in program.inputs)
    outputs = tuple(
        _file_tensor(program, public, name, options.io, layouts.get(public, "nchw"))
        for public, name in program.outputs
    )
    return ModelFile(format, data, inputs, outputs)


def _metadata(spec: ModelSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "task": spec.task,
        "labels": None if spec.labels is None else list(spec.labels),
        "preprocess": spec.preprocess.to_dict(),
    }


def _file_tensor(program: Program, public: str, name: str, io: str, layout: str) -> FileTensor:
    """Describe one input or output; integer ones have the parameters next to the boundary op."""
    shape = tuple(None if d == BATCH else d for d in program.tensors[name].shape)
    tensor = FileTensor(public, shape, layout)
    quant = program.tensors[name].quant or _boundary_quant(program, name)
    if io == "float32" or quant is None:
        return tensor
    shift = 128 if io == "uint8" else 0
    return replace(tensor, dtype=io, scale=float(quant.scale), zero_point=quant.zero_point + shift)


def _boundary_quant(program: Program, name: str) -> QuantParams | None:
    for op in program.ops:
        if op.kind == "quantize" and op.inputs[0] == name:
            return program.tensors[op.output].quant
        if op.kind == "dequantize" and op.output == name:
            return program.tensors[op.inputs[0]].quant
    return None
