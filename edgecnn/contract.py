"""The contract: every file against the NumPy reference, in integers where the network is quantized.

A file of a float network computes in float32 in another order than the reference; its outputs may be
MAX_RELATIVE_ERROR of their largest value away. So may those of a network with int16 activations, some 30 of
whose steps that is: LiteRT computes it in integers, ONNX Runtime in float.

On x86 without VNNI ONNX Runtime saturates where pairs of products leave int16; then the reference does too.

A network of which some layers compute in float is always examined operator by operator, also where its
outputs are as they should be: a runtime that quantizes those layers after all would hide there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from edgecnn.errors import ParityError
from edgecnn.export.dynamic import as_computed
from edgecnn.export.onnx_alignment import align_channels
from edgecnn.export.parity import (
    MAX_OP_STEP,
    MAX_RELATIVE_ERROR,
    Comparison,
    compare,
    first_difference,
    output_scales,
    relative_error,
    sqnr_db,
    traced_outputs,
    worst_images,
)
from edgecnn.export.trace import trace_onnx, trace_tflite
from edgecnn.graph.build import float_islands
from edgecnn.graph.program import Array, Program
from edgecnn.pipeline import Progress
from edgecnn.proof import Candidate, run_outputs
from edgecnn.quantize.reference import run_op, run_program
from edgecnn.quantize.saturation import may_saturate
from edgecnn.runner.environment import local_isa

Outputs = Mapping[str, Array]


SATURATES_HERE = (
    "this machine is x86 without VNNI, where ONNX Runtime saturates with 8-bit weights: the onnx file was "
    "held against a reference that does so too, and differs from the tflite file; elsewhere it is exact"
)


def run_reference(
    program: Program, inputs: Array, progress: Progress, *, saturates: bool = False
) -> dict[str, Array]:
    """Return the outputs of the NumPy reference, as float32.

    Args:
        program: with one input.
        inputs: float32 (n, c, h, w).
        progress: told about every few images.
        saturates: as for `run_program`.
    """
    pieces: list[dict[str, Array]] = []
    batch = max(1, min(16, (1 << 20) // max(int(np.prod(inputs.shape[1:])), 1)))
    kind = "float" if program.computes_in_float else "integer"
    progress.start(f"{kind} reference", len(inputs))
    for start in range(0, len(inputs), batch):
        chunk = inputs[start : start + batch]
        pieces.append(run_program(program, {program.inputs[0]: chunk}, saturates=saturates))
        progress.advance(len(chunk))
    progress.finish()
    return {name: np.concatenate([p[name] for p in pieces]) for name, _ in program.outputs}


@dataclass(frozen=True)
class Parity:
    """What `prove_parity` found.

    Attributes:
        comparisons: "onnx_vs_reference", "tflite_vs_reference", "onnx_vs_tflite", as far as files were made.
        sqnr_db: by file, against float.
        warnings: rounding that added up, in words.
    """

    comparisons: dict[str, Comparison]
    sqnr_db: dict[str, float | None]
    warnings: tuple[str, ...]


def prove_parity(
    program: Program,
    candidates: Sequence[Candidate],
    inputs: Array,
    activation_dtype: str,
    progress: Progress,
) -> Parity:
    """Run the files and the reference on the same images and compare their integers.

    Args:
        program: what the compressed files were made from.
        candidates: compressed files, and the float ones for the SQNR.
        inputs: float32 (n, c, h, w), held out from calibration where possible.
        activation_dtype: of the ONNX file.
        progress: told how far it is.

    Raises:
        ParityError: naming the first operator that computes something else.
        RunnerError: if a runtime cannot load or run a file.
    """
    progress.start("run the files in their runtimes", None)
    outputs = run_outputs(candidates, inputs)
    progress.finish()
    scales = output_scales(program)
    is_float = program.computes_in_float or program.activation_bits == 16
    files = [c.key for c in candidates if not c.key.startswith("float_")]
    computed = {key: as_computed(program, key) for key in files}
    saturates = "onnx" in files and _saturates_here(program, activation_dtype)
    references = _references(computed, inputs, progress, saturates=saturates)
    comparisons = {
        f"{key}_vs_reference": _compare(references[key], outputs[key], scales, is_float) for key in files
    }
    if len(files) == 2:
        comparisons["onnx_vs_tflite"] = _compare(outputs["onnx"], outputs["tflite"], scales, is_float)
    warnings = [SATURATES_HERE] if saturates else []
    for key in files:
        found = comparisons[f"{key}_vs_reference"]
        if program.computes_in_float and not found.holds and not computed[key].is_dynamic:
            raise _float_error(key, found.max_relative_error or 0.0)
        if not found.holds or float_islands(computed[key]):
            worst = worst_images(references[key], outputs[key], scales, 2)
            given = {name: values[worst] for name, values in outputs[key].items()}
            dtype = None if key != "onnx" else activation_dtype
            warnings += _examine(computed[key], dtype, inputs[worst], given, found, saturates=saturates)
    floats = next((outputs[c.key] for c in candidates if c.key.startswith("float_")), None)
    main = program.outputs[0][0]
    sqnr = {key: None if floats is None else sqnr_db(floats[main], outputs[key][main]) for key in files}
    return Parity(comparisons, sqnr, tuple(warnings))


def _saturates_here(program: Program, activation_dtype: str) -> bool:
    """Whether ONNX Runtime gives other integers on this machine than where its kernels are exact."""
    return activation_dtype == "uint8" and local_isa() == "x86-64" and may_saturate(align_channels(program))


def _references(
    computed: Mapping[str, Program], inputs: Array, progress: Progress, *, saturates: bool
) -> dict[str, Outputs]:
    """Return what each file should give; the formats share a run where they compute the same."""
    found: dict[str, Outputs] = {}
    for key, program in computed.items():
        shared = next((k for k in found if computed[k].ops == program.ops), None)
        if key == "onnx" and saturates:
            found[key] = run_reference(align_channels(program), inputs, progress, saturates=True)
        elif shared is None or saturates:
            found[key] = run_reference(program, inputs, progress)
        else:
            found[key] = found[shared]
    return found


def _compare(first: Outputs, second: Outputs, scales: Mapping[str, float], is_float: bool) -> Comparison:
    """Compare outputs in steps, and those of a float network as a fraction of their range too."""
    found = compare(first, second, scales)
    return replace(found, max_relative_error=relative_error(first, second)) if is_float else found


def _is_kept(found: Comparison, is_mixed: bool) -> bool:
    """Whether the contract is kept, which asks less of a network with layers in float."""
    return found.holds or (is_mixed and found.holds_mixed)


def _float_error(key: str, error: float) -> ParityError:
    runtime = "onnxruntime" if key == "onnx" else "LiteRT"
    return ParityError(
        f"the {key} file does not compute in {runtime} what the graph computes: its outputs are up to "
        f"{error:.2g} of their range away, expected at most {MAX_RELATIVE_ERROR:g}",
        hint=f"nothing was written; please report this with the version of {runtime}",
    )


def _examine(
    program: Program,
    onnx_dtype: str | None,
    inputs: Array,
    given: Mapping[str, Array],
    found: Comparison,
    *,
    saturates: bool,
) -> list[str]:
    """Find the operator that differs, or return the warning that rounding added up, where it did.

    `given` are the file's outputs for `inputs`; a trace that leads elsewhere explains nothing.
    `onnx_dtype` is that of the ONNX file's activations, None for TFLite.
    """
    feeds = {program.inputs[0]: inputs}
    key, runtime = ("tflite", "LiteRT") if onnx_dtype is None else ("onnx", "onnxruntime")
    traced = trace_tflite(program, feeds) if onnx_dtype is None else trace_onnx(program, feeds, onnx_dtype)
    compute = partial(run_op, saturates=saturates and onnx_dtype is not None)
    difference = first_difference(program, traced, feeds, compute)
    figures = f"up to {found.max_lsb} LSB, {100 * found.fraction_within_1_lsb:.2f} % within 1 LSB"
    if found.max_relative_error is not None:
        figures = f"up to {found.max_relative_error:.2g} of the outputs' range"
    if difference is not None:
        raise ParityError(
            f"the {key} file does not compute the contract's integers in {runtime} ({figures}); the first "
            f"operator that differs is {difference}",
            hint=f"nothing was written; please report this with the version of {runtime}",
        )
    is_mixed = bool(float_islands(program))
    if _is_kept(found, is_mixed):
        return []
    again = traced_outputs(program, traced)
    scales = {name: scale for name, scale in output_scales(program).items() if name in again}
    if program.is_dynamic:
        differs = relative_error(again, given) > 2 * MAX_OP_STEP
    else:
        differs = bool(scales) and not _is_kept(compare(again, given, scales), is_mixed)
    if differs:
        raise ParityError(
            f"the {key} file does not compute in {runtime} what its operators compute one by one ({figures})",
            hint=f"nothing was written; please report this with the version of {runtime}",
        )
    if program.is_dynamic:
        added = (
            "every operator computes what the reference does, but where a value is rounded the other way the "
            "scales that follow differ, and that adds up along"
        )
    else:
        added = "every operator is within 1 LSB of the reference, but differences of one step add up along"
    return [f"{key}: {added} the network ({figures})"]
