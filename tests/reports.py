"""A report with every figure set, for the tests that render or read one."""

from __future__ import annotations

from edgecnn.model import PassRecord
from edgecnn.report import (
    AccuracyFigures,
    ArtifactFigures,
    DataFigures,
    LatencyFigures,
    LatencyReport,
    ModelFigures,
    ParityFigures,
    Report,
    SizeFigures,
    SpeedupFigures,
)

REPORT = Report(
    model=ModelFigures("lenet5", params=61706, macs=416_520, size_bytes=246_824),
    recipe="static_wi8_ai8",
    seed=0,
    target="local_cpu",
    environment={"torch": "2.13.0", "cpu": {"cores": 2}},
    passes=(PassRecord("fold_batch_norm", {"sizes": [1, 2]}, 0.25, {"params": 61706}, {"params": 61706}),),
    artifacts={
        "onnx": ArtifactFigures("out/model.onnx", "a" * 64, 70_000),
        "tflite": ArtifactFigures("out/model.tflite", "b" * 64, 68_000),
    },
    sizes={
        "onnx": SizeFigures(280_000, 70_000, 240_000, 60_000),
        "tflite": SizeFigures(1_200_000, 1_500_000),
    },
    data=DataFigures("digits", synthetic=False, num_calibration=512, num_proof=500, held_out=True),
    parity={
        "onnx_vs_reference": ParityFigures(1, 0.99999, 1.0, 500),
        "tflite_vs_reference": ParityFigures(1, 1.0, 1.0, 500),
        "onnx_vs_tflite": ParityFigures(2, 0.998, 0.996, 500),
    },
    agreement={"onnx": 0.995, "tflite": 0.99},
    sqnr_db={"onnx": 32.14, "tflite": 31.9},
    accuracy=AccuracyFigures(0.984, 0.982, 0.984, drop_points=0.2, num_samples=500),
    latency=LatencyReport(
        float_onnx=LatencyFigures(0.112, 0.12, None, threads=1, num_runs=200),
        onnx=LatencyFigures(0.061, 0.07, None, threads=1),
        float_tflite=LatencyFigures(12.5, 13.0, 14.0, threads=2),
        tflite=LatencyFigures(12.6, 13.0, 14.0, threads=2),
        speedup={"onnx": SpeedupFigures(1.84, 1.71, 1.93), "tflite": SpeedupFigures(0.99, 0.96, 1.03)},
    ),
    timings={"work_seconds": 2.31, "proof_seconds": 4.2},
    warnings=("the clock frequency moved during the measurement",),
)
