"""Static int8 of 180 networks: both files, how much of them is int8, and whether they compute the same.

    python -m benchmarks.zoo run torchvision OUT.jsonl [NET ...]       one network per process, resumable
    python -m benchmarks.zoo run timm OUT.jsonl
    python -m benchmarks.zoo table OUT.jsonl

Networks have random weights and BatchNorm statistics of smooth images, at the sizes of `prune_nets`. Each is
calibrated on 16 such images and proven on 4 others: ONNX and TFLite against the integer reference and each
other, as every run of `compress` does. SQNR is of the first output against the float file's.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from benchmarks.isolated import Row, report, run_each

if TYPE_CHECKING:
    from edgecnn.export.parity import Comparison
    from edgecnn.model import Model

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

NUM_CALIBRATION, NUM_PROVEN = 16, 4


def quantize(name: str) -> Row:
    """Make and prove the files of one network."""
    import torch

    from benchmarks import nets
    from benchmarks.prune_nets import build, side_of
    from edgecnn.data import open_dataset
    from edgecnn.graph.build import build_program, float_islands
    from edgecnn.load import LoadOptions, load_model
    from edgecnn.pipeline import PassContext, run_passes
    from edgecnn.recipe import Recipe

    torch.set_num_threads(1)
    side = side_of(name)
    row: Row = {"net": name, "side": side, "stage": "load"}
    images = nets.normalize(nets.smooth_pixels(NUM_CALIBRATION + NUM_PROVEN, seed=2, side=side))
    net = build(name)
    nets.settle_batch_norms(net, torch.from_numpy(images[:NUM_CALIBRATION]))
    started = time.perf_counter()
    model = load_model(net, LoadOptions(input_shape=(3, side, side)))
    row |= {"load_s": time.perf_counter() - started, "stage": "quantize"}
    report(row)
    started = time.perf_counter()
    recipe = Recipe.load("static_wi8_ai8")
    context = PassContext(
        open_dataset(images, model.spec.preprocess), tuple(range(NUM_CALIBRATION)), recipe.seed
    )
    compressed = run_passes(model, recipe.passes, context, lambda _: {})
    program = build_program(compressed)
    row |= {"stage": "write", "islands": float_islands(program), "ops": len(program.ops)}
    row["quantize_s"] = time.perf_counter() - started
    report(row)
    return prove(row, model, compressed, images[NUM_CALIBRATION:])


def prove(row: Row, model: Model, compressed: Model, images: npt.NDArray[np.float32]) -> Row:
    """Write the files of one network and hold them against the reference."""
    from edgecnn.contract import prove_parity
    from edgecnn.devices.capability import activation_dtype_for
    from edgecnn.devices.profile import load_device
    from edgecnn.export.files import FORMATS, FileOptions, write_model
    from edgecnn.graph.build import build_program
    from edgecnn.graph.folding import FoldBatchNorm
    from edgecnn.judgement import stage_file
    from edgecnn.pipeline import PassContext, SilentProgress
    from edgecnn.proof import Candidate, temporary_folder

    dtype = activation_dtype_for(load_device("local_cpu").isa)
    program = build_program(compressed)
    float_program = build_program(FoldBatchNorm().run(model, PassContext()))
    with temporary_folder() as folder:
        candidates, started = [], time.perf_counter()
        for kind in FORMATS:
            file = write_model(program, kind, model.spec, FileOptions(activation_dtype=dtype))
            row[f"{kind}_bytes"] = len(file.data)
            candidates.append(Candidate(kind, stage_file(file, folder / "int8", compressed, "int8")))
        plain = write_model(float_program, "onnx", model.spec, FileOptions())
        candidates.append(Candidate("float_onnx", stage_file(plain, folder / "float", model, "float")))
        row |= {"write_s": time.perf_counter() - started, "float_bytes": len(plain.data), "stage": "prove"}
        report(row)
        started = time.perf_counter()
        inputs = np.ascontiguousarray(images)
        parity = prove_parity(program, candidates, inputs, dtype, SilentProgress())
    return row | {
        "prove_s": time.perf_counter() - started,
        "max_lsb": {key: found.max_lsb for key, found in parity.comparisons.items()},
        "holds": all(_holds(found, row) for found in parity.comparisons.values()),
        "sqnr_db": parity.sqnr_db["onnx"],
        "warnings": list(parity.warnings),
        "stage": "done",
    }


def _holds(found: Comparison, row: Row) -> bool:
    """Whether the contract holds that the network is held to."""
    return found.holds_mixed if row["islands"] else found.holds


def verdict(row: Row) -> str:
    """Return what became of a network, in words that can be counted."""
    if row["stage"] != "done":
        return f"failed at {row['stage']}"
    kind = "with islands" if row["islands"] else "full int8"
    return kind if row["holds"] else f"{kind}, each operator within one step"


def table(out: Path) -> None:
    """Print the figures of one suite as Markdown."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    print("| network | verdict | largest LSB | SQNR dB | float / int8 bytes | quantize, s | prove, s |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        done = row["stage"] == "done"
        cells = [row["net"], verdict(row), str(max(row["max_lsb"].values())) if done else ""]
        cells.append(f"{row['sqnr_db']:.1f}" if done and row["sqnr_db"] is not None else "")
        cells.append(f"{row['float_bytes'] / row['onnx_bytes']:.2f}" if done else "")
        cells += [f"{row[key]:.1f}" if key in row else "" for key in ("quantize_s", "prove_s")]
        print("| " + " | ".join(cells) + " |")
    print(f"\n{len(rows)} networks:", dict(Counter(verdict(row) for row in rows)))
    for row in rows:
        if row["stage"] != "done":
            print("-", row["net"], verdict(row), row.get("failure"))
        elif row["islands"]:
            print("-", row["net"], "in float:", ", ".join(row["islands"][:3]), "...", len(row["islands"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("target", help="torchvision or timm, or for table a file of results")
    parser.add_argument("rest", nargs="*", help="file of results, networks")
    chosen = parser.parse_args()
    if chosen.command == "table":
        table(Path(chosen.target))
        return
    from benchmarks.prune_nets import SUITES, import_torchvision_models

    import_torchvision_models()
    import edgecnn.compress  # noqa: F401  once, for every network's process

    for row in run_each(chosen.rest[1:] or SUITES[chosen.target], Path(chosen.rest[0]), quantize):
        print(verdict(row), json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
