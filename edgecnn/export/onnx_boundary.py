"""Inputs and outputs of the ONNX file: their public names, and integers in place of floats where asked for.

With integer inputs the Program's `quantize` of an input is left out and the file's input is its result; with
integer outputs the same goes for the `dequantize` of an output.
"""

from __future__ import annotations

from collections.abc import Collection

from edgecnn.errors import ExportError
from edgecnn.export.onnx_graph import GraphBuilder, same_params
from edgecnn.graph.program import Op, Program, QuantParams


class Boundary:
    """Writes what stands between the operators of a network and the file's inputs and outputs.

    Args:
        graph: where the nodes go.
        io: dtype of the file's inputs and outputs.
        kept: names of tensors that must keep their own name.

    Attributes:
        replaced: outputs of the ops that an integer boundary makes needless.
    """

    def __init__(self, graph: GraphBuilder, io: str, kept: Collection[str]) -> None:
        self.graph = graph
        self.io = io
        self.replaced: set[str] = set()
        self._kept = kept
        self._late: list[tuple[str, str]] = []

    def write_inputs(self) -> None:
        """Bind the inputs' names, then reserve the outputs'.

        Raises:
            ExportError: integer inputs or outputs of a network that has none, or names that collide.
        """
        graph = self.graph
        for name in graph.program.inputs:
            quant = graph.tensor(name).quant
            if self.io != "float32":
                self._write_integer_input(name)
            elif quant is not None:
                op = Op("quantize", (name,), name, layer=f"input {name}")
                graph.value_names[name] = graph.unique(f"{name}/quantized")
                graph.quantize(op, name, quant, graph.value_names[name])
        owned: set[str] = set()
        for public, name in graph.program.outputs:
            self._reserve(public, self._source(public, name), owned)

    def write_outputs(self) -> None:
        """Append what makes the outputs that no operator makes under their public name."""
        for public, name in self._late:
            graph, tensor = self.graph, self.graph.tensor(name)
            op = Op("output", (name,), public, layer=f"output {public}")
            if tensor.quant is None or self.io == graph.activation_dtype:
                graph.node(op, "Identity", [graph.value(name)], public)
            elif self.io == "float32":
                value = graph.value(name)
                parameters = graph.parameters(value, tensor.quant)
                graph.node(op, "DequantizeLinear", [value, *parameters], public)
            else:
                graph.quantize(op, graph.real(op, name), tensor.quant, public, self.io)
        for name in sorted(set(self._kept) - {public for public, _ in self.graph.program.outputs}):
            if self.graph.value_names.get(name, name) != name and name not in self.graph.program.inputs:
                op = Op("output", (name,), name, layer=f"debug output {name}")
                self.graph.node(op, "Identity", [self.graph.value(name)], name)

    def _write_integer_input(self, name: str) -> None:
        graph = self.graph
        quant = input_params(graph.program, name)
        if quant is None:
            raise ExportError(
                f"{graph.program.name}: input {name!r} is not quantized on entry, "
                f"expected one quantize for {self.io} inputs",
                hint="write the file with float32 inputs and outputs, or leave the layer there in int8",
            )
        if graph.tensor(name).quant is not None:
            self._bind_integers(Op("input", (name,), name, layer=f"input {name}"), name, quant)
        for op in graph.program.consumers()[name]:
            if op.kind == "quantize":
                self.replaced.add(op.output)
                self._bind_integers(op, name, quant)

    def _bind_integers(self, op: Op, name: str, quant: QuantParams) -> None:
        """Let op's output be the integer input `name`, converted if the activations have another dtype."""
        graph = self.graph
        if self.io == graph.activation_dtype:
            graph.value_names[op.output] = name
            return
        if op.output == name:
            graph.value_names[name] = graph.unique(f"{name}/converted")
        real = graph.dequantize(op, name, quant, self.io)
        graph.quantize(op, real, quant, graph.value(op.output))

    def _source(self, public: str, name: str) -> str:
        """Return the tensor whose values the output holds: `name`, or its integers."""
        if self.io == "float32" or self.graph.tensor(name).quant is not None:
            return name
        program = self.graph.program
        op = _dequantize_of(program, name)
        if op is None:
            raise ExportError(
                f"{program.name}: output {public!r} is made by no dequantize, "
                f"expected one for {self.io} outputs",
                hint="write the file with float32 inputs and outputs, or leave the layer there in int8",
            )
        if not program.consumers()[name] and name not in self._kept:
            self.replaced.add(name)
        return op.inputs[0]

    def _reserve(self, public: str, source: str, owned: set[str]) -> None:
        """Give the tensor the public name; one that cannot have it gets a copy under that name at the end."""
        graph, program = self.graph, self.graph.program
        if public in program.inputs or (public in self._kept and public != source):
            what = "an input" if public in program.inputs else "a debug output"
            raise ExportError(
                f"{program.name}: output {public!r} has the name of {what}, expected another name"
            )
        tensor = graph.tensor(source)
        native = graph.activation_dtype if tensor.quant is not None else "float32"
        free = not (
            tensor.is_constant or source in program.inputs or source in graph.value_names or source in owned
        )
        if public in program.tensors and public != source and public not in owned:
            graph.value_names[public] = graph.unique(f"{public}/inner")
        if free and native == self.io and (source not in self._kept or source == public):
            owned.add(source)
            if source != public:
                graph.value_names[source] = public
            return
        if public == source:
            graph.value_names[source] = graph.unique(f"{source}/inner")
        self._late.append((public, source))


def boundary_params(program: Program) -> dict[str, QuantParams]:
    """Return the parameters, in int8 terms, of the inputs and outputs that an int8 or uint8 file has.

    A uint8 file adds 128 to the zero point.

    Returns:
        by public name; an input or output on which no quantize or dequantize borders is left out.
    """
    found = {name: input_params(program, name) for name in program.inputs}
    for public, name in program.outputs:
        op = _dequantize_of(program, name)
        found[public] = program.tensors[name if op is None else op.inputs[0]].quant
    return {name: quant for name, quant in found.items() if quant is not None}


def input_params(program: Program, name: str) -> QuantParams | None:
    """Return the parameters every consumer of an input quantizes it with, None if there are no such ones."""
    if program.tensors[name].quant is not None:
        return program.tensors[name].quant
    consumers = program.consumers()[name]
    found = [program.tensors[op.output].quant for op in consumers if op.kind == "quantize"]
    quants = [quant for quant in found if quant is not None]
    if not quants or len(quants) != len(consumers) or not all(same_params(quants[0], q) for q in quants):
        return None
    return quants[0]


def _dequantize_of(program: Program, name: str) -> Op | None:
    return next((op for op in program.ops if op.output == name and op.kind == "dequantize"), None)
