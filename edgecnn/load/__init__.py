"""Load a trained network from whatever the user has into one Model.

    source (path, spec, module)  ->  nn.Module or ExportedProgram  ->  exported graph  ->  Model

Nothing here runs code that a model file carries unless the user said trust.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecnn.load.batch_norm import check_against_batch_norm
    from edgecnn.load.loader import load_model
    from edgecnn.load.options import LoadOptions
    from edgecnn.load.pt2 import save_pt2
    from edgecnn.load.suspicion import suspect_images

__all__ = ["LoadOptions", "check_against_batch_norm", "load_model", "save_pt2", "suspect_images"]

_WHERE = {
    "LoadOptions": "edgecnn.load.options",
    "check_against_batch_norm": "edgecnn.load.batch_norm",
    "load_model": "edgecnn.load.loader",
    "save_pt2": "edgecnn.load.pt2",
    "suspect_images": "edgecnn.load.suspicion",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import edgecnn.load` needs no PyTorch."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
