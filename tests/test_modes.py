"""Training and evaluation mode of exported graphs, and BatchNorm statistics."""

from __future__ import annotations

import nets
import numpy as np
import pytest
import torch
from torch import nn

from edgecnn.graph.modes import batch_norm_nodes, reestimate_batch_norm, set_training
from edgecnn.graph.nodes import copy_graph
from edgecnn.train.network import TrainingNetwork


def graph_of(net: nn.Module, *shape: int) -> torch.fx.GraphModule:
    return torch.export.export(net.eval(), (torch.randn(*shape),)).module(check_guards=False)


def test_a_training_graph_computes_what_the_module_computes_in_training() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, affine=False))
    graph = graph_of(net, 4, 3, 8, 8)
    net.train()
    set_training(graph, True)
    for seed in range(3):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(graph(x), net(x))
    net.eval()
    set_training(graph, False)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(graph(x), net(x))
    for name, buffer in net.named_buffers():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(graph.get_buffer(name), buffer)


def test_dropout_is_at_work_in_training_only() -> None:
    graph = graph_of(nn.Sequential(nn.Flatten(), nn.Dropout(0.5)), 2, 1, 8, 8)
    x = torch.ones(2, 1, 8, 8)
    assert bool((graph(x) == 1).all())
    set_training(graph, True)
    dropped = graph(x)
    assert {float(v) for v in dropped.unique()} == {0.0, 2.0}
    set_training(graph, False)
    assert bool((graph(x) == 1).all())


def test_a_norm_without_statistics_keeps_to_the_batch() -> None:
    graph = graph_of(nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)), 4, 2, 3, 3)
    x = torch.randn(4, 2, 3, 3)
    expected = graph(x)
    set_training(graph, False)
    torch.testing.assert_close(graph(x), expected)
    assert batch_norm_nodes(graph) == []


def test_statistics_are_the_mean_over_the_batches() -> None:
    graph = graph_of(nn.Sequential(nn.BatchNorm2d(1)), 2, 1, 1, 1)
    batches = [torch.tensor([a, b]).reshape(2, 1, 1, 1) for a, b in ((0.0, 2.0), (3.0, 7.0), (1.0, 1.0))]
    assert reestimate_batch_norm(graph, batches) == 3
    # means 1, 5, 1; unbiased variances 2, 8, 0
    assert float(graph.get_buffer("0.running_mean")) == pytest.approx(7 / 3)
    assert float(graph.get_buffer("0.running_var")) == pytest.approx(10 / 3)
    assert [node.args[5] for node in batch_norm_nodes(graph)] == [False], "the mode is as it was"
    assert [node.args[6] for node in batch_norm_nodes(graph)] == [0.1]


def test_without_batches_or_norms_nothing_changes() -> None:
    graph = graph_of(nn.Sequential(nn.BatchNorm2d(1)), 2, 1, 1, 1)
    assert reestimate_batch_norm(graph, []) == 0
    assert float(graph.get_buffer("0.running_var")) == 1.0
    assert reestimate_batch_norm(graph_of(nn.Conv2d(1, 1, 1), 2, 1, 1, 1), [torch.zeros(2, 1, 1, 1)]) == 0


@pytest.mark.parametrize("name", nets.NETS)
def test_every_small_net_trains(name: str) -> None:
    """Forward and backward in training mode, channels_last, on the copy; the model stays as it was."""
    model = nets.model(name)
    before = {k: v.clone() for k, v in model.graph.state_dict().items()}
    network = TrainingNetwork(model, (), torch.device("cpu"))
    x = torch.from_numpy(nets.images(6)).contiguous(memory_format=torch.channels_last)
    outputs, tapped = network(x)
    assert tapped == {}
    assert len(outputs) == len(model.spec.outputs)
    sum(output.square().mean() for output in outputs).backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in network.parameters.values() if p.grad is not None]
    assert gradients
    assert all(bool(g.isfinite().all()) for g in gradients)
    for key, value in model.graph.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    network.set_training(False)
    fresh = TrainingNetwork(model, (), torch.device("cpu"))
    fresh.set_training(False)
    with torch.no_grad():
        found = [y.numpy() for y in fresh(x)[0]]
    for y, expected in zip(found, nets.outputs_of(model.graph, nets.images(6)), strict=True):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_taps_give_the_values_of_nodes() -> None:
    model = nets.model("residual")
    names = [node.name for node in model.graph.graph.nodes if "relu" in node.name][:2]
    network = TrainingNetwork(copy_model(model), tuple(names), torch.device("cpu"))
    network.set_training(False)
    _, tapped = network(torch.from_numpy(nets.images(2)))
    assert list(tapped) == names
    recorded: dict[str, torch.Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            recorded[n.name] = super().run_node(n)
            return recorded[n.name]

    with torch.no_grad():
        Recorder(model.graph).run(torch.from_numpy(nets.images(2)))
    for name in names:
        torch.testing.assert_close(tapped[name], recorded[name])


def copy_model(model: nets.Model) -> nets.Model:
    return model.with_graph(copy_graph(model.graph))
