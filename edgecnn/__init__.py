"""edgecnn: a trained CNN in; one int8 ONNX and one int8 TFLite out, with the same integers, proven and timed.

    result = edgecnn.compress("model.pt2", data="images/", out="out/")
    result.artifacts["tflite"].path
    result.report.to_json()

The public names are imported when they are first used, so that `import edgecnn` needs no PyTorch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecnn.artifact import Artifact as Artifact
    from edgecnn.bench import BenchOptions as BenchOptions
    from edgecnn.bench import bench as bench
    from edgecnn.compress import compress as compress
    from edgecnn.devices.profile import Device as Device
    from edgecnn.evaluation import evaluate as evaluate
    from edgecnn.inspection import inspect_model as inspect  # noqa: F401
    from edgecnn.load import LoadOptions as LoadOptions
    from edgecnn.load import load_model as load  # noqa: F401
    from edgecnn.model import Model as Model
    from edgecnn.options import CompressOptions as CompressOptions
    from edgecnn.recipe import Recipe as Recipe
    from edgecnn.report import Report as Report
    from edgecnn.report.bench_results import BenchReport as BenchReport

__version__ = "0.1.0"

_PUBLIC = {
    "Artifact": "edgecnn.artifact:Artifact",
    "BenchOptions": "edgecnn.bench:BenchOptions",
    "BenchReport": "edgecnn.report.bench_results:BenchReport",
    "CompressOptions": "edgecnn.options:CompressOptions",
    "Device": "edgecnn.devices.profile:Device",
    "Model": "edgecnn.model:Model",
    "Recipe": "edgecnn.recipe:Recipe",
    "Report": "edgecnn.report:Report",
    "bench": "edgecnn.bench:bench",
    "compress": "edgecnn.compress:compress",
    "evaluate": "edgecnn.evaluation:evaluate",
    "inspect": "edgecnn.inspection:inspect_model",
    "LoadOptions": "edgecnn.load:LoadOptions",
    "load": "edgecnn.load:load_model",
}

__all__ = [*_PUBLIC, "__version__"]


class _Package(ModuleType):
    """This package, in which `compress` and `load` are the functions even once the modules are imported."""

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute, except where importing a submodule would hide the function of its name."""
        if name not in _PUBLIC or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'edgecnn' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
