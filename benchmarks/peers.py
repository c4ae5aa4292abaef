"""The same job with torch.onnx.export, onnxruntime.quantization, NNCF, litert-torch and ai-edge-quantizer.

Each function writes one file. Calibration images come as an iterable of float32 (1, 3, h, w), read once and
not kept. Packages are imported inside, so that a process pays only for what it uses.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import nets
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


def quantize_onnx(source: Path, path: Path, images: Images, method: str = "MinMax") -> None:
    """Write onnxruntime's static int8: QDQ, u8 activations, s8 weights per channel; ranges by `method`."""
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
        calibrate_method=CalibrationMethod[method],
    )
    prepared.unlink()


def quantize_nncf(source: Path, path: Path, images: Images) -> None:
    """Write NNCF's post-training int8 of a torch.onnx.export file, as `nncf.quantize` comes."""
    import nncf
    import onnx

    model = onnx.load(str(source))
    name = model.graph.input[0].name
    feeds = nncf.Dataset([{name: image} for image in images()])
    onnx.save(nncf.quantize(model, feeds, subset_size=10_000), str(path))


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
    feeds = _Feeds(name, images)
    job.quantize(job.calibrate({key: feeds})).export_model(str(path), overwrite=True)


class _Feeds(list):  # type: ignore[type-arg]
    """Feeds made while they are read.

    The calibrator first counts them for its progress bar, with list(feeds); no image is decoded for that.
    """

    def __init__(self, name: str, images: Images) -> None:
        super().__init__()
        self.name = name
        self.images = images
        self.counted = False

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
        if not self.counted:
            self.counted = True
            return iter(())
        return ({self.name: np.ascontiguousarray(x.transpose(0, 2, 3, 1))} for x in self.images())


FILES: dict[str, str] = {
    "torch_float": "torch_float.onnx",
    "ort_int8": "ort_int8.onnx",
    "nncf_int8": "nncf_int8.onnx",
    "litert_float": "litert_float.tflite",
    "aeq_int8": "aeq_int8.tflite",
}


def make_all(net: nn.Module, side: int, folder: Path, images: Images) -> dict[str, float]:
    """Write every peer's file into a folder; return the seconds each took, without those that failed.

    Why one failed stands in the file KEY.failed.
    """
    paths = {key: folder / name for key, name in FILES.items()}
    seconds = {}
    for key, job in {
        "torch_float": lambda: export_onnx(net, side, paths["torch_float"]),
        "ort_int8": lambda: quantize_onnx(paths["torch_float"], paths["ort_int8"], images),
        "nncf_int8": lambda: quantize_nncf(paths["torch_float"], paths["nncf_int8"], images),
        "litert_float": lambda: convert_tflite(net, side, paths["litert_float"]),
        "aeq_int8": lambda: quantize_tflite(paths["litert_float"], paths["aeq_int8"], images),
    }.items():
        started = time.perf_counter()
        try:
            job()
        except Exception as error:  # noqa: BLE001  whatever a peer fails with, the others go on
            paths[key].unlink(missing_ok=True)
            (folder / f"{key}.failed").write_text(f"{type(error).__name__}: {error}"[:2000], encoding="utf-8")
            continue
        seconds[key] = time.perf_counter() - started
    return seconds


def main() -> None:
    """Make the files of one network: peers.py NET FOLDER, with weights and images there already."""
    be_quiet()
    name, folder = sys.argv[1], Path(sys.argv[2])
    pixels = np.load(folder / "calibration.npy")
    net = nets.build_net(name, folder / "weights.pt")
    make_all(net, pixels.shape[1], folder, lambda: (nets.normalize(p[None]) for p in pixels))


if __name__ == "__main__":
    main()
