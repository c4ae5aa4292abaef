"""Families of CNNs through the whole static int8 chain: both files, parity, SQNR, one row each.

    python -m benchmarks.families [NET ...]

Seeded random weights with the BatchNorm statistics of smooth images; 32 images to calibrate on, 8 held out.
Networks of torchvision need it installed (see benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import nn

from benchmarks import small_nets
from benchmarks.nets import import_torchvision_models, normalize, settle_batch_norms, smooth_pixels
from edgecnn.contract import prove_parity
from edgecnn.data import open_dataset
from edgecnn.export.files import FORMATS, FileOptions, write_model
from edgecnn.graph.build import build_program, float_islands
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.judgement import stage_file
from edgecnn.load import LoadOptions, load_model
from edgecnn.pipeline import PassContext, SilentProgress, run_passes
from edgecnn.proof import Candidate
from edgecnn.recipe import Recipe

CALIBRATION, HELD_OUT = 32, 8


def lenet5() -> nn.Module:
    from examples.lenet5 import LeNet5

    return LeNet5()


def torchvision_net(name: str, **arguments: object) -> Callable[[], nn.Module]:
    """Return what makes one of torchvision's networks."""

    def build() -> nn.Module:
        models = import_torchvision_models()
        return models.get_model(name, weights=None, **arguments)  # type: ignore[attr-defined]

    return build


NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # what makes it, channels, pixels
    "lenet5": (lenet5, 1, 32),
    "alexnet": (torchvision_net("alexnet"), 3, 224),
    "vgg11": (torchvision_net("vgg11"), 3, 224),
    "googlenet": (torchvision_net("googlenet", init_weights=False), 3, 224),
    "resnet18": (torchvision_net("resnet18"), 3, 224),
    "densenet121": (torchvision_net("densenet121"), 3, 224),
    "mobilenet_v2": (torchvision_net("mobilenet_v2"), 3, 224),
    "efficientnet_b0": (torchvision_net("efficientnet_b0"), 3, 224),
    "senet": (small_nets.senet, 3, 224),
    "cbam": (small_nets.cbam, 3, 224),
    "unet": (small_nets.unet, 3, 224),
    "deeplabv3_mobilenet": (torchvision_net("deeplabv3_mobilenet_v3_large", weights_backbone=None), 3, 224),
}


def images(channels: int, side: int) -> np.ndarray:
    """Return calibration and held-out images, float32 (n, c, side, side)."""
    x = normalize(smooth_pixels(CALIBRATION + HELD_OUT, seed=2, side=side))
    return x if channels == 3 else np.ascontiguousarray(x.mean(axis=1, keepdims=True))


def run(name: str) -> str:
    """Make both files of one network and return its row."""
    build, channels, side = NETS[name]
    torch.manual_seed(0)
    net, x = build(), images(channels, side)
    settle_batch_norms(net, torch.from_numpy(x[:16]))
    started = time.perf_counter()
    model = load_model(net, LoadOptions(input_shape=(channels, side, side)))
    dataset = open_dataset(x, model.spec.preprocess)
    context = PassContext(dataset, tuple(range(CALIBRATION)))
    compressed = run_passes(model, Recipe.load("static_wi8_ai8").passes, context, lambda _: {})
    program = build_program(compressed)
    float_program = build_program(FoldBatchNorm().run(model, context))
    files = {f: write_model(program, f, model.spec, FileOptions()) for f in FORMATS}
    work_seconds = time.perf_counter() - started
    interpreter = Interpreter(model_content=files["tflite"].data, num_threads=1)
    interpreter.allocate_tensors()
    kinds = [d["op_name"] for d in interpreter._get_ops_details()]
    inside = kinds.count("QUANTIZE") + kinds.count("DEQUANTIZE") - len(program.inputs) - len(program.outputs)
    with tempfile.TemporaryDirectory() as folder:
        candidates = [
            Candidate(f, stage_file(file, Path(folder), model, "int8")) for f, file in files.items()
        ]
        float_file = write_model(float_program, "onnx", model.spec, FileOptions())
        float_path = stage_file(float_file, Path(folder) / "float", model, "float")
        candidates.append(Candidate("float_onnx", float_path))
        parity = prove_parity(program, candidates, x[CALIBRATION:], "uint8", SilentProgress())
    found = parity.comparisons
    lsb = "  ".join(
        f"{found[k].max_lsb} {100 * found[k].fraction_within_1_lsb:8.4f}"
        for k in ("onnx_vs_reference", "tflite_vs_reference", "onnx_vs_tflite")
    )
    sqnr = "  ".join(f"{parity.sqnr_db[f] or float('nan'):5.1f}" for f in FORMATS)
    shares = len(files["onnx"].data) / len(float_file.data)
    return (
        f"{name:20s} {len(program.ops):4d} {len(float_islands(program)):3d} {inside:3d} "
        f"{kinds.count('DELEGATE'):3d}  "
        f"{lsb}  {sqnr}  {len(files['onnx'].data) / 1e6:7.2f} {shares:5.2f}  {work_seconds:5.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nets", nargs="*", default=list(NETS))
    arguments = parser.parse_args()
    print(
        "net                   ops flt  qdq del  max LSB, % within 1: onnx/ref, tflite/ref, onnx/tflite"
        "   SQNR dB: onnx, tflite   MB  of float  s"
    )
    for name in arguments.nets:
        print(run(name), flush=True)


if __name__ == "__main__":
    main()
