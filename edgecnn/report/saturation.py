"""What the report says about saturating sums on x86 without VNNI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgecnn.report.numbers import percent_text
from edgecnn.report.page import Section, table

SATURATION = "saturation"
"""The kind of detail that says what x86 without VNNI would make of the ONNX file."""

SAME_DB = 200.0
"""What stands for no difference at all."""

CURE = "for such machines take a --target of isa x86-64, whose 7-bit weights cannot"


def saturation_text(detail: Mapping[str, Any]) -> str:
    """Return what was foreseen, in one sentence.

    Example:
        >>> layers = [{"layer": "conv1 (aten.conv2d)", "changed": 0.117}]
        >>> detail = {"possible": True, "layers": layers, "num_layers": 5, "num_samples": 8}
        >>> text = saturation_text({**detail, "sqnr_db": 15.3, "agreement": 0.75})
        >>> text.partition(";")[0]
        'x86 without VNNI saturates in 5 layers of the ONNX file, most in conv1 (11.7 % of its values)'
        >>> text.split("; ")[1]
        '15.3 dB against exact sums, 2 of 8 answers change (predicted)'
    """
    count = detail["num_samples"]
    if not detail["possible"]:
        return "x86 without VNNI computes the ONNX file exactly too: its weights leave no room for saturation"
    if not detail["num_layers"]:
        return (
            f"x86 without VNNI could saturate in the ONNX file; on {count} images it never does (predicted)"
        )
    worst, number = detail["layers"][0], detail["num_layers"]
    where = f"{number} layer{'s' * (number != 1)} of the ONNX file"
    name, share = str(worst["layer"]).split(" (")[0], percent_text(worst["changed"], 1)
    noise = [] if detail["sqnr_db"] is None else [f"{detail['sqnr_db']:.1f} dB against exact sums"]
    if detail["sqnr_db"] == SAME_DB:
        noise = ["the output stays what it is"]
    if detail["agreement"] is not None:
        noise.append(f"{round((1.0 - detail['agreement']) * count)} of {count} answers change")
    found = f"x86 without VNNI saturates in {where}, most in {name} ({share} of its values)"
    return f"{found}; {', '.join(noise)} (predicted); {CURE}"


def saturation_section(detail: Mapping[str, Any]) -> Section:
    """Return what was foreseen, with the layers that change."""
    rows = [(str(entry["layer"]), percent_text(entry["changed"])) for entry in detail["layers"]]
    blocks = (table(("layer", "values that change"), rows, 1),) if rows else ()
    return Section("The ONNX file on x86 without VNNI", blocks, f"{saturation_text(detail)}.")
