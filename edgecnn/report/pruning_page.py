"""The sections of the page about pruning and training, from what the passes recorded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from edgecnn.report.curves import Curve, Width, curves, smooth, widths
from edgecnn.report.islands import FLOAT_ISLANDS, float_islands_text
from edgecnn.report.numbers import count_text, percent_text, ratio_text
from edgecnn.report.page import Block, Cell, Figure, Section, Table, TileRow, table
from edgecnn.report.results import Report
from edgecnn.report.saturation import SATURATION, saturation_section
from edgecnn.report.search import SEARCH, search_section
from edgecnn.report.terminal import FLOAT_LAYERS, TRAINING, training_facts

MAX_LAYERS = 48
"""Layers drawn; of a network with more, those with the most MACs."""

LOSS_BINS = 120
"""Points of the training loss that are drawn."""


def pruning_sections(report: Report) -> tuple[Section, ...]:
    """Return a section for each pass that pruned or trained, in order."""
    found = []
    taught: Mapping[str, Any] = {}
    for detail in report.details:
        kind = detail.get("kind")
        if kind == "pruning":
            found.append(_pruning(detail))
        elif kind == TRAINING:
            found.append(_training(detail, taught if taught.get("pass") == detail.get("pass") else {}))
        elif kind == "distillation":
            taught = detail
        elif kind == "kernels":
            found.append(Section("The target's int8 kernels", (), f"{detail['text']}."))
        elif kind == SATURATION:
            found.append(saturation_section(detail))
        elif kind == SEARCH:
            found.append(search_section(detail))
        elif kind == FLOAT_LAYERS:
            found.append(_float_layers(detail))
        elif kind == FLOAT_ISLANDS:
            found.append(_float_islands(detail))
        else:
            found.append(_other(detail))
    return tuple(found)


def _float_layers(detail: Mapping[str, Any]) -> Section:
    """Return what computes in float in a quantized network."""
    rows = [tuple(str(layer).rstrip(")").split(" (", 1)) for layer in detail["layers"]]
    lead = f"All else computes in int8. Asked for: {', '.join(map(str, detail['asked']))}."
    return Section("Layers in float", (table(("layer", "operator"), rows, 2),), lead)


def _float_islands(detail: Mapping[str, Any]) -> Section:
    """Return what has no int8 form, and why each operator computes in float."""
    rows = [
        (*str(operator["layer"]).rstrip(")").split(" (", 1), str(operator["why"]))
        for operator in detail["operators"]
    ]
    lead = f"{float_islands_text(detail)}."
    return Section("Operators left in float", (table(("layer", "operator", "why"), rows, 3),), lead)


def pruned_row(before: int, after: int, label: str) -> TileRow:
    """Return how much less a network has of something.

    Example:
        >>> row = pruned_row(200, 100, "MACs")
        >>> row.value, row.unit, row.detail
        ('2.00×', 'fewer', '200 → 100')
    """
    detail = f"{count_text(before)} → {count_text(after)}"
    if after >= before:
        return TileRow("as many", label, detail)
    return TileRow(ratio_text(before / max(after, 1)), label, detail, "good", "fewer")


def pair_of(detail: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    """Return the figures before and after, where a pass recorded both."""
    value = detail.get(key)
    if (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(v, (int, float)) for v in value)
    ):
        return int(value[0]), int(value[1])
    return None


def _pruning(detail: Mapping[str, Any]) -> Section:
    facts = []
    for key, name in (("macs", "MACs"), ("params", "parameters"), ("channels", "channels")):
        pair = pair_of(detail, key)
        if pair is not None:
            share = f" ({percent_text(pair[1] / pair[0], 1)} left)" if pair[0] else ""
            facts.append(f"{count_text(pair[0])} → {count_text(pair[1])} {name}{share}")
    how = [f"{key} {detail[key]}" for key in ("importance", "allocation", "schedule") if detail.get(key)]
    lead = f"{', '.join(facts)}. {', '.join(how).capitalize()}.{_checked(detail)}"
    blocks: list[Block] = []
    layers = [layer for layer in detail.get("layers", []) if layer.get("channels_left") is not None]
    if layers:
        blocks.append(_widths(layers))
    if detail.get("groups"):
        blocks.append(_groups(detail["groups"]))
    reasons = detail.get("frozen_reasons") or {}
    if reasons:
        rows = [(reason, count_text(count)) for reason, count in sorted(reasons.items(), key=_by_count)]
        blocks.append(
            Table(("why not cut", "parameters"), tuple(rows), title="Parameters in no channel that can go")
        )
    return Section("Pruning", tuple(blocks), lead)


def _checked(detail: Mapping[str, Any]) -> str:
    """Say how near the cut network is to the one whose channels are zero."""
    error = detail.get("zeroed_error")
    if error is None:
        return ""
    why = detail.get("inexact_reasons") or ()
    because = f", as {' and '.join(why)}" if why else ""
    return f" Cut and with those channels at zero it gives outputs {error:.1g} of their range apart{because}."


def _by_count(item: tuple[str, int]) -> int:
    return -item[1]


def _widths(layers: list[dict[str, Any]]) -> Figure:
    shown = layers
    caption = "The whole bar is the layer as it was, the filled part what is left."
    if len(layers) > MAX_LAYERS:
        least = sorted((layer.get("macs") or 0 for layer in layers), reverse=True)[MAX_LAYERS - 1]
        shown = [layer for layer in layers if (layer.get("macs") or 0) >= least][:MAX_LAYERS]
        caption += f" Of {len(layers)} layers the {len(shown)} with the most MACs."
    rows = [
        Width(
            str(layer["layer"]).partition(" (")[0],
            layer["channels"],
            layer["channels_left"],
            "as it was" if layer["channels"] == layer["channels_left"] else "",
        )
        for layer in shown
    ]
    return Figure(partial(widths, rows), "Channels of each layer", caption, is_wide=True)


def _groups(groups: list[dict[str, Any]]) -> Table:
    rows = []
    for group in groups:
        before, after = group.get("channels", 0), group.get("channels_left", 0)
        layers = group.get("layers") or []
        listed = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        removed = f"{100 * (1 - after / before):.0f} %" if before and after != before else "-"
        state = Cell("frozen", "warn", tip=str(group["frozen"])) if group.get("frozen") else Cell(removed)
        rows.append((str(group.get("name", "")), listed, str(before), str(after), state))
    columns = ("group", "layers", "channels", "left", "removed")
    caption = (
        "A group's channels compete with each other; one that goes takes its slice of every layer along."
    )
    return Table(columns, tuple(rows), num_texts=2, title="Groups", caption=caption)


def _other(detail: Mapping[str, Any]) -> Section:
    """Return the plain figures of a pass that has no drawing."""
    rows = [
        (key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
        for key, value in detail.items()
        if key not in ("pass", "kind") and isinstance(value, (str, int, float))
    ]
    return Section(str(detail.get("pass", "pass")), (table(("what", "value"), rows, 2),))


def _training(detail: Mapping[str, Any], taught: Mapping[str, Any]) -> Section:
    blocks: list[Block] = []
    epochs, steps = detail.get("epochs") or [], detail.get("steps") or []
    last = epochs[-1] if epochs else 1.0
    lines = []
    if steps:
        points = [
            (last * step / steps[-1], loss)
            for step, loss in zip(steps, detail.get("loss") or [], strict=False)
            if loss is not None
        ]
        if points:
            lines.append(Curve("training", 0, smooth(points, LOSS_BINS)))
    judged = _points(epochs, detail.get("validation_loss") or [])
    if judged:
        lines.append(Curve("validation", 1, judged, is_marked=True))
    if lines:
        draw = partial(curves, lines, "loss", "Loss over the epochs")
        blocks.append(Figure(draw, "Loss"))
    accuracy = _points(epochs, [v and 100 * v for v in detail.get("validation_accuracy") or []])
    if accuracy:
        line = [Curve("validation top-1", 1, accuracy, is_marked=True)]
        draw = partial(curves, line, "top-1, %", "Validation accuracy over the epochs")
        blocks.append(Figure(draw, "Accuracy while training"))
    facts = training_facts(detail)
    if taught:
        methods = " and ".join(map(str, taught.get("methods") or [])) or "outputs"
        labels = "with labels" if taught.get("labels") else "without labels"
        facts += f". Teacher {taught.get('teacher', 'unnamed')}: {methods}, {labels}"
    if not blocks:
        blocks.append(table(("training", ""), [("recorded", "no curves")], 2))
    return Section(f"Training: {detail.get('pass', '')}", tuple(blocks), f"{facts}.")


def _points(epochs: list[float], values: list[float | None]) -> tuple[tuple[float, float], ...]:
    return tuple((x, y) for x, y in zip(epochs, values, strict=False) if y is not None)
