"""Which layers a compressed file spends its time in, against float's file in the same runtime.

    onnx     both files are timed operator by operator by ONNX Runtime's own profiler
    tflite   the operators of each layer are written as a TFLite file of their own, and all of them timed:
             LiteRT's interpreter has no profiler in Python

Alone a layer finds its values in the cache, alike in int8 and float; what a call costs that computes next to
nothing is taken off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.devices.local import run_local
from edgecnn.errors import EdgeCNNError
from edgecnn.export.tflite import to_tflite
from edgecnn.graph.program import BATCH, Op, Program, Tensor
from edgecnn.judgement import Made
from edgecnn.proof import TIMEOUT_S, Candidate, read_images, temporary_folder
from edgecnn.search.workbench import Workbench

RUNTIME = "(runtime)"
"""Stands for what is in between layers: transpositions, reorders, quantize and dequantize."""

_ADDED = re.compile(r"^fused |(_token_\d+|_nchwc|_bn_fused)+$")
"""What ONNX Runtime's optimizations add to the name of a node or of the value it makes."""


@dataclass(frozen=True)
class LayerTime:
    """One layer's operators in one runtime, for one image.

    Attributes:
        layer: path in the network, "features.0".
        int8_ms, float_ms: time in the compressed and in the float file.
    """

    layer: str
    int8_ms: float
    float_ms: float

    @property
    def lost_ms(self) -> float:
        """How much int8 costs; less than 0 where it gains."""
        return self.int8_ms - self.float_ms

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-ready."""
        return {"layer": self.layer, "int8_ms": self.int8_ms, "float_ms": self.float_ms}


def layer_times(bench: Workbench, made: Made, file_format: str) -> list[LayerTime]:
    """Time the layers of one format's files on this machine; what loses most comes first.

    Args:
        bench: of the run.
        made: the files, and the networks they hold.
        file_format: "onnx" or "tflite".

    Raises:
        EdgeCNNError: if a runtime fails.
    """
    progress = bench.maker.progress
    progress.start(f"which layers are slower than float in the {file_format} file", None)
    if file_format == "onnx":
        before, after = _profiled(bench, made)
    else:
        before, after = _timed_alone(made, bench.maker.options.threads)
    progress.finish()
    times = [LayerTime(n, after.get(n, 0.0), before.get(n, 0.0)) for n in {**after, **before}]
    return sorted(times, key=lambda time: -time.lost_ms)


def order_of_loss(times: Mapping[str, Sequence[LayerTime]]) -> list[str]:
    """Return the layers that lose time, what loses most first: shares of each format's float file, summed.

    Example:
        >>> onnx = [LayerTime("a", 0.2, 0.1), LayerTime("b", 0.1, 0.9)]
        >>> tflite = [LayerTime("a", 0.1, 0.1), LayerTime("b", 1.4, 0.9)]
        >>> order_of_loss({"onnx": onnx, "tflite": tflite}), order_of_loss({"onnx": onnx})
        (['b', 'a'], ['a'])
    """
    lost: dict[str, float] = {}
    for found in times.values():
        total = sum(time.float_ms for time in found) or 1.0
        for time in found:
            if time.lost_ms > 0:
                lost[time.layer] = lost.get(time.layer, 0.0) + time.lost_ms / total
    return sorted(lost, key=lambda layer: -lost[layer])


def layer_programs(program: Program) -> Iterator[tuple[str, Program]]:
    """Yield the path of each layer with a Program of its operators; what converts between layers by itself.

    A value that comes from another layer is an input, in int8 where it is; one that another reads an output.
    """
    groups: dict[str, list[Op]] = {}
    for op in program.ops:
        groups.setdefault(_path(op) or f"{RUNTIME} {op.output}", []).append(op)
    readers, outputs = program.consumers(), {name for _, name in program.outputs}
    for path, ops in groups.items():
        made = {op.output: None for op in ops}
        read = dict.fromkeys(name for op in ops for name in op.inputs)
        inputs = tuple(name for name in read if name not in made and not program.tensors[name].is_constant)
        given = [
            name for name in made if name in outputs or any(reader not in ops for reader in readers[name])
        ]
        if inputs and given:
            tensors = {name: program.tensors[name] for name in (*read, *made)}
            piece = Program(path, inputs, tuple((name, name) for name in given), tensors, tuple(ops))
            yield (RUNTIME if path.startswith(RUNTIME) else path), piece


def _path(op: Op) -> str:
    """Return the path of the layer that an operator belongs to, "" for what is in between."""
    return op.layer.split(" (")[0] if " (" in op.layer and not op.kind.endswith("quantize") else ""


def _timed_alone(made: Made, threads: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return milliseconds by layer of the float and of the compressed TFLite file, each layer by itself."""
    places: list[tuple[int, str, str]] = []
    left_out: set[str] = set()
    with temporary_folder() as folder:
        empty = _empty_program()
        files = {_form(empty): _staged(folder, "call", empty)}
        for side, program in enumerate((made.float_program, made.program)):
            for path, piece in layer_programs(program):
                form = _form(piece)
                try:
                    files[form] = files.get(form) or _staged(folder, str(len(files)), piece)
                    places.append((side, path, files[form].key))
                except EdgeCNNError:  # has a form in the whole network alone
                    left_out.add(path)
        entries = _run(files.values(), threads, min_runs=32, max_seconds=20.0, warmup_seconds=0.1)
    found: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for side, path, key in places:
        if path not in left_out:
            alone_ms = max(entries[key]["median_ms"] - entries["call"]["median_ms"], 0.0)
            found[side][path] = found[side].get(path, 0.0) + alone_ms
    return found


def _form(program: Program) -> str:
    """Return what decides how long a Program takes: everything but names and values."""
    return repr([(op.kind, sorted(op.attributes.items()), _shapes(program, op)) for op in program.ops])


def _shapes(program: Program, op: Op) -> list[tuple[tuple[int, ...], str, bool]]:
    tensors = [program.tensors[name] for name in (*op.inputs, op.output)]
    return [(tensor.shape, tensor.dtype, tensor.is_constant) for tensor in tensors]


def _staged(folder: Path, key: str, program: Program) -> Candidate:
    """Write a Program as a TFLite file where the runner can open it."""
    path = folder / f"{key}.tflite"
    path.write_bytes(to_tflite(program).data)
    return Candidate(key, path)


def _empty_program() -> Program:
    """Return a Program that computes next to nothing."""
    tensors = {name: Tensor(name, (BATCH, 1)) for name in ("x", "y")}
    return Program(
        "call", ("x",), (("y", "y"),), tensors, (Op("clamp", ("x",), "y", {"clamp": (0.0, None)}),)
    )


def _profiled(bench: Workbench, made: Made) -> tuple[dict[str, float], dict[str, float]]:
    """Return milliseconds by layer of the float and of the compressed ONNX file."""
    dataset, held_out = bench.images
    inputs, _ = read_images(dataset, held_out[:1])
    with bench.staged(made, ["onnx"]) as candidates:
        path = candidates[0].path.parent / "inputs.npy"
        np.save(path, np.asarray(inputs, np.float32))
        asked: dict[str, Any] = {"inputs": str(path), "profile": True, "min_runs": 10, "max_seconds": 10.0}
        entries = _run(candidates, bench.maker.options.threads, **asked)
    places = _places(made.float_program) | _places(made.program)
    before, after = (_by_layer(entries[key]["profile"] or [], places) for key in ("float_onnx", "onnx"))
    return before, after


def _run(candidates: Iterable[Candidate], threads: int, **asked: Any) -> dict[str, Any]:
    """Time files interleaved, as long as asked for; without images they are fed noise."""
    request = {
        "task": "latency",
        "artifacts": [candidate.to_request() for candidate in candidates],
        "threads": threads,
        "min_seconds": 0.0,
        **asked,
    }
    entries: dict[str, Any] = run_local(request, TIMEOUT_S)["artifacts"]
    return entries


def _places(program: Program) -> dict[str, str]:
    """Return value -> path of the layer that makes it, and each path as it is."""
    made_by = {op.output: _path(op) for op in program.ops if _path(op)}
    return {**made_by, **{path: path for path in made_by.values()}}


def _by_layer(profile: Sequence[Mapping[str, Any]], places: Mapping[str, str]) -> dict[str, float]:
    """Sum an ONNX Runtime profile by layer.

    The writer calls nodes LAYER/OPERATOR; the runtime names some that it makes after the value they give.

    Example:
        >>> rows = [("stem/Conv_token_1", 3.0), ("conv2d_nchwc", 1.0), ("fused stem/Relu", 2.0), ("C", 4.0)]
        >>> profile = [{"name": name, "median_ms": ms} for name, ms in rows]
        >>> _by_layer(profile, {"stem": "stem", "conv2d": "body.0"})
        {'stem': 5.0, 'body.0': 1.0, '(runtime)': 4.0}
    """
    found: dict[str, float] = {}
    for row in profile:
        bare = _ADDED.sub("", _ADDED.sub("", str(row["name"])))
        name = places.get(bare.partition("/")[0], RUNTIME)
        found[name] = found.get(name, 0.0) + row["median_ms"]
    return found
