"""Runs a written TFLite file in its real runtime, for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema
from programs import ProgramBuilder, feeds_for

from edgecnn.export.tflite import TfliteFile
from edgecnn.graph.program import Array, Program
from edgecnn.quantize.reference import run_program

Make = Callable[[ProgramBuilder, str], Any]


class TfliteSession:
    """One file opened with XNNPACK (the runtime's default) or with TFLite's own kernels."""

    def __init__(self, file: TfliteFile, xnnpack: bool = True) -> None:
        kind = "BUILTIN" if xnnpack else "BUILTIN_WITHOUT_DEFAULT_DELEGATES"
        self.layouts = file.layouts
        self.interpreter: Any = litert.Interpreter(
            model_content=file.data,
            num_threads=1,
            experimental_op_resolver_type=getattr(litert.OpResolverType, kind),
        )
        signature = self.interpreter._get_full_signature_list()["serving_default"]
        details = [*self.interpreter.get_input_details(), *self.interpreter.get_output_details()]
        by_index = {entry["index"]: entry for entry in details}
        self.inputs = {name: by_index[index] for name, index in signature["inputs"].items()}
        self.outputs = {name: by_index[index] for name, index in signature["outputs"].items()}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return outputs by public name; feeds and outputs have PyTorch's dimension order."""
        for name, entry in self.inputs.items():
            batch = len(feeds[name])
            self.interpreter.resize_tensor_input(entry["index"], [batch, *entry["shape"][1:].tolist()])
        self.interpreter.allocate_tensors()
        for name, entry in self.inputs.items():
            x = feeds[name].transpose(0, 2, 3, 1) if self.layouts[name] == "nhwc" else feeds[name]
            self.interpreter.set_tensor(entry["index"], np.ascontiguousarray(x))
        self.interpreter.invoke()
        results = {}
        for name, entry in self.outputs.items():
            y = self.interpreter.get_tensor(entry["index"]).copy()
            results[name] = y.transpose(0, 3, 1, 2) if self.layouts[name] == "nhwc" else y
        return results

    def num_delegates(self) -> int:
        """Return into how many XNNPACK partitions the graph fell."""
        return self._names().count("DELEGATE")

    def operators(self) -> list[str]:
        """Return the file's operators in order."""
        return [name for name in self._names() if name != "DELEGATE"]

    def _names(self) -> list[str]:
        self.interpreter.allocate_tensors()
        return [entry["op_name"] for entry in self.interpreter._get_ops_details()]


def read_model(file: TfliteFile) -> Any:
    """Return the file as the schema's object tree."""
    return schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(file.data, 0))


def metadata(file: TfliteFile) -> dict[str, str]:
    """Return the file's metadata entries."""
    model = read_model(file)
    return {entry.name.decode(): bytes(model.buffers[entry.buffer].data).decode() for entry in model.metadata}


def structure(file: TfliteFile) -> dict[str, Any]:
    """Return everything in the file but the constants' values, ready for JSON."""
    model = read_model(file)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    types = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    codes = [f"{names[code.builtinCode]} v{code.version}" for code in model.operatorCodes]
    return {
        "version": model.version,
        "operator_codes": codes,
        "tensors": [_tensor(tensor, types) for tensor in graph.tensors],
        "operators": [_operator(op, codes) for op in graph.operators],
        "inputs": {entry.name.decode(): int(entry.tensorIndex) for entry in signature.inputs},
        "outputs": {entry.name.decode(): int(entry.tensorIndex) for entry in signature.outputs},
        "buffer_bytes": [0 if buffer.data is None else len(buffer.data) for buffer in model.buffers],
        "metadata": sorted(entry.name.decode() for entry in model.metadata),
    }


def _tensor(tensor: Any, types: Mapping[int, str]) -> dict[str, Any]:
    shown = {
        "name": tensor.name.decode(),
        "type": types[tensor.type],
        "shape": [int(size) for size in tensor.shape],
        "buffer": int(tensor.buffer),
    }
    if tensor.shapeSignature is not None:
        shown["shape_signature"] = [int(size) for size in tensor.shapeSignature]
    if tensor.quantization is not None and tensor.quantization.scale is not None:
        shown["num_scales"] = len(tensor.quantization.scale)
        shown["zero_point"] = int(tensor.quantization.zeroPoint[0])
        shown["quantized_dimension"] = int(tensor.quantization.quantizedDimension)
    return shown


def _operator(op: Any, codes: list[str]) -> dict[str, Any]:
    options = {} if op.builtinOptions is None else vars(op.builtinOptions)
    plain = {
        key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in options.items()
    }
    return {
        "operator": codes[op.opcodeIndex],
        "inputs": [int(index) for index in op.inputs],
        "outputs": [int(index) for index in op.outputs],
        "options": dict(sorted(plain.items())),
    }


def make(build: Make, shape: tuple[int, ...] = (4, 9, 7)) -> Program:
    """Return the float Program of what `build` adds to an image."""
    builder = ProgramBuilder("net")
    made = build(builder, builder.input(shape))
    return builder.finish(*(made if isinstance(made, tuple) else (made,)))


def scale_of(program: Program, public: str) -> float:
    """The step of one level of a quantized program's float output."""
    name = dict(program.outputs)[public]
    producer = next(op for op in program.ops if op.output == name)
    quant = program.tensors[producer.inputs[0]].quant
    assert quant is not None
    return float(quant.scale)


def difference(program: Program, file: TfliteFile, batch: int, xnnpack: bool = True) -> float:
    """Largest difference from the reference over all outputs, in levels for a quantized program."""
    feeds = feeds_for(program, batch)
    expected = run_program(program, feeds)
    found = TfliteSession(file, xnnpack).run(feeds)
    assert list(found) == list(expected)
    largest = 0.0
    for name, values in expected.items():
        assert found[name].shape == values.shape
        unit = scale_of(program, name) if any(tensor.quant for tensor in program.tensors.values()) else 1.0
        largest = max(largest, float(np.abs(found[name] - values).max()) / unit)
    return largest
