"""Structured pruning of 180 networks at ratio 0.5 of every group's channels: what runs, trains, exports.

    python -m benchmarks.prune_coverage run torchvision OUT.jsonl [NET ...]
    python -m benchmarks.prune_coverage run timm OUT.jsonl --peer
    python -m benchmarks.prune_coverage table OUT.jsonl [--peer PEER.jsonl]

One network per process, resumable; with --peer it is Torch-Pruning that prunes.

A network counts as pruned when the smaller one runs, gradients reach its weights, it exports to ONNX (by
edgecnn's writer where that has all operators, else by torch.onnx.export) and at most 60 % of its parameters
are left.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.isolated import report, run_each

os.environ.setdefault("OMP_NUM_THREADS", "1")

RATIO = 0.5
MAX_LEFT = 0.6


def prune_ours(name: str) -> dict[str, Any]:
    """Cut half of every group of one network and return what came of it."""
    from benchmarks.prune_nets import build, side_of
    from edgecnn.graph.channels import couple_channels, macs_and_params
    from edgecnn.load import LoadOptions, load_model
    from edgecnn.prune.surgery import cut_channels, inexact_reasons, verify_cut

    started = time.perf_counter()
    side = side_of(name)
    model = load_model(build(name), LoadOptions(input_shape=(3, side, side)))
    row: dict[str, Any] = {
        "net": name,
        "side": side,
        "load_s": time.perf_counter() - started,
        "stage": "couple",
    }
    report(row)
    started = time.perf_counter()
    coupling = couple_channels(model)
    row |= {
        "couple_s": time.perf_counter() - started,
        "frozen": dict(coupling.frozen_reasons),
        "stage": "cut",
    }
    removed = half_of_each_group(coupling)
    macs, params = macs_and_params(coupling, ())
    macs_after, params_after = macs_and_params(coupling, removed)
    started = time.perf_counter()
    cut = cut_channels(model, coupling, removed)
    row |= {
        "cut_s": time.perf_counter() - started,
        "params_left": params_after / params,
        "macs_left": macs_after / macs,
        "runs": True,
        "stage": "verify",
    }
    report(row)
    row |= {
        "error": verify_cut(model, coupling, removed, cut),
        "inexact": list(inexact_reasons(coupling, removed)),
    }
    row["stage"] = "gradients"
    row["gradients"] = gradients_flow(model.graph, side, model.fixed_batch) == gradients_flow(
        cut.graph, side, model.fixed_batch
    )
    row["stage"] = "export"
    report(row)
    try:
        return row | {"exporter": export(cut, side), "stage": "done"}
    except ValueError as error:
        try:
            uncut = export(model, side)
        except ValueError as same:
            uncut = f"fails too: {same}"
        raise ValueError(f"{error}; the uncut network: {uncut}") from error


def half_of_each_group(coupling: Any) -> set[int]:
    """Return a seeded random half of the channels of every group that can be cut."""
    import numpy as np

    rng = np.random.default_rng(0)
    removed: set[int] = set()
    for group in coupling.groups:
        if group.frozen is None:
            count = min(int(group.size * RATIO), group.size - 1)
            removed |= set(rng.permutation(group.channels)[:count].tolist())
    return removed


def gradients_flow(graph: Any, side: int, batch: int | None) -> tuple[str, ...]:
    """Return the names of the parameters that a finite, non-zero gradient of the outputs' squares reaches."""
    import torch
    from torch.utils import _pytree as pytree

    images = torch.randn(batch or 2, 3, side, side, generator=torch.Generator().manual_seed(0))
    for parameter in graph.parameters():
        parameter.requires_grad_(True)
    outputs = pytree.tree_leaves(graph(images))
    sum(((o / o.detach().abs().max().clamp(min=1e-20)) ** 2).sum() for o in outputs).backward()
    found = [n for n, p in graph.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())]
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return tuple(found)


def export(cut: Any, side: int) -> str:
    """Write the cut network as ONNX, run it, and return which exporter could."""
    import io

    import numpy as np
    import onnxruntime
    import torch
    from torch.utils import _pytree as pytree

    from edgecnn.errors import EdgeCNNError
    from edgecnn.export.files import FileOptions, write_model
    from edgecnn.graph.build import build_program

    images = torch.randn(cut.fixed_batch or 1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [o.numpy() for o in pytree.tree_leaves(cut.graph(images))]
    try:
        data = write_model(build_program(cut), "onnx", cut.spec, FileOptions()).data
        exporter = "edgecnn"
    except EdgeCNNError as error:
        data, exporter, reasons = b"", "torch.onnx.export", [str(error)[:150]]
        for dynamo in (False, True):
            buffer = io.BytesIO()
            try:
                if dynamo:
                    torch.onnx.export(cut.graph, (images,), dynamo=True, opset_version=18).save(buffer)
                else:
                    torch.onnx.export(cut.graph, (images,), buffer, dynamo=False, opset_version=17)
                data = buffer.getvalue()
                break
            except Exception as reason:  # noqa: BLE001  the exporter raises anything
                reasons.append(f"dynamo={dynamo}: {str(reason)[:150]}")
        if not data:
            raise ValueError(f"no exporter: {reasons}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for a, b in zip(found, expected, strict=True):
        if np.abs(a - b).max() > 1e-2 * max(np.abs(b).max(), 1e-6):
            raise ValueError(f"{exporter}: the file's outputs differ by {np.abs(a - b).max():.2g}")
    return exporter


def prune_peer(name: str) -> dict[str, Any]:
    """Torch-Pruning's BasePruner, magnitude importance, ratio 0.5, in its stock form."""
    import torch
    import torch_pruning as tp

    from benchmarks.prune_nets import build, side_of

    net, side = build(name), side_of(name)
    images = torch.randn(1, 3, side, side)
    row: dict[str, Any] = {"net": name, "side": side, "stage": "couple"}
    report(row)
    before = sum(p.numel() for p in net.parameters())
    started = time.perf_counter()
    heads = [
        m
        for m in net.modules()
        if getattr(m, "out_features", None) == 1000 or getattr(m, "out_channels", None) == 21
    ]
    pruner = tp.pruner.MagnitudePruner(
        net, images, tp.importance.MagnitudeImportance(p=1), pruning_ratio=RATIO, ignored_layers=heads
    )
    row |= {"couple_s": time.perf_counter() - started, "stage": "cut"}
    started = time.perf_counter()
    pruner.step()
    row |= {
        "cut_s": time.perf_counter() - started,
        "params_left": sum(p.numel() for p in net.parameters()) / before,
        "stage": "run",
    }
    report(row)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        outputs = net(images)
    row |= {"runs": True, "stage": "gradients"}
    outputs = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    sum((net(images) if not isinstance(net(images), dict) else net(images)["out"]).flatten()).backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    return row | {"gradients": bool(grads) and all(bool(g.isfinite().all()) for g in grads), "stage": "done"}


def run_suite(names: list[str], out: Path, peer: bool) -> None:
    """Try each network that `out` does not hold yet, each in a process of its own."""
    _import_everything(peer)
    for row in run_each(names, out, prune_peer if peer else prune_ours):
        print(verdict(row, peer), json.dumps({k: v for k, v in row.items() if k != "frozen"}), flush=True)


def _import_everything(peer: bool) -> None:
    """Import once what every network's process, forked from this one, would import again."""
    import torch
    import torch._dynamo

    import benchmarks.prune_nets

    torch.set_num_threads(1)
    benchmarks.prune_nets.import_torchvision_models()
    import timm  # noqa: F401

    if peer:
        import torch_pruning  # noqa: F401
    else:
        import onnxruntime  # noqa: F401

        import edgecnn.export.onnx
        import edgecnn.graph.build_ops
        import edgecnn.load
        import edgecnn.prune.surgery  # noqa: F401


def verdict(row: dict[str, Any], peer: bool) -> str:
    """Return "pruned", or the first thing that is not as it should be."""
    if row["stage"] != "done":
        return f"failed at {row['stage']}"
    if not row.get("gradients"):
        return "no gradients"
    if not peer and not row.get("exporter"):
        return "no export"
    return "pruned" if row["params_left"] <= MAX_LEFT else "too much left"


def table(out: Path, peer: Path | None) -> None:
    """Print the figures of one suite as Markdown."""
    ours = [json.loads(line) for line in out.read_text().splitlines()]
    theirs = {r["net"]: r for r in map(json.loads, peer.read_text().splitlines())} if peer else {}
    print(
        "| network | verdict | params left | MACs left | couple + cut, s | exporter | zeroed against cut |"
        + (" Torch-Pruning |" if peer else "")
    )
    print("|---|---|---|---|---|---|---|" + ("---|" if peer else ""))
    for row in ours:
        left, macs = (f"{100 * row[k]:.0f} %" if k in row else "" for k in ("params_left", "macs_left"))
        seconds = f"{row.get('couple_s', 0) + row.get('cut_s', 0):.1f}"
        error = f"{row['error']:.0e}{' (inexact)' if row['inexact'] else ''}" if "error" in row else ""
        cells = [row["net"], verdict(row, False), left, macs, seconds, row.get("exporter", ""), error]
        if peer:
            other = theirs.get(row["net"])
            cells.append(f"{verdict(other, True)} {100 * other.get('params_left', 1):.0f} %" if other else "")
        print("| " + " | ".join(cells) + " |")
    for title, rows, is_peer in (("edgecnn", ours, False), ("Torch-Pruning", list(theirs.values()), True)):
        if rows:
            print(f"\n{title}: {len(rows)} networks:", dict(Counter(verdict(r, is_peer) for r in rows)))
            print("exporters:", dict(Counter(r.get("exporter", "none") for r in rows)) if not is_peer else "")
            for row in rows:
                if verdict(row, is_peer) != "pruned":
                    print("-", row["net"], verdict(row, is_peer), row.get("failure", row.get("params_left")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "one", "table"))
    parser.add_argument("target", help="torchvision, timm, a network, or a file of results")
    parser.add_argument("rest", nargs="*", help="file of results, networks")
    parser.add_argument(
        "--peer", nargs="?", const="yes", help="Torch-Pruning; for table: its file of results"
    )
    chosen = parser.parse_args()
    if chosen.command == "one":
        import torch

        torch.set_num_threads(1)
        row = prune_peer(chosen.target) if chosen.peer else prune_ours(chosen.target)
        report(row)
    elif chosen.command == "table":
        table(Path(chosen.target), Path(chosen.peer) if chosen.peer else None)
    else:
        from benchmarks.prune_nets import SUITES

        names = chosen.rest[1:] or SUITES[chosen.target]
        run_suite(names, Path(chosen.rest[0]), bool(chosen.peer))


if __name__ == "__main__":
    main()
