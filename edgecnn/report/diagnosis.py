"""The doctor's letter of `edgecnn inspect --int8` on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from edgecnn.report.numbers import bytes_text, count_text, percent_text
from edgecnn.report.terminal import warnings_table

STYLES = {"problem": "bold red", "warning": "bold yellow", "note": "cyan"}
LOSSLESS_DB = 200.0
"""Stands for no noise at all."""

MOST_LAYERS = 6
"""Named at each finding; the rest is counted, and --json has all."""


def print_diagnosis(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `edgecnn.diagnosis.letter.diagnose` found; `console` is stdout by default."""
    console = console or Console()
    head = Text(str(found["name"]), style="bold")
    head.append(f"  int8 on {found['target']} ({found['isa']})\n", style="not bold")
    console.print(head.append(f"kernels   {found['kernels']['text']}", style="not bold"))
    if found["size"]:
        before, after = found["size"]["float_bytes"], found["size"]["int8_bytes"]
        ratio = f", {before / after:.2f}x smaller" if after else ""
        console.print(Text(f"size      {bytes_text(before)} of weights, {bytes_text(after)} in int8{ratio}"))
    if found["speedup"]:
        console.print(Text(f"speed-up  {speedup_text(found['speedup'])}"))
    console.print(Text(f"ranges    from {found['ranges_from']}"))
    for text in found["warnings"]:
        console.print(warnings_table(str(text)))
    for entry in found["findings"]:
        console.print()
        title = Text(f"{entry['level']:<8}  ", style=STYLES[entry["level"]])
        console.print(title.append(entry["title"], style="not bold" if entry["level"] == "note" else ""))
        for name in ("layers", "why", "action"):
            text = layers_text(entry["layers"]) if name == "layers" else str(entry[name])
            if text:
                label = "to do" if name == "action" else name
                line = Text(f"{label:<6}  {text}", style="dim" if name == "layers" else "")
                console.print(Padding(line, (0, 0, 0, 10), expand=False))
    if not found["findings"]:
        console.print(Text("\nnothing stands in the way of int8", style="green"))
    if found.get("sensitivity"):
        console.print()
        print_precision(found["sensitivity"], console)


def print_precision(found: Mapping[str, Any], console: Console) -> None:
    """Print which layers int8 hurts, and what leaving more and more of them in float brings."""
    images = f"{found['num_samples']} images of {found['source']}"
    console.print(Text(f"Each layer alone in int8, on {images}", style="bold"))
    worst = Table("layer", "SQNR", "agrees", "MACs", box=None, pad_edge=False)
    for entry in found["layers"][:MOST_LAYERS]:
        agreement = percent_text(entry["agreement"])
        worst.add_row(
            _path(entry["layer"]), f"{entry['sqnr_db']:.1f} dB", agreement, count_text(entry["macs"])
        )
    console.print(worst)
    console.print(Text("\nLayers left in float, by what they save for their MACs", style="bold"))
    points = Table("in float", "MACs", "SQNR", "agrees", "layers", box=None, pad_edge=False)
    for point in found["points"]:
        layers = list(dict.fromkeys(_path(layer) for layer in point["layers"]))
        count, share = str(len(point["layers"])), percent_text(point["float_macs_share"], 1)
        is_all = point["sqnr_db"] >= LOSSLESS_DB
        noise = "as float" if is_all else f"{point['sqnr_db']:.1f} dB"
        agreement = percent_text(point["agreement"])
        points.add_row(count, share, noise, agreement, "all" if is_all else layers_text(layers))
    console.print(points)
    console.print(
        Text('a recipe leaves them so: float_layers = ["NAME", ...] of quantize_static', style="dim")
    )


def _path(layer: str) -> str:
    return layer.partition(" (")[0]


def layers_text(layers: Sequence[str]) -> str:
    """Return the first few layers and how many there are besides.

    Example:
        >>> layers_text(["a", "b"]), layers_text([str(i) for i in range(8)])
        ('a, b', '0, 1, 2, 3, 4, 5 and 2 more')
    """
    more = f" and {len(layers) - MOST_LAYERS} more" if len(layers) > MOST_LAYERS else ""
    return ", ".join(layers[:MOST_LAYERS]) + more


def speedup_text(speedup: Mapping[str, Any]) -> str:
    """Return the class of a network and what was measured for it.

    Example:
        >>> speedup_text({"class": "depthwise", "like": "X", "onnx": [2.0, 2.0], "tflite": [2.0, 3.0],
        ...               "measured": "docs", "notes": ["untested here"]})
        'depthwise, as X: 2x in ONNX Runtime, 2 to 3x in LiteRT (docs); untested here'
    """
    onnx, tflite = (_interval(speedup[key]) for key in ("onnx", "tflite"))
    notes = "".join(f"; {note}" for note in speedup["notes"])
    return (
        f"{speedup['class']}, as {speedup['like']}: {onnx} in ONNX Runtime, {tflite} in LiteRT "
        f"({speedup['measured']}){notes}"
    )


def _interval(bounds: Sequence[float]) -> str:
    low, high = bounds
    return f"{low:g}x" if low == high else f"{low:g} to {high:g}x"
