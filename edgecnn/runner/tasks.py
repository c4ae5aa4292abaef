"""One request to its result; each task has a file of its own."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict

from .environment import describe_environment
from .inputs import Images
from .latency import run_latency, session_options
from .outputs import run_outputs
from .predictions import run_predictions
from .request import Request
from .runtimes import package_label
from .session import open_with


def execute(request: Request) -> Dict[str, Any]:
    """Run a request for latency, outputs or predictions.

    Returns:
        The JSON-ready result: `ok`, `task`, `artifacts` by key, `environment`, and what the task adds.

    Raises:
        RunFailure: for anything wrong with the request, the runtime, a model file or the inputs.
    """
    with ExitStack() as stack:
        result: Dict[str, Any] = {"ok": True, "task": request.task}
        if request.task == "latency":
            result.update(run_latency(request, stack))
        else:
            options = session_options(request)
            sessions = {
                artifact.key: stack.enter_context(open_with(artifact.path, artifact.runtime, options))
                for artifact in request.artifacts
            }
            images = Images(request.inputs or Path(), request.preprocess)
            run = run_outputs if request.task == "outputs" else run_predictions
            result.update(run(request, sessions, images))
        versions = {
            package_label(entry["runtime_package"]): entry["runtime_version"]
            for entry in result["artifacts"].values()
        }
        result["environment"] = describe_environment(versions)
        return result
