"""The report: one frozen object; report.json and the terminal's table are renderings of it."""

from edgecnn.report.results import (
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

__all__ = [
    "AccuracyFigures",
    "ArtifactFigures",
    "DataFigures",
    "LatencyFigures",
    "LatencyReport",
    "ModelFigures",
    "ParityFigures",
    "Report",
    "SizeFigures",
    "SpeedupFigures",
]
