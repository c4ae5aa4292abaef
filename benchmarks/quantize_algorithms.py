"""What each quantization algorithm gains, on CIFAR-10's JPEG test set, in ONNX Runtime.

    python -m benchmarks.quantize_algorithms [--data DIR] [--cache DIR] [--model FILE]
        [resnet20 resnet56] [--rows TEXT ...]

Rows are float against int8 from 512 images, from made-up images (data-free: 24 distilled ones), and with
weights of 4 bits. Those are simulated: no runtime computes a convolution with 4-bit weights, the file holds
15 of int8's levels. Rows with "qat" train on the 50,000 JPEG training images, to the float network's answers
and, unless they say label-free, to labels: the float network was trained on images without JPEG artefacts,
so training wins more than the rounding cost. They run only where --rows names them. One row: top-1 of both,
agreement, SQNR of the logits, CPU seconds of the quantization; for qat also top-1 of the fake-quantized
network that was trained, in float, and how often its answers are the file's. --model takes another network
of that shape, such as one that benchmarks.prune_accuracy tuned on the JPEG images.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

from benchmarks.accuracy import CIFAR, unpack
from benchmarks.cifar_jpeg import open_jpeg_cifar
from edgecnn.data import open_dataset, split_indices
from edgecnn.data.synthetic import distill_images
from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.parity import sqnr_db
from edgecnn.graph.build import build_program
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.load import LoadOptions, load_model
from edgecnn.lower.averages import AveragesToConvolutions
from edgecnn.model import Model
from edgecnn.pipeline import PassContext
from edgecnn.qat.quantize_aware_training import QuantizeAwareTraining
from edgecnn.quantize.equalize import Equalize
from edgecnn.quantize.static import QuantizeStatic

BATCH = 50


@dataclass(frozen=True)
class Row:
    """One way to quantize."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    equalize: Equalize | None = None
    data_free: bool = False
    qat: bool = False


FOUR_BITS = {"weight_bits": 4, "weight_observer": "mse"}
ROWS = (
    Row("512 images"),
    Row("512 images, no bias correction", {"bias_correction": False}),
    Row("512 images, bias in order", {"bias_method": "in_order"}),
    Row("512 images, bias from batch norms", {"bias_method": "batch_norm"}),
    Row("512 images, equalized", {}, Equalize()),
    Row("512 images, adaround", {"rounding": "adaround"}),
    Row("data-free", {}, None, True),
    Row("data-free, no bias correction", {"bias_correction": False}, None, True),
    Row("data-free, bias from batch norms", {"bias_method": "batch_norm"}, None, True),
    Row("data-free, equalized, batch norms", {"bias_method": "batch_norm"}, Equalize(), True),
    Row("data-free, eq., absorbed, batch norms", {"bias_method": "batch_norm"}, Equalize(absorb=True), True),
    Row("4 bits, nearest, min_max", {"weight_bits": 4}),
    Row("4 bits, nearest, mse", FOUR_BITS),
    Row("4 bits, adaround", {**FOUR_BITS, "rounding": "adaround"}),
    Row("4 bits, brecq", {**FOUR_BITS, "rounding": "brecq"}),
    Row("4 bits, qat, 1 epoch", {**FOUR_BITS, "epochs": 1.0}, qat=True),
    Row("4 bits, qat, 1/4 epoch", {**FOUR_BITS, "epochs": 0.25}, qat=True),
    Row("4 bits, qat label-free, 1/4 epoch", {**FOUR_BITS, "epochs": 0.25, "hard_labels": False}, qat=True),
    Row("4 bits, qat fake_quant, 1/4 epoch", {**FOUR_BITS, "epochs": 0.25, "method": "fake_quant"}, qat=True),
    Row("8 bits, qat, 1/4 epoch", {"epochs": 0.25}, qat=True),
    Row("8 bits, qat label-free, 1/4 epoch", {"epochs": 0.25, "hard_labels": False}, qat=True),
    Row("8 bits, qat fake_quant, 1/4 epoch", {"epochs": 0.25, "method": "fake_quant"}, qat=True),
)


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    """Return what ONNX Runtime gives for x (n, c, h, w), on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    file = to_onnx(build_program(model), OnnxOptions()).SerializeToString()
    session = onnxruntime.InferenceSession(file, options)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x[i : i + BATCH]})[0] for i in range(0, len(x), BATCH)])


def measure(network: str, data: Path, cache: Path, wanted: list[str], file: str | None) -> None:
    """Print all rows of a network."""
    load = LoadOptions(arch=f"benchmarks.cifar_resnet:{network}", input_shape=(3, 32, 32))
    model = load_model(file) if file else load_model(str(data / "weights" / CIFAR[network]), load)
    train, test = (
        open_dataset(str(source), model.spec.preprocess, class_count=10, labels=model.spec.labels)
        for source in (
            data / "cifar10" / "train4000.npz",
            unpack(data / "cifar10" / "test_jpeg.tar.gz", cache),
        )
    )
    images = PassContext(train, split_indices(train, 512, 2000, 0).calibration)
    rows = [row for row in ROWS if any(text in row.name for text in wanted) or not (wanted or row.qat)]
    made_up = images
    if any(row.data_free for row in rows):
        made_up = PassContext(distill_images(model, 32, 0), tuple(range(24)))
    if any(row.qat for row in rows):
        jpegs: Any = open_jpeg_cifar("train", model, cache, data)
        order = split_indices(jpegs, len(jpegs), 0, 0).calibration
        images = dataclasses.replace(images, train=jpegs, train_indices=order, teacher=model)
    folded = AveragesToConvolutions().run(FoldBatchNorm().run(model, images), images)
    x = np.concatenate([test.inputs(range(i, min(i + BATCH, len(test)))) for i in range(0, len(test), BATCH)])
    labels, real = np.asarray(test.labels), outputs(folded, x)
    for row in rows:
        context = made_up if row.data_free else images
        started = time.process_time()
        before = folded if row.equalize is None else row.equalize.run(folded, context)
        trained: list[Model] = []
        after = quantize(row, before, context, trained)
        seconds = time.process_time() - started
        found = outputs(after, x)
        top1 = [100 * float((y.argmax(1) == labels).mean()) for y in (real, found)]
        agreement = 100 * float((real.argmax(1) == found.argmax(1)).mean())
        figures = f"{top1[0]:6.2f} {top1[1]:6.2f} {agreement:6.2f} {sqnr_db(real, found):6.2f} {seconds:7.1f}"
        if trained:
            with torch.no_grad():
                parts = [
                    trained[0].graph(torch.from_numpy(x[i : i + BATCH])) for i in range(0, len(x), BATCH)
                ]
            classes = torch.cat(parts).argmax(1).numpy()
            figures += f"   fake-quantized {100 * float((classes == labels).mean()):.2f}"
            figures += f", agrees {100 * float((classes == found.argmax(1)).mean()):.2f}"
        print(f"{network:10s} {row.name:38s} {figures}", flush=True)


def quantize(row: Row, model: Model, context: PassContext, trained: list[Model]) -> Model:
    """Return the quantized network; one that was trained in float goes into `trained`."""
    if not row.qat:
        return QuantizeStatic(**row.options).run(model, context)
    step = QuantizeAwareTraining(**row.options)
    made, network = step.trained(model, context)
    trained.append(network)
    return step.written(made, network, context)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=list(CIFAR))
    parser.add_argument("--data", type=Path, default=Path(__file__).parent.parent.parent / "shared" / "data")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "edgecnn-accuracy")
    parser.add_argument("--rows", nargs="+", default=[], help="only rows whose name holds one of these")
    parser.add_argument("--model", help="a .pt2 of that shape instead of the published weights")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print("4 bits are simulated: no runtime computes convolutions with them, the file holds int8")
    print("network    quantized with                          float   int8  agree   SQNR CPU seconds")
    for network in arguments.networks:
        measure(network, arguments.data, arguments.cache, arguments.rows, arguments.model)


if __name__ == "__main__":
    main()
