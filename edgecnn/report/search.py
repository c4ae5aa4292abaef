"""What the search for better files found, in words and as a section of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgecnn.report.numbers import digits, percent_text
from edgecnn.report.page import Block, Cell, Section, table

SEARCH = "search"
"""The kind of detail that a search records."""

_FORMATS = {"onnx": "ONNX", "tflite": "TFLite"}
_GOALS = {"accuracy": "within the budget", "speed": "not slower than float"}


def search_facts(detail: Mapping[str, Any]) -> str:
    """Return in words what was looked for, and what came of it.

    Example:
        >>> search_facts({"goal": "accuracy", "is_met": True, "changes": ["AdaRound"], "trials": [{}, {}]})
        'within the budget: reached after 2 tries by AdaRound'
    """
    tries = len(detail.get("trials") or [])
    count = f"{tries} tries" if tries != 1 else "1 try"
    changes = "; ".join(detail.get("changes") or [])
    goal = _GOALS.get(str(detail.get("goal")), str(detail.get("goal")))
    goal = "faster than float" if detail.get("must_be_faster") else goal
    if detail.get("is_met"):
        note = f"; {detail['note']}" if detail.get("note") else ""
        return f"{goal}: reached after {count}" + (f" by {changes}" if changes else "") + note
    best = f", the best: {changes}" if changes else ", nothing helped"
    advice = f"; {detail['advice']}" if detail.get("advice") else ""
    return f"{goal}: NOT reached in {count}{best}{advice}"


def slow_layer_facts(detail: Mapping[str, Any]) -> str:
    """Return which layers ate the time in which file, "" where that was not asked.

    Example:
        >>> slow = {"format": "onnx", "layer": "stem", "int8_ms": 0.054, "float_ms": 0.0121}
        >>> slow_layer_facts({"slow_layers": [slow, {**slow, "format": "tflite"}]})
        'ONNX: stem 0.0540 ms (0.0121 in float); TFLite: stem 0.0540 ms (0.0121 in float)'
    """
    found: dict[str, list[str]] = {}
    for layer in detail.get("slow_layers") or []:
        text = f"{layer['layer']} {digits(layer['int8_ms'])} ms ({digits(layer['float_ms'])} in float)"
        found.setdefault(_FORMATS.get(str(layer.get("format")), "ONNX"), []).append(text)
    return "; ".join(f"{name}: {', '.join(layers)}" for name, layers in found.items())


def search_section(detail: Mapping[str, Any]) -> Section:
    """Return every way that was tried, with its figures."""
    trials = list(detail.get("trials") or [])
    columns = [("drop_points", "drop, points"), ("drop_error", "+-"), ("agreement", "agreement")]
    columns += [("onnx_speedup", "ONNX speed"), ("tflite_speedup", "TFLite speed"), ("size_share", "size")]
    shown = [(key, title) for key, title in columns if any(trial.get(key) is not None for trial in trials)]
    rows: list[tuple[Cell | str, ...]] = []
    for trial in trials:
        figures = [_figure(key, trial.get(key)) for key, _ in shown]
        failed = Cell("failed", "warn", tip=str(trial["error"])) if trial.get("error") else None
        state = failed or Cell("kept" if trial.get("kept") else "", "good" if trial.get("kept") else "")
        rows.append((str(trial["change"]), *figures, f"{trial.get('seconds', 0.0):.1f} s", state))
    titles = ("tried", *(title for _, title in shown), "took", "")
    lead = search_facts(detail) + "."
    slow = slow_layer_facts(detail)
    if slow:
        lead += f" What int8 makes slower: {slow}."
    blocks: tuple[Block, ...] = (table(titles, rows, 1),) if rows else ()
    return Section(f"Search: {detail['goal']}", blocks, lead[0].upper() + lead[1:])


def _figure(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key in ("agreement", "size_share"):
        return percent_text(value, 2)
    return f"{value:.2f}" + ("x" if key.endswith("_speedup") else "")
