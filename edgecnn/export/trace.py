"""Every integer that a file computes on the way: its intermediate tensors made outputs, and run.

Values in float are left as they are on the way: made outputs, they would be computed differently, since
runtimes fuse an operator with what follows only where nobody else reads its result.

Slower than the file itself and only for finding out where two executions part.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgecnn.errors import ExportError
from edgecnn.graph.program import Array, Program
from edgecnn.runner.runtimes import import_runtime


def traceable(program: Program) -> tuple[str, ...]:
    """Return the quantized activations, of a dynamic Program all but its outputs, in execution order."""
    if program.is_dynamic:
        given_out = {name for output in program.outputs for name in output}
        return tuple(op.output for op in program.ops if op.output not in given_out)
    return tuple(op.output for op in program.ops if program.tensors[op.output].quant is not None)


def float_outputs(program: Program) -> dict[str, str]:
    """Return tensor -> public name of the outputs that are made in float."""
    makers = {op.output: op.kind for op in program.ops}
    return {
        name: public
        for public, name in program.outputs
        if program.tensors[name].quant is None and makers.get(name, "dequantize") != "dequantize"
    }


def trace_onnx(program: Program, feeds: Mapping[str, Array], activation_dtype: str) -> dict[str, Array]:
    """Return every quantized activation as ONNX Runtime computes it, int8, and outputs made in float.

    Args:
        program: quantized, or dynamic, of which every activation and output is given in float32.
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
    real = float_outputs(program)
    values = dict(zip((*names, *real), session.run([*names, *real.values()], dict(feeds)), strict=True))
    shift = 128 if activation_dtype == "uint8" else 0
    return {
        name: (value.astype(np.int16) - shift).astype(np.int8)
        if value.dtype in (np.int8, np.uint8)
        else value
        for name, value in values.items()
    }


def trace_tflite(program: Program, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return every quantized activation as LiteRT computes it, int8, and outputs made in float.

    Args:
        program: quantized, or dynamic, of which every activation and output is given in float32.
        feeds: float32 (n, c, h, w) by input name; each image runs on its own.
    """
    from edgecnn.export.tflite import TfliteOptions, to_tflite

    names = traceable(program)
    file = to_tflite(program, TfliteOptions(debug_outputs=names))
    interpreter = import_runtime("litert").Interpreter(model_content=file.data, num_threads=1)
    interpreter.allocate_tensors()
    given = interpreter.get_output_details()
    outputs, details = given[: len(program.outputs)], given[len(program.outputs) :]
    if len(details) != len(names):
        raise ExportError(f"the traced file has {len(details)} further outputs, expected {len(names)}")
    read = {n: (d["index"], file.layouts[n]) for n, d in zip(names, details, strict=True)}
    real = float_outputs(program)
    for (public, name), detail in zip(program.outputs, outputs, strict=True):
        if name in real:
            read[name] = (detail["index"], file.layouts[public])
    rows: dict[str, list[Array]] = {name: [] for name in read}
    inputs = {d["name"]: d for d in interpreter.get_input_details()}
    for index in range(len(next(iter(feeds.values())))):
        for name, value in feeds.items():
            image = value[index : index + 1]
            stored = image.transpose(0, 2, 3, 1) if file.layouts[name] == "nhwc" else image
            detail = next((d for key, d in inputs.items() if name in key), interpreter.get_input_details()[0])
            interpreter.set_tensor(detail["index"], np.ascontiguousarray(stored))
        interpreter.invoke()
        for name, (place, layout) in read.items():
            value = interpreter.get_tensor(place)
            rows[name].append(value.transpose(0, 3, 1, 2) if layout == "nhwc" else value)
    return {name: np.concatenate(row) for name, row in rows.items()}
