"""Statistics by hand numbers, the order of interleaving, and when timing stops."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from edgecnn.runner.environment import cpu_flags, cpu_name, describe_environment, isa_name
from edgecnn.runner.measure import Limits, compare_all, describe, measure, round_order
from edgecnn.runner.session import Session
from edgecnn.runner.statistics import (
    compare,
    median,
    median_interval,
    median_rank,
    percentile,
    summarize,
)


class SleepingSession(Session):
    """A session whose inference takes a known time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.path, self.runtime, self.runtime_package = Path("sleep"), "sleep", "sleep"
        self.runtime_version, self.threads, self.load_ms = "1", 1, 0.0
        self.inputs, self.outputs = (), ()
        self.seconds, self.num_runs = seconds, 0

    def invoke(self) -> None:
        time.sleep(self.seconds)
        self.num_runs += 1

    def _bind(self, piece: Any) -> None:
        pass

    def _execute(self) -> None:
        pass

    def _read(self) -> list[Any]:
        return []

    def _release(self) -> None:
        pass


def test_median_and_percentiles_by_hand() -> None:
    assert median([7]) == 7.0
    assert median([1, 2, 3, 10]) == 2.5
    assert percentile(range(1, 101), 90) == 90.0
    assert percentile([1, 2, 3], 90) == 3.0
    for function in (median, lambda values: percentile(values, 50), summarize):
        with pytest.raises(ValueError, match="no "):
            function([])


def test_the_medians_interval_has_the_binomial_ranks() -> None:
    # P(Bin(10, 1/2) <= 1) = 11 / 1024 = 1.07 % and P(<= 2) = 56 / 1024 = 5.5 %, against 2.5 %: k = 2
    assert median_rank(10) == 2
    assert median_interval(list(range(1, 11))) == (2.0, 9.0)
    # 1 / 2^5 = 3.1 % is too much, 1 / 2^6 = 1.6 % is not
    assert median_interval([1, 2, 3, 4, 5]) is None
    assert median_interval([1, 2, 3, 4, 5, 6]) == (1.0, 6.0)


def test_the_normal_approximation_meets_the_exact_ranks() -> None:
    exact, approximate = median_rank(1000), median_rank(1001)
    assert exact is not None
    assert approximate is not None
    assert abs(exact - approximate) <= 1


@pytest.mark.parametrize(
    ("n", "has_p90", "has_p99"), [(63, False, False), (64, True, False), (662, True, True)]
)
def test_percentiles_need_their_samples(n: int, has_p90: bool, has_p99: bool) -> None:
    summary = summarize([1_000_000] * n)
    assert (summary["p90_ms"] is not None, summary["p99_ms"] is not None) == (has_p90, has_p99)
    assert summary["num_samples"] == n


def test_outliers_are_counted_and_kept() -> None:
    summary = summarize([10_000_000, 11_000_000, 12_000_000, 13_000_000] * 5 + [90_000_000])
    assert summary["num_outliers"] == 1
    assert summary["max_ms"] == 90.0
    assert summary["num_samples"] == 21


def test_drift_is_last_quarter_over_first() -> None:
    assert summarize([10] * 4 + [20] * 4)["drift"] == 2.0
    assert summarize([10] * 7)["drift"] is None


def test_compare_pairs_blocks_and_says_no_difference() -> None:
    # drift doubles both, and the ratio of each pair stays 2
    baseline = [[20 * factor] * 3 for factor in (1, 2, 3, 4, 5, 6)]
    faster = compare(baseline, [[10 * factor] * 3 for factor in (1, 2, 3, 4, 5, 6)])
    assert faster == {"speedup": 2.0, "interval": [2.0, 2.0], "num_pairs": 6, "verdict": "faster"}
    assert compare([[10]] * 6, [[20]] * 6)["verdict"] == "slower"
    assert compare([[10], [10], [10], [20], [20], [20]], [[20], [20], [20], [10], [10], [10]])["verdict"] == (
        "no difference"
    )
    assert compare([[10]] * 5, [[20]] * 5)["verdict"] == "undecided"
    with pytest.raises(ValueError, match="no pair"):
        compare([[]], [[1]])


def test_round_order_is_abba_and_gives_every_place_to_every_artifact() -> None:
    assert ["".join(round_order("AB", i)) for i in range(4)] == ["AB", "BA", "BA", "AB"]
    firsts = [round_order("ABC", i)[0] for i in range(6)]
    assert sorted(firsts) == ["A", "A", "B", "B", "C", "C"]


def test_measure_reaches_both_minima_and_sees_the_difference() -> None:
    sessions: dict[str, Session] = {"slow": SleepingSession(0.004), "fast": SleepingSession(0.001)}
    timings = measure(sessions, Limits(min_runs=32, min_seconds=0.05, max_seconds=20))
    for timing in timings.values():
        assert timing.num_samples >= 32
        assert timing.total_ns >= 50_000_000
        assert len(timing.warmup_ns) >= 5
        assert len(timing.store.block_lengths) % 2 == 0
    assert compare_all(timings, "slow")["fast"]["verdict"] == "faster"
    described = describe(sessions["slow"], timings["slow"])
    assert sum(described["block_lengths"]) == len(described["samples_ns"]) == described["num_samples"]
    assert described["median_ms"] >= 4.0


def test_the_cap_stops_and_leaves_one_run_each() -> None:
    sessions: dict[str, Session] = {"a": SleepingSession(0.03), "b": SleepingSession(0.03)}
    start = time.perf_counter()
    timings = measure(sessions, Limits(min_runs=1000, min_seconds=100, max_seconds=0.0))
    assert time.perf_counter() - start < 5
    assert [timing.num_samples for timing in timings.values()] == [1, 1]


@pytest.mark.parametrize(
    ("machine", "flags", "bits", "isa"),
    [
        ("x86_64", ["avx2"], 64, "x86-64"),
        ("x86_64", ["avx2", "avx512f"], 64, "x86-64"),
        ("AMD64", ["avx_vnni"], 64, "x86-64-vnni"),
        ("x86_64", ["avx512_vnni"], 64, "x86-64-vnni"),
        ("aarch64", ["asimd"], 64, "aarch64"),
        ("aarch64", ["asimd", "asimddp"], 64, "aarch64-dotprod"),
        ("aarch64", ["asimd", "asimddp"], 32, "armv7l"),
        ("armv7l", ["neon"], 32, "armv7l"),
        ("riscv64", [], 64, "riscv64"),
    ],
)
def test_isa_names(machine: str, flags: list[str], bits: int, isa: str) -> None:
    assert isa_name(machine, flags, bits) == isa


def test_cpuinfo_of_a_raspberry_pi_5() -> None:
    text = "processor\t: 0\nFeatures\t: fp asimd asimddp\n\nRevision\t: d04170\nModel\t\t: Raspberry Pi 5\n"
    assert "asimddp" in cpu_flags(text)
    assert cpu_name(text) == "Raspberry Pi 5"
    assert cpu_flags("") == frozenset()


def test_environment_is_json_ready() -> None:
    import json

    values = describe_environment({"onnxruntime": "1.31.1"})
    assert json.loads(json.dumps(values)) == values
    assert values["num_cores"] >= 1
    assert values["runtimes"] == {"onnxruntime": "1.31.1"}
