"""What `edgecnn.compress` can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from edgecnn.errors import ExportError
from edgecnn.export.files import FORMATS
from edgecnn.load import LoadOptions

IO_DTYPES = ("float32", "int8", "uint8")


@dataclass(frozen=True)
class CompressOptions:
    """What `compress` can be told besides the model, the recipe and the data.

    Attributes:
        load: how the model is read.
        formats: "onnx", "tflite" or both.
        io: type of the files' inputs and outputs: float32, int8 or uint8.
        target: device profile the files are made for.
        num_samples: calibration images at most; None leaves it to the recipe.
        max_drop: accuracy budget in percentage points of top-1.
        max_latency_ms: budget on the median of each compressed file.
        max_size_mb: budget on each compressed file, 1 MB = 1,000,000 bytes.
        must_be_faster: every compressed file must be faster than float, by more than the noise.
        search: look for other ways to quantize where the files miss max_drop or one is slower than float.
        seed: of everything random; None leaves it to the recipe.
        force: overwrite earlier results.
        threads: of the latency measurement.
        measure: False leaves latency out.
        train_data: images to train on, as `data`; None takes what judgement and calibration leave of `data`.
        teacher: the network to learn from, whatever `load_model` takes; None is the network itself, as given.
        teacher_arch: architecture of a teacher that is a state dict.
        resume: go on where an unfinished run into the same directory stopped.
    """

    load: LoadOptions = field(default_factory=LoadOptions)
    formats: tuple[str, ...] = FORMATS
    io: str = "float32"
    target: str = "local_cpu"
    num_samples: int | None = None
    max_drop: float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    must_be_faster: bool = False
    search: bool = True
    seed: int | None = None
    force: bool = False
    threads: int = 1
    measure: bool = True
    train_data: Any = None
    teacher: Any = None
    teacher_arch: str | None = None
    resume: bool = False

    def check(self) -> None:
        """Check the values.

        Raises:
            ExportError: naming the option, what was found and what was expected.
        """
        wrong = [name for name in self.formats if name not in FORMATS]
        if wrong or not self.formats or isinstance(self.formats, str):
            found = repr(self.formats if isinstance(self.formats, str) or not wrong else wrong[0])
            raise ExportError(f"formats: found {found}, expected one or more of {', '.join(FORMATS)}")
        if self.io not in IO_DTYPES:
            raise ExportError(f"io is {self.io!r}, expected one of {', '.join(IO_DTYPES)}")
        for name in ("threads", "num_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ExportError(f"{name} is {value}, expected at least 1")
        for name in ("max_drop", "max_latency_ms", "max_size_mb"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ExportError(f"{name} is {value}, expected a finite number, 0 or more")
