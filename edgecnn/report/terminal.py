"""The report as a table on the terminal. It answers, in this order: smaller by how much, faster by how
much, what did it cost, do I trust it; then the warnings. Everything goes to stdout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgecnn.report.bench_results import EMULATED
from edgecnn.report.islands import FLOAT_ISLANDS, float_islands_text
from edgecnn.report.numbers import bytes_text, count_text, digits, percent_text
from edgecnn.report.results import LatencyFigures, ParityFigures, Report, SpeedupFigures
from edgecnn.report.saturation import SATURATION, saturation_text
from edgecnn.report.search import SEARCH, search_facts, slow_layer_facts

FILES = {"onnx": "ONNX", "tflite": "TFLite"}
PAIRS = {
    "onnx_vs_reference": "ONNX vs reference",
    "tflite_vs_reference": "TFLite vs reference",
    "onnx_vs_tflite": "ONNX vs TFLite",
    "onnx_on_target": "ONNX there vs here",
    "tflite_on_target": "TFLite there vs here",
}


KERNELS = "kernels"
"""The kind of detail that says which int8 instructions the target has."""

FLOAT_LAYERS = "float_layers"
"""The kind of detail that says which layers of an int8 network compute in float."""

MOST_NAMED = 4
"""Layers in float named on the terminal."""

TRAINING = "training_curves"
"""The kind of detail that a pass which trained records."""


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a report; `console` is stdout by default."""
    (console or Console()).print(render_report(report))


def render_report(report: Report) -> RenderableType:
    """Return the report for a rich console; readable at 80 columns and without colour."""
    figures = _grid(4)
    figures.add_row("", "", "float", "result", "", style="dim")
    for rows in (_pruned_rows(report), _size_rows(report), _latency_rows(report), _cost_rows(report)):
        for row in rows:
            figures.add_row(*row)
    trust = _grid(2)
    for row in _trust_rows(report):
        trust.add_row(*row)
    for row in _search_rows(report):
        trust.add_row(*row)
    parts: list[RenderableType] = [_title(report), Text(), figures, Text(), trust]
    if report.warnings:
        parts.append(Text())
        parts.append(warnings_table(*report.warnings))
    return Group(Text(), *parts, Text(), _files(report))


def print_inspection(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `edgecnn.inspect` found out about a network; `console` is stdout by default."""
    console = console or Console()
    macs = "unknown" if found["macs"] is None else count_text(found["macs"])
    costs = f"{count_text(found['params'])} params, {macs} MACs, {bytes_text(found['size_bytes'])}"
    console.print(f"[bold]{escape(str(found['name']))}[/]  {costs}", highlight=False)
    for key in ("inputs", "outputs"):
        tensors = ", ".join(f"{tensor['name']} {_shape(tensor['shape'])}" for tensor in found[key])
        console.print(f"{key:<10}  {tensors}", markup=False, highlight=False)
    if found["preprocess"]:
        console.print(f"preprocess  {preprocess_text(found['preprocess'])}", markup=False, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("layer", "op", "output"):
        table.add_column(name, overflow="fold")
    for name in ("params", "MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in found["layers"]:
        shape = _shape(layer["output_shape"])
        counts = [count_text(layer[key]) if layer[key] else "" for key in ("params", "macs")]
        table.add_row(escape(str(layer["layer"])), escape(str(layer["op"])), shape, *counts)
    console.print(table)
    if found["unsupported"]:
        console.print(warnings_table("cannot be exported yet: " + ", ".join(map(str, found["unsupported"]))))
    for text in found.get("warnings", ()):
        console.print(warnings_table(str(text)))


def preprocess_text(preprocess: Mapping[str, Any]) -> str:
    """Return in words how pixels become a network's input.

    Example:
        >>> from edgecnn.runner.preprocess import Preprocess
        >>> preprocess_text(Preprocess((32, 24)).to_dict())
        '32x24 rgb, pixels * 0.003922, mean 0 0 0, std 1 1 1 (default)'
    """
    height, width = preprocess["size"]
    resize = f", short side {preprocess['resize_short']} before" if preprocess.get("resize_short") else ""
    mean, std = (" ".join(f"{value:.4g}" for value in preprocess[key]) for key in ("mean", "std"))
    source = f" ({preprocess['source']})" if preprocess.get("source") else ""
    return (
        f"{height}x{width}{resize} {preprocess['channel_order']}, pixels * {preprocess['scale']:.4g}, "
        f"mean {mean}, std {std}{source}"
    )


def _shape(sizes: Sequence[int | None]) -> str:
    """Return "nx3x32x32"."""
    return "x".join("n" if size in (None, -1) else str(size) for size in sizes)


def _grid(num_numbers: int) -> Table:
    """Return a table without lines: the question, the file or pair, then numbers and a verdict."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=8, style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    for _ in range(num_numbers - 2):
        table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _title(report: Report) -> Text:
    """Return what was made of what, and for whom."""
    model = report.model
    text = Text(model.name, style="bold")
    text.append(f"  {count_text(model.params)} params, {count_text(model.macs)} MACs\n", style="not bold")
    return text.append(f"recipe {report.recipe}, seed {report.seed}, for {report.target}", style="not bold")


def _pruned_rows(report: Report) -> list[list[RenderableType]]:
    """How much of the network is left?"""
    model = report.model
    rows: list[list[RenderableType]] = []
    for name, before, after in (
        ("MACs", model.macs, model.macs_after),
        ("params", model.params, model.params_after),
    ):
        if after is not None:
            verdict = _factor(before / max(after, 1), "fewer", "MORE") if after != before else Text("as many")
            rows.append([name, count_text(before), count_text(after), verdict])
    return _asked("Pruned", rows)


def _size_rows(report: Report) -> list[list[RenderableType]]:
    """Smaller by how much?"""
    rows: list[list[RenderableType]] = []
    for key, size in report.sizes.items():
        verdict = _factor(size.float_size_bytes / size.size_bytes, "smaller", "LARGER")
        if size.float_gzip_bytes and size.gzip_bytes:
            verdict.append(f" ({size.float_gzip_bytes / size.gzip_bytes:.2f}x through gzip)", style="dim")
        rows.append(
            [FILES.get(key, key), bytes_text(size.float_size_bytes), bytes_text(size.size_bytes), verdict]
        )
    return _asked("Smaller", rows)


def _latency_rows(report: Report) -> list[list[RenderableType]]:
    """Faster by how much?"""
    if report.latency is None:
        return _asked("Faster", [["", "", "", Text("not measured", style="yellow")]])
    rows: list[list[RenderableType]] = []
    for key, name in FILES.items():
        after = report.latency.of(key)
        if after is None:
            continue
        verdict = _speedup(report.latency.speedup.get(key))
        if report.environment.get("emulated"):
            verdict = Text(EMULATED, style="yellow")
        verdict.append(f", {after.threads} thread{'s' if after.threads > 1 else ''}", style="dim")
        rows.append([name, _median(report.latency.of(f"float_{key}")), _median(after), verdict])
    return _asked("Faster", rows)


def _cost_rows(report: Report) -> list[list[RenderableType]]:
    """What did it cost?"""
    rows: list[list[RenderableType]] = []
    if report.accuracy is None:
        task = report.model.task
        why = "unmeasured: no labels" if task == "classification" else f"not defined for task {task}"
        rows.append(["top-1", "-", "-", Text(why, style="yellow")])
    for key in report.artifacts:
        name, notes = FILES.get(key, key), _agreement(report, key)
        after = report.accuracy.top1(key) if report.accuracy else None
        if report.accuracy is None or after is None:
            rows.append([name, "", "", notes])
            continue
        before, error = report.accuracy.float_top1, report.accuracy.drop_error_points
        verdict = _points(100 * (after - before))
        if error is not None and abs(100 * (before - after) - report.accuracy.drop_points) < 1e-9:
            verdict.append(f" +- {error:.2f}", style="not bold")
        verdict.append(f", {notes}" if notes else "", style="dim")
        rows.append([name, percent_text(before), percent_text(after), verdict])
    return _asked("Cost", rows)


def _trust_rows(report: Report) -> list[list[RenderableType]]:
    """Do I trust it?"""
    rows: list[list[RenderableType]] = [
        [PAIRS.get(key, key), _parity(parity)] for key, parity in report.parity.items()
    ]
    data = report.data
    kept_apart = "held out from" if data.held_out else "NOT held out from"
    proof = f"{data.num_proof} images, {kept_apart} the {data.num_calibration} calibrated on ({data.source})"
    if not data.num_calibration:
        proof = f"{data.num_proof} images of {data.source}; nothing was calibrated"
    rows.append(["proven on", Text(proof, style="" if data.held_out else "yellow")])
    if data.preprocess:
        rows.append(["preprocess", Text(preprocess_text(data.preprocess))])
    if data.train_source:
        rows.append(["trained on", f"{data.num_train} images of {data.train_source}"])
    rows += [[str(d.get("pass")), training_facts(d)] for d in report.details if d.get("kind") == TRAINING]
    for detail in report.details:
        if detail.get("kind") == KERNELS:
            fast = detail["exact"] and detail["is_dot_product"]
            rows.append(["kernels", Text(str(detail["text"]), style="" if fast else "yellow")])
        elif detail.get("kind") == SATURATION:
            rows.append(
                ["elsewhere", Text(saturation_text(detail), style="yellow" if detail["num_layers"] else "")]
            )
        elif detail.get("kind") == FLOAT_LAYERS:
            rows.append(["in float", float_layers_text(detail)])
        elif detail.get("kind") == FLOAT_ISLANDS:
            rows.append(["in float", Text(float_islands_text(detail), style="yellow")])
    if report.accuracy:
        rows.append(["accuracy on", f"{report.accuracy.num_samples} labelled images"])
    return _asked("Trust", rows)


def _search_rows(report: Report) -> list[list[RenderableType]]:
    """What else was tried?"""
    rows: list[list[RenderableType]] = []
    for detail in report.details:
        if detail.get("kind") == SEARCH:
            rows.append(
                [str(detail["goal"]), Text(search_facts(detail), style="" if detail["is_met"] else "yellow")]
            )
            slow = slow_layer_facts(detail)
            rows += [["slow layers", slow]] if slow else []
    return _asked("Search", rows)


def float_layers_text(detail: Mapping[str, Any]) -> str:
    """Return which layers of a quantized network compute in float, by the recipe.

    Example:
        >>> float_layers_text({"asked": ["fc"], "layers": ["fc (aten.linear.default)"]})
        '1 operator, by the recipe: fc'
        >>> float_layers_text({"asked": [], "layers": ["cat (aten.cat.default)"]})
        '1 operator at the output: cat'
    """
    layers = list(dict.fromkeys(str(layer).split(" (")[0] for layer in detail["layers"]))
    count = len(detail["layers"])
    shown = ", ".join(layers[:MOST_NAMED]) + (
        f" and {len(layers) - MOST_NAMED} more" * (len(layers) > MOST_NAMED)
    )
    why = ", by the recipe" if detail["asked"] else " at the output"
    return f"{count} operator{'s' * (count != 1)}{why}: {shown or 'none'}"


def _asked(question: str, rows: list[list[RenderableType]]) -> list[list[RenderableType]]:
    """Put the question in front of the first row."""
    return [[question if index == 0 else "", *row] for index, row in enumerate(rows)]


def _factor(ratio: float, better: str, worse: str) -> Text:
    """Return "3.67x smaller" in green, or the opposite in red."""
    if ratio >= 1:
        return Text(f"{ratio:.2f}x {better}", style="green")
    return Text(f"{1 / ratio:.2f}x {worse}", style="bold red")


def _speedup(speedup: SpeedupFigures | None) -> Text:
    """Return the verdict on a speedup with its interval."""
    if speedup is None:
        return Text("no float file to compare with", style="yellow")
    if speedup.verdict == "no difference":
        text = Text("no difference", style="yellow")
    else:
        text = _factor(speedup.ratio, "faster", "SLOWER")
    low, high = speedup.low, speedup.high
    if speedup.verdict == "slower":
        low, high = 1 / high, 1 / low
    return text.append(f" ({low:.2f} to {high:.2f})", style="not bold")


def _points(points: float) -> Text:
    """Return a change of accuracy in percentage points."""
    if points >= -0.005:
        return Text(f"{max(points, 0.0):+.2f} points" if points >= 0.005 else "no drop", style="green")
    return Text(f"{points:+.2f} points", style="bold red" if points < -1 else "yellow")


def _agreement(report: Report, key: str) -> str:
    """Return agreement with float and SQNR, as far as they were measured."""
    agreement, sqnr_db = report.agreement.get(key), report.sqnr_db.get(key)
    notes = [] if agreement is None else [f"agree {percent_text(agreement, 1)}"]
    notes += [] if sqnr_db is None else [f"SQNR {sqnr_db:.1f} dB"]
    return ", ".join(notes)


def _parity(parity: ParityFigures) -> Text:
    """Return how near two executions are."""
    near = f"max {parity_text(parity)}"
    if parity.max_relative_error is None:
        near += f", {percent_text(parity.fraction_within_1_lsb)} within 1"
    if parity.top1_agreement is not None:
        near += f", top-1 {percent_text(parity.top1_agreement)}"
    return Text(near, style="green" if parity.max_lsb <= 2 else "yellow")


def training_facts(detail: Mapping[str, Any]) -> str:
    """Return in words how a training went, as far as it was recorded.

    Example:
        >>> training_facts({"epochs": [0, 4.0], "validation_accuracy": [0.5, 0.875], "seconds": 61.0})
        '4 epochs, validation top-1 50.00 % → 87.50 %, 61 s'
    """
    epochs, accuracy = detail.get("epochs") or [], detail.get("validation_accuracy") or []
    found = [f"{epochs[-1]:g} epoch{'' if epochs[-1] == 1 else 's'}"] if epochs else []
    known = [value for value in accuracy if value is not None]
    if known:
        found.append(f"validation top-1 {percent_text(known[0])} → {percent_text(known[-1])}")
    if detail.get("seconds"):
        found.append(f"{detail['seconds']:.0f} s")
    return ", ".join(found) or "nothing recorded"


def parity_text(parity: ParityFigures) -> str:
    """Return the largest difference: in steps, or of files in float as a fraction of the outputs' range.

    Example:
        >>> parity_text(ParityFigures(1, 1.0, None, 8)), parity_text(ParityFigures(0, 1.0, None, 8, 2e-6))
        ('1 LSB', '2e-06 of range')
    """
    if parity.max_relative_error is None:
        return f"{parity.max_lsb} LSB"
    return f"{parity.max_relative_error:.0e} of range" if parity.max_relative_error else "no difference"


def warnings_table(*texts: str) -> Table:
    """Return warnings with their lines set in."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=8, no_wrap=True)
    table.add_column(overflow="fold")
    for text in texts:
        table.add_row(Text("warning", style="bold yellow"), Text(text))
    return table


def _files(report: Report) -> Text:
    """Return where the files are and how long it took."""
    paths = "  ".join(artifact.path for artifact in report.artifacts.values())
    seconds = [
        f"{report.timings[key]:.1f} s {word}"
        for key, word in (("work_seconds", "to make"), ("proof_seconds", "to prove"))
        if key in report.timings
    ]
    return Text(f"{paths}\n{', '.join(seconds)}" if seconds else paths, style="dim")


def _median(figures: LatencyFigures | None) -> str:
    """Return a median latency, in ms so that the report stays ASCII."""
    return "-" if figures is None else f"{digits(figures.median_ms)} ms"
