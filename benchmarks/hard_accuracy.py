"""What int8 costs networks that quantize badly, trained on CIFAR-10: ours, each algorithm alone, the peers.

    python -m benchmarks.hard_accuracy --cache DIR [--out FILE] [--peers-python PYTHON] [--rows TEXT ...]
        [mobilenet_v3_small depthwise efficientnet_half]
    python -m benchmarks.hard_accuracy --cache DIR [--out FILE] --table

The networks of benchmarks.hard_nets, trained the first time. Everybody calibrates on the same 512 training
images and is judged on the 5,000 JPEG test images: top-1, drop from float in points, how often the class is
float's, SQNR of the logits against float, and for ours how many images the ONNX and the TFLite file give
exactly the same logits. "+" rows are plain min-max with one algorithm in addition. The guard sees 512
training images to calibrate and 2,000 others to judge on, and in its second form trains on all of them; the
test images are new to it. Each row is a line of --out; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

import edgecnn
from benchmarks import runs
from benchmarks.cifar_jpeg import open_jpeg_cifar
from benchmarks.hard_nets import MEAN, NETS, SIDE, STD, argument_parser, trained
from benchmarks.hard_peers import FILES as PEERS
from edgecnn.data import Dataset, split_indices
from edgecnn.devices.capability import activation_dtype_for
from edgecnn.devices.profile import load_device
from edgecnn.errors import BudgetError
from edgecnn.export.files import FORMATS, FileOptions, write_model
from edgecnn.export.parity import sqnr_db
from edgecnn.graph.build import build_program
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.judgement import stage_file
from edgecnn.load import LoadOptions, load_model
from edgecnn.lower.activations import DecomposeActivations
from edgecnn.lower.averages import AveragesToConvolutions
from edgecnn.model import Model
from edgecnn.options import CompressOptions
from edgecnn.pipeline import PassContext, run_passes
from edgecnn.proof import Candidate, run_outputs, temporary_folder
from edgecnn.quantize.equalize import Equalize
from edgecnn.quantize.static import QuantizeStatic

Array = npt.NDArray[np.float32]

NUM_CALIBRATION, NUM_GUARDED = 512, 2000
MAX_DROP = 0.3


@dataclass(frozen=True)
class Row:
    """One way of ours to quantize."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    equalize: bool = False


PLAIN = {"observer": "min_max", "bias_correction": False}
CORRECTED = {"observer": "min_max", "bias_correction": True}
ROWS = (
    Row("plain min-max", PLAIN),
    Row("+ mse ranges", {**PLAIN, "observer": "mse"}),
    Row("+ equalization", PLAIN, equalize=True),
    Row("+ bias correction, analytic", {**CORRECTED, "bias_method": "batch_norm"}),
    Row("+ bias correction, empirical", {**CORRECTED, "bias_method": "mean_input"}),
    Row("+ bias correction, in order", {**CORRECTED, "bias_method": "in_order"}),
    Row("+ adaround", {**PLAIN, "rounding": "adaround"}),
    Row("+ brecq", {**PLAIN, "rounding": "brecq"}),
    Row("static_wi8_ai8", {}),
)
GUARD, GUARD_TRAIN = "guard 0.3", "guard 0.3, train data"
NAMES = (*(row.name for row in ROWS), GUARD, GUARD_TRAIN, *PEERS)


@dataclass(frozen=True)
class Bench:
    """A float network and what everybody is given.

    Attributes:
        name: of the network.
        weights: its state dict.
        model: as loaded.
        folded: batch norms folded; its file is "float".
        train, test: images.
        calibration, guarded: indices into `train`.
        inputs: all of `test`, float32 (n, 3, 64, 64).
        logits: of the float file, (n, 10).
    """

    name: str
    weights: Path
    model: Model
    folded: Model
    train: Dataset
    test: Dataset
    calibration: tuple[int, ...]
    guarded: tuple[int, ...]
    inputs: Array
    logits: Array


def open_bench(name: str, weights: Path, train: Dataset, test: Dataset, num_calibration: int) -> Bench:
    """Load a network and run its float file over the test images."""
    model = load_network(name, weights)
    split = split_indices(train, num_calibration, min(NUM_GUARDED, len(train) - num_calibration), 0)
    folded = FoldBatchNorm().run(model, PassContext())
    inputs = test.inputs(range(len(test)))
    logits = outputs_of(folded, inputs, ("onnx",))["onnx"]
    return Bench(name, weights, model, folded, train, test, split.calibration, split.held_out, inputs, logits)


def load_network(name: str, weights: Path) -> Model:
    """Return a trained network."""
    net = NETS[name]()
    net.load_state_dict(torch.load(weights, weights_only=True))
    return load_model(net.eval(), LoadOptions(input_shape=(3, SIDE, SIDE), mean=MEAN, std=STD))


def outputs_of(model: Model, inputs: Array, formats: tuple[str, ...] = FORMATS) -> dict[str, Array]:
    """Return the logits of a network's files."""
    program = build_program(model)
    options = FileOptions(activation_dtype=activation_dtype_for(load_device("local_cpu").isa))
    with temporary_folder() as folder:
        candidates = [
            Candidate(kind, stage_file(write_model(program, kind, model.spec, options), folder, model, "row"))
            for kind in formats
        ]
        return only_outputs(candidates, inputs)


def only_outputs(candidates: list[Candidate], inputs: Array) -> dict[str, Array]:
    """Return the one output of each file."""
    return {key: next(iter(found.values())) for key, found in run_outputs(candidates, inputs).items()}


def figures(bench: Bench, found: Mapping[str, Array]) -> dict[str, Any]:
    """Return what a row says of the logits of one or both formats; the ONNX file's, where there is one."""
    labels = np.asarray(bench.test.labels)
    logits = found.get("onnx", next(iter(found.values())))
    before, after = (100 * float((y.argmax(1) == labels).mean()) for y in (bench.logits, logits))
    same = bench.logits.argmax(1) == logits.argmax(1)
    made: dict[str, Any] = {"float": before, "top1": after, "drop": before - after}
    made |= {"agreement": 100 * float(same.mean()), "sqnr_db": sqnr_db(bench.logits, logits)}
    if len(found) == 2:
        made["parity"] = 100 * float((found["onnx"] == found["tflite"]).all(1).mean())
    return made


def quantize(bench: Bench, row: Row) -> Model:
    """Return our int8 network."""
    passes: list[Any] = [FoldBatchNorm()]
    passes += [Equalize()] if row.equalize else []
    passes += [DecomposeActivations(), AveragesToConvolutions(), QuantizeStatic(**row.options)]
    context = PassContext(bench.train, bench.calibration)
    return run_passes(bench.model, passes, context, lambda _: {})


def guard(bench: Bench, with_training: bool, cache: Path) -> dict[str, Any]:
    """Compress within the budget and judge the files on the test images."""
    chosen = [*bench.calibration, *bench.guarded]
    data = Subset(bench.train, chosen)
    options = CompressOptions(
        max_drop=MAX_DROP,
        num_samples=len(bench.calibration),
        train_data=bench.train if with_training else None,
        measure=False,
        force=True,
    )
    folder = cache / "guard" / f"{bench.name}-{with_training}"
    try:
        report = edgecnn.compress(bench.model, data=data, out=folder, options=options).report
    except BudgetError as error:
        print(f"  {error.message}", flush=True)
        report = edgecnn.Report.from_json((folder / "report.json").read_text(encoding="utf-8"))
    searched = [detail for detail in report.details if "changes" in detail]
    found = only_outputs([Candidate(kind, folder / f"model.{kind}") for kind in FORMATS], bench.inputs)
    return figures(bench, found) | {"changes": [c for detail in searched for c in detail["changes"]]}


class Subset:
    """Some images of a dataset."""

    def __init__(self, whole: Dataset, indices: list[int]) -> None:
        self.name, self.class_names, self.warnings = whole.name, whole.class_names, whole.warnings
        self._whole, self._indices = whole, indices
        self.labels = None if whole.labels is None else whole.labels[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def inputs(self, indices: Any) -> Array:
        """Return float32 (n, c, h, w)."""
        return self._whole.inputs([self._indices[i] for i in indices])


def make_peers(bench: Bench, python: str, cache: Path) -> Path:
    """Let the peers write their files and return the folder."""
    folder = cache / "peers" / bench.weights.stem
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "calibration.npy", bench.train.inputs(list(bench.calibration)))
    paths = f"{runs.ROOT}{os.pathsep}{runs.ROOT / 'benchmarks'}"
    command = [python, "-m", "benchmarks.hard_peers", bench.name, str(bench.weights), str(folder)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, cwd=runs.ROOT, env={**os.environ, "PYTHONPATH": paths}, check=True, **quiet)  # type: ignore[call-overload]
    return folder


def peer_outputs(path: Path, inputs: Array) -> Array:
    """Return the logits of a peer's file of batch 1."""
    if path.suffix == ".onnx":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options)
        name = session.get_inputs()[0].name
        return np.concatenate([session.run(None, {name: x[None]})[0] for x in inputs])
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path), num_threads=1).get_signature_runner()
    ((name, given),) = runner.get_input_details().items()
    ((_, made),) = runner.get_output_details().items()
    feeds = (_to_file(np.ascontiguousarray(x[None].transpose(0, 2, 3, 1)), given) for x in inputs)
    return np.concatenate([_from_file(next(iter(runner(**{name: feed}).values())), made) for feed in feeds])


def _to_file(x: Array, details: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Return an input in a file's own type."""
    scale, zero_point = details["quantization"]
    return np.clip(np.rint(x / scale) + zero_point, -128, 127).astype(details["dtype"]) if scale else x


def _from_file(y: npt.NDArray[Any], details: Mapping[str, Any]) -> Array:
    """Return an output as float32."""
    scale, zero_point = details["quantization"]
    return ((y.astype(np.float32) - zero_point) * scale).astype(np.float32) if scale else y


def measure(bench: Bench, name: str, peers_python: str | None, cache: Path) -> dict[str, Any]:
    """Return one row."""
    started = time.process_time()
    if name in PEERS:
        path = cache / "peers" / bench.weights.stem / PEERS[name]
        if not path.is_file() and peers_python is not None:
            make_peers(bench, peers_python, cache)
        if not path.is_file():
            failed = path.with_name(path.name + ".failed")
            return {"failed": failed.read_text(encoding="utf-8") if failed.is_file() else "no --peers-python"}
        return figures(bench, {path.suffix[1:]: peer_outputs(path, bench.inputs)})
    if name in (GUARD, GUARD_TRAIN):
        made = guard(bench, name == GUARD_TRAIN, cache)
        return {**made, "cpu_s": time.process_time() - started}
    quantized = quantize(bench, next(row for row in ROWS if row.name == name))
    seconds = time.process_time() - started
    return {**figures(bench, outputs_of(quantized, bench.inputs)), "cpu_s": seconds}


def line(row: Mapping[str, Any]) -> str:
    """Return a row of the Markdown table."""
    start = f"| {row['net']} | {row['row']} |"
    if "failed" in row:
        return f"{start} failed: {row['failed'].splitlines()[0][:80]} | | | | | | |"
    parity = f"{row['parity']:.2f}" if "parity" in row else "-"
    seconds = f"{row['cpu_s']:.0f}" if "cpu_s" in row else "-"
    cells = f"{row['top1']:.2f} | {row['drop']:+.2f} | {row['agreement']:.2f} | {row['sqnr_db']:.1f}"
    changes = ", ".join(row.get("changes", []))
    return f"{start} {cells} | {parity} | {seconds} | {changes} |"


def table(out: Path) -> str:
    """Return all rows as Markdown."""
    head = (
        "| network | quantized | top-1 | drop | agreement | SQNR dB | ONNX = TFLite % | CPU s | changes |\n"
    )
    rows = sorted(runs.read(out), key=lambda row: (list(NETS).index(row["net"]), NAMES.index(row["row"])))
    floats = {row["net"]: f"{row['net']} float {row['float']:.2f}" for row in rows if "float" in row}
    return "; ".join(floats.values()) + "\n\n" + head + "|---" * 9 + "|\n" + "\n".join(map(line, rows))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, help="rows, by default hard.jsonl in the cache")
    parser.add_argument(
        "--peers-python", help="interpreter with the peers; without it their rows are left out"
    )
    parser.add_argument("--rows", nargs="+", default=[], help="only rows whose name holds one of these")
    parser.add_argument("--table", action="store_true", help="print what there is")
    arguments = parser.parse_args()
    out = arguments.out or arguments.cache / "hard.jsonl"
    torch.set_num_threads(1)
    if not arguments.table:
        for name in arguments.networks:
            measure_all(name, arguments, out)
    print(table(out))


def measure_all(name: str, arguments: argparse.Namespace, out: Path) -> None:
    """Measure the rows of a network that are not there yet."""
    known = (row for row in NAMES if arguments.peers_python or row not in PEERS)
    wanted = [row for row in known if not arguments.rows or any(text in row for text in arguments.rows)]
    left = [row for row in wanted if not runs.is_in({"net": name, "row": row}, runs.read(out))]
    if not left:
        return
    weights = trained(name, arguments.cache, arguments.data, arguments.epochs)
    model = load_network(name, weights)
    train, test = (
        open_jpeg_cifar(which, model, arguments.cache, arguments.data) for which in ("train", "test")
    )
    bench = open_bench(name, weights, train, test, NUM_CALIBRATION)
    for row in left:
        found = {"net": name, "row": row, **measure(bench, row, arguments.peers_python, arguments.cache)}
        runs.append(out, found)
        print(line(found), flush=True)


if __name__ == "__main__":
    main()
