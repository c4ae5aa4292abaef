"""`edgecnn inspect --groups --draw --sensitivity`: what ties channels, and what they are worth."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("torch")

import small_networks

import edgecnn
from edgecnn.cli.main import main
from edgecnn.compress import CompressResult
from edgecnn.errors import PassError
from edgecnn.prunability import SHARES, inspect_groups, inspect_sensitivity
from edgecnn.report.groups import draw_groups

OPTIONS = edgecnn.LoadOptions(input_shape=small_networks.SIZE, preprocess="unit")
SMALL = ["small_networks:deep", "--input-shape", "3x16x16", "--preprocess", "unit"]
Captured = pytest.CaptureFixture[str]


def test_groups_of_a_chain() -> None:
    found = inspect_groups(small_networks.deep(), OPTIONS)
    groups = {group["name"]: group for group in found["groups"]}
    assert {name: group["channels"] for name, group in groups.items()} == {"0": 16, "3": 24, "8": 5}
    assert groups["0"]["frozen"] is None
    assert "output" in groups["8"]["frozen"]
    assert found["frozen_reasons"] == {groups["8"]["frozen"]: 5}
    first = {(m["tensor"], m["dim"], m["role"]) for m in groups["0"]["members"]}
    assert {("0.weight", 0, "out"), ("3.weight", 1, "in"), ("1.weight", 0, "norm")} <= first
    params = 16 * 27 + 2 * 16 + 24 * 16 * 9 + 2 * 24 + 24 * 5 + 5
    macs = 16 * 27 * 256 + 24 * 144 * 64 + 24 * 5
    assert (found["params"], found["macs"]) == (params, macs)
    assert groups["0"]["macs"] == 16 * 27 * 256 + 24 * 144 * 64
    assert json.loads(json.dumps(found)) == found


def test_sensitivity_with_labels_and_without() -> None:
    found = inspect_sensitivity(small_networks.deep(), OPTIONS, data="small_networks:images")["sensitivity"]
    assert (found["source"], found["num_samples"], found["labelled"]) == ("small_networks:images", 40, True)
    assert 0 <= found["top1"] <= 1
    assert [entry["name"] for entry in found["groups"]] == ["0", "3"]
    for entry in found["groups"]:
        assert tuple(entry["shares"]) == SHARES
        assert len(entry["top1"]) == len(entry["agreement"]) == len(entry["sqnr_db"]) == len(SHARES)
        assert entry["sqnr_db"][0] >= entry["sqnr_db"][-1]
    bare = inspect_sensitivity(small_networks.deep(), OPTIONS, data=small_networks.unlabelled())
    assert bare["sensitivity"]["top1"] is None
    assert all(value is None for entry in bare["sensitivity"]["groups"] for value in entry["top1"])


def test_silencing_everything_takes_the_answers_along() -> None:
    """The last convolution without three quarters of its channels is worse than without a quarter."""
    found = inspect_sensitivity(small_networks.segmentation(), OPTIONS, data="small_networks:images")
    (entry,) = found["sensitivity"]["groups"]
    assert entry["agreement"] == [None] * 3
    assert entry["sqnr_db"] == sorted(entry["sqnr_db"], reverse=True)


def test_a_drawing_stands_alone_and_ties_layers_together() -> None:
    found = inspect_groups(small_networks.deep(), OPTIONS)
    text = draw_groups(found)
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    labels = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"00", "33", "88"} <= set(labels)  # each with what shows when it is pointed at
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 2 + 2 + 1  # each group's maker and reader; nothing reads the output
    assert len({circle.get("cx") for circle in circles}) == 2  # two groups share no row with the third
    assert "url(" not in text and "http:" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_command(tmp_path: Path, capsys: Captured) -> None:
    drawing = tmp_path / "groups.svg"
    assert main(["inspect", *SMALL, "--groups", "--draw", str(drawing)]) == 0
    captured = capsys.readouterr()
    lines = [" ".join(line.split()) for line in captured.out.splitlines()]
    assert lines[0].startswith("deep 4.09 k params, ")
    assert any(line.startswith("0 16 ") and line.endswith("0 -> 3") for line in lines)
    assert any("frozen: is an output of the network" in line for line in lines)
    assert drawing.read_text().startswith("<svg xmlns=")
    assert captured.err == f"drawn: {drawing}\n"


def test_the_command_with_images(capsys: Captured) -> None:
    assert main(["inspect", *SMALL, "--sensitivity", "--data", "small_networks:images"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "top-1 on 40 images of small_networks:images" in text
    assert "-25 % -50 % -75 %" in text
    assert main(["inspect", *SMALL, "--sensitivity", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["sensitivity"]["labelled"] is False
    assert values["sensitivity"]["num_samples"] == 16


def test_what_cannot_be_inspected(lenet_result: CompressResult, capsys: Captured) -> None:
    with pytest.raises(PassError, match="lenet5 is quantized already"):
        inspect_groups(lenet_result.artifacts["onnx"].path.with_name("model.pt2"))
    with pytest.raises(PassError, match="importance 'tailor' is unknown, expected one of l1,"):
        inspect_sensitivity(small_networks.deep(), OPTIONS, importance="tailor")
    assert main(["inspect", "m.pt2", "--data", "digits"]) == 2
    assert "--data is for --sensitivity" in capsys.readouterr().err
