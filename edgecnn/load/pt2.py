"""Read and write .pt2 files: an exported graph with its ModelSpec beside it.

extra/edgecnn.json   {"schema_version": 1, "name", "task", "labels", "preprocess", "history"}
"""

from __future__ import annotations

import importlib
import io
import json
import os
import tempfile
import warnings as python_warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from edgecnn.errors import LoadError, OutputError
from edgecnn.load.export import (
    ExportedGraph,
    describe,
    dynamic_or_fixed,
    export_program,
    first_line,
    functional_graph,
    output_names,
)
from edgecnn.load.pt2_check import check_archive
from edgecnn.model import Model, PassRecord
from edgecnn.runner.preprocess import Preprocess

SCHEMA_VERSION = 1
EXTRA_FILE = "edgecnn.json"


@dataclass(frozen=True)
class StoredSpec:
    """What a .pt2 written by edgecnn says beside its graph; all None for others."""

    name: str | None = None
    task: str | None = None
    labels: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    history: tuple[PassRecord, ...] = ()


def read_pt2(path: Path, *, trust: bool) -> tuple[ExportedProgram, StoredSpec]:
    """Read a .pt2 file; nothing in it runs unless `trust`.

    Args:
        path: written by `torch.export.save` or `save_pt2`.
        trust: allow pickles and custom objects in the archive.

    Raises:
        UntrustedPickleError: if a member wants to run code.
        LoadError: if the file is damaged or not readable by this PyTorch.
    """
    from torch.export.pt2_archive._package import load_pt2

    try:
        data = path.read_bytes()
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror})") from error
    check_archive(path, data, trust=trust)
    if b"quantized_decomposed" in data:
        register_quantized_ops()
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            contents = load_pt2(io.BytesIO(data))
    except Exception as error:
        raise LoadError(
            f"{path}: cannot be loaded by PyTorch {torch.__version__} ({first_line(error)})",
            hint="copy it again, or export it again with this PyTorch",
        ) from error
    if len(contents.exported_programs) != 1:
        names = ", ".join(contents.exported_programs) or "none"
        raise LoadError(
            f"{path}: holds {len(contents.exported_programs)} exported programs ({names}), expected one"
        )
    program = next(iter(contents.exported_programs.values()))
    program._guards_code = []  # source text from the file, of use only to checks we leave out
    return program, _stored_spec(path, contents.extra_files.get(EXTRA_FILE))


def register_quantized_ops() -> None:
    """Register torch.ops.quantized_decomposed, which a quantized graph calls."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")


def _stored_spec(path: Path, text: Any) -> StoredSpec:
    if text is None:
        return StoredSpec()
    try:
        values = json.loads(text)
        if values["schema_version"] != SCHEMA_VERSION:
            raise LoadError(
                f"{path}: {EXTRA_FILE} has schema version {values['schema_version']}, not {SCHEMA_VERSION}",
                hint="update edgecnn",
            )
        labels = values["labels"]
        return StoredSpec(
            name=str(values["name"]),
            task=str(values["task"]),
            labels=tuple(str(label) for label in labels) if labels is not None else None,
            preprocess=Preprocess.from_dict(values["preprocess"]),
            history=tuple(PassRecord(**record) for record in values["history"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{path}: {EXTRA_FILE} in the archive is damaged ({first_line(error)})") from error


def graph_of_program(program: ExportedProgram, shape: tuple[int, int, int] | None) -> ExportedGraph:
    """Turn an exported program into a Model's graph.

    Args:
        program: takes one image batch.
        shape: (c, h, w) the user gave; needed only where the program leaves them open.

    Raises:
        LoadError: if its input is not one image batch, or not of `shape`.
    """
    name, sizes = _image_input(program)
    found = tuple(size if isinstance(size, int) else None for size in sizes)
    wanted = shape or found[1:]
    if any(size is None for size in wanted):
        raise LoadError(
            f"the exported program takes images of any size ({_spell(found[1:])})",
            hint="give --input-shape, such as 3x224x224",
        )
    fits = all(have in (None, want) for have, want in zip(found[1:], wanted, strict=True))
    if not fits:
        raise LoadError(f"input shape is {_spell(wanted)}, the exported program takes {_spell(found[1:])}")
    image = (int(wanted[0] or 0), int(wanted[1] or 0), int(wanted[2] or 0))
    outputs = output_names(program)
    if None in found[1:]:
        try:
            program = export_program(program.module(check_guards=False), image, found[0])
        except Exception as error:
            raise LoadError(
                f"the exported program does not run with input {_spell(image)} ({first_line(error)})"
            ) from error
    graph = functional_graph(program, image, batch=found[0] or 2)
    if found[0] is None:
        return describe(graph, name, image, outputs)
    return dynamic_or_fixed(graph, name, image, outputs, found[0], "exported with a fixed batch")


def _spell(shape: tuple[int | None, ...]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)


def _image_input(program: ExportedProgram) -> tuple[str, tuple[Any, ...]]:
    """Return name and sizes (n, c, h, w) of a program's one input."""
    names = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    if len(names) != 1:
        raise LoadError(
            f"the exported program takes {len(names)} inputs ({', '.join(map(str, names))}), expected one",
            hint="export a module whose forward takes one image batch (n, c, h, w)",
        )
    value = values.get(str(names[0]))
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.dtype != torch.float32:
        found = (
            f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        )
        raise LoadError(f"input {names[0]!r} is {found}, expected a float32 image batch (n, c, h, w)")
    return str(names[0]), tuple(value.shape)


def save_pt2(model: Model, path: str | Path) -> None:
    """Write a model as .pt2 (graph, weights, spec and history) that `load_model` gives back.

    Args:
        model: exported again here with its dynamic (or fixed) batch.
        path: replaced in one step once all is written.

    Raises:
        OutputError: if the file cannot be written.
        LoadError: if the graph cannot be exported.
    """
    target = Path(path)
    _, *sizes = model.spec.inputs[0].shape
    if any("quantized_decomposed" in str(node.target) for node in model.graph.graph.nodes):
        register_quantized_ops()
    try:
        program = export_program(model.graph, tuple(int(size or 0) for size in sizes), model.fixed_batch)
    except Exception as error:
        raise LoadError(
            f"{model.spec.name}: the graph cannot be exported again ({first_line(error)})"
        ) from error
    extra = {EXTRA_FILE: json.dumps(_spec_values(model))}
    _write_program(program, target, extra)


def _spec_values(model: Model) -> dict[str, Any]:
    spec = model.spec
    return {
        "schema_version": SCHEMA_VERSION,
        "name": spec.name,
        "task": spec.task,
        "labels": list(spec.labels) if spec.labels is not None else None,
        "preprocess": spec.preprocess.to_dict(),
        "history": [asdict(record) for record in model.history],
    }


def _write_program(program: ExportedProgram, target: Path, extra: dict[str, Any]) -> None:
    temporary: str | None = None
    for node in program.graph.nodes:  # paths of this machine's source files, of no use elsewhere
        node.meta.pop("stack_trace", None)
        node.meta.pop("from_node", None)
    try:
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files=extra)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(buffer.getbuffer())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
        temporary = None
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written ({error.strerror or error})",
            hint="check the folder, its rights and the free space",
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
