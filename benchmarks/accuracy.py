"""Accuracy and agreement of int8 with float on trained networks, in both runtimes, on whole test sets.

    python -m benchmarks.accuracy [--data ../shared/data] [--cache DIR] [resnet20 resnet56 squeezenet1_1]

One row per network, calibration and set: float and int8 top-1 (ONNX Runtime, LiteRT), agreement of each int8
file with float, and parity of the two files. Calibrated on 512 images for the CIFAR-10 networks, 200 of the
400 ImageNet samples for SqueezeNet (the other 200 judge it), and once more on no data at all: on images made
up from the BatchNorm statistics, or from the classes where, as in SqueezeNet, there are none. SqueezeNet
needs torchvision.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
from pathlib import Path

import edgecnn
from benchmarks.nets import import_torchvision_models
from edgecnn.data import Dataset, open_dataset
from edgecnn.export.files import FORMATS, FileOptions, write_model
from edgecnn.graph.build import build_program
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.judgement import stage_file
from edgecnn.load import LoadOptions, load_model
from edgecnn.options import CompressOptions
from edgecnn.pipeline import PassContext, SilentProgress
from edgecnn.proof import Candidate, predict

CIFAR = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


def unpack(archive: Path, cache: Path) -> Path:
    """Extract an archive once and return the folder that holds the class folders."""
    folder = cache / archive.name.split(".")[0]
    if not folder.is_dir():
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    while len(inner := [p for p in folder.iterdir() if p.is_dir()]) == 1:
        folder = inner[0]
    return folder


def files_of(
    load: LoadOptions, source: str, data: Path | None, out: Path
) -> tuple[list[Candidate], edgecnn.Report]:
    """Compress a network, without data where that is None, and return the four files and the report."""
    options = CompressOptions(load=load, force=True, measure=False)
    result = edgecnn.compress(source, data=data and str(data), out=out, options=options)
    model = load_model(source, load)
    program = build_program(FoldBatchNorm().run(model, PassContext()))
    files = [Candidate(name, result.artifacts[name].path) for name in FORMATS]
    for name in FORMATS:
        float_file = write_model(program, name, model.spec, FileOptions())
        files.append(Candidate(f"float_{name}", stage_file(float_file, out / "float", model, "float")))
    return files, result.report


def row(network: str, calibrated: str, name: str, files: list[Candidate], dataset: Dataset) -> str:
    """Run all files over a set and return the figures as one line."""
    found = predict(files, dataset, range(len(dataset)), "float_onnx", SilentProgress())
    top1, agree = found.top1, found.agreement
    figures = [top1["float_onnx"], top1["onnx"], top1["tflite"], agree["onnx"], agree["tflite"]]
    cells = "  ".join(f"{100 * value:6.2f}" if value is not None else "     -" for value in figures)
    return f"{network:14s} {calibrated:8s} {name:10s} {found.num_samples:6d}  {cells}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=[*CIFAR, "squeezenet1_1"])
    parser.add_argument("--data", type=Path, default=Path(__file__).parent.parent.parent / "shared" / "data")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "edgecnn-accuracy")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    print("network        on       set        images   float    onnx  tflite  agree onnx, tflite (all %)")
    for network in arguments.networks:
        judge(network, arguments.data, arguments.cache)


def judge(network: str, data: Path, cache: Path) -> None:
    """Compress a network with and without data and print its rows."""
    if network in CIFAR:
        load = LoadOptions(arch=f"benchmarks.cifar_resnet:{network}", input_shape=(3, 32, 32))
        weights = data / "weights" / CIFAR[network]
        calibration = data / "cifar10" / "train4000.npz"
        jpeg = unpack(data / "cifar10" / "test_jpeg.tar.gz", cache)
        sets = {"test1000": data / "cifar10" / "test1000.npz", "jpeg": jpeg}
    else:
        import_torchvision_models()
        mean, std = (123 / 255, 117 / 255, 104 / 255), (1 / 255,) * 3  # these weights are Caffe's
        load = LoadOptions(arch=f"torchvision:{network}", mean=mean, std=std)
        weights = data / "weights" / f"{network}.safetensors"
        calibration = unpack(data / "imagenet_samples.tar.gz", cache)
        sets = {"samples": calibration}
    spec = load_model(str(weights), load).spec
    for calibrated, source in (("images", calibration), ("nothing", None)):
        files, report = files_of(load, str(weights), source, cache / f"{network}-{calibrated}")
        for name, place in sets.items():
            classes = spec.outputs[0].shape[1]
            dataset = open_dataset(str(place), spec.preprocess, class_count=classes, labels=spec.labels)
            print(row(network, calibrated, name, files, dataset), flush=True)
        for name, parity in report.parity.items():
            print(
                f"{network:14s} {calibrated:8s} {name:20s} max {parity.max_lsb} LSB, "
                f"{100 * parity.fraction_within_1_lsb:.3f} % within 1, "
                f"top-1 equal {100 * (parity.top1_agreement or 0):.2f} % of {parity.num_samples}",
                flush=True,
            )


if __name__ == "__main__":
    main()
