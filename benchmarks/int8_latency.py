"""Latency, size and SQNR of edgecnn's files beside the peers', all files of a runtime interleaved.

    python benchmarks/int8_latency.py [NET ...] [--hard] [--threads 1 2] [--runs 100] [--cache DIR]
                                      [--peers-python PYTHON] [--json FILE]

Everybody calibrates on the same 64 images; the SQNR is against edgecnn's float ONNX file on 16 others. A
ratio above 1 is faster than edgecnn's float file of the same format in the same run; the float files of
torch.onnx.export and litert-torch stand beside it to show that this baseline is not a slow one.
ai-edge-quantizer's file reads int8, edgecnn's reads float unless `--io int8` is given: both are timed.

Files are made in processes of their own and kept in the cache, so that timing can be repeated alone. A peer
that fails on a network is left out of its table, with its message.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nets
import numpy as np
import numpy.typing as npt
import peers

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
from edgecnn.pipeline import PassContext, run_passes
from edgecnn.proof import Candidate, run_outputs
from edgecnn.recipe import Recipe

NUM_CALIBRATION = 64
NUM_JUDGED = 16

FILES = {
    "onnx": {
        "edgecnn_float": "float/model.onnx",
        "edgecnn_int8": "int8/model.onnx",
        "torch_float": peers.FILES["torch_float"],
        "ort_int8": peers.FILES["ort_int8"],
        "nncf_int8": peers.FILES["nncf_int8"],
    },
    "tflite": {
        "edgecnn_float": "float/model.tflite",
        "edgecnn_int8": "int8/model.tflite",
        "edgecnn_int8_io": "int8_io/model.tflite",
        "litert_float": peers.FILES["litert_float"],
        "aeq_int8": peers.FILES["aeq_int8"],
    },
}
BASELINE = "edgecnn_float"

LABELS = {
    "edgecnn_float": "edgecnn float",
    "edgecnn_int8": "edgecnn int8",
    "edgecnn_int8_io": "edgecnn int8, --io int8",
    "torch_float": "torch.onnx.export float",
    "ort_int8": "quantize_static u8s8",
    "nncf_int8": "NNCF",
    "litert_float": "litert-torch float",
    "aeq_int8": "ai-edge-quantizer",
}


def make_ours(name: str, folder: Path) -> None:
    """Write edgecnn's float and int8 files of one network."""
    options = LoadOptions(input_shape=(3, nets.SIDE, nets.SIDE))
    model = load_model(nets.build_net(name, folder / "weights.pt"), options)
    images = nets.normalize(np.load(folder / "calibration.npy"))
    dataset = open_dataset(images, model.spec.preprocess)
    device = load_device("local_cpu")
    bits = weight_bits_for(device.isa)
    recipe = Recipe.load("static_wi8_ai8")
    passes = [
        dataclasses.replace(step, weight_bits=bits) if hasattr(step, "weight_bits") else step  # type: ignore[type-var]
        for step in recipe.passes
    ]
    context = PassContext(dataset, tuple(range(len(images))), recipe.seed)
    program = build_program(run_passes(model, passes, context, lambda _: {}))
    float_program = build_program(FoldBatchNorm().run(model, context))
    int8 = FileOptions(activation_dtype=activation_dtype_for(device.isa))
    for kind in FILES:
        stage_file(write_model(program, kind, model.spec, int8), folder / "int8", model, recipe.name)
        stage_file(
            write_model(float_program, kind, model.spec, FileOptions()), folder / "float", model, "float"
        )
    as_peers = write_model(program, "tflite", model.spec, FileOptions(io="int8"))
    stage_file(as_peers, folder / "int8_io", model, recipe.name)


def make_files(name: str, folder: Path, peers_python: str) -> None:
    """Make whatever files of a network are not in the cache yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "calibration.npy").is_file():
        np.save(folder / "calibration.npy", nets.smooth_pixels(NUM_CALIBRATION, seed=2))
        nets.build_net(name, folder / "weights.pt")
    here = Path(__file__).resolve()
    jobs = {
        "edgecnn": [sys.executable, str(here), "--make", name, "--cache", str(folder.parent)],
        "peers": [peers_python, str(here.parent / "peers.py"), name, str(folder)],
    }
    for who, command in jobs.items():
        ours = who == "edgecnn"
        wanted = [p for kind in FILES.values() for k, p in kind.items() if k.startswith("edgecnn") == ours]
        failed = {peers.FILES[path.stem] for path in folder.glob("*.failed")}
        if all((folder / path).is_file() or path in failed for path in wanted):
            continue
        print(f"{name}: {who} makes {len(wanted)} files", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}: {who} failed\n{done.stderr[-2000:]}")


def describe_onnx(path: Path) -> dict[str, int | None]:
    """Count what is left in float after ONNX Runtime's own optimization."""
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(optimized)
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(str(optimized)).graph
    ends = {v.name for v in (*graph.input, *graph.output)}
    floats = {v.name for v in graph.input}
    float_ops = boundary_ops = 0
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            boundary_ops += not ends & {node.input[0], node.output[0]}
            if node.op_type == "DequantizeLinear":
                floats.update(node.output)
        elif not node.op_type.startswith(("QLinear", "QGemm")) and floats & set(node.input):
            floats.update(node.output)
            float_ops += 1
    return {"float_ops": float_ops, "inner_boundary_ops": boundary_ops, "delegates": None}


def describe_tflite(path: Path) -> dict[str, int | None]:
    """Count what is left in float, QUANTIZE and DEQUANTIZE inside, and the pieces that XNNPACK takes."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    dtypes = {t["index"]: t["dtype"] for t in interpreter.get_tensor_details()}
    details = [*interpreter.get_input_details(), *interpreter.get_output_details()]
    ends = {t["index"] for t in details}
    ops = interpreter._get_ops_details()
    float_ops = boundary_ops = 0
    for op in ops:
        if op["op_name"] in ("QUANTIZE", "DEQUANTIZE"):
            boundary_ops += not ends & {int(op["inputs"][0]), int(op["outputs"][0])}
        elif op["op_name"] != "DELEGATE":
            float_ops += any(dtypes.get(int(index)) is np.float32 for index in op["outputs"])
    delegates = sum(op["op_name"] == "DELEGATE" for op in ops)
    return {"float_ops": float_ops, "inner_boundary_ops": boundary_ops, "delegates": delegates}


def files_of(folder: Path) -> dict[str, dict[str, str]]:
    """Return the files there are, by format and key."""
    return {
        kind: {key: path for key, path in files.items() if (folder / path).is_file()}
        for kind, files in FILES.items()
    }


def describe_files(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return size, operator counts and SQNR by format and key."""
    images = nets.normalize(nets.smooth_pixels(NUM_JUDGED, seed=3))
    outputs = {
        kind: run_outputs([Candidate(key, folder / path) for key, path in files.items()], images)
        for kind, files in files_of(folder).items()
    }
    reference = next(iter(outputs["onnx"][BASELINE].values()))
    described: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, files in files_of(folder).items():
        count = describe_onnx if kind == "onnx" else describe_tflite
        described[kind] = {
            key: {
                "size_bytes": (folder / path).stat().st_size,
                "sqnr_db": sqnr_db(reference, in_layout_of(reference, outputs[kind][key])),
                **count(folder / path),
            }
            for key, path in files.items()
        }
    return described


def in_layout_of(reference: npt.NDArray[Any], outputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return a file's first output; litert-torch's maps are NCHW, where TFLite's are taken for NHWC."""
    value = next(iter(outputs.values()))
    return value if value.shape == reference.shape else np.moveaxis(value, 1, -1)


def time_files(folder: Path, kind: str, threads: int, runs: int) -> dict[str, Any]:
    """Time all files of a format interleaved in a fresh process, batch 1, on one image of the judged."""
    with tempfile.TemporaryDirectory() as scratch:
        np.save(Path(scratch) / "inputs.npy", nets.normalize(nets.smooth_pixels(1, seed=3)))
        request = {
            "task": "latency",
            "artifacts": [
                {"key": key, "path": str(folder / path)} for key, path in files_of(folder)[kind].items()
            ],
            "inputs": str(Path(scratch) / "inputs.npy"),
            "threads": threads,
            "min_runs": runs,
            "min_seconds": 0.5,
            "max_seconds": 120.0,
            "baseline": BASELINE,
        }
        return run_local(request, 1200.0)


def print_table(name: str, kind: str, threads: int, timed: dict[str, Any], files: dict[str, Any]) -> None:
    print(f"\n{name} {nets.SIDE}, {kind}, {threads} thread{'s' if threads > 1 else ''}")
    print(
        f"  {'':24s} {'median ms':>9s} {'vs float':>8s} {'95 % interval':>14s} {'MB':>6s} "
        f"{'float ops':>9s} {'inner Q/DQ':>10s} {'delegates':>9s} {'SQNR dB':>8s}"
    )
    for key, file in files.items():
        ratio = timed["comparisons"].get(key, {"speedup": 1.0, "interval": None})
        interval = "" if ratio["interval"] is None else "{:.2f} to {:.2f}".format(*ratio["interval"])
        delegates = "-" if file["delegates"] is None else str(file["delegates"])
        itself = (kind, key) == ("onnx", BASELINE)
        spelled = "-" if itself or file["sqnr_db"] is None else f"{file['sqnr_db']:.1f}"
        print(
            f"  {LABELS[key]:24s} {timed['artifacts'][key]['median_ms']:9.2f} {ratio['speedup']:8.2f} "
            f"{interval:>14s} {file['size_bytes'] / 1e6:6.2f} {file['float_ops']:9d} "
            f"{file['inner_boundary_ops']:10d} {delegates:>9s} {spelled:>8s}",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nets", nargs="*", metavar="NET", help=f"default: {' '.join(nets.NETS)}")
    parser.add_argument("--hard", action="store_true", help=f"these: {' '.join(nets.HARD_NETS)}")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=100, help="timed runs of each file, at least")
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--make", metavar="NET", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.make:
        make_ours(arguments.make, arguments.cache / arguments.make)
        return
    measured: list[dict[str, Any]] = []
    for name in arguments.nets or (nets.HARD_NETS if arguments.hard else nets.NETS):
        folder = (arguments.cache / name).absolute()
        make_files(name, folder, arguments.peers_python)
        described = describe_files(folder)
        for path in sorted(folder.glob("*.failed")):
            print(f"\n{name}: {LABELS[path.stem]} failed: {path.read_text(encoding='utf-8')[:300]}")
        for threads in arguments.threads:
            for kind in FILES:
                timed = time_files(folder, kind, threads, arguments.runs)
                print_table(name, kind, threads, timed, described[kind])
                row = {"net": name, "format": kind, "threads": threads, "files": described[kind]}
                measured.append({**row, "latency": timed})
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
