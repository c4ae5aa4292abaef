"""Channel coupling against groups worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from channel_nets import NETS, Attention, Lambda, conv, model, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edgecnn.graph.channels import Coupling, Group, couple_channels, macs_and_params
from edgecnn.graph.channels.union import NONE, Classes
from edgecnn.graph.channels.values import along, compact, tidy, varying


def coupled(net: nn.Module) -> Coupling:
    return couple_channels(model(net))


def group(coupling: Coupling, tensor: str, dim: int = 0) -> Group:
    """The one group that lives in a dimension of a tensor."""
    found = [g for g in coupling.groups if any((m.tensor, m.dim) == (tensor, dim) for m in g.members)]
    assert len(found) == 1, [g.name for g in found]
    return found[0]


def positions(found: Group, tensor: str, dim: int) -> tuple[tuple[int, ...], ...]:
    return next(m.positions for m in found.members if (m.tensor, m.dim) == (tensor, dim))


def test_residual_ties_both_branches() -> None:
    coupling = coupled(NETS["residual"][0]())
    outer, inner = group(coupling, "stem.weight"), group(coupling, "a.weight")
    assert {(m.tensor, m.dim, m.role) for m in outer.members} == {
        ("stem.weight", 0, "out"),
        ("stem.bias", 0, "out"),
        ("b.weight", 0, "out"),
        ("b.bias", 0, "out"),
        ("norm.weight", 0, "norm"),
        ("norm.bias", 0, "norm"),
        ("norm.running_mean", 0, "norm"),
        ("norm.running_var", 0, "norm"),
        ("a.weight", 1, "in"),
        ("head.weight", 1, "in"),
    }
    assert outer.size == 8
    assert outer.name == "stem"
    assert {(m.tensor, m.dim) for m in inner.members} == {("a.weight", 0), ("a.bias", 0), ("b.weight", 1)}
    assert positions(inner, "b.weight", 1) == ((0,), (1,), (2,), (3,), (4,), (5,))


def test_output_layer_is_frozen_with_its_reason() -> None:
    coupling = coupled(Lambda(lambda s, x: x))
    head = group(coupling, "head.weight")
    assert head.frozen == "is an output of the network"
    assert head.size == 5
    assert coupling.frozen_reasons == {
        "is an output of the network": 5
    }  # the bias; the weight shrinks along 1
    assert coupling.params == (3 * 9 * 8 + 8) + 16 + (8 * 5 + 5)
    assert coupling.prunable_fraction == pytest.approx(1 - 5 / coupling.params)


def test_concat_shifts_positions() -> None:
    """8 stem channels beside 4 of a, read by b: a's lie at 8 to 11."""
    coupling = coupled(NETS["concat"][0]())
    assert positions(group(coupling, "a.weight"), "b.weight", 1) == ((8,), (9,), (10,), (11,))


def test_flatten_takes_all_pixels_of_a_channel() -> None:
    """2x2 pixels of 8 channels, flattened: channel c is read at 4 c to 4 c + 3."""
    coupling = coupled(NETS["flatten"][0]())
    read = positions(group(coupling, "stem.weight"), "a.weight", 1)
    assert read[0] == (0, 1, 2, 3)
    assert read[7] == (28, 29, 30, 31)


def test_shuffle_ties_positions_of_both_halves() -> None:
    """view(2, 4) of [stem 0-3, a 0-3] ties stem j with a j."""

    def shuffled(s: Lambda, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = torch.cat([x, s.a(x)], 1).view(n, 2, c, h, w).transpose(1, 2).reshape(n, 2 * c, h, w)
        return s.b(y)

    coupling = coupled(Lambda(shuffled, 4, a=conv(4, 4), b=conv(8, 4)))
    tied = group(coupling, "stem.weight")
    assert positions(tied, "a.weight", 0) == ((0,), (1,), (2,), (3,))
    assert positions(tied, "b.weight", 1) == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_option_a_shortcut_ties_only_the_middle() -> None:
    """8 channels padded by 4 on both sides meet a's 16: a's 4 to 11 are the stem's, the others a's own."""
    coupling = coupled(NETS["option a"][0]())
    stem = group(coupling, "stem.weight")
    assert positions(stem, "a.weight", 0) == tuple((i,) for i in range(4, 12))
    own = [g for g in coupling.groups if g.name == "a"]
    assert [positions(g, "a.weight", 0) for g in own] == [tuple((i,) for i in (0, 1, 2, 3, 12, 13, 14, 15))]


def test_heads_go_whole() -> None:
    """4 heads of 2 channels: head 1 is rows 2, 3 of q, 10, 11 of k, 18, 19 of v, and columns 2, 3 of the
    output.
    """
    coupling = coupled(NETS["fused attention"][0]())
    heads = group(coupling, "a.qkv.weight")
    assert heads.size == 4
    assert positions(heads, "a.qkv.weight", 0)[1] == (2, 3, 10, 11, 18, 19)
    assert positions(heads, "a.out.weight", 1)[1] == (2, 3)


def test_bias_table_follows_the_heads() -> None:
    coupling = coupled(NETS["bias table"][0]())
    assert positions(group(coupling, "a.qkv.weight"), "a.table", 1) == ((0,), (1,), (2,), (3,))


def test_grouped_convolution_by_position() -> None:
    """2 groups, 4 in, 6 out each: input j goes with j + 4, output i with i + 6."""
    coupling = coupled(NETS["grouped"][0]())
    assert positions(group(coupling, "stem.weight"), "stem.weight", 0) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert positions(group(coupling, "stem.weight"), "a.weight", 1) == ((0,), (1,), (2,), (3,))
    assert positions(group(coupling, "a.weight"), "a.weight", 0)[5] == (5, 11)


def test_grouped_convolution_by_group() -> None:
    """8 groups of 2 in and 2 out: group k is stem channels 2 k, 2 k + 1 and the same outputs."""
    found = group(coupled(NETS["whole groups"][0]()), "stem.weight")
    assert found.size == 8
    assert positions(found, "stem.weight", 0)[3] == (6, 7)
    assert positions(found, "a.weight", 0)[3] == (6, 7)
    assert not any((m.tensor, m.dim) == ("a.weight", 1) for m in found.members)


def test_channel_multiplier_takes_its_outputs_along() -> None:
    found = group(coupled(NETS["multiplier"][0]()), "stem.weight")
    assert positions(found, "a.weight", 0)[2] == (4, 5)
    assert positions(found, "b.weight", 1)[2] == (4, 5)


def test_softmax_over_channels_freezes_them_and_says_so() -> None:
    coupling = coupled(NETS["channel softmax"][0]())
    assert group(coupling, "a.weight").frozen == "softmax runs along the channels"
    assert (
        coupling.frozen_reasons["softmax runs along the channels"] == 6
    )  # the bias; the weight shrinks along 1


def test_unknown_operator_freezes_what_it_reads() -> None:
    coupling = coupled(Lambda(lambda s, x: s.a(torch.cumsum(x, 1)), a=conv(8, 6)))
    assert "aten.cumsum" in str(group(coupling, "stem.weight").frozen)
    assert group(coupling, "a.weight").frozen is None


def test_weights_computed_from_the_image_freeze_their_layer() -> None:
    def dynamic(s: Lambda, x: Tensor) -> Tensor:
        kernel = s.a(x.mean((0, 2, 3), keepdim=True)).reshape(8, 1, 1, 1)
        return F.conv2d(x, kernel, groups=8)

    coupling = coupled(Lambda(dynamic, a=conv(8, 8)))
    assert group(coupling, "stem.weight").frozen == "is convolved with weights computed from the image"


def test_several_outputs_are_all_frozen() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 6, 3), conv(6, 4), conv(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.relu(self.a(x))
            return self.b(y), self.c(y)

    coupling = coupled(Two())
    assert group(coupling, "a.weight").frozen is None
    assert (
        group(coupling, "b.weight").frozen
        == group(coupling, "c.weight").frozen
        == "is an output of the network"
    )


def test_one_channel_maps_stay() -> None:
    """CBAM's map of one channel is all there is of its layer; what it multiplies can be cut."""
    coupling = coupled(NETS["cbam"][0]())
    assert not any(m.tensor == "a.weight" and m.dim == 0 for g in coupling.groups for m in g.members)
    assert next(layer for layer in coupling.layers if layer.weight == "a.weight").output_channels == (-1,)
    assert group(coupling, "stem.weight").frozen is None


def test_one_channel_beside_others_stays() -> None:
    """The only channel of a layer is read next to eight others, which can be cut; it cannot."""
    net = Lambda(lambda s, x: s.b(torch.cat([x, s.a(x)], 1)), a=conv(8, 1), b=conv(9, 4))
    coupling = coupled(net)
    last = [g for g in coupling.groups if any((m.tensor, m.dim) == ("b.weight", 1) for m in g.members)][-1]
    assert positions(last, "b.weight", 1) == ((8,),)
    assert str(last.frozen).startswith("is all there is of a layer (a ")


def test_inexact_reasons_name_the_operator() -> None:
    coupling = coupled(NETS["channels last"][0]())
    assert [reason for _, reason, _ in coupling.inexact] == [
        "layer_norm takes its statistics over the channels"
    ]
    assert coupling.inexact[0][2] == set(group(coupling, "stem.weight").channels)


@pytest.mark.parametrize("name", NETS)
def test_groups_are_a_partition_and_cover_the_layers(name: str) -> None:
    coupling = coupled(NETS[name][0]())
    channels = [c for g in coupling.groups for c in g.channels]
    assert len(channels) == len(set(channels))
    cuttable = {c for g in coupling.groups if g.frozen is None for c in g.channels}
    for layer in coupling.layers:
        assert {c for c in (*layer.output_channels, *layer.input_channels) if c >= 0} <= cuttable
    for found in coupling.groups:
        for member in found.members:
            assert len(member.positions) == found.size
            size = coupling.tensors[member.tensor].shape[member.dim]
            assert all(0 <= i < size for unit in member.positions for i in unit)
    assert 0.0 <= coupling.prunable_fraction <= 1.0
    assert sum(coupling.frozen_reasons.values()) == coupling.params - coupling.prunable_params


def test_macs_of_heads_and_token_mixing() -> None:
    """Cutting 1 of 4 heads takes a quarter of the attention's layers along their head dimension."""
    net = Lambda(lambda s, x: s.a(tokens(x)), a=Attention(8, 4))
    coupling = coupled(net)
    before = macs_and_params(coupling, ())[0]
    after = macs_and_params(coupling, {group(coupling, "a.qkv.weight").channels[0]})[0]
    assert before - after == 64 * 8 * 6 + 64 * 2 * 8


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60))
def test_classes_join_as_sets_do(pairs: list[tuple[int, int]]) -> None:
    classes = Classes()
    ids = classes.issue(30)
    expected = {i: {i} for i in range(30)}
    for a, b in pairs:
        union = expected[a] | expected[b]
        for i in union:
            expected[i] = union
    half = len(pairs) // 2
    for part in (pairs[:half], pairs[half:]):
        classes.join(np.array([a for a, _ in part], np.int64), np.array([b for _, b in part], np.int64))
    assert classes.find(ids).tolist() == [min(expected[i]) for i in range(30)]
    assert classes.find(np.array([NONE])).tolist() == [NONE]


def test_ids_of_a_feature_map_take_no_room() -> None:
    ids = along(torch.arange(512), 1, (1, 512, 56, 56))
    assert compact(ids).numel() == 512
    assert varying(ids) == (1,)
    assert varying(tidy(torch.ones(3, 4, dtype=torch.int64))) == ()
