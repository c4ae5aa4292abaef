"""The pass sparsify: which weights are zero, what it honestly says, and that int8 keeps the zeros."""

from __future__ import annotations

import gzip

import nets
import numpy as np
import prune_nets
import pytest
import torch
from torch import nn

from edgecnn.errors import PassError, RecipeError
from edgecnn.export.onnx import to_onnx
from edgecnn.export.tflite import to_tflite
from edgecnn.graph.build import build_program
from edgecnn.model import Model
from edgecnn.pipeline import PassContext
from edgecnn.prune.masks import with_masks, without_masks
from edgecnn.prune.sparsity import Sparsify, gzip_bytes, keep_largest, n_of_m_mask, parse_pattern


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.graph.named_parameters() if p.dim() >= 2}


def test_the_smallest_weights_of_all_layers_go() -> None:
    a, b = torch.tensor([[1.0, -4.0]]), torch.tensor([[0.5, 3.0], [-0.1, 2.0]])
    keep_largest([a, b], 0.5)
    assert a.tolist() == [[0.0, -4.0]]
    assert b.tolist() == [[0.0, 3.0], [0.0, 2.0]]


def test_n_of_m_by_hand() -> None:
    w = torch.tensor([[1.0, -3.0, 2.0, 0.0, 5.0, 5.0, 5.0, 5.0]])
    assert n_of_m_mask(w, 1, 2, 4).tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    along_first = n_of_m_mask(w.T.contiguous(), 0, 1, 4)
    assert along_first.flatten().tolist() == [0, 1, 0, 0, 1, 0, 0, 0]


def test_half_of_the_inner_weights_are_zero() -> None:
    model, ctx = nets.model("residual"), nets.context()
    after = Sparsify(0.5).run(model, ctx)
    before, found = weights(model), weights(after)
    inner = [n for n in found if n not in ("stem.0.weight", "last.2.weight")]
    zeros = sum(int((found[n] == 0).sum()) for n in inner)
    assert zeros == sum(found[n].numel() for n in inner) // 2
    for name in found:
        kept = found[name] != 0
        assert torch.equal(found[name][kept], before[name][kept])
    assert ctx.records[0]["dense"] == ["stem.0.weight", "last.2.weight"]


def test_two_of_four_along_the_input_channels() -> None:
    ctx = nets.context()
    found = weights(Sparsify(pattern="2:4").run(nets.model("residual"), ctx))
    for name, weight in found.items():
        if weight.shape[1] % 4 == 0:
            blocks = weight.movedim(1, -1).reshape(-1, 4)
            assert ((blocks != 0).sum(dim=1) == 2).all(), name
    assert ctx.records[0]["dense"] == ["stem.0.weight"]  # three input channels


@pytest.mark.parametrize("step", [Sparsify(0.6, skip_ends=False), Sparsify(pattern="1:4")])
@pytest.mark.parametrize("name", ["residual", "transposed", "mlp"])
def test_zeros_survive_int8_in_every_layer(name: str, step: Sparsify) -> None:
    """Weights are symmetric: a zero is the integer 0, whatever batch norm and scale are folded in."""
    sparse = step.run(nets.model(name), nets.context())
    program = build_program(nets.STEP.run(nets.prepare(sparse), nets.context()))
    floats = [w for w in weights(sparse).values() if w.dim() in (2, 4)]
    integers = [
        program.tensors[op.inputs[1]].data
        for op in program.ops
        if op.kind in ("conv2d", "conv_transpose2d", "linear")
    ]
    checked = 0
    for weight in floats:
        same = [q for q in integers if q.shape == tuple(weight.shape)]
        assert any((q[weight.numpy() == 0] == 0).all() for q in same)
        checked += int((weight == 0).sum())
    assert checked > 0


def test_files_shrink_only_once_they_are_compressed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
    dense = nets.as_model(nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval())
    sparse = Sparsify(0.8).run(dense, nets.context())
    sizes = []
    for model in (dense, sparse):
        program = build_program(nets.STEP.run(nets.prepare(model), nets.context()))
        files = (to_onnx(program).SerializeToString(), to_tflite(program).data)
        sizes.append([(len(f), len(gzip.compress(f, 6))) for f in files])
    for (plain, packed), (sparse_plain, sparse_packed) in zip(*sizes, strict=True):
        assert abs(sparse_plain - plain) < 0.01 * plain
        assert sparse_packed < 0.6 * packed


def test_training_keeps_the_zeros() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 64)
    data = prune_nets.Labelled(nets.images(64, 1), labels)
    base = nets.context()
    context = PassContext(
        base.calibration, base.calibration_indices, train=data, train_indices=tuple(range(64))
    )
    model = nets.model("residual")
    untrained = weights(Sparsify(pattern="2:4").run(model, base))
    after = Sparsify(pattern="2:4", epochs=2).run(model, context)
    found = weights(after)
    for name, weight in found.items():
        assert torch.equal(weight != 0, untrained[name] != 0), name
    assert any(not torch.equal(found[name], untrained[name]) for name in found)
    assert {n for n, _ in after.graph.named_buffers()} == {n for n, _ in model.graph.named_buffers()}
    assert len(after.graph.graph.nodes) == len(model.graph.graph.nodes)
    with pytest.raises(PassError, match=r"sparsify: training needs labelled training images, found none"):
        Sparsify(epochs=1).run(model, base)


def test_masks_come_and_go_without_a_trace() -> None:
    model = Sparsify(0.5).run(nets.model("residual"), nets.context())
    names = [name for name, weight in weights(model).items() if (weight == 0).any()]
    masked = with_masks(model, names)
    x = nets.held_out(4)
    np.testing.assert_array_equal(nets.outputs_of(masked.graph, x)[0], nets.outputs_of(model.graph, x)[0])
    back = without_masks(masked)
    for name, value in model.graph.state_dict().items():
        assert torch.equal(back.graph.state_dict()[name], value)


def test_the_warning_is_honest() -> None:
    after = Sparsify(0.5).run(nets.model("residual"), nets.context())
    (message,) = [w for w in after.warnings if w.startswith("sparsify")]
    assert "ONNX Runtime and LiteRT gain neither speed nor file size" in message
    assert "gzip takes the int8 weights from" in message


def test_gzip_counts_zeros_as_nearly_nothing() -> None:
    rng = np.random.default_rng(0)
    dense = torch.from_numpy(rng.standard_normal((64, 64)).astype(np.float32))
    assert gzip_bytes([dense]) > 3000
    assert gzip_bytes([torch.zeros(64, 64)]) < 100


def test_the_network_given_stays_as_it_was() -> None:
    model = nets.model("residual")
    before = {name: value.clone() for name, value in model.graph.state_dict().items()}
    Sparsify(0.9).run(model, nets.context())
    for name, value in model.graph.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Sparsify(1.0), r"sparsity is 1, expected 0 <= sparsity < 1"),
        (Sparsify(-0.1), r"sparsity is -0\.1, expected 0 <= sparsity < 1"),
        (
            Sparsify(pattern="4:2"),
            r"pattern is '4:2', expected 'unstructured' or 'N:M' with 0 < N < M, such as '2:4'",
        ),
        (Sparsify(pattern="block"), r"pattern is 'block', expected 'unstructured' or 'N:M'"),
        (Sparsify(num_samples=0), r"num_samples is 0, expected at least 1"),
    ],
)
def test_parameters_out_of_range(step: Sparsify, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        step.check()


def test_what_cannot_be_sparse_is_refused() -> None:
    with pytest.raises(PassError, match=r"is quantized .*put sparsify ahead of quantize_static"):
        Sparsify().requires(nets.quantized("residual"))
    with pytest.raises(PassError, match=r"sparsify changed the shape of a parameter"):
        Sparsify().ensures(nets.model("residual"), nets.model("mlp"))
    assert parse_pattern("4:8") == (4, 8)
