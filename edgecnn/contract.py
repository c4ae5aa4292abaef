"""The contract: every file against the NumPy reference, in integers where the network is quantized.

A file of a float network computes in float32 in another order than the reference; its outputs may be
MAX_RELATIVE_ERROR of their largest value away. So may those of a network with int16 activations, some 30 of
whose steps that is: LiteRT computes it in integers, ONNX Runtime in float.

A network of which some layers compute in float is always examined operator by operator, also where its
outputs are as they should be: a runtime that quantizes those layers after all would hide there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgecnn.errors import ParityError
from edgecnn.export.dynamic import as_computed
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

Outputs = Mapping[str, Array]


def run_reference(program: Program, inputs: Array, progress: Progress) -> dict[str, Array]:
    """Return the outputs of the NumPy reference, as float32.

    Args:
        program: with one input.
        inputs: float32 (n, c, h, w).
        progress: told about every few images.
    """
    pieces: list[dict[str, Array]] = []
    batch = max(1, min(16, (1 << 20) // max(int(np.prod(inputs.shape[1:])), 1)))
    kind = "float" if program.computes_in_float else "integer"
    progress.start(f"{kind} reference", len(inputs))
    for start in range(0, len(inputs), batch):
        chunk = inputs[start : start + batch]
        pieces.append(run_program(program, {program.inputs[0]: chunk}))
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
    references: dict[str, Outputs] = {}
    for key in files:
        shared = next((k for k in references if computed[k].ops == computed[key].ops), None)
        references[key] = (
            run_reference(computed[key], inputs, progress) if shared is None else references[shared]
        )
    comparisons = {
        f"{key}_vs_reference": _compare(references[key], outputs[key], scales, is_float) for key in files
    }
    if len(files) == 2:
        comparisons["onnx_vs_tflite"] = _compare(outputs["onnx"], outputs["tflite"], scales, is_float)
    warnings = []
    for key in files:
        found = comparisons[f"{key}_vs_reference"]
        if program.computes_in_float and not found.holds and not computed[key].is_dynamic:
            raise _float_error(key, found.max_relative_error or 0.0)
        if not found.holds or float_islands(computed[key]):
            worst = worst_images(references[key], outputs[key], scales, 2)
            given = {name: values[worst] for name, values in outputs[key].items()}
            warnings += _examine(computed[key], key, inputs[worst], given, activation_dtype, found)
    floats = next((outputs[c.key] for c in candidates if c.key.startswith("float_")), None)
    main = program.outputs[0][0]
    sqnr = {key: None if floats is None else sqnr_db(floats[main], outputs[key][main]) for key in files}
    return Parity(comparisons, sqnr, tuple(warnings))


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
    key: str,
    inputs: Array,
    given: Mapping[str, Array],
    activation_dtype: str,
    found: Comparison,
) -> list[str]:
    """Find the operator that differs, or return the warning that rounding added up, where it did.

    `given` are the file's outputs for `inputs`; a trace that leads elsewhere explains nothing.
    """
    feeds = {program.inputs[0]: inputs}
    onnx = key == "onnx"
    traced = trace_onnx(program, feeds, activation_dtype) if onnx else trace_tflite(program, feeds)
    difference = first_difference(program, traced, feeds, run_op)
    runtime = "onnxruntime" if onnx else "LiteRT"
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
