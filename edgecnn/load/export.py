"""An nn.Module or ExportedProgram becomes the graph of a Model: functional, eval mode, dynamic batch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from edgecnn.errors import LoadError
from edgecnn.load.dynamic_batch import make_batch_dynamic, same_rows
from edgecnn.load.functional import NotFunctionalError, is_training, make_functional
from edgecnn.model import TREE_SPEC_WARNING, TensorSpec

MAX_BATCH = 65536
"""Upper bound of the dynamic batch dimension."""


@dataclass(frozen=True)
class ExportedGraph:
    """A graph module with what `Model` and `ModelSpec` need to know about it.

    Attributes:
        graph: functional, eval mode, parameters without gradient.
        inputs: one image input.
        outputs: in the order the graph returns them.
        fixed_batch: None, or the only batch size the graph accepts.
        warnings: what the user should know.
    """

    graph: GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fixed_batch: int | None = None
    warnings: tuple[str, ...] = ()


def first_line(error: BaseException, limit: int = 300) -> str:
    """Return the first line with content of an error's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:limit]}" if lines else type(error).__name__


def export_program(module: torch.nn.Module, shape: tuple[int, ...], batch: int | None) -> ExportedProgram:
    """Run torch.export on `module` in eval mode.

    Args:
        module: takes one image batch.
        shape: (c, h, w).
        batch: a fixed batch size, or None for a dynamic one.
    """
    example = torch.zeros((2 if batch is None else batch, *shape))
    dynamic = ({0: Dim("batch", min=1, max=MAX_BATCH)},) if batch is None else None
    parameters = list(inspect.signature(module.forward).parameters.values())
    if dynamic and parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        dynamic = (dynamic,)  # type: ignore[assignment]
    with torch.no_grad(), eval_mode(module):
        return torch.export.export(module, (example,), dynamic_shapes=dynamic)


@contextmanager
def eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """Put a module into eval mode and back; a graph has no mode of its own."""
    training = (
        [] if isinstance(module, GraphModule) else [child for child in module.modules() if child.training]
    )
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True


def export_module(
    module: torch.nn.Module, shape: tuple[int, int, int], *, copy_weights: bool = False
) -> ExportedGraph:
    """Turn a module into an exported graph.

    Args:
        module: on the CPU, in float32; left as it is.
        shape: (c, h, w) of one image.
        copy_weights: give the graph its own weights, for a module that lives on elsewhere.

    Returns:
        The graph, with a dynamic batch where the network allows one.

    Raises:
        LoadError: if the network cannot be exported for this input.
    """
    name = input_name(module)
    try:
        program = export_program(module, shape, None)
    except Exception as error:  # noqa: BLE001  the network's own code runs here and may raise anything
        return _export_fixed(module, shape, name, error)
    graph = functional_graph(program, shape, compare_with=module)
    if copy_weights:
        _copy_weights(graph)
    return describe(graph, name, shape, output_names(program))


def _export_fixed(
    module: torch.nn.Module, shape: tuple[int, int, int], name: str, reason: BaseException
) -> ExportedGraph:
    """Export with batch 1, then try to make the batch dynamic in the graph."""
    try:
        program = export_program(module, shape, 1)
    except Exception as error:
        raise LoadError(
            f"{type(module).__name__}: the network does not run or export with input "
            f"{'x'.join(map(str, shape))} ({first_line(error)})",
            hint="check --input-shape (channels x height x width); the network must take one image tensor",
        ) from error
    graph = functional_graph(program, shape, batch=1, compare_with=module)
    _copy_weights(graph)
    return dynamic_or_fixed(graph, name, shape, output_names(program), 1, first_line(reason))


def dynamic_or_fixed(
    graph: GraphModule, name: str, shape: tuple[int, ...], outputs: tuple[str, ...], batch: int, reason: str
) -> ExportedGraph:
    """Make a graph of fixed batch dynamic, or describe it with its batch and a warning."""
    try:
        program = export_program(make_batch_dynamic(graph, batch), shape, None)
        candidate = functional_graph(program, shape)
        if same_rows(graph, candidate, shape, batch):
            return describe(candidate, name, shape, outputs)
        reason = f"{reason}; after making it dynamic, rows depend on the batch"
    except Exception as error:  # noqa: BLE001  an attempt: whatever fails, the fixed graph stands
        reason = f"{reason}; {first_line(error)}"
    warning = f"the network accepts a batch of {batch} only ({reason}); calibration is slower for it"
    return describe(graph, name, shape, outputs, batch=batch, notes=(warning,))


def functional_graph(
    program: ExportedProgram,
    shape: tuple[int, ...],
    *,
    batch: int = 2,
    compare_with: torch.nn.Module | None = None,
) -> GraphModule:
    """Return the program's graph module, functional and in eval mode, checked where it was rewritten.

    Args:
        program: with one image input.
        shape: (c, h, w), for the check.
        batch: batch size of the check.
        compare_with: the network that the graph came from; None: the unedited graph.

    Raises:
        LoadError: naming the op that cannot be made functional.
    """
    graph = program.module(check_guards=False)
    training = is_training(graph.graph)
    try:
        rewritten = make_functional(graph)
    except NotFunctionalError as error:
        graph, rewritten = _functional_by_torch(program, error), True
    graph = _freeze(graph)
    if rewritten and not training:
        reference = compare_with or program.module(check_guards=False)
        try:
            same, reason = _same_values(graph, reference, (batch, *shape)), "the values differ"
        except Exception as error:  # noqa: BLE001  an operator that does not run raises anything
            same, reason = False, first_line(error)
        if not same:
            raise LoadError(
                f"making the network's in-place operations functional changed what it computes ({reason})",
                hint="replace in-place operations (relu_, x[...] = y) in the network by functional ones",
            )
    return graph


def _functional_by_torch(program: ExportedProgram, reason: NotFunctionalError) -> GraphModule:
    """PyTorch's own functionalisation: slower, and right for every aliasing."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", TREE_SPEC_WARNING, FutureWarning)
            graph: GraphModule = program.run_decompositions({}).module(check_guards=False)
        make_functional(graph)
    except Exception as error:
        raise LoadError(
            f"the network has an in-place operation without a functional form: {reason}",
            hint="replace it in the network by a functional one",
        ) from error
    return graph


def _same_values(graph: torch.nn.Module, reference: torch.nn.Module, shape: tuple[int, ...]) -> bool:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), eval_mode(reference):
        found = pytree.tree_leaves(graph(x.clone()))
        expected = pytree.tree_leaves(reference(x.clone()))
    return len(found) == len(expected) and all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4 * (1.0 + float(b.abs().nan_to_num().max())), equal_nan=True)
        for a, b in zip(found, expected, strict=True)
    )


def _freeze(graph: GraphModule) -> GraphModule:
    """Return a plain graph module with the weights in use, without gradients; tied weights get one name."""
    first: dict[int, Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        value = attribute(graph, str(node.target))
        if not isinstance(value, torch.Tensor):
            continue
        if id(value) in first:
            node.replace_all_uses_with(first[id(value)])
            graph.graph.erase_node(node)
        else:
            first[id(value)] = node
    plain = GraphModule(graph, graph.graph)  # the exporter's own class refuses eval() and train()
    plain.training = False
    _copy_weights(plain, clone=False)
    return plain


def _copy_weights(graph: GraphModule, *, clone: bool = True) -> None:
    """Replace each parameter by a new one without gradient; with `clone`, with memory of its own."""
    for module in graph.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                data = parameter.detach().clone() if clone else parameter.detach()
                module._parameters[name] = torch.nn.Parameter(data, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and clone:
                module._buffers[name] = buffer.detach().clone()


def attribute(module: torch.nn.Module, target: str) -> Any:
    """Return the attribute at a dotted path ("layer1.0.conv1.weight")."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def input_name(module: torch.nn.Module) -> str:
    """Return the name of the one input of a module's forward.

    Raises:
        LoadError: if forward needs several inputs, or none.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p for p in named if p.default is p.empty]
    if len(required) > 1 or (not named and not any(p.kind is p.VAR_POSITIONAL for p in parameters)):
        names = ", ".join(p.name for p in required) or "none"
        raise LoadError(
            f"{type(module).__name__}.forward takes {len(required)} inputs ({names}), expected one image",
            hint="wrap the network in a module whose forward takes one image batch (n, c, h, w)",
        )
    return named[0].name if named else "input"


def output_names(program: ExportedProgram) -> tuple[str, ...]:
    """Return the public names of a program's outputs: "output", a dict's keys, or output_0, output_1, ..."""
    spec = program.call_spec.out_spec
    if spec is None or spec.is_leaf():
        return ("output",)
    names: list[str] = [""] * spec.num_leaves

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, child in value.items():
                walk(child, f"{path}_{key}" if path else str(key))
        elif isinstance(value, (tuple, list)):
            for i, child in enumerate(value):
                walk(child, f"{path or 'output'}_{i}")
        else:
            names[int(value)] = path

    walk(pytree.tree_unflatten(list(range(spec.num_leaves)), spec), "")
    return ("output",) if names == ["output_0"] else tuple(names)


def output_nodes(graph: GraphModule) -> list[Any]:
    """Return what the graph returns, flat."""
    return pytree.tree_leaves(graph.graph.output_node().args[0])


def describe(
    graph: GraphModule,
    name: str,
    shape: tuple[int, ...],
    outputs: tuple[str, ...],
    *,
    batch: int | None = None,
    notes: tuple[str, ...] = (),
) -> ExportedGraph:
    """Name the inputs and outputs of a graph and read their shapes off it.

    Raises:
        LoadError: for an output that is not a float tensor.
    """
    specs = []
    for output, node in zip(outputs, output_nodes(graph), strict=True):
        value = node.meta.get("val") if isinstance(node, Node) else None
        if not isinstance(value, torch.Tensor):
            raise LoadError(
                f"output {output!r} of the network is {type(node).__name__} {node}, expected a tensor",
                hint="wrap the network in a module that returns tensors only",
            )
        tail = tuple(int(size) for size in value.shape[1:])
        specs.append(TensorSpec(output, (None, *tail), str(value.dtype).removeprefix("torch.")))
    inputs = (TensorSpec(name, (None, *shape)),)
    return ExportedGraph(graph, inputs, tuple(specs), batch, notes)
