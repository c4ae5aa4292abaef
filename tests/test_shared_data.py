"""Trained networks, real images: ResNet-20 on CIFAR-10, SqueezeNet 1.1 on ImageNet; skipped without data."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import edgecnn
from edgecnn.compress import CompressOptions, CompressResult
from edgecnn.load import LoadOptions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def resnet20(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> CompressResult:
    load = LoadOptions(
        arch="benchmarks.cifar_resnet:resnet20", input_shape=(3, 32, 32), preprocess="imagenet"
    )
    return edgecnn.compress(
        data_dir / "weights" / "resnet20-12fca82f.th",
        data=data_dir / "cifar10" / "train4000.npz",
        out=tmp_path_factory.mktemp("resnet20"),
        options=CompressOptions(load=load, measure=False),
    )


def test_resnet20_on_the_images_kept_apart(resnet20: CompressResult) -> None:
    report = resnet20.report
    assert report.accuracy is not None
    assert report.accuracy.float_top1 > 0.95  # images of the training set
    assert report.accuracy.drop_points < 1.0
    assert (report.data.num_calibration, report.accuracy.num_samples) == (512, 2000)
    assert all(value is not None and value >= 0.985 for value in report.agreement.values())
    assert not any("does not fit" in warning for warning in report.warnings)


def test_resnet20_has_the_same_integers_in_both_files(resnet20: CompressResult) -> None:
    parity = resnet20.report.parity["onnx_vs_tflite"]
    assert parity.max_lsb <= 1
    assert parity.fraction_within_1_lsb == 1.0
    assert parity.top1_agreement is not None and parity.top1_agreement >= 0.998


@pytest.mark.parametrize("name", ["onnx", "tflite"])
def test_resnet20_on_the_test_set(resnet20: CompressResult, data_dir: Path, name: str) -> None:
    """Float has 91.5 % of these 1,000 images."""
    test_set = data_dir / "cifar10" / "test1000.npz"
    found = edgecnn.evaluate(resnet20.artifacts[name].path, data=test_set)
    assert found["num_samples"] == 1000
    assert found["top1"] >= 0.905


def test_squeezenet_on_photographs(data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    images = tmp_path / "images"
    with tarfile.open(data_dir / "imagenet_samples.tar.gz") as archive:
        archive.extractall(images, filter="data")
    load = LoadOptions(
        arch="torchvision:squeezenet1_1",
        input_shape=(3, 224, 224),
        mean=tuple(value / 255 for value in (123.0, 117.0, 104.0)),
        std=(1 / 255,) * 3,
    )
    result = edgecnn.compress(
        data_dir / "weights" / "squeezenet1_1.safetensors",
        data=images,
        out=tmp_path / "o",
        options=CompressOptions(load=load, num_samples=200, measure=False),
    )
    report = result.report
    assert report.accuracy is not None
    assert report.accuracy.float_top1 > 0.5
    assert all(value is not None and value >= 0.9 for value in report.agreement.values())
    assert report.parity["onnx_vs_tflite"].fraction_within_1_lsb >= 0.999
    assert np.isfinite(report.accuracy.drop_points)
