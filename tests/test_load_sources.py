"""Every kind of source becomes the same Model; files are recognised by content."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgecnn.errors import LoadError, StateDictMismatchError
from edgecnn.load import LoadOptions, load_model, save_pt2

LENET = "examples.lenet5:LeNet5"
SHAPE = (1, 32, 32)


@pytest.fixture(autouse=True)
def from_project_root(monkeypatch: pytest.MonkeyPatch, examples_dir: Path) -> None:
    monkeypatch.chdir(examples_dir.parent)


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    from examples.lenet5 import LeNet5

    torch.manual_seed(3)
    return LeNet5()


def scores(net: Any, seed: int = 0, batch: int = 2) -> np.ndarray:
    x = torch.randn((batch, *SHAPE), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return net(x).numpy()


def test_module_becomes_a_model(lenet: nn.Module) -> None:
    model = load_model(lenet, LoadOptions(input_shape=SHAPE))
    assert [(t.name, t.shape, t.dtype) for t in model.spec.inputs] == [("image", (None, *SHAPE), "float32")]
    assert [(t.name, t.shape) for t in model.spec.outputs] == [("output", (None, 10))]
    assert (model.spec.task, model.spec.name, model.fixed_batch, model.warnings) == (
        "classification", "lenet5", None, ())  # fmt: skip
    assert lenet.training, "the user's module is left as it was"
    np.testing.assert_allclose(scores(model.graph), scores(lenet), atol=1e-5)
    for batch in (1, 5):
        assert scores(model.graph, batch=batch).shape == (batch, 10)


def test_graph_has_its_own_weights(lenet: nn.Module) -> None:
    model = load_model(lenet, LoadOptions(input_shape=SHAPE))
    before = scores(model.graph)
    with torch.no_grad():
        lenet.features[0].weight.add_(1.0)
    np.testing.assert_array_equal(scores(model.graph), before)
    with torch.no_grad():
        lenet.features[0].weight.sub_(1.0)
    assert not any(p.requires_grad for p in model.graph.parameters())
    assert all(p.requires_grad for p in lenet.parameters())


def test_model_passes_through(lenet: nn.Module) -> None:
    model = load_model(lenet, LoadOptions(input_shape=SHAPE))
    assert load_model(model) is model


WRAPPINGS = {
    "plain.pt": lambda s: s,
    "nested.pth": lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {}, "lr": 0.1}},
    "model.tar": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)},
    "ema.bin": lambda s: {"ema": {"state_dict": s}},
    "parallel.th": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "compiled.pt": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_state_dict_is_found_where_training_scripts_put_it(
    lenet: nn.Module, tmp_path: Path, name: str
) -> None:
    torch.save(WRAPPINGS[name](lenet.state_dict()), tmp_path / name)
    model = load_model(tmp_path / name, LoadOptions(arch=LENET, input_shape=SHAPE))
    np.testing.assert_allclose(scores(model.graph), scores(lenet), atol=1e-5)
    assert model.warnings == ()


def test_legacy_pickle_and_safetensors(lenet: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.save(lenet.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(lenet.state_dict(), tmp_path / "wrong_extension.pt")
    for name in ("old.pt", "wrong_extension.pt"):
        model = load_model(LENET, LoadOptions(weights=tmp_path / name, input_shape=SHAPE))
        np.testing.assert_allclose(scores(model.graph), scores(lenet), atol=1e-5)


def test_lightning_prefix_is_removed_with_a_warning(lenet: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": {f"net.{k}": v for k, v in lenet.state_dict().items()}}, tmp_path / "x.ckpt")
    model = load_model(tmp_path / "x.ckpt", LoadOptions(arch=LENET, input_shape=SHAPE))
    assert "removed the prefix 'net.'" in model.warnings[0]
    np.testing.assert_allclose(scores(model.graph), scores(lenet), atol=1e-5)


def test_random_weights_are_said_to_be_random_and_seeded() -> None:
    first, same, other = (load_model(LENET, LoadOptions(input_shape=SHAPE, seed=s)) for s in (1, 1, 2))
    assert first.warnings == (
        f"{LENET}: the weights are what the factory returned; if it loads none, give --weights FILE",
    )
    np.testing.assert_array_equal(scores(first.graph), scores(same.graph))
    assert not np.array_equal(scores(first.graph), scores(other.graph))


def test_pt2_round_trip_keeps_spec_and_values(lenet: nn.Module, tmp_path: Path) -> None:
    from dataclasses import replace

    model = load_model(lenet, LoadOptions(input_shape=SHAPE, preprocess="symmetric"))
    model = replace(model, spec=replace(model.spec, name="digits", labels=tuple("0123456789")))
    save_pt2(model, tmp_path / "a.pt2")
    again = load_model(tmp_path / "a.pt2")
    assert again.spec == model.spec
    assert again.fixed_batch is None
    np.testing.assert_array_equal(scores(again.graph, batch=1), scores(model.graph, batch=1))
    (tmp_path / "renamed.dat").write_bytes((tmp_path / "a.pt2").read_bytes())
    assert load_model(tmp_path / "renamed.dat").spec == model.spec
    save_pt2(again, tmp_path / "b.pt2")
    assert load_model(tmp_path / "b.pt2").spec == model.spec
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt2", "b.pt2", "renamed.dat"]


def test_exported_program_without_our_spec(lenet: nn.Module, tmp_path: Path) -> None:
    batch = torch.export.Dim("n", min=1, max=64)
    program = torch.export.export(lenet.eval(), (torch.zeros(2, *SHAPE),), dynamic_shapes=({0: batch},))
    lenet.train()
    torch.export.save(program, tmp_path / "net.pt2")
    for model in (load_model(program), load_model(tmp_path / "net.pt2")):
        assert (model.fixed_batch, model.spec.inputs[0].name) == (None, "image")
        np.testing.assert_allclose(scores(model.graph, batch=1), scores(lenet, batch=1), atol=1e-5)
        assert model.spec.preprocess.source == "default: unit"


def test_quantized_graph_round_trip(tmp_path: Path) -> None:
    import torch.ao.quantization.fx._decomposed

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.arange(-6, 6, dtype=torch.int8).reshape(4, 3, 1, 1))
            self.register_buffer("b", torch.arange(4, dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ops = torch.ops.quantized_decomposed
            q = ops.quantize_per_tensor.default(x, 0.1, 3, -128, 127, torch.int8)
            x = ops.dequantize_per_tensor.default(q, 0.1, 3, -128, 127, torch.int8)
            w = ops.dequantize_per_tensor.default(self.w, 0.5, 0, -127, 127, torch.int8)
            b = ops.dequantize_per_tensor.default(self.b, 0.05, 0, -(2**31), 2**31 - 1, torch.int32)
            return torch.nn.functional.conv2d(x, w, b)

    model = load_model(Quantized(), LoadOptions(input_shape=(3, 4, 4)))
    save_pt2(model, tmp_path / "q.pt2")
    again = load_model(tmp_path / "q.pt2")
    buffers = dict(again.graph.named_buffers())
    assert (buffers["w"].dtype, buffers["b"].dtype) == (torch.int8, torch.int32)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(again.graph(x), model.graph(x))


def test_shipped_example() -> None:
    model = load_model("examples/lenet5_digits.pt2")
    assert model.spec.labels == tuple("0123456789")
    assert (model.spec.preprocess.channel_order, model.spec.preprocess.size) == ("gray", (32, 32))
    weights = "examples/lenet5_digits.safetensors"
    other = load_model(weights, LoadOptions(arch=LENET, input_shape=SHAPE))
    np.testing.assert_allclose(scores(model.graph), scores(other.graph), atol=1e-5)


def test_fewer_classes_than_the_package_default(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.save(models.squeezenet1_1(weights=None, num_classes=7).state_dict(), tmp_path / "w.pt")
    options = LoadOptions(arch="torchvision:squeezenet1_1", input_shape=(3, 64, 64))
    assert load_model(tmp_path / "w.pt", options).spec.outputs[0].shape == (None, 7)


def test_real_weights(data_dir: Path) -> None:
    pytest.importorskip("torchvision")
    model = load_model(
        data_dir / "weights" / "squeezenet1_1.safetensors",
        LoadOptions(arch="torchvision:squeezenet1_1", mean=(0.482, 0.459, 0.408), std=(1 / 255,) * 3),
    )
    assert model.spec.labels is not None
    assert model.spec.labels[:2] == ("tench", "goldfish")
    assert model.spec.preprocess.source == "default: imagenet; user: mean, std"
    assert model.spec.preprocess.resize_short == 256


def test_segmentation_outputs_keep_their_names() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": self.conv(x), "aux": self.conv(x) * 2}

    model = load_model(TwoHeads(), LoadOptions(input_shape=(3, 8, 8)))
    assert [(o.name, o.shape) for o in model.spec.outputs] == [
        ("out", (None, 4, 8, 8)),
        ("aux", (None, 4, 8, 8)),
    ]
    assert model.spec.task == "segmentation"


def test_mismatch_lists_both_sides(lenet: nn.Module, tmp_path: Path) -> None:
    state = dict(lenet.state_dict())
    state["extra.weight"] = torch.zeros(1)
    del state["features.0.bias"]
    state["classifier.5.weight"] = torch.zeros(11, 84)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(StateDictMismatchError) as caught:
        load_model(tmp_path / "w.pt", LoadOptions(arch=LENET, input_shape=SHAPE))
    message = str(caught.value)
    assert "missing in the file: features.0.bias" in message
    assert "not in the network: extra.weight" in message
    assert "classifier.5.weight is (11, 84) in the file, (10, 84) in the network" in message


def test_mismatch_names_a_differing_prefix(lenet: nn.Module, tmp_path: Path) -> None:
    state = {f"backbone.{k}": v for k, v in lenet.state_dict().items() if k != "features.0.bias"}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(StateDictMismatchError, match=r"names in the file begin with 'backbone\.'"):
        load_model(tmp_path / "w.pt", LoadOptions(arch=LENET, input_shape=SHAPE))


def test_weights_without_architecture(lenet: nn.Module, tmp_path: Path) -> None:
    torch.save(lenet.state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        LoadError, match=r"a state dict holds weights but no network.*--arch torchvision:NAME"
    ):
        load_model(tmp_path / "w.pt")
