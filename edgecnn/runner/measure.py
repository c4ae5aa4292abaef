"""Latency, with the phases kept apart and several artifacts interleaved in one process.

    import -> load -> first inference -> warm-up until stable -> timed blocks -> profile

Timed blocks go in rounds; a round runs one block of every artifact, and the order turns and mirrors from
round to round (A B, B A, ...; with three A B C, C B A, B C A, A C B, ...), so that drift of the machine
falls on all alike. Each block starts with one untimed run, since the artifact before it emptied the
caches or the sensors were read. Sensors are read between blocks, and no thread runs beside the timed code.
Garbage collection is off while samples are taken. All samples are kept.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from .runtimes import IMPORT_MS
from .sensors import Monitor
from .session import Session
from .statistics import compare, median, summarize
from .taints import CpuUse

MIN_WARMUP_RUNS = 6
MIN_WARMUP_SECONDS = 0.2
MAX_WARMUP_SECONDS = 2.0
STABLE_CHANGE = 0.05
NUM_ROUNDS = 16
MAX_BLOCK_SECONDS = 1.0
"""Of a sustained run, so that sensors are read often."""

MAX_CURVE_POINTS = 2000


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
        blocks_ns: latencies of the timed runs, by block.
        block_starts_s: when each block began, on the monitor's clock.
        warmed_up: whether the warm-up became stable before its cap.
        cpu: processor time of the timed blocks.
        num_samples: timed runs in all blocks.
        total_ns: their sum.
    """

    first_ns: int = 0
    warmup_ns: List[int] = field(default_factory=list)
    blocks_ns: List[List[int]] = field(default_factory=list)
    block_starts_s: List[float] = field(default_factory=list)
    warmed_up: bool = False
    cpu: CpuUse = field(default_factory=CpuUse)
    num_samples: int = 0
    total_ns: int = 0

    @property
    def samples_ns(self) -> List[int]:
        """All timed latencies in the order they were measured."""
        return [sample for block in self.blocks_ns for sample in block]


def start(session: Session) -> Timing:
    """Run a prepared session for the first time and warm it up.

    Raises:
        InferenceFailure: if the runtime fails.
    """
    timing = Timing(first_ns=_time(session))
    _warm_up(session, timing)
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
    samples = timing.samples_ns
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
        "warmup_ns": timing.warmup_ns,
        "samples_ns": samples,
        "block_lengths": [len(block) for block in timing.blocks_ns],
        **summarize(samples),
        "cpu": timing.cpu.to_dict(),
        "warnings": warnings,
    }


def curve(timing: Timing, max_points: int = MAX_CURVE_POINTS) -> List[Tuple[float, float]]:
    """Return (seconds on the monitor's clock, latency in ns) over a run, at most `max_points` of them.

    Each point is the median of as many samples in a row, so that a slow stretch shows and a single slow run
    does not.

    Example:
        >>> timing = Timing(blocks_ns=[[10, 20, 30], [40]], block_starts_s=[0.0, 5.0])
        >>> curve(timing, max_points=2)
        [(0.0, 15.0), (3e-08, 35.0)]
    """
    times: List[float] = []
    for started, block in zip(timing.block_starts_s, timing.blocks_ns):  # noqa: B905 - 3.9
        elapsed_ns = 0
        for sample in block:
            times.append(started + elapsed_ns / 1e9)
            elapsed_ns += sample
    samples = timing.samples_ns
    step = max(1, -(-len(samples) // max_points))
    return [(times[i], median(samples[i : i + step])) for i in range(0, len(samples), step)]


def compare_all(timings: Dict[str, Timing], baseline: str) -> Dict[str, Dict[str, Any]]:
    """Compare every artifact but the baseline with the baseline, on paired blocks."""
    base = timings[baseline].blocks_ns
    return {key: compare(base, timing.blocks_ns) for key, timing in timings.items() if key != baseline}


def _time(session: Session) -> int:
    start = time.perf_counter_ns()
    session.invoke()
    return time.perf_counter_ns() - start


def _warm_up(session: Session, timing: Timing) -> None:
    """Run windows, each half of the minimum warm-up, until the medians of two in a row are within 5 %."""
    start = time.perf_counter()
    earlier = 0.0
    while not timing.warmed_up:
        window: List[int] = []
        window_start = time.perf_counter()
        while (
            len(window) < MIN_WARMUP_RUNS // 2 or time.perf_counter() - window_start < MIN_WARMUP_SECONDS / 2
        ):
            window.append(_time(session))
        timing.warmup_ns.extend(window)
        later = median(window)
        timing.warmed_up = abs(later - earlier) <= STABLE_CHANGE * earlier
        earlier = later
        if len(timing.warmup_ns) >= MIN_WARMUP_RUNS and time.perf_counter() - start >= MAX_WARMUP_SECONDS:
            return


def _timed_rounds(
    sessions: Mapping[str, Session], timings: Dict[str, Timing], limits: Limits, monitor: Monitor
) -> None:
    """Run pairs of rounds until every artifact has its minima or the cap is reached."""
    keys = list(sessions)
    began = time.perf_counter()
    least = began + (limits.sustained_s or 0.0)
    deadline = max(began + limits.max_seconds, least)
    round_index = 0
    while True:
        for key in round_order(keys, round_index):
            disturbed = monitor.sample() or len(keys) > 1
            _timed_block(sessions[key], timings[key], limits, deadline, disturbed, monitor.elapsed_s)
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
) -> None:
    """Take one block, at least one run."""
    if settle:
        session.invoke()
    min_runs, min_ns = limits.block_runs, limits.block_seconds * 1e9
    block: List[int] = []
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
    timing.total_ns += total_ns
    timing.num_samples += len(block)
    timing.blocks_ns.append(block)
    timing.block_starts_s.append(started_s)
