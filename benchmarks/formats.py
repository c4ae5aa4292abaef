"""Every format of the same network beside float: bytes, latency, agreement with float and SQNR.

    python benchmarks/formats.py [resnet20] [mobilenet_v2] [--runs 40] [--threads 1] [--json FILE]

resnet20 is trained (../shared/data, CIFAR-10); mobilenet_v2 has random weights and the BatchNorm statistics
of smooth images, so its agreement says nothing and is left out. All files of a runtime are timed interleaved
in one process, batch 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import nets
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks.cifar_resnet

from edgecnn.data import open_dataset
from edgecnn.devices.capability import activation_dtype_for, weight_bits_for
from edgecnn.devices.local import run_local
from edgecnn.devices.profile import load_device
from edgecnn.export.files import FileOptions, write_model
from edgecnn.export.parity import sqnr_db
from edgecnn.graph.build import build_program
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.judgement import stage_file
from edgecnn.load import LoadOptions, load_model
from edgecnn.model import Model
from edgecnn.pipeline import PassContext, run_passes
from edgecnn.proof import Candidate, run_outputs
from edgecnn.recipe import Recipe

FORMATS = ("onnx", "tflite")
RECIPES = ("fp16", "weight_only_wi8_afp32", "dynamic_wi8_ai8", "static_wi8_ai8", "static_wi8_ai16")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
NUM_CALIBRATION, NUM_JUDGED = {"resnet20": 512, "mobilenet_v2": 64}, {"resnet20": 500, "mobilenet_v2": 16}


def read_images(name: str, split: str) -> np.ndarray[Any, Any]:
    """Return uint8 (n, h, w, 3)."""
    if name == "resnet20":
        file, count = ("train4000", NUM_CALIBRATION) if split == "calibration" else ("test1000", NUM_JUDGED)
        return np.load(DATA / "cifar10" / f"{file}.npz")["x"][: count[name]]  # type: ignore[no-any-return]
    count, seed = (NUM_CALIBRATION, 2) if split == "calibration" else (NUM_JUDGED, 3)
    return nets.smooth_pixels(count[name], seed)


def load(name: str, folder: Path) -> Model:
    if name == "resnet20":
        weights = DATA / "weights" / "resnet20-12fca82f.th"
        return load_model(weights, LoadOptions("benchmarks.cifar_resnet:resnet20", input_shape=(3, 32, 32)))
    return load_model(nets.build_net(name, folder / "weights.pt"), LoadOptions(input_shape=(3, 224, 224)))


def make(model: Model, name: str, folder: Path) -> None:
    """Write float and each recipe's files."""
    device = load_device("local_cpu")
    bits = weight_bits_for(device.isa)
    images = nets.normalize(read_images(name, "calibration"))
    context = PassContext(open_dataset(images, model.spec.preprocess), tuple(range(len(images))))
    options = FileOptions(activation_dtype=activation_dtype_for(device.isa))
    made = {"float": FoldBatchNorm().run(model, context)}
    for recipe in RECIPES:
        passes = [
            dataclasses.replace(step, weight_bits=bits) if hasattr(step, "weight_bits") else step  # type: ignore[type-var]
            for step in Recipe.load(recipe).passes
        ]
        made[recipe] = run_passes(model, passes, context, lambda _: {})
    for key, compressed in made.items():
        program = build_program(compressed)
        for kind in FORMATS:
            stage_file(write_model(program, kind, model.spec, options), folder / key, model, key)


def measure(name: str, folder: Path, threads: int, runs: int) -> list[dict[str, Any]]:
    """Return one row for each file."""
    judged = nets.normalize(read_images(name, "judged"))
    np.save(folder / "one.npy", judged[:1])
    rows = []
    for kind in FORMATS:
        paths = {key: folder / key / f"model.{kind}" for key in ("float", *RECIPES)}
        outputs = {
            key: next(iter(run_outputs([Candidate(key, path)], judged)[key].values()))
            for key, path in paths.items()
        }
        request = {
            "task": "latency",
            "artifacts": [{"key": key, "path": str(path)} for key, path in paths.items()],
            "inputs": str(folder / "one.npy"),
            "threads": threads,
            "min_runs": runs,
            "min_seconds": 0.5,
            "max_seconds": 150.0,
            "baseline": "float",
        }
        timed = run_local(request, 1200.0)
        for key, path in paths.items():
            found = timed["comparisons"].get(key)
            same = (outputs[key].argmax(1) == outputs["float"].argmax(1)).mean()
            rows.append(
                {
                    "net": name,
                    "format": kind,
                    "file": key,
                    "size_bytes": path.stat().st_size,
                    "median_ms": timed["artifacts"][key]["median_ms"],
                    "speedup": 1.0 if found is None else found["speedup"],
                    "interval": None if found is None else found["interval"],
                    "agreement": float(same) if name == "resnet20" else None,
                    "sqnr_db": sqnr_db(outputs["float"], outputs[key]),
                }
            )
    return rows


def show(row: dict[str, Any]) -> None:
    low, high = row["interval"] or (1.0, 1.0)
    agreement = "-" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %"
    print(
        f"{row['net']:13s} {row['format']:7s} {row['file']:22s} {row['size_bytes'] / 1e6:7.3f} MB "
        f"{row['median_ms']:8.2f} ms  {1 / row['speedup']:6.2f} of float ({1 / high:.2f} to {1 / low:.2f})  "
        f"{agreement:>8s}  {row['sqnr_db'] or 0.0:6.1f} dB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nets", nargs="*", default=["resnet20", "mobilenet_v2"])
    parser.add_argument("--runs", type=int, default=40, help="timed runs of each file, at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in arguments.nets:
        with tempfile.TemporaryDirectory() as scratch:
            make(load(name, Path(scratch)), name, Path(scratch))
            found = measure(name, Path(scratch), arguments.threads, arguments.runs)
        for row in found:
            show(row)
        rows += found
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
