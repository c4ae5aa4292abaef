"""Other quantizers' files of one of `hard_nets`: python -m benchmarks.hard_peers NET WEIGHTS FOLDER.

FOLDER holds calibration.npy, float32 (n, 3, 64, 64), which everybody sees whole and in the same order. Run by
benchmarks.hard_accuracy in the peers' own environment, with benchmarks/ on the path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.hard_nets import NETS, SIDE

FILES = {
    "onnxruntime, min-max": "ort_minmax.onnx",
    "onnxruntime, percentile": "ort_percentile.onnx",
    "NNCF": "nncf.onnx",
    "ai-edge-quantizer": "aeq.tflite",
}


def main() -> None:
    """Write the files; one that fails leaves FILE.failed with the reason."""
    import peers

    peers.be_quiet()
    torch.set_num_threads(1)
    name, weights, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    net = NETS[name]()
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.eval()
    stored: npt.NDArray[np.float32] = np.load(folder / "calibration.npy")

    def images() -> Iterator[npt.NDArray[np.float32]]:
        return (stored[i : i + 1] for i in range(len(stored)))

    floats, lite = folder / "torch_float.onnx", folder / "litert_float.tflite"
    paths = {key: folder / file for key, file in FILES.items()}
    jobs = (
        (floats, lambda: peers.export_onnx(net, SIDE, floats)),
        (
            paths["onnxruntime, min-max"],
            lambda: peers.quantize_onnx(floats, paths["onnxruntime, min-max"], images),
        ),
        (paths["NNCF"], lambda: peers.quantize_nncf(floats, paths["NNCF"], images)),
        (
            paths["onnxruntime, percentile"],
            lambda: peers.quantize_onnx(floats, paths["onnxruntime, percentile"], images, "Percentile"),
        ),
        (lite, lambda: peers.convert_tflite(net, SIDE, lite)),
        (paths["ai-edge-quantizer"], lambda: peers.quantize_tflite(lite, paths["ai-edge-quantizer"], images)),
    )
    for path, job in jobs:
        if path.is_file():
            continue
        try:
            job()
        except Exception as error:  # noqa: BLE001  whatever a peer fails with, the others go on
            path.unlink(missing_ok=True)
            reason = f"{type(error).__name__}: {error}"[:2000]
            path.with_name(path.name + ".failed").write_text(reason, encoding="utf-8")


if __name__ == "__main__":
    main()
