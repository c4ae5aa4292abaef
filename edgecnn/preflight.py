"""What is checked before the long work: packages, the place of the results, and that the network is float."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgecnn.artifact import OUTPUT_NAMES
from edgecnn.errors import MissingDependencyError, OutputError, PassError
from edgecnn.export.files import FORMATS
from edgecnn.graph.nodes import argument, aten, fetch, is_constant, layer_name
from edgecnn.model import Model
from edgecnn.runner.runtimes import MODULES

PACKAGES = {
    "onnx": (("onnx",), MODULES["onnxruntime"]),
    "tflite": (("flatbuffers",), MODULES["litert"]),
}
"""What writing and proving a format needs; of each group one package is enough."""


MAX_FACTOR = 100.0
"""A BatchNorm channel that multiplies by so many times the layer's median was not trained well.

With the usual eps of 1e-5 no channel gets beyond 316 times its weight, whatever its variance is; those of
ResNet-56 stay within 3 times the median.
"""

MIN_VARIANCE = 1e-3
"""Share of the layer's median variance above which a large factor is one that was trained."""


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


def suspect_channels(model: Model) -> list[str]:
    """Say which BatchNorms have channels that are dead or explode, read off their statistics.

        y = gamma * (x - mean) / sqrt(var + eps) + beta

    gamma = 0 gives a constant; a variance far below what the layer's other channels have multiplies whatever
    comes in that training did not have.

    Args:
        model: float.
    """
    dead, exploding, count = [], [], 0
    for node in model.graph.graph.nodes:
        if node.target is not aten.batch_norm.default:
            continue
        constants = [n for n in (argument(node, i, "") for i in (1, 4)) if is_constant(n)]
        if len(constants) < 2:  # a BatchNorm without weight or statistics
            continue
        gamma, var = (fetch(model.graph, n).double() for n in constants)
        factor = gamma.abs() / (var.clamp(min=0.0) + float(argument(node, 7, "eps", 1e-5))).sqrt()
        silent = int((gamma == 0).sum())
        if silent:
            dead.append(f"{layer_name(node).partition(' (')[0]} ({silent} of {len(gamma)})")
            count += silent
        steep = (factor > MAX_FACTOR * factor.median()) & (var < MIN_VARIANCE * var.median())
        if bool((var < 0).any()) or (bool(steep.any()) and float(factor.median()) > 0):
            exploding.append(f"{layer_name(node).partition(' (')[0]} ({float(factor.max()):.3g}x)")
    found = []
    if exploding:
        found.append(
            f"BatchNorm channels that explode in {', '.join(exploding[:3])}: their running variance is "
            "next to nothing, so values unlike those of training get enormous and int8 loses the others; "
            f"expected factors within {MAX_FACTOR:g} times the layer's median"
        )
    if dead:
        found.append(
            f"{count} dead BatchNorm channels (weight 0), first {', '.join(dead[:3])}: they give a "
            "constant and cost as much as the others; --prune removes them"
        )
    return found


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
