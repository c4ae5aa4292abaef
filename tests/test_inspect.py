"""`inspect` on networks that can be exported, that cannot, and that are quantized already."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

import small_networks

import edgecnn
from edgecnn.cli.main import main
from edgecnn.compress import CompressResult

LAYERS = [  # (layer, params, macs), counted by hand: c_out c_in k k + c_out; params without bias times pixels
    ("features.0", 156, 6 * 25 * 28 * 28),
    ("features.3", 2416, 16 * 6 * 25 * 10 * 10),
    ("classifier.1", 48120, 400 * 120),
    ("classifier.3", 10164, 120 * 84),
    ("classifier.5", 850, 84 * 10),
]


def test_what_each_layer_costs(examples_dir: Path) -> None:
    found = edgecnn.inspect(examples_dir / "lenet5_digits.pt2")
    layers = [(x["layer"].split(" ")[0], x["params"], x["macs"]) for x in found["layers"] if x["params"]]
    assert layers == LAYERS
    assert found["params"] == sum(params for _, params, _ in LAYERS)
    assert found["macs"] == sum(macs for _, _, macs in LAYERS)
    assert found["size_bytes"] == 4 * found["params"]
    assert found["inputs"] == [{"name": "image", "shape": [None, 1, 32, 32]}]
    assert (found["unsupported"], found["task"]) == ([], "classification")


def test_the_command(examples_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(examples_dir / "lenet5_digits.pt2")
    assert main(["inspect", model]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "lenet5 61.7 k params, 417 k MACs, 247 kB"
    assert lines[1] == "inputs image nx1x32x32"
    assert lines[2] == "outputs output nx10"
    assert main(["inspect", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(edgecnn.inspect(model)))


def test_a_quantized_network_has_parameters_too(lenet_result: CompressResult) -> None:
    found = edgecnn.inspect(lenet_result.artifacts["onnx"].path.with_name("model.pt2"))
    assert found["params"] == 61706
    assert 61706 <= found["size_bytes"] <= 61706 + 3 * (6 + 16 + 120 + 84 + 10)  # biases have four bytes


def test_an_operator_without_a_lowering_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    options = edgecnn.LoadOptions(input_shape=small_networks.SIZE)
    found = edgecnn.inspect(small_networks.CumulativeSum(), options)
    assert found["macs"] is None
    assert found["layers"] == []
    assert found["unsupported"] == ["neck (aten.cumsum.default)"]
    assert main(["inspect", "small_networks:CumulativeSum", "--input-shape", "3x16x16"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "unknown MACs" in text
    assert "warning cannot be exported yet: neck (aten.cumsum.default)" in text
