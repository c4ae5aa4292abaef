"""The commands `edgecnn devices list`, `show`, `probe` and `add`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgecnn.cli.options import ValuesCommand

if TYPE_CHECKING:
    from edgecnn.devices.probe import DeviceProbe

MIB = 2**20


@click.group(short_help="List, show, probe and add device profiles.")
def devices() -> None:
    """Device profiles: what a machine is, how to reach it and what its runtimes read."""


@devices.command("list")
def list_() -> None:
    """List the profiles in ./devices and those shipped with edgecnn."""
    from edgecnn.devices.profile import list_devices, load_device

    names = list_devices()
    width = max(map(len, names), default=0)
    for name in names:
        click.echo(f"{name:<{width}}  {load_device(name).description}".rstrip())


@devices.command()
@click.argument("name")
def show(name: str) -> None:
    """Check the profile NAME, or a file, and print what it says."""
    from edgecnn.devices.profile import load_device

    device = load_device(name)
    rows = {field.name: getattr(device, field.name) for field in fields(device)}
    rows |= {"max_opset": device.max_opset, "max_ir_version": device.max_ir_version}
    _print_rows(rows)


@devices.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def probe(name: str, as_json: bool) -> None:
    """Ask the device of the profile NAME, or a file, what will run there and what to install."""
    from edgecnn.devices.probe import probe as ask
    from edgecnn.devices.profile import load_device

    device = load_device(name)
    click.echo(f"asking {device.name} {device.host}".rstrip(), err=True)
    _print_probe(ask(device), as_json)


@devices.command(cls=ValuesCommand)
@click.argument("name")
@click.option("--host", required=True, metavar="HOST", help="ssh alias or user@host, or adb serial.")
@click.option("--like", metavar="PROFILE", help="Take the rest from this profile. Default: ask the device.")
@click.option("--transport", type=click.Choice(["ssh", "adb"]), help="Default: ssh.")
@click.option("--python", help="Interpreter on the device. Default: python3.")
@click.option("--workdir", help="Folder on the device for files in transit.")
@click.option("--runtime", type=click.Choice(["onnxruntime", "litert"]), help="Runtime to prefer.")
@click.option("--isa", help="Instruction set, where it is not to be asked for.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads for latency.")
@click.option("--ssh-config", type=click.Path(path_type=Path), help="ssh configuration file.")
@click.option("--force", is_flag=True, help="Replace a profile of that name in ./devices.")
def add(values: Mapping[str, Any]) -> None:
    """Write the profile ./devices/NAME.toml.

    The device is asked what it is, unless --isa or --like says so.
    """
    from edgecnn.devices.registration import add_device

    own = ("name", "like", "force")
    given = {key: value for key, value in values.items() if value is not None and key not in own}
    if "ssh_config" in given:
        given["ssh_config"] = str(given["ssh_config"].expanduser().absolute())
    path, found = add_device(values["name"], given, like=values["like"], force=values["force"])
    if found is not None:
        _print_probe(found, as_json=False)
    click.echo(f"wrote {path}", err=True)


def _print_probe(found: DeviceProbe, as_json: bool) -> None:
    """Print what a device said, and what to do about it last."""
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    room = {"ram": found.ram_bytes, "disk free": found.disk_free_bytes}
    rows: dict[str, Any] = {
        "board": found.board,
        "emulated": "yes, its speed says nothing" if found.emulated else None,
        "cpu": found.cpu,
        "isa": found.isa,
        "system": f"{found.system} {found.machine}".strip(),
        "python": found.python,
        "glibc": found.glibc,
        **{key: f"{value // MIB:,} MiB" for key, value in room.items() if value is not None},
        **{key: package.version or "broken" for key, package in found.packages.items()},
    }
    rows["runs"] = "\n".join(found.runs) or "nothing yet"
    rows["to do"] = "\n".join(found.advice)
    _print_rows(rows)


def _print_rows(rows: Mapping[str, Any]) -> None:
    width = max(map(len, rows))
    for key, value in rows.items():
        for line in _lines(value):
            click.echo(f"{key:<{width}}  {line}")


def _lines(value: Any) -> list[str]:
    """Return a value's text, one line per entry; nothing for a value that is not set."""
    if isinstance(value, Mapping):
        return [f"{key} {item}" for key, item in value.items()]
    if isinstance(value, tuple):
        return [" ".join(str(getattr(item, field.name)) for field in fields(item)) for item in value]
    return [] if value in (None, "") else str(value).splitlines()
