"""The same job with today's tools: torch.onnx.export, onnxruntime.quantization, litert-torch, ai-edge-quantizer.

Each function writes one file. Calibration images come as an iterable of float32 (1, 3, h, w), read once and
not kept. Packages are imported inside, so that a process pays only for what it uses.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

Images = Callable[[], Iterable[npt.NDArray[np.float32]]]


def be_quiet() -> None:
    """Silence the peers' warnings and progress."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def import_all() -> None:
    """Import every peer, to see what that costs."""
    import ai_edge_quantizer  # noqa: F401
    import litert_torch  # noqa: F401
    import onnxruntime.quantization  # noqa: F401
    import onnxscript  # noqa: F401


def export_onnx(net: nn.Module, side: int, path: Path) -> None:
    """Write a float network with torch.onnx.export (dynamo), batch 1."""
    example = torch.zeros(1, 3, side, side)
    torch.onnx.export(
        net, (example,), str(path), dynamo=True, opset_version=18, external_data=False, verbose=False
    )


def quantize_onnx(source: Path, path: Path, images: Images) -> None:
    """Write onnxruntime's static int8: QDQ, u8 activations, s8 weights per channel, min-max."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    name = onnx.load(str(prepared)).graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.stream: Iterator[npt.NDArray[np.float32]] = iter(images())

        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            image = next(self.stream, None)
            return None if image is None else {name: image}

    quantize_static(
        str(prepared),
        str(path),
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    prepared.unlink()


def convert_tflite(net: nn.Module, side: int, path: Path) -> None:
    """Write a float network with litert-torch, batch 1, input NHWC (its fastest layout)."""
    import litert_torch

    example = torch.zeros(1, side, side, 3)
    net = litert_torch.to_channel_last_io(net, args=[0])
    litert_torch.convert(net, (example,)).export(str(path))


def quantize_tflite(source: Path, path: Path, images: Images) -> None:
    """Write ai-edge-quantizer's static_wi8_ai8 of a litert-torch file."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    signatures = Interpreter(str(source)).get_signature_list()
    key = next(iter(signatures))
    name = signatures[key]["inputs"][0]
    job = quantizer.Quantizer(str(source))
    job.load_quantization_recipe(recipe.static_wi8_ai8())
    feeds = ({name: np.ascontiguousarray(image.transpose(0, 2, 3, 1))} for image in images())
    job.quantize(job.calibrate({key: feeds})).export_model(str(path), overwrite=True)
