"""report.html: complete, self-contained and well-formed, whatever was or was not measured."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
import sys

import pytest
from pages import Page, drawn
from reports import REPORT

from edgecnn.errors import DataError
from edgecnn.report import Report
from edgecnn.report.bench_results import BenchReport, BenchRun, BoardAccuracy, Comparison
from edgecnn.report.html import render_compress_html, render_html
from edgecnn.runner.statistics import summarize

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x00\u202e"


def bench_run(key: str = "float", median_ms: float = 10.0, num: int = 700, threads: int = 1) -> BenchRun:
    noise = random.Random(key)
    samples = tuple(int(1e6 * median_ms * (1 + abs(noise.gauss(0, 0.03)))) for _ in range(num))
    figures = summarize(samples)
    interval = figures["median_interval_ms"]
    return BenchRun(
        key=key,
        path=f"out/{key}.onnx",
        sha256="ab" * 32,
        size_bytes=1_000_000 if "float" in key else 250_000,
        runtime="onnxruntime",
        runtime_version="1.31.1",
        threads=threads,
        samples_ns=samples,
        block_lengths=(num,),
        median_ms=figures["median_ms"],
        median_interval_ms=None if interval is None else tuple(interval),
        p90_ms=figures["p90_ms"],
        p99_ms=figures["p99_ms"],
        iqr_ms=figures["iqr_ms"],
        min_ms=figures["min_ms"],
        phases={"import_ms": 412.0, "load_ms": 31.25, "first_ms": 37.0, "warmup_ms": 510.0},
        peak_rss_bytes=4_660_000,
        profile=tuple(
            {"op": "Conv", "name": f"conv{i}", "total_ms": 2.0, "count": 4, "share": 0.05} for i in range(20)
        ),
        delegate={"partitions": 1, "delegated_ops": 27, "total_ops": 29},
        trace=tuple(
            {"t_s": i / 4, "temperature_c": 48 + i, "frequency_mhz": 1800.0, "throttled": "0x0"}
            for i in range(9)
        ),
    )


def accuracy(key: str, top1: float | None) -> BoardAccuracy:
    return BoardAccuracy(
        key, key, "litert 2.3.0", "litert 2.3.0", 2000, top1, None, 0.9995, 0, 0.0, 1.0, 64, True
    )


BENCH = BenchReport(
    device="raspberrypi4",
    environment={"board": "Raspberry Pi 4", "governor": None, "runtimes": {"onnxruntime": "1.31.1"}},
    runs=(bench_run(), bench_run("int8", 5.0)),
    comparisons=(Comparison("float", "int8", 2.0, 1.914, 2.07, "faster", 16),),
    accuracy=(accuracy("float", 0.9215), accuracy("int8", 0.919)),
    warnings=("the governor is ondemand",),
    data="cifar10",
)


def changed(report: BenchReport, index: int = 1, /, **values: object) -> BenchReport:
    runs = list(report.runs)
    runs[index] = dataclasses.replace(runs[index], **values)  # type: ignore[arg-type]
    return dataclasses.replace(report, runs=tuple(runs))


EMULATED = dataclasses.replace(BENCH, emulated=True)
PRUNING = {
    "pass": "prune_channels",
    "kind": "pruning",
    "importance": "taylor",
    "allocation": "global",
    "schedule": "one_shot",
    "macs": [416520, 100_000],
    "params": [61706, 20_000],
    "channels": [236, 118],
    "frozen_reasons": {"is an output of the <network>": 10},
    "layers": [
        {
            "layer": f"features.{i} (aten.conv2d.default)",
            "channels": 16,
            "channels_left": 16 - i % 9,
            "macs": i,
        }
        for i in range(60)
    ],
    "groups": [
        {
            "name": "features.0",
            "channels": 6,
            "channels_left": 3,
            "layers": ["a", "b", "c", "d"],
            "frozen": None,
        },
        {"name": "head", "channels": 10, "channels_left": 10, "layers": ["head"], "frozen": "is an output"},
    ],
}
TAUGHT = {
    "pass": "distill",
    "kind": "distillation",
    "teacher": "lenet5",
    "methods": ["logits"],
    "labels": True,
}
CURVES = {
    "pass": "distill",
    "kind": "training_curves",
    "steps": list(range(1, 401)),
    "loss": [2.0 - i / 400 for i in range(400)],
    "epochs": [0, 1.0, 2.0],
    "validation_loss": [2.5, 1.5, 1.25],
    "validation_accuracy": [0.1, 0.75, 0.875],
    "seconds": 61.0,
}
PRUNED = dataclasses.replace(
    REPORT,
    model=dataclasses.replace(REPORT.model, params_after=20_000, macs_after=100_000),
    details=(PRUNING, TAUGHT, CURVES, {"pass": "sparsify", "kind": "sparsity", "zeros": 0.5, "dense": []}),
)
BARE = dataclasses.replace(
    REPORT,
    details=(
        {"pass": "prune_channels", "kind": "pruning"},
        {"pass": "fine_tune", "kind": "training_curves", "steps": [1], "loss": [None], "epochs": []},
    ),
)
PAGES = {
    "bench": lambda: render_html([BENCH]),
    "two devices and compress": lambda: render_html([BENCH, EMULATED], REPORT),
    "one run": lambda: render_html([BenchReport("local_cpu", {}, (bench_run(num=3),))]),
    "no run": lambda: render_html([BenchReport("local_cpu", {}, ())]),
    "compress": lambda: render_compress_html(REPORT),
    "pruned": lambda: render_compress_html(PRUNED),
    "pruned, nothing recorded": lambda: render_compress_html(BARE),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_well_formed_and_needs_nothing_else(name: str) -> None:
    text = PAGES[name]()
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.count("h1") == 1
    assert {at["type"] for tag, at in page.tags if tag == "script"} == {"application/json"}
    assert {at["href"] for tag, at in page.tags if tag == "link"} == {"data:,"}
    names = {attribute for _, at in page.tags for attribute in at}
    assert not {"src", "srcset", "xlink:href", "action"} & names
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:", text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert drawn(svg).tags[1][0] == "title"


@pytest.mark.parametrize("name", PAGES)
def test_figures_that_are_missing_are_never_zero_or_none(name: str) -> None:
    assert not re.search(r"\bNone\b|\bnan\b|\binf\b", Page(PAGES[name]()).text)


def test_the_page_of_a_pruned_and_distilled_network() -> None:
    page = render_compress_html(PRUNED)
    text = Page(page).text
    assert "MACs 4.17× fewer 417 k → 100 k" in text
    assert "417 k → 100 k MACs (24.0 % left), 61.7 k → 20.0 k parameters (32.4 % left)" in text
    assert "Importance taylor, allocation global, schedule one_shot" in text
    assert "Of 60 layers the 48 with the most MACs" in text
    assert "features.0 a, b, c and 1 more 6 3 50 %" in text
    assert "is an output of the <network> 10" in text
    assert "2 epochs, validation top-1 10.00 % → 87.50 %, 61 s. Teacher lenet5: logits, with labels" in text
    assert "sparsify" in text and "zeros 0.5" in text
    titles = re.findall(r"<title>([^<]*)</title>", page)
    assert "Loss over the epochs" in titles and "Validation accuracy over the epochs" in titles


def test_a_float_page_speaks_of_range_not_of_steps() -> None:
    parity = {
        key: dataclasses.replace(value, max_relative_error=2e-6) for key, value in REPORT.parity.items()
    }
    text = Page(render_compress_html(dataclasses.replace(REPORT, parity=parity))).text
    assert "2e-06 of range from the float reference" in text
    assert "compute the same in float32, up to the order of sums" in text


def test_the_verdict_of_a_bench() -> None:
    text = Page(render_html([BENCH])).text
    assert "Smaller int8 4.00× smaller 1.00 MB → 250 kB" in text
    assert "2.00× faster" in text
    assert "95 % interval 1.91–2.07" in text
    assert "Cost int8 −0.25 points top-1 92.15 % → 91.90 %" in text
    assert "Trust clean nothing throttled, drifted or shared the CPU same outputs" in text
    assert "1 warning the governor is ondemand" in text
    assert "412 ms 31.2 ms 37.0 ms 510 ms" in text
    assert "27 of 29 in 1" in text
    assert "5 more operators take 25.0 %" in text
    assert "governor not known" in text


def test_the_embedded_json_is_the_report() -> None:
    data = json.loads(Page(render_html([BENCH], REPORT)).json)
    assert BenchReport.from_values(data["bench"][0]) == BENCH
    assert Report.from_json(json.dumps(data["compress"])) == REPORT


def test_an_emulated_board_shows_no_speed() -> None:
    page = Page(render_html([EMULATED]))
    assert "Emulated: not a speed measurement" in page.text
    assert page.count("p", "banner") == 1
    assert "Faster not measured an emulated board says nothing about speed" in page.text
    assert "2.00×" not in page.text
    assert "Accuracy against latency" not in page.text
    assert Page(render_html([BENCH])).count("p", "banner") == 0


def test_devices_stand_side_by_side() -> None:
    text = Page(render_html([BENCH, dataclasses.replace(EMULATED, device="board_a72")])).text
    assert "2 devices Median latency file raspberrypi4 board_a72 float" in text
    assert "emulated" in text


def test_taints_and_broken_runs_are_seen_at_once() -> None:
    tainted = Page(render_html([changed(BENCH, taints=("throttled: frequency capped",))])).text
    assert "1 of 2 runs tainted" in tainted
    assert "int8: throttled: frequency capped" in tainted
    broken = BenchRun("int8", "out/int8.onnx", "", 12, "", "", 1, error="killed by signal 9")
    text = Page(render_html([BenchReport("pi", {}, (bench_run(), broken))])).text
    assert "1 of 2 runs broke no number is given for them" in text
    assert "int8: killed by signal 9" in text


def test_what_was_not_measured_is_said_with_the_reason() -> None:
    text = Page(
        render_html([BenchReport("pi", {}, (dataclasses.replace(bench_run(num=3), profile=None),))])
    ).text
    assert "Comparison Nothing was compared: give a second file, or --baseline." in text
    assert "Accuracy on the device No labelled images were given (--data)." in text
    assert "Operators No profile was taken, or the runtime has none." in text
    assert text.count("too few runs") == 4  # the interval twice, p90 and p99


def test_hostile_texts_stay_texts() -> None:
    run = dataclasses.replace(
        bench_run(),
        key=HOSTILE,
        path=HOSTILE,
        sha256=HOSTILE,
        runtime=HOSTILE,
        taints=(HOSTILE,),
        profile=({"op": HOSTILE, "name": HOSTILE, "total_ms": 1.0, "count": 1, "share": 1.0},),
    )
    other = dataclasses.replace(run, key="b" + HOSTILE)
    report = BenchReport(
        HOSTILE,
        {HOSTILE: {HOSTILE: HOSTILE}, "board": HOSTILE},
        (run, other),
        (Comparison(run.key, other.key, 1.5, 1.4, 1.6, "faster", 8),),
        (dataclasses.replace(accuracy(run.key, 0.9), note=HOSTILE), accuracy(other.key, 0.8)),
        (HOSTILE,),
        data=HOSTILE,
    )
    model = dataclasses.replace(REPORT.model, name=HOSTILE)
    compressed = dataclasses.replace(REPORT, model=model, recipe=HOSTILE, warnings=(HOSTILE,))
    page = Page(render_html([report], compressed))
    assert page.count("img") == 0
    assert page.count("script") == 1
    assert json.loads(page.json)["bench"][0]["device"] == HOSTILE
    assert "alert(2)" in page.text


def test_ten_thousand_samples_stay_small_and_the_page_says_what_it_left_out() -> None:
    text = render_html([BenchReport("pi", {}, (bench_run(num=10_000),))])
    assert len(text.encode()) < 500_000
    assert "each group of up to 34 is shown by its median and its slowest" in text
    assert len(json.loads(Page(text).json)["bench"][0]["runs"][0]["samples_ns"]) == 10_000


def test_an_hour_of_samples_is_thinned_out_in_the_json_and_says_so() -> None:
    values = json.loads(Page(render_html([BenchReport("pi", {}, (bench_run(num=120_000),))])).json)["bench"][
        0
    ]
    assert values["samples_kept_every"] == 3
    assert len(values["runs"][0]["samples_ns"]) == 40_000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["0x0", "0x0"], 0),
        (["0x50000", "0x50000", "0x50000"], 0),
        (["0x0", "0x20002", "0x20000", "0x20000"], 1),
        (["0x0", "0x40000", "0x40000"], 1),
        (["cooling cpu=2", "0x0"], 1),
        ([None, None], 0),
    ],
)
def test_throttling_is_marked_when_it_happens_not_since_boot(words: list[str | None], expected: int) -> None:
    trace = tuple(
        {"t_s": float(i), "temperature_c": None, "frequency_mhz": None, "throttled": w}
        for i, w in enumerate(words)
    )
    text = render_html([BenchReport("pi", {}, (dataclasses.replace(bench_run(), trace=trace),))])
    assert Page(text).count("rect", "throttle") == 2 * expected  # for wide and for narrow screens
    assert ("Red: the board throttled while it ran float." in text) == bool(expected)
    assert "Temperature was not measured." in text


def test_a_sweep_over_threads_names_each_run() -> None:
    runs = tuple(bench_run(f"{key}@{n}", 8.0 / n, threads=n) for n in (1, 2, 4) for key in ("float", "int8"))
    comparisons = tuple(
        Comparison(f"float@{n}", f"int8@{n}", 2.0, None, None, "undecided") for n in (1, 2, 4)
    )
    page = Page(render_html([BenchReport("pi", {}, runs, comparisons)]))
    assert "int8, 4 threads" in page.text
    assert "1, 2, 4 threads" in page.text
    assert "too few blocks for an interval" in page.text
    assert page.count("path", "line") >= 4


def test_the_page_of_compress() -> None:
    text = Page(render_compress_html(REPORT)).text
    assert "Smaller ONNX 4.00× smaller 280 kB → 70.0 kB TFLite 1.25× LARGER 1.20 MB → 1.50 MB" in text
    assert "ONNX 1.84× faster 0.112 ms → 61.0 µs 95 % interval 1.71–1.93 TFLite no difference" in text
    assert "ONNX −0.20 points top-1 98.40 % → 98.20 %" in text
    assert "ONNX vs reference 1 LSB 99.999 % 100 % 500" in text
    slower = dataclasses.replace(REPORT.latency.speedup["onnx"], ratio=0.5, low=0.48, high=0.52)  # type: ignore[union-attr]
    latency = dataclasses.replace(REPORT.latency, speedup={"onnx": slower})  # type: ignore[type-var]
    assert (
        "ONNX 2.00× SLOWER" in Page(render_compress_html(dataclasses.replace(REPORT, latency=latency))).text
    )


def test_a_compress_run_without_labels_and_latency_says_so() -> None:
    bare = dataclasses.replace(
        REPORT, accuracy=None, latency=None, sqnr_db={}, agreement={}, parity={}, sizes={}
    )
    text = Page(render_compress_html(bare)).text
    assert "Faster not measured" in text
    assert "Cost not measured top-1: no labels" in text
    assert "Latency was not measured." in text


def test_the_page_follows_the_reader_and_the_printer() -> None:
    text = render_compress_html(REPORT)
    for feature in ("prefers-color-scheme: dark", "@media print", "max-width: 760px", 'name="viewport"'):
        assert feature in text


def test_nothing_to_show_and_figures_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="no report to render"):
        render_html([])
    with pytest.raises(DataError, match=r"report\.runs\[0\]\.min_ms is nan"):
        render_html([changed(BENCH, 0, min_ms=float("nan"))])


def test_reading_a_report_needs_no_pytorch() -> None:
    program = "import sys, edgecnn.report.html; print([n for n in ('torch', 'onnx') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
