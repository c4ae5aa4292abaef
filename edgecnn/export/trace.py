"""Every integer that a file computes on the way: its intermediate tensors made outputs, and run.

Slower than the file itself and only for finding out where two executions part.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgecnn.errors import ExportError
from edgecnn.graph.program import Array, Program
from edgecnn.runner.runtimes import import_runtime


def traceable(program: Program) -> tuple[str, ...]:
    """Return the names of the quantized activations, of all of a dynamic Program, in execution order."""
    if program.is_dynamic:
        public = {name for name, _ in program.outputs}
        return tuple(op.output for op in program.ops if op.output not in public)
    return tuple(op.output for op in program.ops if program.tensors[op.output].quant is not None)


def trace_onnx(program: Program, feeds: Mapping[str, Array], activation_dtype: str) -> dict[str, Array]:
    """Return every quantized activation as ONNX Runtime computes it, int8 in PyTorch's order.

    Args:
        program: quantized, or dynamic, of which every activation is given in float32.
        feeds: float32 (n, c, h, w) by input name.
        activation_dtype: of the file, "uint8" or "int8".
    """
    from edgecnn.export.onnx import OnnxOptions, to_onnx

    onnxruntime = import_runtime("onnxruntime")
    names = traceable(program)
    model = to_onnx(program, OnnxOptions(activation_dtype=activation_dtype, debug_outputs=names))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = session.run(list(names), dict(feeds))
    if program.is_dynamic:
        return dict(zip(names, values, strict=True))
    shift = 128 if activation_dtype == "uint8" else 0
    return {
        name: (value.astype(np.int16) - shift).astype(np.int8)
        for name, value in zip(names, values, strict=True)
    }


def trace_tflite(program: Program, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return every quantized activation as LiteRT computes it, int8 in PyTorch's order.

    Args:
        program: quantized, or dynamic, of which every activation is given in float32.
        feeds: float32 (n, c, h, w) by input name; each image runs on its own.
    """
    from edgecnn.export.tflite import TfliteOptions, to_tflite

    names = traceable(program)
    file = to_tflite(program, TfliteOptions(debug_outputs=names))
    interpreter = import_runtime("litert").Interpreter(model_content=file.data, num_threads=1)
    interpreter.allocate_tensors()
    details = interpreter.get_output_details()[len(program.outputs) :]
    if len(details) != len(names):
        raise ExportError(f"the traced file has {len(details)} further outputs, expected {len(names)}")
    rows: list[list[Array]] = [[] for _ in names]
    inputs = {d["name"]: d for d in interpreter.get_input_details()}
    for index in range(len(next(iter(feeds.values())))):
        for name, value in feeds.items():
            image = value[index : index + 1]
            stored = image.transpose(0, 2, 3, 1) if file.layouts[name] == "nhwc" else image
            detail = next((d for key, d in inputs.items() if name in key), interpreter.get_input_details()[0])
            interpreter.set_tensor(detail["index"], np.ascontiguousarray(stored))
        interpreter.invoke()
        for row, name, detail in zip(rows, names, details, strict=True):
            value = interpreter.get_tensor(detail["index"])
            row.append(value.transpose(0, 3, 1, 2) if file.layouts[name] == "nhwc" else value)
    return {name: np.concatenate(row) for name, row in zip(names, rows, strict=True)}
