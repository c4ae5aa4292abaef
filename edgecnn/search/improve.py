"""What a run does about files that miss the accuracy budget or are slower than float."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgecnn.devices.profile import Device
from edgecnn.judgement import Made
from edgecnn.making import Maker, Plan, Prepared, widens
from edgecnn.report.misses import largest_drop
from edgecnn.report.results import Report
from edgecnn.search.cures import is_static, quantizer_of
from edgecnn.search.guard import Guard
from edgecnn.search.speed import MAX_NAMED, hasten, slow_formats
from edgecnn.search.workbench import Workbench


@dataclass
class Found:
    """What a search found.

    Attributes:
        plan: to make the files by; the first where nothing better was found.
        details: for the report: {"pass": "search", "kind": "search", "goal": "accuracy" or "speed", "is_met",
            "changes", "advice", "trials", for accuracy "note", for speed "must_be_faster" and "slow_layers"}.
    """

    plan: Plan
    details: list[dict[str, Any]] = field(default_factory=list)


def misses_accuracy(report: Report, max_drop: float | None) -> bool:
    """Return whether the files lose more than the budget, on images that can tell."""
    drop = largest_drop(report)
    return max_drop is not None and drop is not None and drop > max_drop + 1e-9


def may_miss_accuracy(report: Report, plan: Plan, max_drop: float | None) -> bool:
    """Return whether the files miss the budget, or keep it by less than the drop's standard error.

    The latter asks for a search only where one can help: in a network that is quantized statically.
    """
    if misses_accuracy(report, max_drop):
        return True
    found = report.accuracy
    if max_drop is None or found is None or not is_static(plan):
        return False
    return found.drop_points + (found.drop_error_points or 0.0) > max_drop + 1e-9


def is_slower(report: Report, device: Device, *, must_be_faster: bool = False) -> bool:
    """Return whether a file is slower than float on the device it is made for, if it was timed there.

    Args:
        report: of the files.
        device: that they are made for.
        must_be_faster: whether one that is not faster counts too.
    """
    is_there = device.transport == "local" or any(key.endswith("_on_target") for key in report.parity)
    if report.latency is None or not is_there or report.environment.get("emulated"):
        return False
    return bool(slow_formats(report.latency.speedup, must_be_faster=must_be_faster))


def guard_accuracy(maker: Maker, prepared: Prepared, plan: Plan, max_drop: float) -> Found:
    """Look for the cheapest change that brings the files within the budget."""
    bench = Workbench(maker, prepared)
    found = Guard(bench, plan, max_drop).run()
    detail = {"goal": "accuracy", "is_met": found.is_met, "changes": found.changes, "advice": found.advice}
    detail["note"] = found.note
    return Found(found.plan, [_detail(bench, detail)])


def avoid_slower(maker: Maker, prepared: Prepared, plan: Plan, made: Made, report: Report) -> Found:
    """Look for the smallest change after which no file is slower than float.

    int16 activations are for accelerators: on a CPU nothing but float would make up for them.
    """
    if report.latency is None or quantizer_of(plan) is None or widens(plan.passes):
        return Found(plan)
    bench = Workbench(maker, prepared)
    must_be_faster = maker.options.must_be_faster
    found = hasten(bench, plan, made, report.latency.speedup, must_be_faster=must_be_faster)
    detail = {
        "goal": "speed",
        "must_be_faster": must_be_faster,
        "is_met": found.is_met,
        "changes": found.changes,
        "advice": "" if found.is_met else "the float or fp16 file is the faster one on this machine",
        "slow_layers": [
            {"format": name, **time.to_dict()}
            for name, times in found.slow_layers.items()
            for time in times[:MAX_NAMED]
        ],
    }
    return Found(found.plan, [_detail(bench, detail)])


def _detail(bench: Workbench, detail: dict[str, Any]) -> dict[str, Any]:
    trials = [trial.to_dict() for trial in bench.trials]
    return {"pass": "search", "kind": "search", **detail, "trials": trials}
