"""The page of a compress run: smaller, faster, at what cost, and whether to trust it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from edgecnn.model import PassRecord
from edgecnn.report.numbers import (
    NOT_MEASURED,
    bytes_text,
    count_text,
    ms_text,
    percent_text,
    points_text,
    time_axis,
)
from edgecnn.report.page import (
    PARETO_TEXT,
    Block,
    Cell,
    Figure,
    Note,
    Part,
    Section,
    Table,
    Tile,
    TileRow,
    cost_row,
    environment_tables,
    size_row,
    speed_row,
    table,
    without_empty,
)
from edgecnn.report.plots import Bar, Dot, Ratio, bars, forest, scatter
from edgecnn.report.pruning_page import pruned_row, pruning_sections
from edgecnn.report.results import LatencyFigures, ParityFigures, Report
from edgecnn.report.sampling import drop_text
from edgecnn.report.terminal import FILES, PAIRS, parity_text, preprocess_text

SERIES = {"onnx": 1, "tflite": 2}
FLOAT_SERIES = 0


def compress_part(report: Report) -> Part:
    """Return the part of the page that a compress run fills."""
    model = report.model
    facts = [
        f"recipe {report.recipe}",
        f"seed {report.seed}",
        f"for {report.target}",
        f"{count_text(model.params)} parameters",
        f"{count_text(model.macs)} MACs",
        f"task {model.task}",
    ]
    facts += [f"{name} {version}" for name, version in (report.environment.get("runtimes") or {}).items()]
    tiles = (
        Tile("Smaller", tuple(_smaller(report))),
        Tile("Faster", tuple(_faster(report))),
        Tile("Cost", tuple(_cost(report))),
        Tile("Trust", tuple(_trust(report))),
    )
    return Part(
        "edgecnn compress",
        model.name,
        tuple(facts),
        tiles,
        without_empty(compress_sections(report)),
        report.warnings,
    )


def compress_sections(report: Report) -> tuple[Section, ...]:
    """Return the sections of a compress run, without the verdict above them."""
    return (
        _size_section(report),
        _latency_section(report),
        _accuracy_section(report),
        *pruning_sections(report),
        _parity_section(report),
        _passes_section(report),
        _files_section(report),
        Section("Environment", environment_tables(report.environment)),
    )


def _smaller(report: Report) -> Iterable[TileRow]:
    for key, size in report.sizes.items():
        yield size_row(size.float_size_bytes, size.size_bytes, FILES.get(key, key))
    if report.model.macs_after is not None:
        yield pruned_row(report.model.macs, report.model.macs_after, "MACs")
    if not report.sizes:
        yield TileRow(NOT_MEASURED, tone="unknown")


def _faster(report: Report) -> Iterable[TileRow]:
    measured = False
    for key, name in FILES.items():
        after = report.latency.of(key) if report.latency else None
        if report.latency is None or after is None:
            continue
        measured = True
        before, speedup = report.latency.of(f"float_{key}"), report.latency.speedup.get(key)
        detail = f"{ms_text(before.median_ms)} → {ms_text(after.median_ms)}" if before else ""
        if speedup is None:
            yield TileRow(ms_text(after.median_ms), name, detail)
        else:
            interval = (speedup.low, speedup.high)
            yield speed_row(speedup.ratio, interval, speedup.verdict, name, detail)
    if not measured:
        yield TileRow(NOT_MEASURED, tone="unknown")


def _cost(report: Report) -> Iterable[TileRow]:
    accuracy = report.accuracy
    if accuracy is None:
        why = "no labels" if report.model.task == "classification" else f"not defined for {report.model.task}"
        yield TileRow(NOT_MEASURED, tone="unknown", detail=f"top-1: {why}")
    for key in report.artifacts:
        after = accuracy.top1(key) if accuracy else None
        notes = _fidelity(report, key)
        if accuracy is None or after is None:
            yield TileRow(notes[0], FILES.get(key, key), notes[1])
            continue
        yield cost_row(accuracy.float_top1, after, FILES.get(key, key))


def _fidelity(report: Report, key: str) -> tuple[str, str]:
    """Return the best figure there is without labels, and the next."""
    agreement, sqnr_db = report.agreement.get(key), report.sqnr_db.get(key)
    found = [] if agreement is None else [f"{percent_text(agreement, 1)} agree"]
    found += [] if sqnr_db is None else [f"SQNR {sqnr_db:.1f} dB"]
    found += [NOT_MEASURED, ""]
    return found[0], found[1] if found[1] != NOT_MEASURED else ""


def _trust(report: Report) -> Iterable[TileRow]:
    for key, name in FILES.items():
        parity = report.parity.get(f"{key}_vs_reference")
        if parity is not None:
            kind = "integer" if parity.max_relative_error is None else "float"
            detail = f"from the {kind} reference, {count_text(parity.num_samples)} images"
            yield TileRow(parity_text(parity), name, detail, _parity_tone(parity))
    if not report.data.held_out:
        yield TileRow("not held out", tone="warn", detail="proven on images it was calibrated on")


def _parity_tone(parity: ParityFigures) -> str:
    return "good" if parity.max_lsb <= 2 else "warn"


def _size_section(report: Report) -> Section:
    rows, packed = [], []
    for key, size in report.sizes.items():
        name = FILES.get(key, key)
        for label, series, raw, gzip in (
            (f"{name}, float", FLOAT_SERIES, size.float_size_bytes, size.float_gzip_bytes),
            (name, SERIES.get(key, 3), size.size_bytes, size.gzip_bytes),
        ):
            rows.append(Bar(label, series, raw, bytes_text(raw)))
            if gzip is not None:
                packed.append(Bar(label, series, gzip, bytes_text(gzip)))
    blocks: list[Block] = []
    if rows:
        blocks.append(Figure(partial(bars, rows, "Sizes of the files"), "File size"))
    if packed:
        blocks.append(Figure(partial(bars, packed, "Sizes of the files through gzip"), "Through gzip"))
    return Section("Size", tuple(blocks) or (Note(NOT_MEASURED),))


def _latency_section(report: Report) -> Section:
    if report.latency is None:
        return Section("Latency", (Note("Latency was not measured."),))
    figures = {
        label: (series, entry)
        for key, name in FILES.items()
        for label, series, entry in (
            (f"{name}, float", FLOAT_SERIES, report.latency.of(f"float_{key}")),
            (name, SERIES[key], report.latency.of(key)),
        )
        if entry is not None
    }
    rows = [Bar(k, s, e.median_ms, ms_text(e.median_ms)) for k, (s, e) in figures.items()]
    blocks: list[Block] = [Figure(partial(bars, rows, "Median latencies"), "Median latency")] if rows else []
    ratios = [
        Ratio(FILES.get(key, key), SERIES.get(key, 3), s.ratio, s.low, s.high, s.verdict)
        for key, s in report.latency.speedup.items()
    ]
    if ratios:
        blocks.append(
            Figure(partial(forest, ratios), "Against float", "Timed in turns; the line is the 95 % interval.")
        )
    blocks.append(_latency_table({label: entry for label, (_, entry) in figures.items()}))
    return Section(
        "Latency",
        tuple(blocks),
        "Batch 1, one image in each file's own runtime, the network as it was given beside the compressed.",
    )


def _latency_table(entries: dict[str, LatencyFigures]) -> Table:
    rows = [
        (
            label,
            ms_text(e.median_ms),
            "too few runs" if e.p90_ms is None else ms_text(e.p90_ms),
            "too few runs" if e.p99_ms is None else ms_text(e.p99_ms),
            str(e.threads),
            NOT_MEASURED if e.num_runs is None else str(e.num_runs),
        )
        for label, e in entries.items()
    ]
    return table(("file", "median", "p90", "p99", "threads", "runs"), rows)


def _accuracy_section(report: Report) -> Section:
    blocks: list[Block] = []
    accuracy = report.accuracy
    if accuracy is not None:
        names = [
            (
                f"float_{key}" if is_float else key,
                f"{FILES[key]} float" if is_float else FILES[key],
                series,
                top1,
            )
            for key in FILES
            for is_float, series, top1 in (
                (True, FLOAT_SERIES, accuracy.float_top1),
                (False, SERIES[key], accuracy.top1(key)),
            )
            if top1 is not None and key in report.sizes
        ]
        latency = {k: e for k, _, _, _ in names if report.latency and (e := report.latency.of(k)) is not None}
        factor, unit = time_axis(max((entry.median_ms for entry in latency.values()), default=0.0))
        by_latency = [
            Dot(n, s, factor * latency[k].median_ms, 100 * t) for k, n, s, t in names if k in latency
        ]
        by_size = [Dot(n, s, _size(report, k) / 1e6, 100 * t) for k, n, s, t in names]
        for dots, label in ((by_latency, f"latency, {unit}"), (by_size, "size, MB")):
            if len(dots) > 1:
                blocks.append(
                    Figure(
                        partial(scatter, dots, label, "top-1, %"), f"Accuracy against {label.split(', ')[0]}"
                    )
                )
    lead = f"{accuracy.num_samples} labelled images." if accuracy else "Top-1 was not measured."
    if accuracy and accuracy.drop_error_points is not None:
        counted = drop_text(accuracy.drop_points, accuracy.drop_error_points, accuracy.num_samples)
        lead += f" The drop is {counted} (one standard error, of the same images before and after)."
    if blocks:
        lead += f" {PARETO_TEXT}"
    rows = []
    for key in report.artifacts:
        top1 = accuracy.top1(key) if accuracy else None
        before = accuracy.float_top1 if accuracy else None
        sqnr_db = report.sqnr_db.get(key)
        rows.append(
            (
                FILES.get(key, key),
                percent_text(before),
                percent_text(top1),
                NOT_MEASURED if top1 is None or before is None else points_text(100 * (top1 - before)),
                percent_text(report.agreement.get(key)),
                NOT_MEASURED if sqnr_db is None else f"{sqnr_db:.1f} dB",
            )
        )
    columns = ("file", "float top-1", "top-1", "change", "agrees with float", "SQNR")
    blocks.append(table(columns, rows))
    return Section("Accuracy", tuple(blocks), lead)


def _size(report: Report, key: str) -> int:
    size = report.sizes[key.removeprefix("float_")]
    return size.float_size_bytes if key.startswith("float_") else size.size_bytes


def _parity_section(report: Report) -> Section:
    rows = [
        (
            PAIRS.get(key, key),
            Cell(parity_text(parity), _parity_tone(parity)),
            percent_text(parity.fraction_within_1_lsb, 3) if parity.max_relative_error is None else "-",
            percent_text(parity.top1_agreement),
            str(parity.num_samples),
        )
        for key, parity in report.parity.items()
    ]
    data = report.data
    proof: list[tuple[str, str]] = [
        ("source", f"{data.source}{' (made up, for want of data)' if data.synthetic else ''}"),
        (
            "calibrated on",
            f"{data.num_calibration} images" if data.num_calibration else "nothing was calibrated",
        ),
        ("proven on", f"{data.num_proof} images, {'held out' if data.held_out else 'NOT held out'}"),
        ("preprocess", preprocess_text(data.preprocess) if data.preprocess else "not known"),
    ]
    if data.train_source:
        trained = f"{data.num_train} images of {data.train_source}, {data.num_validation} more to follow it"
        proof.insert(1, ("trained on", trained))
    columns = ("pair", "largest difference", "within 1 LSB", "same top-1", "images")
    is_float = any(parity.max_relative_error is not None for parity in report.parity.values())
    lead = (
        "Both files and the NumPy reference compute the same in float32, up to the order of sums."
        if is_float
        else "One integer contract: the same integers in both files and in the NumPy reference."
    )
    found = table(columns, rows) if rows else Note("Parity was not measured.")
    return Section("Parity and data", (found, table(("data", ""), proof, num_texts=2)), lead)


def _passes_section(report: Report) -> Section:
    rows = [
        (record.name, _settings(record), _change(record), f"{record.seconds:.2f} s")
        for record in report.passes
    ]
    seconds = [
        f"{report.timings[key]:.1f} s {word}"
        for key, word in (("work_seconds", "to make the files"), ("proof_seconds", "to prove them"))
        if key in report.timings
    ]
    blocks = (table(("pass", "settings", "graph nodes, bytes", "time"), rows, num_texts=3),)
    return Section("Passes", blocks, ", ".join(seconds))


def _settings(record: PassRecord) -> str:
    given = {key: value for key, value in record.parameters.items() if value is not None}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in given.items()) or "none"


def _change(record: PassRecord) -> str:
    """Return what a pass changed of the graph's figures."""
    found = []
    for key, text in (("nodes", str), ("bytes", bytes_text)):
        before, after = record.before.get(key), record.after.get(key)
        if isinstance(before, (int, float)) and isinstance(after, (int, float)):
            found.append(text(before) if before == after else f"{text(before)} → {text(after)}")
    return ", ".join(found)


def _files_section(report: Report) -> Section:
    rows = [
        (
            FILES.get(key, key),
            file.path,
            Cell(file.sha256[:16], mono=True, tip=file.sha256),
            bytes_text(file.size_bytes),
        )
        for key, file in report.artifacts.items()
    ]
    return Section("Files", (table(("file", "path", "sha256", "size"), rows, num_texts=3),))
