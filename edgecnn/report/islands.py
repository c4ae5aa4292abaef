"""What is said about the operators of an int8 network that have no int8 form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

FLOAT_ISLANDS = "float_islands"
"""The kind of detail that lists them."""


def float_islands_text(detail: Mapping[str, Any]) -> str:
    """Return which operators of a quantized network have no int8 form, and what that costs.

    Example:
        >>> operators = [{"layer": "ln (aten.layer_norm.default)", "why": "no int8 form"}]
        >>> cost = {"pieces": 1, "macs_share": 0.0, "conversions": 2, "values": 1536}
        >>> float_islands_text({"operators": operators, **cost})[:61]
        '1 operator without an int8 form (1 layer_norm), in 1 piece: 0'
    """
    operators = detail["operators"]
    lacking = [str(o["layer"]) for o in operators if o["why"] == "no int8 form"]
    kinds = Counter(name.rpartition("(aten.")[2].partition(".")[0] or name for name in lacking)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    count, near, pieces = len(lacking), len(operators) - len(lacking), int(detail["pieces"])
    beside = f" and {near} beside them" if near else ""
    cost = (
        f"{100 * detail['macs_share']:.1f} % of the MACs, {detail['conversions']} conversions of "
        f"{detail['values']:,} values per image"
    )
    return (
        f"{count} operator{'s' * (count != 1)} without an int8 form ({listed}){beside}, in {pieces} "
        f"piece{'s' * (pieces != 1)}: {cost}"
    )
