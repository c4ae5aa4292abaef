"""`inspect --int8`: each finding on a network that is made to have it, and nothing on one that has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from edgecnn.cli.main import main
from edgecnn.devices.capability import ACTIVATION_DTYPES
from edgecnn.devices.kernels import KERNELS, kernels_for
from edgecnn.diagnosis.letter import diagnose
from edgecnn.errors import DeviceError
from edgecnn.load import LoadOptions

SIZE = (3, 16, 16)
ROOT = Path(__file__).parent.parent


def block(c_in: int, c_out: int, act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), act or nn.ReLU()
    )


class Gated(nn.Module):
    """One hard-swish, one gate, one BatchNorm ahead of its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16, nn.Hardswish())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.late = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.late(x * self.squeeze(x)).mean((2, 3))


class Joined(nn.Module):
    """Boxes a hundred times as wide as the scores, in one concat; a difference; a bilinear resize."""

    def __init__(self, scale: float = 100.0) -> None:
        super().__init__()
        self.boxes, self.scores = block(3, 16), block(3, 16)
        with torch.no_grad():
            self.boxes[1].weight.fill_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.boxes(x), self.scores(x)], 1)
        finer = nn.functional.interpolate(both, scale_factor=2, mode="bilinear")
        return finer - torch.sigmoid(finer)


def findings(module: nn.Module, **options: Any) -> dict[str, dict[str, Any]]:
    found = diagnose(module.eval(), LoadOptions(input_shape=SIZE), **options)
    return {entry["check"]: entry for entry in found["findings"]}


def test_activations_gates_and_lone_batch_norms_are_named() -> None:
    found = findings(Gated())
    assert found["swish"]["layers"] == ["stem.2"]
    assert "decompose_activations" in found["swish"]["action"]
    assert found["squeeze_excitation"]["title"] == "1 squeeze-and-excitation gates"
    assert found["batch_norm_alone"]["layers"] == ["late.0"]
    assert "float_between_int8" not in found


def test_mismatched_ranges_of_a_concat_from_batch_norm_and_from_data(tmp_path: Path) -> None:
    """Ranges 0..400 and 0..4: 256 / 100 levels are left."""
    (layer,) = findings(Joined())["concat_ranges"]["layers"]
    assert layer.endswith("(2 of 256 levels)")
    assert "concat_ranges" not in findings(Joined(scale=1.0))
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", x=images)
    found = findings(Joined(), data=tmp_path / "x.npz")
    assert "8 images" in found["concat_ranges"]["title"]


def test_what_onnx_runtime_computes_in_float_is_named() -> None:
    found = findings(Joined())["float_between_int8"]
    assert found["title"] == "no int8 kernel in ONNX Runtime: resize, sub"


def test_dead_outlier_and_exploding_channels() -> None:
    net = nn.Sequential(block(3, 16), nn.Conv2d(16, 8, 1))
    norm, last = net[0][1], net[1]
    with torch.no_grad():
        norm.weight[0], norm.bias[0] = 0.1, -1.0  # -1 + 4 * 0.1 is never above zero
        norm.weight[1] = 50.0
        last.weight[3] = 0.0
    found = findings(net)
    assert found["dead_channels"]["layers"] == ["0.2 (1 of 16)"]
    assert found["outlier_channels"]["layers"] == ["0.0 (50x)"]
    assert found["dead_weights"]["layers"] == ["1 (1 of 8)"]
    with torch.no_grad():
        norm.weight[1] = 1e5
    assert findings(net)["exploding"]["level"] == "problem"


def test_channels_and_the_input_depend_on_the_target() -> None:
    net = nn.Sequential(nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 3))
    options = LoadOptions(input_shape=(1, 16, 16))
    x86 = {f["check"] for f in diagnose(net.eval(), options, target="android")["findings"]}
    assert "one_channel_input" in x86
    assert "channel_multiple" not in x86  # 24 is a multiple of 8


@pytest.mark.parametrize(
    ("head", "source"),
    [((), "noise"), ((nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)), "images made up")],
)
def test_no_statistics_and_no_data_is_a_warning(head: tuple[nn.Module, ...], source: str) -> None:
    found = findings(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), *head))
    assert found["no_statistics"]["level"] == "warning"
    assert f"without --data, scales come from {source}" in found["no_statistics"]["why"]
    assert "--data" in found["no_statistics"]["action"]


class Gelu(nn.Module):
    """What stays in float between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(nn.functional.gelu(self.a(x)))


@pytest.mark.parametrize(
    ("net", "kind"),
    [
        (nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), "plain convolutions"),
        (nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU()), "depthwise convolutions"),
        (nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Hardswish()), "swish or gates"),
        (Gelu(), "parts without an int8 form"),
    ],
)
def test_the_expected_speed_is_that_of_networks_alike(net: nn.Module, kind: str) -> None:
    """The figures must be those of docs/benchmarks.md: lowest and highest of the class there."""
    speedup = diagnose(net.eval(), LoadOptions(input_shape=SIZE))["speedup"]
    assert speedup["class"] == kind
    names = {"MobileNetV3": "MobileNetV3-small", "RegNetY": "RegNetY-400MF"}
    rows = (ROOT / "docs" / "benchmarks.md").read_text().partition("| two threads |")[2]
    rows = (ROOT / "docs" / "benchmarks.md").read_text()[: -len(rows)] + rows.partition("| one thread |")[2]
    for name in speedup["like"].partition(", the one")[0].split(", "):
        cells = next(r for r in rows.splitlines() if r.startswith(f"| {names.get(name, name)} |")).split("|")
        ours = {"onnx": 2, "tflite": 4 if len(cells) == 7 else 5}
        for runtime, column in ours.items():
            low, high = speedup[runtime]
            assert low - 0.06 <= float(cells[column].split()[0]) <= high + 0.06, (name, runtime)


def test_size_is_counted_and_speed_is_the_class_measured() -> None:
    found = diagnose(block(3, 16).eval(), LoadOptions(input_shape=SIZE), target="raspberrypi4")
    assert found["size"] == {"float_bytes": 4 * (432 + 16), "int8_bytes": 432 + 8 * 16}
    assert found["speedup"]["class"] == "plain convolutions"
    assert "docs/benchmarks.md" in found["speedup"]["measured"]
    assert any("no int8 dot product" in note for note in found["speedup"]["notes"])
    assert found["kernels"]["instruction"] == "smlal"


def test_an_unknown_operator_is_a_problem_and_not_a_crash() -> None:
    class Cumulative(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(1)

    found = diagnose(Cumulative(), LoadOptions(input_shape=SIZE))
    assert [f["level"] for f in found["findings"] if f["check"] == "unsupported"] == ["problem"]
    assert (found["size"], found["speedup"]) == (None, None)


def test_every_instruction_set_has_kernels() -> None:
    assert set(KERNELS) == set(ACTIVATION_DTYPES)
    assert {isa for isa in KERNELS if not kernels_for(isa).exact} == {"x86-64"}
    with pytest.raises(DeviceError, match="isa is 'mips'"):
        kernels_for("mips")


def test_the_command(examples_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(examples_dir / "lenet5_digits.pt2")
    assert main(["inspect", model, "--int8", "--target", "raspberrypi5"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "lenet5 int8 on raspberrypi5 (aarch64-dotprod)" in text
    assert "sdot" in text
    assert "the first convolution reads one channel" in text
    assert main(["inspect", model, "--int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "lenet5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8", "--groups"], "--int8 goes without --groups"),
        (["--target", "raspberrypi5"], "--target is for --int8"),
        (["--int8", "--target", "raspberry5"], "did you mean 'raspberrypi5'?"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, examples_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(examples_dir / "lenet5_digits.pt2"), *arguments]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
