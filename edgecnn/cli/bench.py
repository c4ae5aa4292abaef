"""The command `edgecnn bench`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgecnn.cli.options import POSITIVE, DurationType, ThreadsType, ValuesCommand
from edgecnn.errors import DeviceError, EdgeCNNError, OutputError, RunnerError

if TYPE_CHECKING:
    from edgecnn.bench import BenchOptions
    from edgecnn.report.bench_results import BenchReport


@click.command(cls=ValuesCommand, short_help="Measure files on this machine or on boards.")
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True)
@click.option(
    "--device",
    "devices",
    metavar="NAME|FILE",
    multiple=True,
    help="Device profile; may be repeated, devices work side by side.  [default: local_cpu]",
)
@click.option("--baseline", metavar="ARTIFACT", help="Compare with this file.  [default: the first]")
@click.option(
    "--data", metavar="SOURCE", help="Measure accuracy on the device too: folder, FILE.npz, digits."
)
@click.option("--threads", type=ThreadsType(), help="Such as 1,2,4.  [default: the device's]")
@click.option("--runs", type=click.IntRange(min=1), help="Timed runs of a file, at least.  [default: 64]")
@click.option("--seconds", type=POSITIVE, help="Timed seconds of a file, at least.  [default: 1]")
@click.option(
    "--blocks",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Processes of a compared file.",
)
@click.option("--sustained", type=DurationType(), help="Run each file without a pause for so long: 10m.")
@click.option("--preset", type=click.Choice(["mlperf"]), help="mlperf: 1,024 runs and 60 s; p90 counts.")
@click.option("--profile", is_flag=True, help="Time the operators too, in a process of its own.")
@click.option("--half", is_flag=True, help="Run a .pt2 in half precision, on a GPU.")
@click.option("--cuda-graph", is_flag=True, help="Let a .pt2 replay one recorded CUDA graph.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, a list for several devices.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Write one row per run.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), help="Write a page with plots.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Directory for bench-DEVICE.json and bench.html."
)
def bench(values: Mapping[str, Any]) -> None:
    """Measure latency, memory and accuracy of ARTIFACTs on a device.

    An ARTIFACT is an .onnx or .tflite file, or a folder that compress wrote. Several are compared in
    interleaved blocks, each in a process of its own; "no difference" means that the interval includes 1.
    """
    from edgecnn.bench import BenchOptions

    options = BenchOptions(
        threads=values["threads"] or (),
        num_runs=values["runs"],
        seconds=values["seconds"],
        num_blocks=values["blocks"],
        sustained_s=values["sustained"],
        preset=values["preset"],
        profile=values["profile"],
        half=values["half"],
        cuda_graph=values["cuda_graph"],
    )
    reports, failures = _run(values, options)
    if not reports:
        raise next(iter(failures.values()))
    _write(values, reports)
    if values["as_json"]:
        click.echo(_json(reports, several=len(set(values["devices"])) > 1), nl=False)
    else:
        from edgecnn.report.bench_terminal import print_bench

        print_bench(reports)
    if failures:
        texts = [
            error.message if error.message.startswith(name) else f"{name}: {error.message}"
            for name, error in failures.items()
        ]
        raise DeviceError("; ".join(texts), hint=next(iter(failures.values())).hint)
    broken = [f"{run.key} on {report.device}" for report in reports for run in report.runs if run.error]
    if broken:
        raise RunnerError(f"did not run: {', '.join(broken)}", hint="the report says why")


def _run(
    values: Mapping[str, Any], options: BenchOptions
) -> tuple[list[BenchReport], dict[str, EdgeCNNError]]:
    """Measure on one device here, on several side by side; those that failed are in the second."""
    from edgecnn.bench import bench as run
    from edgecnn.bench_devices import bench_devices
    from edgecnn.cli.progress import TerminalProgress

    devices = list(dict.fromkeys(values["devices"])) or ["local_cpu"]
    chosen = {"baseline": values["baseline"], "data": values["data"], "options": options}
    with TerminalProgress() as progress:
        if len(devices) == 1:
            return [run(*values["artifacts"], device=devices[0], progress=progress, **chosen)], {}
        return bench_devices(values["artifacts"], devices, progress=progress, **chosen)


def _write(values: Mapping[str, Any], reports: Sequence[BenchReport]) -> None:
    """Write the files asked for, all or none."""
    from edgecnn.artifact import write_files_atomically

    files: dict[Path, bytes] = {}
    if values["csv_file"]:
        from edgecnn.report.bench_csv import render_csv

        files[values["csv_file"]] = render_csv(reports).encode()
    pages = [values["html_file"]] if values["html_file"] else []
    if values["out"]:
        files |= {values["out"] / f"bench-{_name(r.device)}.json": r.to_json().encode() for r in reports}
        pages.append(values["out"] / "bench.html")
    if pages:
        from edgecnn.report.html import render_html

        page = render_html(reports).encode()
        files |= dict.fromkeys(pages, page)
    try:
        for folder in {path.parent for path in files}:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{error.filename} cannot be made: {error.strerror}") from error
    if files:
        write_files_atomically(files)


def _name(device: str) -> str:
    """Return a device's name as it may stand in a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", device)


def _json(reports: Sequence[BenchReport], *, several: bool) -> str:
    """Return the report as an object, or those of several devices as a list."""
    texts = [report.to_json() for report in reports]
    return texts[0] if not several else "[" + ",".join(texts) + "]\n"
