"""The BenchReport: what one device said about a set of files, as `bench.json` (schema_version 1) holds it.

Figures that were not measured are None, never invented: a run that broke has an `error` and no number, a
percentile is None below the samples it needs, a ratio without an interval is "undecided".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from edgecnn.errors import DataError
from edgecnn.report.latencies import Latencies
from edgecnn.report.schema import from_values, to_values
from edgecnn.runner.samples import Int64Array

SCHEMA_VERSION = 1
KIND = "bench"
"""The value of the key "kind", by which a bench report is told from that of `compress`."""

EMULATED = "emulated: not a speed measurement"
"""What every rendering says of figures from an emulated board."""


@dataclass(frozen=True)
class BenchRun:
    """One file on the device, batch 1, at one number of threads.

    Attributes:
        key: unique in its report; the file's key, with "@2" for 2 threads when several were asked for.
        path: of the file on the host.
        sha256: of the file.
        size_bytes: of the file.
        runtime: "onnxruntime" or "litert"; empty when the run broke before it was known.
        runtime_version: of the runtime.
        threads: inside an operator.
        samples_ns: every timed latency in the order it was measured; nothing is ever removed. Any sequence of
            whole numbers may be given. JSON has a list, or above 50,000 of them the packed form of
            `edgecnn.runner.samples`.
        block_lengths: how many of them each block holds; a block is one process when files are compared.
        median_ms: middle latency; None when the run broke.
        median_interval_ms: 95 % confidence interval of the median, (low, high); None below 6 samples.
        p90_ms: None below 64 samples.
        p99_ms: None below 662 samples.
        iqr_ms: interquartile range.
        min_ms: smallest latency.
        phases: "import_ms", "load_ms", "first_ms", "warmup_ms", medians over the run's processes.
        peak_rss_bytes: largest peak of the process, less that after its imports; None when unknown.
        device_memory_bytes: of a GPU, at the peak; None without.
        profile: operators, {"op", "name", "total_ms", "count", "share"}; None when not asked for.
        delegate: {"partitions", "delegated_ops", "total_ops"}; None where the runtime has no delegate.
        trace: {"t_s", "temperature_c", "frequency_mhz", "throttled"} over the run.
        curve: of a sustained run at most 600 windows of as many latencies in a row: {"t_s", "num_samples",
            "min_ms", "median_ms", "p90_ms", "max_ms"} on the trace's clock.
        taints: why the numbers should not be relied on; empty for a clean run.
        error: why the run broke; None for one that did not.
    """

    key: str
    path: str
    sha256: str
    size_bytes: int
    runtime: str
    runtime_version: str
    threads: int
    samples_ns: Latencies = field(default_factory=Latencies)
    block_lengths: tuple[int, ...] = ()
    median_ms: float | None = None
    median_interval_ms: tuple[float, ...] | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    iqr_ms: float | None = None
    min_ms: float | None = None
    phases: dict[str, float | None] | None = None
    peak_rss_bytes: int | None = None
    device_memory_bytes: int | None = None
    profile: tuple[dict[str, Any], ...] | None = None
    delegate: dict[str, Any] | None = None
    trace: tuple[dict[str, Any], ...] = ()
    curve: tuple[dict[str, Any], ...] = ()
    taints: tuple[str, ...] = ()
    error: str | None = None

    def __post_init__(self) -> None:
        """Check that a broken run has no number, a whole one has some, and the blocks add up."""
        if not isinstance(self.samples_ns, Latencies):
            object.__setattr__(self, "samples_ns", Latencies(self.samples_ns))
        if (self.error is None) != (self.median_ms is not None):
            raise ValueError(f"run {self.key} has error {self.error!r} and median_ms {self.median_ms}")
        if sum(self.block_lengths) != len(self.samples_ns):
            raise ValueError(
                f"run {self.key} has {len(self.samples_ns)} samples in blocks of {sum(self.block_lengths)}"
            )
        if self.median_interval_ms is not None and len(self.median_interval_ms) != 2:
            raise ValueError(
                f"run {self.key} has the interval {self.median_interval_ms}, expected (low, high)"
            )

    @property
    def blocks_ns(self) -> list[Int64Array]:
        """The samples block by block.

        Example:
            >>> samples = Latencies([3, 4, 5])
            >>> run = BenchRun("a", "a.onnx", "", 1, "onnxruntime", "1", 1, samples, (1, 2), 4e-6)
            >>> [block.tolist() for block in run.blocks_ns]
            [[3], [4, 5]]
        """
        return split_blocks(self.samples_ns.array, self.block_lengths)


def split_blocks(samples: Int64Array, lengths: Sequence[int]) -> list[Int64Array]:
    """Return samples as blocks of the given lengths.

    Args:
        samples: (n,).
        lengths: their sum is n.
    """
    ends = list(accumulate(lengths))
    return [samples[end - length : end] for length, end in zip(lengths, ends, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """Baseline's latency over the candidate's, from interleaved blocks, with its 95 % confidence interval.

    Attributes:
        baseline: key of a run.
        candidate: key of a run at the same number of threads.
        speedup: above 1 the candidate is faster.
        low: of the interval; None below 6 pairs of blocks.
        high: of the interval.
        verdict: "faster", "slower", "no difference" (the interval includes 1) or "undecided".
        num_pairs: pairs of blocks.
    """

    baseline: str
    candidate: str
    speedup: float
    low: float | None
    high: float | None
    verdict: str
    num_pairs: int = 0

    def __post_init__(self) -> None:
        """Check the order."""
        if self.low is not None and self.high is not None and not 0 < self.low <= self.high:
            raise ValueError(f"the interval is [{self.low}, {self.high}], expected 0 < low <= high")


@dataclass(frozen=True)
class BoardAccuracy:
    """Accuracy of one file on the device, and how far its outputs are from this host's of the same file.

    Attributes:
        key: of the file, the key of its run without the threads.
        path: of the file on the host.
        runtime: on the device, "litert 2.3.0".
        host_runtime: on this host.
        num_samples: images.
        top1: fraction right; None without labels.
        top5: fraction right; None without labels or below 6 classes.
        agreement_with_host: fraction of images with the same first class on both; None without classes.
        max_lsb: largest difference of an output in steps of its scale; None for a float file.
        max_difference: largest absolute difference of an output value.
        cosine: of the angle between all outputs of both sides; None when one is all zeros.
        num_compared: images whose outputs were compared.
        holds: whether it is within the contract: LiteRT int8 exact, otherwise cosine above 0.999 and the same
            first class for 99 % of the images.
        note: what differs, with runtime and version of both sides; empty when it holds.
    """

    key: str
    path: str
    runtime: str
    host_runtime: str
    num_samples: int
    top1: float | None
    top5: float | None
    agreement_with_host: float | None
    max_lsb: int | None
    max_difference: float
    cosine: float | None
    num_compared: int
    holds: bool
    note: str = ""


@dataclass(frozen=True)
class BenchReport:
    """Everything one device said.

    Attributes:
        device: name of its profile.
        environment: of the device, as its runner described it, JSON-ready.
        runs: in the order asked for; the first is that of the first file (the baseline, if one was named).
        comparisons: of every other file with the baseline, thread count by thread count.
        accuracy: empty without data.
        warnings: what the user should know.
        emulated: whether the board is emulated, so that no latency here is a measurement of speed.
        baseline: key of the file the user named as the baseline; None if none was named.
        data: the labelled images, as the user named them; None without.
        schema_version: of this format.
        kind: "bench".
    """

    device: str
    environment: dict[str, Any]
    runs: tuple[BenchRun, ...]
    comparisons: tuple[Comparison, ...] = ()
    accuracy: tuple[BoardAccuracy, ...] = ()
    warnings: tuple[str, ...] = ()
    emulated: bool = False
    data: str | None = None
    baseline: str | None = None
    schema_version: int = SCHEMA_VERSION
    kind: str = KIND

    @property
    def median_ms(self) -> float | None:
        """Median latency of the first run; None if it broke."""
        return self.runs[0].median_ms if self.runs else None

    def run(self, key: str) -> BenchRun:
        """Return the run of a key.

        Raises:
            DataError: if there is none.
        """
        for entry in self.runs:
            if entry.key == key:
                return entry
        raise DataError(
            f"the report has no run {key!r}, expected one of {', '.join(r.key for r in self.runs)}"
        )

    def to_json(self) -> str:
        """Return the text of bench.json.

        Raises:
            DataError: if a figure is not finite.
        """
        values = to_values(self)
        head = {"schema_version": values.pop("schema_version"), "kind": values.pop("kind")}
        return json.dumps({**head, **values}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> BenchReport:
        """Read a report back.

        Raises:
            DataError: if it is not JSON, no bench report, of another schema, or has a field missing or wrong.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"bench report: not valid JSON: {error}", hint="it may have been cut short; run again"
            ) from error
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: Any) -> BenchReport:
        """Build a report from parsed JSON.

        Raises:
            DataError: as `from_json`.
        """
        if not isinstance(values, dict) or values.get("kind") != KIND:
            raise DataError("bench report: its kind is not 'bench'", hint="give a file that bench wrote")
        if values.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"bench report: schema_version is {values.get('schema_version')!r}, "
                f"expected {SCHEMA_VERSION}",
                hint="read it with the edgecnn that wrote it, or run again",
            )
        return from_values(cls, values, "bench report")
