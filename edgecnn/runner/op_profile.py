"""Time by operator from ONNX Runtime's profiler, and how much of a TFLite graph its delegate took over."""

from __future__ import annotations

import json
import statistics
from typing import Any, Dict, List, Mapping, Sequence, Set, Tuple

from .failure import InferenceFailure

KERNEL_SUFFIX = "_kernel_time"
DELEGATE_OP = "DELEGATE"


def read_profile(text: str) -> List[Dict[str, Any]]:
    r"""Sum the kernel times in a profile that ONNX Runtime wrote.

    Args:
        text: the JSON list of trace events, durations in microseconds.

    Returns:
        One row per node, the slowest first: `op`, `name`, `total_ms` over all runs, `count` of calls, and
        `share` of the time of all nodes, `median_ms` of a call. The first call of each node is left out where
        there are more.

    Raises:
        InferenceFailure: if the text is not such a list.

    Example:
        >>> event = '{"cat": "Node", "name": "c_kernel_time", "dur": %d, "args": {"op_name": "Conv"}}'
        >>> read_profile("[" + ",".join(event % dur for dur in (900, 200, 300)) + "]")
        [{'op': 'Conv', 'name': 'c', 'total_ms': 0.5, 'count': 2, 'median_ms': 0.25, 'share': 1.0}]
    """
    try:
        events = json.loads(text)
    except ValueError as error:
        raise InferenceFailure(f"the profile of onnxruntime is not JSON: {error}") from error
    durations: Dict[Tuple[str, str, str], List[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(KERNEL_SUFFIX):
            arguments = event.get("args", {})
            key = (
                str(arguments.get("op_name", "")),
                name[: -len(KERNEL_SUFFIX)],
                str(arguments.get("node_index", "")),
            )
            durations.setdefault(key, []).append(float(event.get("dur", 0)))
    rows: List[Dict[str, Any]] = []
    for (op, name, _), values in durations.items():
        kept = values[1:] or values
        total = sum(kept) / 1e3
        median_ms = statistics.median(kept) / 1e3
        rows.append({"op": op, "name": name, "total_ms": total, "count": len(kept), "median_ms": median_ms})
    return with_shares(rows)


def with_shares(rows: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Add to each row its `share` of the time of all, and put the slowest first.

    Example:
        >>> with_shares([{"op": "a", "total_ms": 1.0}, {"op": "b", "total_ms": 3.0}])[0]
        {'op': 'b', 'total_ms': 3.0, 'share': 0.75}
    """
    total = sum(row["total_ms"] for row in rows)
    for row in rows:
        row["share"] = row["total_ms"] / total if total else 0.0
    return sorted(rows, key=lambda row: -row["total_ms"])


def delegate_coverage(ops: Sequence[Mapping[str, Any]]) -> Dict[str, int]:
    """Count partitions and the operators inside them.

    The interpreter lists the file's operators and, after them, one DELEGATE per partition. A partition holds
    what lies on the way back from its outputs to its inputs.

    Args:
        ops: with `op_name`, and tensor indices `inputs` and `outputs`.

    Returns:
        `partitions`, `delegated_ops`, `total_ops` (of the file).

    Example:
        >>> chain = [{"op_name": "CONV_2D", "inputs": [i], "outputs": [i + 1]} for i in range(3)]
        >>> delegate_coverage([*chain, {"op_name": "DELEGATE", "inputs": [1], "outputs": [3]}])
        {'partitions': 1, 'delegated_ops': 2, 'total_ops': 3}
    """
    own = [op for op in ops if op["op_name"] != DELEGATE_OP]
    partitions = [op for op in ops if op["op_name"] == DELEGATE_OP]
    producer = {int(tensor): index for index, op in enumerate(own) for tensor in op["outputs"]}
    delegated: Set[int] = set()
    for partition in partitions:
        seen = {int(tensor) for tensor in partition["inputs"]}
        waiting = [int(tensor) for tensor in partition["outputs"]]
        while waiting:
            tensor = waiting.pop()
            if tensor in seen or tensor not in producer:
                continue
            seen.add(tensor)
            delegated.add(producer[tensor])
            waiting += [int(source) for source in own[producer[tensor]]["inputs"]]
    return {"partitions": len(partitions), "delegated_ops": len(delegated), "total_ops": len(own)}
