"""Latency, with the phases kept apart and several artifacts interleaved in one process.

    import -> load -> first inference -> warm-up until stable -> timed blocks -> profile

Timed blocks go in rounds; a round runs one block of every artifact, and the order turns and mirrors from
round to round (A B, B A, ...; with three A B C, C B A, B C A, A C B, ...), so that drift of the machine
falls on all alike. Each block starts with one untimed run, since the artifact before it emptied the
caches or the sensors were read. Sensors are read between blocks, and no thread runs beside the timed code.
Garbage collection is off while samples are taken. All samples are kept; those of long runs are packed
between blocks.
"""

from __future__ import annotations

import gc
import math
import time
from array import array
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np

from .runtimes import IMPORT_MS
from .samples import Int64Array, SampleStore
from .sensors import Monitor
from .session import Session
from .statistics import (
    MIN_SAMPLES_P90,
    Distribution,
    compare,
    drift_quarter,
    median,
    percentile,
    ratio_of_medians,
    summarize_distribution,
)
from .taints import CpuUse

MIN_WARMUP_RUNS = 6
MIN_WARMUP_SECONDS = 0.2
MAX_WARMUP_SECONDS = 2.0
STABLE_CHANGE = 0.05
NUM_ROUNDS = 16
MAX_BLOCK_SECONDS = 1.0
"""Of a sustained run, so that sensors are read often."""

MAX_CURVE_POINTS = 600


@dataclass(frozen=True)
class Limits:
    """When timing stops: after both minima, or at the cap.

    Attributes:
        min_runs: timed runs of each artifact.
        min_seconds: timed seconds of each artifact.
        max_seconds: seconds for the timed phase of all artifacts together.
        sustained_s: seconds by the clock that the timed phase lasts at least, whatever the cap; None: no such
            wish.
    """

    min_runs: int = 50
    min_seconds: float = 1.0
    max_seconds: float = 60.0
    sustained_s: Optional[float] = None

    @property
    def block_runs(self) -> int:
        """Runs of one block: a sixteenth of those asked for."""
        return 1 if self.sustained_s is not None else -(-self.min_runs // NUM_ROUNDS)

    @property
    def block_seconds(self) -> float:
        """Seconds of one block: a sixteenth of those asked for."""
        if self.sustained_s is not None:
            return min(MAX_BLOCK_SECONDS, max(self.sustained_s, self.min_seconds) / NUM_ROUNDS)
        return self.min_seconds / NUM_ROUNDS


@dataclass
class Timing:
    """What was measured of one session.

    Attributes:
        first_ns: latency of the first inference.
        warmup_ns: latencies of the warm-up runs after it.
        store: latencies of the timed runs, by block.
        block_starts_s: when each block began, on the monitor's clock.
        warmed_up: whether the warm-up became stable before its cap.
        cpu: processor time of the timed blocks.
    """

    first_ns: int = 0
    warmup_ns: "array[int]" = field(default_factory=lambda: array("q"))
    store: SampleStore = field(default_factory=SampleStore)
    block_starts_s: List[float] = field(default_factory=list)
    warmed_up: bool = False
    cpu: CpuUse = field(default_factory=CpuUse)

    @property
    def num_samples(self) -> int:
        """Timed runs in all blocks."""
        return self.store.num_samples

    @property
    def total_ns(self) -> int:
        """Their sum."""
        return self.store.total_ns

    def summary(self) -> Dict[str, Any]:
        """Return what `statistics.summarize` says of the timed runs, without having all in memory."""
        drift, num = None, self.num_samples
        if quarter := drift_quarter(num):
            ends = [(num - quarter, num), (0, quarter)]
            later, earlier = (Distribution.gather(self.store.between(*end)).median() for end in ends)
            drift = ratio_of_medians(later, earlier)
        return summarize_distribution(Distribution.gather(self.store.chunks()), drift)


def start(session: Session, warmup_seconds: Optional[float] = None) -> Timing:
    """Run a prepared session for the first time and warm it up.

    Args:
        session: after `prepare`.
        warmup_seconds: cap on the warm-up, whose windows are an eighth of it; None takes MAX_WARMUP_SECONDS.

    Raises:
        InferenceFailure: if the runtime fails.
    """
    timing = Timing(first_ns=_time(session))
    _warm_up(session, timing, MAX_WARMUP_SECONDS if warmup_seconds is None else warmup_seconds)
    return timing


def measure(
    sessions: Mapping[str, Session],
    limits: Limits,
    timings: Optional[Dict[str, Timing]] = None,
    monitor: Optional[Monitor] = None,
) -> Dict[str, Timing]:
    """Time sessions whose inputs are prepared.

    Args:
        sessions: by key, each after `prepare`.
        limits: when to stop.
        timings: what `start` gave for each session; None starts them here.
        monitor: reads the sensors between blocks.

    Returns:
        Timings by key. Every artifact has at least one timed run, whatever the cap.

    Raises:
        InferenceFailure: if a runtime fails.
    """
    if timings is None:
        timings = {key: start(session) for key, session in sessions.items()}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        _timed_rounds(sessions, timings, limits, monitor or Monitor(math.inf))
    finally:
        if collecting:
            gc.enable()
    return timings


def round_order(keys: Sequence[str], round_index: int) -> List[str]:
    """Return the order of a round: turned by one every second round, mirrored every other round.

    Example:
        >>> ["".join(round_order("AB", i)) for i in range(4)]
        ['AB', 'BA', 'BA', 'AB']
        >>> ["".join(round_order("ABC", i)) for i in range(4)]
        ['ABC', 'CBA', 'BCA', 'ACB']
    """
    turn = (round_index // 2) % len(keys)
    order = [*keys[turn:], *keys[:turn]]
    return order[::-1] if round_index % 2 else order


def describe(session: Session, timing: Timing) -> Dict[str, Any]:
    """Return the JSON-ready result of one artifact, raw samples included."""
    warnings = []
    if not timing.warmed_up:
        warnings.append(f"latency was still changing after {MAX_WARMUP_SECONDS:g} s of warm-up")
    import_ms, first_ms = IMPORT_MS.get(session.runtime), timing.first_ns / 1e6
    return {
        "runtime": session.runtime,
        "runtime_package": session.runtime_package,
        "runtime_version": session.runtime_version,
        "threads": session.threads,
        "import_ms": import_ms,
        "load_ms": session.load_ms,
        "first_ms": first_ms,
        "phases": {
            "import_ms": import_ms,
            "load_ms": session.load_ms,
            "first_ms": first_ms,
            "warmup_ms": sum(timing.warmup_ns) / 1e6,
        },
        "warmup_ns": timing.warmup_ns.tolist(),
        "samples_ns": timing.store.to_json(),
        "block_lengths": timing.store.block_lengths,
        **timing.summary(),
        "cpu": timing.cpu.to_dict(),
        "warnings": warnings,
    }


def curve(timing: Timing, max_points: int = MAX_CURVE_POINTS) -> List[Dict[str, Any]]:
    """Return latency over a run in at most `max_points` windows, each of as many samples in a row.

    Returns:
        Per window `t_s` (its start on the monitor's clock), `num_samples`, `min_ms`, `median_ms`, `p90_ms`
        (None below 64 samples) and `max_ms`: a slow stretch shows in the median, a single slow run in the
        maximum.

    Example:
        >>> timing = Timing(block_starts_s=[0.0, 5.0])
        >>> timing.store.append([10, 20, 30]), timing.store.append([40])
        (False, False)
        >>> [(point["t_s"], point["median_ms"]) for point in curve(timing, max_points=2)]
        [(0.0, 1.5e-05), (3e-08, 3.5e-05)]
    """
    step = max(1, -(-timing.num_samples // max_points))
    points: List[Dict[str, Any]] = []
    window: List[Int64Array] = []
    room, start_s = step, 0.0
    for block_start_s, block in zip(timing.block_starts_s, timing.store.blocks()):  # noqa: B905 - 3.9
        taken, elapsed_ns = 0, 0
        while taken < len(block):
            if not window:
                start_s = block_start_s + elapsed_ns / 1e9
            piece = block[taken : taken + room]
            window.append(piece)
            taken, elapsed_ns, room = taken + len(piece), elapsed_ns + int(piece.sum()), room - len(piece)
            if room == 0:
                points.append(_point(start_s, window))
                window, room = [], step
    return [*points, _point(start_s, window)] if window else points


def _point(start_s: float, window: Sequence[Int64Array]) -> Dict[str, Any]:
    """Return one window of the curve."""
    samples = np.sort(np.concatenate(window))
    return {
        "t_s": start_s,
        "num_samples": len(samples),
        "min_ms": float(samples[0]) / 1e6,
        "median_ms": median(samples) / 1e6,
        "p90_ms": percentile(samples, 90) / 1e6 if len(samples) >= MIN_SAMPLES_P90 else None,
        "max_ms": float(samples[-1]) / 1e6,
    }


def compare_all(timings: Dict[str, Timing], baseline: str) -> Dict[str, Dict[str, Any]]:
    """Compare every artifact but the baseline with the baseline, on paired blocks."""
    return {
        key: compare(timings[baseline].store.blocks(), timing.store.blocks())
        for key, timing in timings.items()
        if key != baseline
    }


def _time(session: Session) -> int:
    start = time.perf_counter_ns()
    session.invoke()
    return time.perf_counter_ns() - start


def _warm_up(session: Session, timing: Timing, max_seconds: float) -> None:
    """Run windows, each half of the minimum warm-up, until the medians of two in a row are within 5 %."""
    start = time.perf_counter()
    window_seconds = min(MIN_WARMUP_SECONDS / 2, max_seconds / 8)
    earlier = 0.0
    while not timing.warmed_up:
        window = array("q")
        window_start = time.perf_counter()
        while len(window) < MIN_WARMUP_RUNS // 2 or time.perf_counter() - window_start < window_seconds:
            window.append(_time(session))
        timing.warmup_ns.extend(window)
        later = median(window)
        timing.warmed_up = abs(later - earlier) <= STABLE_CHANGE * earlier
        earlier = later
        if len(timing.warmup_ns) >= MIN_WARMUP_RUNS and time.perf_counter() - start >= max_seconds:
            return


def _timed_rounds(
    sessions: Mapping[str, Session], timings: Dict[str, Timing], limits: Limits, monitor: Monitor
) -> None:
    """Run pairs of rounds until every artifact has its minima or the cap is reached."""
    keys = list(sessions)
    began = time.perf_counter()
    least = began + (limits.sustained_s or 0.0)
    deadline = max(began + limits.max_seconds, least)
    round_index, packed = 0, False
    while True:
        for key in round_order(keys, round_index):
            disturbed = monitor.sample() or packed or len(keys) > 1
            packed = _timed_block(sessions[key], timings[key], limits, deadline, disturbed, monitor.elapsed_s)
        round_index += 1
        now = time.perf_counter()
        if now >= deadline:
            return
        enough = all(
            timing.num_samples >= limits.min_runs and timing.total_ns >= limits.min_seconds * 1e9
            for timing in timings.values()
        )
        if enough and now >= least and round_index % 2 == 0:
            return


def _timed_block(
    session: Session, timing: Timing, limits: Limits, deadline: float, settle: bool, started_s: float
) -> bool:
    """Take one block, at least one run, and tell whether keeping it emptied the caches."""
    if settle:
        session.invoke()
    min_runs, min_ns = limits.block_runs, limits.block_seconds * 1e9
    block = array("q")
    total_ns = 0
    before = CpuUse.now()
    while True:
        sample = _time(session)
        block.append(sample)
        total_ns += sample
        done = len(block) >= min_runs and total_ns >= min_ns
        if done or time.perf_counter() >= deadline:
            break
    timing.cpu.add_since(before)
    timing.block_starts_s.append(started_s)
    return timing.store.append(block)
