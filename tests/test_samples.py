"""Raw samples of long runs: all kept, in order, exact statistics, small in memory and in JSON."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import benches
import numpy as np
import pytest
from pages import Page
from rich.console import Console

from edgecnn.errors import DataError, RunnerError
from edgecnn.report.bench_build import BenchFile, build_run
from edgecnn.report.bench_csv import render_csv
from edgecnn.report.bench_results import BenchReport
from edgecnn.report.bench_terminal import print_bench
from edgecnn.report.html import render_html
from edgecnn.report.latencies import Latencies
from edgecnn.runner.__main__ import write_result
from edgecnn.runner.measure import Timing, compare_all, curve
from edgecnn.runner.samples import CODING, MAX_PLAIN, PIECE_SAMPLES, SampleStore, pack_json, unpack_json
from edgecnn.runner.statistics import Distribution, compare, summarize


def noise(num: int, seed: int = 0) -> np.ndarray:
    """Latencies around 17 µs with outliers of up to 7 s."""
    generator = np.random.default_rng(seed)
    samples = generator.normal(17_000, 150, num).astype(np.int64)
    samples[:: num // 7] = generator.integers(10**5, 7 * 10**9, len(samples[:: num // 7]))
    return samples


def stored(samples: np.ndarray, block: int = 9_999) -> SampleStore:
    store = SampleStore()
    for start in range(0, len(samples), block):
        store.append(samples[start : start + block].tolist())
    return store


def test_a_store_gives_back_every_sample_in_order_whatever_the_blocks() -> None:
    samples = noise(3 * PIECE_SAMPLES + 17)
    for length in (1_000, 9_999, PIECE_SAMPLES, 2 * PIECE_SAMPLES + 1):
        store = stored(samples, length)
        assert np.array_equal(np.concatenate([*store.chunks()]), samples)
        blocks = list(store.blocks())
        assert [len(block) for block in blocks] == store.block_lengths
        assert np.array_equal(np.concatenate(blocks), samples)
        assert np.array_equal(np.concatenate([*store.between(70_000, 140_001)]), samples[70_000:140_001])
        assert (store.num_samples, store.total_ns) == (len(samples), int(samples.sum()))


def test_statistics_of_a_store_are_those_of_all_samples_to_the_last_digit() -> None:
    samples = noise(5 * PIECE_SAMPLES + 3)
    timing = Timing(store=stored(samples))
    expected = np.sort(samples)
    found = timing.summary()
    assert found == summarize(samples.tolist()) == summarize(samples)
    assert found["median_ms"] == np.median(samples) / 1e6
    assert found["p99_ms"] == expected[-(-99 * len(samples) // 100) - 1] / 1e6
    assert (found["min_ms"], found["max_ms"]) == (expected[0] / 1e6, expected[-1] / 1e6)
    quarter = len(samples) // 4
    assert found["drift"] == np.median(samples[-quarter:]) / np.median(samples[:quarter])


def test_a_distribution_counts_equal_values_and_merges_any_number_of_parts() -> None:
    parts = [np.array([3, 1]), np.array([], np.int64), *([np.array([3, 2])] * 40)]
    found = Distribution.gather(iter(parts))
    assert (found.values.tolist(), found.counts.tolist()) == ([1, 2, 3], [1, 40, 41])
    assert (found.total, found.count_above(1), found.count_above(0), found.count_above(3)) == (204, 81, 82, 0)
    with pytest.raises(ValueError, match="no samples"):
        Distribution.gather([])


def test_blocks_of_stores_are_compared_as_blocks_in_memory() -> None:
    fast, slow = noise(200_000, 1), noise(200_000, 2) + 4_000
    timings = {"slow": Timing(store=stored(slow)), "fast": Timing(store=stored(fast))}
    cut = [slice(start, start + 9_999) for start in range(0, 200_000, 9_999)]
    assert compare_all(timings, "slow")["fast"] == compare([slow[c] for c in cut], [fast[c] for c in cut])


def test_a_long_result_is_written_bit_by_bit_and_read_back(tmp_path: Path) -> None:
    samples = noise(MAX_PLAIN + 100_000)
    store = stored(samples)
    write_result(tmp_path / "r.json", {"long": store.to_json(), "short": stored(samples[:8]).to_json()})
    values = json.loads((tmp_path / "r.json").read_text())
    assert values["short"] == samples[:8].tolist()
    assert (values["long"]["coding"], values["long"]["num_samples"]) == (CODING, len(samples))
    assert np.array_equal(unpack_json(values["long"]), samples)
    assert (tmp_path / "r.json").stat().st_size < 2.2 * len(samples)


def test_the_boundary_between_a_list_and_the_packed_form() -> None:
    assert isinstance(pack_json(np.arange(MAX_PLAIN)), list)
    assert isinstance(stored(np.arange(MAX_PLAIN)).to_json(), list)
    packed = pack_json(np.arange(MAX_PLAIN + 1))
    assert isinstance(packed, dict)
    assert unpack_json(packed).tolist() == list(range(MAX_PLAIN + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coding": "other"}, f"packed with the coding {CODING}"),
        ({"pieces": None}, "packed samples are damaged"),
        ({"pieces": ["%%%%"]}, "packed samples are damaged"),
        ({"pieces": [base64.b64encode(b"no zlib").decode()]}, "packed samples are damaged"),
        ({"num_samples": 7}, "packed samples hold 60000, expected 7"),
    ],
)
def test_damaged_samples_are_refused_with_the_reason(change: dict[str, Any], message: str) -> None:
    damaged = {**pack_json(noise(60_000)), **change}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=message):
        unpack_json(damaged)
    file = BenchFile("a.onnx", Path("a.onnx"), "", 1)
    with pytest.raises(RunnerError, match=rf"a\.onnx: the runner's result is damaged: .*{message}"):
        build_run(file, "a.onnx", 1, [benches.entry(samples_ns=damaged)])
    report = json.loads(benches.report_of(runs=(benches.run_of("a.onnx"),), comparisons=()).to_json())
    report["runs"][0]["samples_ns"] = damaged
    with pytest.raises(DataError, match=rf"runs\[0\]\.samples_ns: .*{message}"):
        BenchReport.from_json(json.dumps(report))


def sustained_report(num: int) -> BenchReport:
    samples = noise(num)
    timing = Timing(store=stored(samples), block_starts_s=[float(i) for i in range(-(-num // 9_999))])
    entry = benches.entry(
        samples_ns=pack_json(samples), block_lengths=timing.store.block_lengths, curve=curve(timing)
    )
    run = build_run(BenchFile("a.onnx", Path("a.onnx"), "", 1), "a.onnx", 1, [entry])
    return benches.report_of(runs=(run,), comparisons=(), accuracy=())


def test_a_report_of_a_million_samples_is_small_exact_and_shown_at_once() -> None:
    report = sustained_report(1_000_000)
    (run,) = report.runs
    text = report.to_json()
    assert len(text) < 2_200_000
    assert BenchReport.from_json(text) == report
    assert np.array_equal(run.samples_ns.array, noise(1_000_000))
    assert run.median_ms == np.median(noise(1_000_000)) / 1e6
    assert 500 <= len(run.curve) <= 600
    page = render_html([report])
    assert len(page) < 1_000_000
    values = json.loads(Page(page).json)["bench"][0]
    assert (values["samples_kept_every"], len(values["runs"][0]["samples_ns"])) == (20, 50_000)
    assert "1000000" in render_csv([report])
    with Path("/dev/null").open("w") as nowhere:
        print_bench([report], Console(file=nowhere))


def test_a_report_of_before_with_a_plain_list_can_be_read() -> None:
    report = benches.report_of(runs=(benches.run_of("a.onnx"),), comparisons=(), accuracy=())
    values = json.loads(report.to_json())
    del values["runs"][0]["curve"]
    values["runs"][0]["samples_ns"] = list(range(MAX_PLAIN + 5))
    values["runs"][0]["block_lengths"] = [MAX_PLAIN + 5]
    read = BenchReport.from_json(json.dumps(values)).runs[0]
    assert (read.samples_ns[-1], len(read.samples_ns), read.curve) == (MAX_PLAIN + 4, MAX_PLAIN + 5, ())


def test_latencies_are_a_sequence_that_cannot_be_written_to() -> None:
    latencies = Latencies(range(5))
    assert latencies == (0, 1, 2, 3, 4) == latencies
    assert latencies != (0, 1, 2, 3, 5)
    assert (latencies == 3) is False
    assert hash(latencies) == hash(Latencies([0, 1, 2, 3, 4]))
    assert repr(latencies) == "Latencies([0, 1, 2, 3] and 1 more)"
    assert (3 in latencies, latencies[-1], latencies[1:3]) == (True, 4, (1, 2))
    with pytest.raises(ValueError, match="read-only"):
        latencies.array[0] = 9


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from edgecnn.runner.__main__ import write_result
from edgecnn.runner.environment import peak_rss_bytes, reset_peak_rss, rss_bytes
from edgecnn.runner.measure import Timing, curve
block = np.random.default_rng(0).normal(17_000, 150, 50_000).astype(np.int64).tolist()
timing = Timing()
timing.store.append(block)
timing.summary()
reset_peak_rss()
before = rss_bytes()
for index in range(80):
    timing.block_starts_s.append(float(index))
    timing.store.append(block)
result = {"samples_ns": timing.store.to_json(), "curve": curve(timing), **timing.summary()}
write_result(Path(sys.argv[1]), result)
print(peak_rss_bytes() - before)
"""


def test_the_runner_keeps_four_million_samples_in_a_few_megabytes(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs the peak memory of /proc")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "result.json")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert int(done.stdout) < 12_000_000  # 32 MB as plain int64, 160 MB as a list
    assert unpack_json(json.loads((tmp_path / "result.json").read_text())["samples_ns"]).size == 4_050_000
