"""The task "latency": artifacts loaded one by one, timed interleaved, and what would taint their times.

Memory of one artifact: VmHWM after its warm-up minus VmRSS before it was loaded, imports done. The peak is
set back before each load where the kernel allows; where it does not, only a request of one artifact has one.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from .environment import peak_rss_bytes, reset_peak_rss, rss_bytes
from .failure import InputFailure
from .inputs import Images, noise_feeds
from .measure import Limits, Timing, compare_all, curve, describe, measure, start
from .request import PRESETS, ArtifactRequest, Request
from .runtimes import import_runtime, runtime_of
from .sensors import Monitor
from .session import Session, SessionOptions, open_with
from .taints import Clocks, clock_taint, cpu_taints, drift_taint, load_taint, suspend_taint, throttle_taint

PROFILE_SECONDS = 1.0
MAX_TRACE_SAMPLES = 1000


@dataclass
class Started:
    """An artifact that is loaded and warm.

    Attributes:
        session: with its inputs prepared.
        timing: first inference and warm-up.
        baseline_rss_bytes: resident memory before it was loaded, imports done.
        peak_rss_bytes: highest until it was warm, None where it is not known for this artifact alone.
    """

    session: Session
    timing: Timing
    baseline_rss_bytes: Optional[int]
    peak_rss_bytes: Optional[int]


def run_latency(request: Request, stack: ExitStack) -> Dict[str, Any]:
    """Time all artifacts interleaved, and compare them with the baseline.

    The same first `batch_size` images, or seeded noise, feed every run.

    Args:
        request: of this task.
        stack: closes the sessions.

    Returns:
        What the task adds to a result; per artifact its samples, summary, phases, memory, profile and taints.

    Raises:
        RunFailure: for anything wrong with a runtime, a model file or the inputs.
    """
    images = None if request.inputs is None else Images(request.inputs, request.preprocess)
    if images is not None and len(images) < request.batch_size:
        raise InputFailure(f"{images.path} holds {len(images)} images, a batch needs {request.batch_size}")
    before = Clocks.now()
    monitor = Monitor(max(1.0, (request.sustained_s or 0.0) / MAX_TRACE_SAMPLES))
    monitor.sample()
    started = {entry.key: _start(request, entry, images, stack) for entry in request.artifacts}
    sessions = {key: entry.session for key, entry in started.items()}
    limits = Limits(request.min_runs, request.min_seconds, request.max_seconds, request.sustained_s)
    timings = measure(sessions, limits, {key: entry.timing for key, entry in started.items()}, monitor)
    monitor.sample(force=True)
    common = _common_taints(before, monitor)
    baseline = request.baseline or next(iter(sessions))
    artifacts = {key: _describe(request, entry, monitor, common) for key, entry in started.items()}
    return {
        "batch_size": request.batch_size,
        "baseline": baseline,
        "artifacts": artifacts,
        "comparisons": compare_all(timings, baseline),
        "peak_rss_loaded_bytes": peak_rss_bytes(),
        "timed_region": "invoke only: inputs converted and set before, outputs converted after",
    }


def session_options(request: Request) -> SessionOptions:
    """Return the options that all sessions of a request are opened with."""
    return SessionOptions(
        request.provider, request.threads, request.optimize, request.half, request.cuda_graph
    )


def _start(request: Request, entry: ArtifactRequest, images: Optional[Images], stack: ExitStack) -> Started:
    import_runtime(runtime_of(entry.path, entry.runtime))
    fresh = reset_peak_rss() or len(request.artifacts) == 1
    baseline = rss_bytes()
    session = stack.enter_context(open_with(entry.path, entry.runtime, session_options(request)))
    session.prepare(
        noise_feeds(session, request.batch_size)
        if images is None
        else images.feeds(session, 0, request.batch_size)
    )
    timing = start(session, request.warmup_seconds)
    return Started(session, timing, baseline, peak_rss_bytes() if fresh else None)


def _common_taints(before: Clocks, monitor: Monitor) -> List[str]:
    """Return the taints of the whole run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    after = Clocks.now()
    found = [
        throttle_taint(monitor.samples),
        load_taint(before, cores),
        suspend_taint(before, after),
        clock_taint(before, after),
    ]
    return [taint for taint in found if taint is not None]


def _describe(request: Request, started: Started, monitor: Monitor, common: List[str]) -> Dict[str, Any]:
    session, timing = started.session, started.timing
    entry = describe(session, timing)
    drift = drift_taint(entry["drift"])
    taints = [*common, *([drift] if drift else [])]
    if session.on_cpu:
        taints += cpu_taints(timing.cpu, session.threads)
    entry.update(
        baseline_rss_bytes=started.baseline_rss_bytes,
        peak_rss_bytes=started.peak_rss_bytes,
        device_memory_bytes=session.device_memory_bytes(),
        profile=session.profile(PROFILE_SECONDS) if request.profile else None,
        delegate=session.delegate(),
        trace=monitor.trace(),
        taints=taints,
    )
    if request.sustained_s is not None:
        entry["curve"] = curve(timing)
    if request.preset is not None:
        entry["preset"] = _preset(request.preset, entry, timing)
        if not entry["preset"]["met"]:
            entry["warnings"].append(
                f"preset {request.preset} was not met: "
                f"{timing.num_samples} runs in {timing.total_ns / 1e9:.1f} s"
            )
    return entry


def _preset(name: str, entry: Dict[str, Any], timing: Timing) -> Dict[str, Any]:
    """Say whether the cap left the preset its runs and seconds, and give the percentile it reports."""
    preset = PRESETS[name]
    met = timing.num_samples >= preset["min_runs"] and timing.total_ns >= preset["min_seconds"] * 1e9
    return {"name": name, "met": met, "p90_ms": entry["p90_ms"] if met else None}
