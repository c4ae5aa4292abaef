"""Latency, with the phases kept apart and several artifacts interleaved in one process.

    import -> load -> first inference -> warm-up until stable -> timed blocks

Timed blocks go in rounds; a round runs one block of every artifact, and the order turns and mirrors from
round to round (A B, B A, ...; with three A B C, C B A, B C A, A C B, ...), so that drift of the machine
falls on all alike. Each block starts with one untimed run, since the artifact before it emptied the
caches. Garbage collection is off while samples are taken. All samples are kept.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from typing import Any, Dict, List, Sequence

from .session import IMPORT_MS, Session
from .statistics import compare, median, summarize

MIN_WARMUP_RUNS = 6
MIN_WARMUP_SECONDS = 0.2
MAX_WARMUP_SECONDS = 2.0
STABLE_CHANGE = 0.05
NUM_ROUNDS = 16
DRIFT_WARNING = 1.05


@dataclass(frozen=True)
class Limits:
    """When timing stops: after both minima, or at the cap.

    Attributes:
        min_runs: timed runs of each artifact.
        min_seconds: timed seconds of each artifact.
        max_seconds: seconds for the timed phase of all artifacts together.
    """

    min_runs: int = 50
    min_seconds: float = 1.0
    max_seconds: float = 60.0


@dataclass
class Timing:
    """What was measured of one session.

    Attributes:
        first_ns: latency of the first inference.
        warmup_ns: latencies of the warm-up runs after it.
        blocks_ns: latencies of the timed runs, by block.
        warmed_up: whether the warm-up became stable before its cap.
    """

    first_ns: int = 0
    warmup_ns: List[int] = field(default_factory=list)
    blocks_ns: List[List[int]] = field(default_factory=list)
    warmed_up: bool = False

    @property
    def samples_ns(self) -> List[int]:
        """All timed latencies in the order they were measured."""
        return [sample for block in self.blocks_ns for sample in block]


def measure(sessions: Dict[str, Session], limits: Limits) -> Dict[str, Timing]:
    """Time sessions whose inputs are prepared.

    Args:
        sessions: by key, each after `prepare`.
        limits: when to stop.

    Returns:
        Timings by key. Every artifact has at least one timed run, whatever the cap.

    Raises:
        InferenceFailure: if a runtime fails.
    """
    timings = {key: Timing(first_ns=_time(session)) for key, session in sessions.items()}
    for key, session in sessions.items():
        _warm_up(session, timings[key])
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        _timed_rounds(sessions, timings, limits)
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
    summary = summarize(samples)
    warnings = []
    if not timing.warmed_up:
        warnings.append(f"latency was still changing after {MAX_WARMUP_SECONDS:g} s of warm-up")
    if summary["drift"] is not None and summary["drift"] > DRIFT_WARNING:
        warnings.append(
            f"the last quarter of the runs is {summary['drift']:.2f} times as slow as the first: "
            "throttling, or a busy machine"
        )
    return {
        "runtime": session.runtime,
        "runtime_package": session.runtime_package,
        "runtime_version": session.runtime_version,
        "threads": session.threads,
        "import_ms": IMPORT_MS.get(session.runtime),
        "load_ms": session.load_ms,
        "first_ms": timing.first_ns / 1e6,
        "warmup_ns": timing.warmup_ns,
        "samples_ns": samples,
        "block_lengths": [len(block) for block in timing.blocks_ns],
        **summary,
        "warnings": warnings,
    }


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


def _timed_rounds(sessions: Dict[str, Session], timings: Dict[str, Timing], limits: Limits) -> None:
    """Run pairs of rounds until every artifact has its minima or the cap is reached."""
    keys = list(sessions)
    deadline = time.perf_counter() + limits.max_seconds
    total_ns = dict.fromkeys(keys, 0)
    total_runs = dict.fromkeys(keys, 0)
    round_index = 0
    while True:
        for key in round_order(keys, round_index):
            block = _timed_block(sessions[key], limits, deadline, len(keys) > 1)
            timings[key].blocks_ns.append(block)
            total_ns[key] += sum(block)
            total_runs[key] += len(block)
        round_index += 1
        if time.perf_counter() >= deadline:
            return
        enough = all(
            total_runs[key] >= limits.min_runs and total_ns[key] >= limits.min_seconds * 1e9 for key in keys
        )
        if enough and round_index % 2 == 0:
            return


def _timed_block(session: Session, limits: Limits, deadline: float, settle: bool) -> List[int]:
    """Take one block: a sixteenth of the runs and of the seconds asked for, at least one run."""
    if settle:
        session.invoke()
    min_runs = -(-limits.min_runs // NUM_ROUNDS)
    min_ns = limits.min_seconds * 1e9 / NUM_ROUNDS
    block: List[int] = []
    total_ns = 0
    while True:
        sample = _time(session)
        block.append(sample)
        total_ns += sample
        done = len(block) >= min_runs and total_ns >= min_ns
        if done or time.perf_counter() >= deadline:
            return block
