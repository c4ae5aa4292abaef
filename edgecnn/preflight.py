"""What is checked before the long work: packages, the place of the results, and that the network is float."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgecnn.artifact import OUTPUT_NAMES
from edgecnn.errors import MissingDependencyError, OutputError, PassError
from edgecnn.export.files import FORMATS
from edgecnn.model import Model
from edgecnn.runner.runtimes import MODULES

PACKAGES = {
    "onnx": (("onnx",), MODULES["onnxruntime"]),
    "tflite": (("flatbuffers",), MODULES["litert"]),
}
"""What writing and proving a format needs; of each group one package is enough."""


def require_packages(formats: Sequence[str]) -> None:
    """Check that what writes and runs the formats is installed.

    Raises:
        MissingDependencyError: naming the packages and the extra that brings them.
    """
    for name in formats:
        missing = [
            group[0].partition(".")[0]
            for group in PACKAGES[name]
            if not any(importlib.util.find_spec(module.partition(".")[0]) for module in group)
        ]
        if missing:
            other = next(known for known in FORMATS if known != name)
            raise MissingDependencyError(
                f"the {name} format needs {' and '.join(missing)}, not installed here",
                hint=f"pip install 'edgecnn[{name}]'"
                + (f", or make the other file alone: --format {other}" if other in formats else ""),
            )


def keep_inputs(sources: Sequence[Any], folder: Path) -> None:
    """Check that no result would replace the network that was given.

    Args:
        sources: the model and its weights; only paths of files matter.
        folder: directory of the results.

    Raises:
        OutputError: naming the file.
    """
    results = {(folder / name).absolute() for name in OUTPUT_NAMES}
    for source in sources:
        if isinstance(source, (str, Path)) and Path(source).is_file():
            found = Path(source)
            if any(result.exists() and result.samefile(found) for result in results):
                raise OutputError(
                    f"{found} is the network to be compressed, and a result of that name would replace it",
                    hint="choose another directory with -o",
                )


def refuse_quantized(model: Model) -> None:
    """Check that a network does not hold integers or float16 already.

    Raises:
        PassError: if it does.
    """
    if any("quantized_decomposed" in str(node.target) for node in model.graph.graph.nodes):
        raise PassError(
            f"{model.spec.name} is quantized already, expected a float network",
            hint="compress the float model that it was made from",
        )
    if any(str(tensor.dtype) == "torch.float16" for tensor in model.graph.buffers()):
        raise PassError(
            f"{model.spec.name} has float16 weights already, expected a float network in float32",
            hint="compress the float model that it was made from",
        )
