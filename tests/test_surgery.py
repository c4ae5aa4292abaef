"""Cutting channels: what is left runs, costs what was predicted, and computes what the zeroed network
computes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from channel_nets import NETS, Lambda, conv, model
from torch import fx, nn

from edgecnn.errors import PassError
from edgecnn.graph.channels import Coupling, couple_channels, macs_and_params
from edgecnn.load import load_model
from edgecnn.load.pt2 import save_pt2
from edgecnn.model import Model
from edgecnn.prune.groups import emptiable_values
from edgecnn.prune.surgery import EXACT, cut_channels, inexact_reasons, verify_cut, zero_channels
from edgecnn.prune.surgery_sizes import Kept


def choose(coupling: Coupling, ratio: float = 0.5, seed: int = 0) -> set[int]:
    """A random share of every group that can be cut, never all of it nor all of a value."""
    rng = np.random.default_rng(seed)
    removed: set[int] = set()
    for group in coupling.groups:
        if group.frozen is None:
            count = min(round(group.size * ratio), group.size - 1)
            removed |= set(rng.permutation(group.channels)[:count].tolist())
    for channels in emptiable_values(coupling).values():
        if channels <= removed:
            removed.discard(min(channels))
    return removed


class Recorder(fx.Interpreter):
    def __init__(self, net: Model) -> None:
        super().__init__(net.graph)
        self.values: dict[str, object] = {}

    def run_node(self, n: fx.Node) -> object:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def largest_difference(net: Model, coupling: Coupling, removed: set[int], cut: Model) -> float:
    """Between every activation of the zeroed network, where it is left, and the cut one's, relative to its
    range.
    """
    kept = Kept(coupling, removed)
    x = torch.randn(coupling.batch, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    zeroed, smaller = Recorder(zero_channels(net, coupling, removed)), Recorder(cut)
    with torch.no_grad():
        zeroed.run(x), smaller.run(x)
    worst = 0.0
    for node in net.graph.graph.nodes:
        a, b = zeroed.values[node.name], smaller.values.get(node.name)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.is_floating_point():
            for dim, mask in enumerate(kept.along(node) or ()):
                a = a.index_select(dim, torch.from_numpy(np.flatnonzero(mask)))
            assert a.shape == b.shape, node.name
            worst = max(worst, float((a - b).abs().max()) / (1e-6 + float(a.abs().max())))
    return worst


@pytest.mark.parametrize("name", NETS)
def test_cut_network_computes_what_the_zeroed_one_does(name: str) -> None:
    make, exact = NETS[name]
    torch.manual_seed(0)
    net = model(make())
    coupling = couple_channels(net)
    removed = choose(coupling)
    assert removed
    cut = cut_channels(net, coupling, removed)  # checks shapes, MACs and parameters itself
    error = verify_cut(net, coupling, removed, cut)
    assert bool(inexact_reasons(coupling, removed)) is not exact
    if exact:
        assert error <= EXACT
        assert largest_difference(net, coupling, removed, cut) <= 1e-4
    assert all(p.grad is None for p in cut.graph.parameters())
    for parameter in cut.graph.parameters():
        parameter.requires_grad_(True)
    cut.graph(torch.randn(2, 3, 8, 8)).square().sum().backward()
    used = {str(node.target) for node in cut.graph.graph.nodes if node.op == "get_attr"}
    for key, parameter in cut.graph.named_parameters():
        assert key not in used or parameter.grad is not None, key


def test_nothing_removed_changes_nothing() -> None:
    net = model(NETS["residual"][0]())
    coupling = couple_channels(net)
    cut = cut_channels(net, coupling, ())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(cut.graph(x), net.graph(x))


def test_the_model_is_left_as_it_is() -> None:
    net = model(NETS["residual"][0]())
    before = {k: v.clone() for k, v in net.graph.state_dict().items()}
    code = net.graph.code
    coupling = couple_channels(net)
    cut_channels(net, coupling, choose(coupling))
    zero_channels(net, coupling, choose(coupling))
    assert net.graph.code == code
    assert all(torch.equal(v, before[k]) for k, v in net.graph.state_dict().items())


def test_removing_all_channels_of_a_layer_is_refused() -> None:
    net = model(Lambda(lambda s, x: s.b(s.a(x)), a=conv(8, 6), b=conv(6, 4)))
    coupling = couple_channels(net)
    inner = next(g for g in coupling.groups if g.name == "a")
    with pytest.raises(PassError, match=r"the cut leaves nothing of a\.weight"):
        cut_channels(net, coupling, inner.channels)


def test_output_channels_are_refused() -> None:
    net = model(Lambda(lambda s, x: x))
    coupling = couple_channels(net)
    head = next(g for g in coupling.groups if g.name == "head")
    with pytest.raises(PassError, match=r"of head cannot be cut: it is an output of the network"):
        cut_channels(net, coupling, head.channels[:1])


def test_unknown_channels_are_refused() -> None:
    net = model(Lambda(lambda s, x: x))
    with pytest.raises(PassError, match=r"channel 4711 is in no group of this network"):
        cut_channels(net, couple_channels(net), {4711})


def test_predicted_cost_by_hand() -> None:
    """Stem 3x3 from 3 to 8 on 8x8 pixels, conv 1x1 from 8 to 6, head from 6 to 5; 2 of 8 and 3 of 6
    channels go.
    """
    net = model(Lambda(lambda s, x: s.a(x), a=conv(8, 6)))
    coupling = couple_channels(net)
    assert macs_and_params(coupling, ()) == (
        64 * 3 * 9 * 8 + 64 * 8 * 6 + 6 * 5,
        (3 * 9 * 8 + 8) + 2 * 8 + (8 * 6 + 6) + (6 * 5 + 5),
    )
    stem, inner = (next(g for g in coupling.groups if g.name == n) for n in ("stem", "a"))
    removed = {*stem.channels[:2], *inner.channels[:3]}
    assert macs_and_params(coupling, removed) == (
        64 * 3 * 9 * 6 + 64 * 6 * 3 + 3 * 5,
        (3 * 9 * 6 + 6) + 2 * 6 + (6 * 3 + 3) + (3 * 5 + 5),
    )
    cut = cut_channels(net, coupling, removed)
    assert sum(p.numel() for p in cut.graph.parameters()) == (3 * 9 * 6 + 6) + 12 + 21 + 20


def test_the_right_rows_are_kept() -> None:
    net = model(Lambda(lambda s, x: s.a(x), a=conv(8, 6)))
    coupling = couple_channels(net)
    stem = next(g for g in coupling.groups if g.name == "stem")
    cut = cut_channels(net, coupling, {stem.channels[0], stem.channels[5]})
    kept = [1, 2, 3, 4, 6, 7]
    assert torch.equal(cut.graph.stem.weight, net.graph.stem.weight[kept])
    assert torch.equal(cut.graph.norm.running_var, net.graph.norm.running_var[kept])
    assert torch.equal(cut.graph.a.weight, net.graph.a.weight[:, kept])


@pytest.mark.parametrize("name", ["residual", "option a", "shuffle", "grouped", "fused attention", "split"])
def test_cut_network_survives_saving(name: str, tmp_path: object) -> None:
    net = model(NETS[name][0]())
    coupling = couple_channels(net)
    cut = cut_channels(net, coupling, choose(coupling))
    path = f"{tmp_path}/cut.pt2"
    save_pt2(cut, path)
    again = load_model(path)
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(again.graph(x), cut.graph(x))


def test_weights_keep_whether_they_are_trained() -> None:
    net = model(NETS["residual"][0]())
    for parameter in net.graph.parameters():
        parameter.requires_grad_(True)
    coupling = couple_channels(net)
    cut = cut_channels(net, coupling, choose(coupling))
    assert all(p.requires_grad and isinstance(p, nn.Parameter) for p in cut.graph.parameters())


class SliceOfOneSource(nn.Module):
    """A slice that reads channels of one group only, while its source has others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(3, 4)
        self.head = nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(torch.cat([both, both[:, 1:3]], 1).mean((2, 3)))


def test_a_value_without_channels_is_refused() -> None:
    net = model(SliceOfOneSource())
    coupling = couple_channels(net)
    (sliced,) = (c for n, c in emptiable_values(coupling).items() if n.startswith("slice"))
    assert len(sliced) == 2
    cut_channels(net, coupling, sliced - {min(sliced)})
    with pytest.raises(PassError, match="the cut leaves nothing of the value slice"):
        cut_channels(net, coupling, sliced)
