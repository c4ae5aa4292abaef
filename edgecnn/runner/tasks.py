"""One request from open sessions to its result; latency here, the other tasks in files of their own."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict

from .environment import describe_environment, peak_rss_bytes
from .failure import InputFailure
from .inputs import Images, noise_feeds
from .measure import Limits, compare_all, describe, measure
from .outputs import run_outputs
from .predictions import run_predictions
from .request import Request
from .session import Session, open_session

SCHEMA_VERSION = 1


def execute(request: Request) -> Dict[str, Any]:
    """Run a request.

    Returns:
        The JSON-ready result: `schema_version`, `ok`, `task`, `artifacts` by key, `environment`, and what the
        task adds.

    Raises:
        RunFailure: for anything wrong with the request, the runtime, a model file or the inputs.
    """
    with ExitStack() as stack:
        sessions: Dict[str, Session] = {}
        for artifact in request.artifacts:
            session = open_session(
                artifact.path, artifact.runtime, request.provider, request.threads, request.optimize
            )
            sessions[artifact.key] = stack.enter_context(session)
        result: Dict[str, Any] = {"schema_version": SCHEMA_VERSION, "ok": True, "task": request.task}
        if request.task == "latency":
            result.update(run_latency(request, sessions))
        else:
            images = Images(request.inputs or Path(), request.preprocess)
            run = run_outputs if request.task == "outputs" else run_predictions
            result.update(run(request, sessions, images))
        versions = {session.runtime: session.runtime_version for session in sessions.values()}
        result["environment"] = describe_environment(versions)
        return result


def run_latency(request: Request, sessions: Dict[str, Session]) -> Dict[str, Any]:
    """Time all artifacts interleaved, and compare them with the baseline.

    The same first `batch_size` images, or seeded noise, feed every run.
    """
    images = None if request.inputs is None else Images(request.inputs, request.preprocess)
    if images is not None and len(images) < request.batch_size:
        raise InputFailure(f"{images.path} holds {len(images)} images, a batch needs {request.batch_size}")
    for session in sessions.values():
        session.prepare(
            noise_feeds(session, request.batch_size)
            if images is None
            else images.feeds(session, 0, request.batch_size)
        )
    loaded_bytes = peak_rss_bytes()
    limits = Limits(request.min_runs, request.min_seconds, request.max_seconds)
    timings = measure(sessions, limits)
    baseline = request.baseline or next(iter(sessions))
    return {
        "batch_size": request.batch_size,
        "baseline": baseline,
        "artifacts": {key: describe(session, timings[key]) for key, session in sessions.items()},
        "comparisons": compare_all(timings, baseline),
        "peak_rss_loaded_bytes": loaded_bytes,
        "timed_region": "invoke only: inputs converted and set before, outputs converted after",
    }
