"""The step of a file's outputs, read from the file itself: what one LSB is worth.

    real = scale * (q - zero_point)

A float32 output of an int8 network comes from a DequantizeLinear or DEQUANTIZE, whose scale is the step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgecnn.errors import LoadError, MissingDependencyError
from edgecnn.export.tflite_graph import load_schema


def output_steps(path: Path) -> list[float | None]:
    """Return the quantization scale of each output, None for one that is computed in float.

    Args:
        path: .onnx or .tflite file.

    Raises:
        LoadError: if the file cannot be read.
        MissingDependencyError: if the package that reads the format is not installed.
    """
    try:
        return _onnx_steps(path) if path.suffix.lower() == ".onnx" else _tflite_steps(path)
    except MissingDependencyError:
        raise
    except Exception as error:  # whatever a damaged file makes its parser raise
        raise LoadError(f"{path} cannot be read: {error}", hint="compress the model again") from error


def _onnx_steps(path: Path) -> list[float | None]:
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(
            f"onnx is needed to read the scale of {path.name}'s outputs", hint="pip install 'edgecnn[onnx]'"
        ) from error
    from onnx import numpy_helper

    graph = onnx.load(str(path), load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    steps: list[float | None] = []
    for output in graph.output:
        node = producers.get(output.name)
        scale = None
        if node is not None and node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            scale = constants.get(node.input[1])
        values = None if scale is None else numpy_helper.to_array(scale).ravel()
        steps.append(float(values[0]) if values is not None and values.size == 1 else None)
    return steps


def _tflite_steps(path: Path) -> list[float | None]:
    schema = load_schema()
    model = schema.ModelT.InitFromPackedBuf(bytearray(path.read_bytes()), 0)
    graph = model.subgraphs[0]
    producers = {index: op for op in graph.operators for index in op.outputs}
    steps: list[float | None] = []
    for index in graph.outputs:
        step = _scale(graph.tensors[index])
        op = producers.get(index)
        if step is None and op is not None:
            code = model.operatorCodes[op.opcodeIndex]
            kind = max(code.builtinCode, code.deprecatedBuiltinCode)
            if kind == schema.BuiltinOperator.DEQUANTIZE:
                step = _scale(graph.tensors[op.inputs[0]])
        steps.append(step)
    return steps


def _scale(tensor: Any) -> float | None:
    """Return a tensor's only scale."""
    found = None if tensor.quantization is None else tensor.quantization.scale
    return float(found[0]) if found is not None and len(found) == 1 else None
