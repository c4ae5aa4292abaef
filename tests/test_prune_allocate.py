"""From scores to channels: orders, budgets, floors, rounding; hand-written couplings."""

from __future__ import annotations

import nets
import numpy as np
import prune_nets
import pytest

from edgecnn.errors import PassError
from edgecnn.graph.channels import couple_channels, macs_and_params
from edgecnn.prune.allocate import Limits, Target, choose_channels
from edgecnn.prune.cost import CutCost
from edgecnn.prune.groups import cuttable
from edgecnn.prune.importance import Question, score_channels
from edgecnn.prune.sensitivity import Curve, hull, sensitivity_scores

NETS = ["residual", "option_a", "depthwise", "inception", "dense", "unet", "se_conv", "mlp", "splits"]


def scores(*values: list[float]) -> dict[int, np.ndarray]:
    return {i: np.array(v) for i, v in enumerate(values)}


TWO = prune_nets.chain([3, 4, 4, 2], [1200, 160, 80])
"""Groups of channels 0-3 and 4-7. MACs: a channel of the first saves 300 and 40, of the second 40 and 20."""

ASCENDING = scores([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4])


def test_uniform_takes_the_same_share_of_every_group() -> None:
    assert choose_channels(TWO, ASCENDING, Target("ratio", 0.5), "uniform") == {0, 1, 4, 5}
    assert choose_channels(TWO, ASCENDING, Target("ratio", 0.49), "uniform") == {0, 4}
    assert choose_channels(TWO, ASCENDING, Target("ratio", 0.0), "uniform") == frozenset()


def test_global_takes_the_lowest_scores_anywhere() -> None:
    assert choose_channels(TWO, ASCENDING, Target("ratio", 0.5), "global") == {
        4,
        5,
        6,
        0,
    }  # one of each stays


def test_cost_aware_takes_the_least_score_per_mac() -> None:
    """Uncut a channel saves 300 + 40 or 40 + 20 MACs: 1 and 2 against 0.6 to 0.9 are the better bargain."""
    near = scores([1.0, 2.0, 3.0, 4.0], [0.6, 0.7, 0.8, 0.9])
    assert choose_channels(TWO, near, Target("ratio", 0.25), "cost_aware") == {0, 1}
    assert choose_channels(TWO, near, Target("ratio", 0.25), "global") == {4, 5}


def test_what_a_channel_saves_shrinks_as_others_go() -> None:
    cost = CutCost(TWO, "macs")
    assert [cost.saving(0), cost.saving(4)] == pytest.approx([300 + 40, 40 + 20])
    cost.remove(1)
    assert [cost.saving(0), cost.saving(4)] == pytest.approx([300 + 40, 30 + 20])
    cost.remove(5)
    assert [cost.saving(0), cost.saving(4)] == pytest.approx([300 + 30, 30 + 20])
    assert CutCost(TWO, "params").saving(0) == pytest.approx(3 + 4)


@pytest.mark.parametrize("name", NETS)
def test_predicted_savings_are_those_of_a_cut(name: str) -> None:
    """Of every group, taking channels away one by one."""
    coupling = couple_channels(nets.model(name))
    for group in cuttable(coupling):
        cost, gone = CutCost(coupling, "macs"), []
        for channel in group.channels[:-1]:
            before, _ = macs_and_params(coupling, gone)
            saving = cost.saving(channel)
            gone.append(channel)
            after, _ = macs_and_params(coupling, gone)
            assert saving == pytest.approx(before - after, abs=len(coupling.layers))  # MACs are whole numbers
            cost.remove(channel)


@pytest.mark.parametrize("kind", ["macs_left", "params_left"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "cost_aware"])
def test_a_budget_is_met_within_two_percent_on_the_right_side(kind: str, allocation: str) -> None:
    wide = prune_nets.chain([3, 64, 128, 128, 64, 10], [90_000, 800_000, 900_000, 400_000, 640])
    rng = np.random.default_rng(0)
    values = {g.index: rng.random(g.size) for g in wide.groups}
    for budget in (0.9, 0.476, 0.25, 0.1):
        removed = choose_channels(wide, values, Target(kind, budget), allocation)
        index = 0 if kind == "macs_left" else 1
        left = macs_and_params(wide, removed)[index] / macs_and_params(wide, ())[index]
        assert budget * 0.98 <= left <= budget


@pytest.mark.parametrize("allocation", ["uniform", "global", "cost_aware"])
@pytest.mark.parametrize("name", NETS)
def test_real_networks_meet_a_budget(name: str, allocation: str) -> None:
    model = nets.model(name)
    coupling = couple_channels(model)
    values = score_channels(Question(model, coupling), "l2")
    removed = choose_channels(coupling, values, Target("macs_left", 0.6), allocation)
    assert macs_and_params(coupling, removed)[0] <= 0.6 * macs_and_params(coupling, ())[0]
    # nothing could be put back: every group's most valuable removed channel is needed
    for group in cuttable(coupling):
        gone = [c for c in group.channels if c in removed]
        if gone:
            best = max(gone, key=lambda c: values[group.index][group.channels.index(c)])
            assert macs_and_params(coupling, removed - {best})[0] > 0.6 * macs_and_params(coupling, ())[0]


def test_within_a_group_the_lowest_scores_go() -> None:
    model = nets.model("residual")
    coupling = couple_channels(model)
    values = score_channels(Question(model, coupling), "l2")
    for allocation in ("uniform", "global", "cost_aware"):
        removed = choose_channels(coupling, values, Target("macs_left", 0.5), allocation)
        for group in cuttable(coupling):
            gone = np.array([c in removed for c in group.channels])
            if gone.any() and not gone.all():
                assert values[group.index][gone].max() <= values[group.index][~gone].min()


def test_every_layer_keeps_its_floor() -> None:
    removed = choose_channels(TWO, ASCENDING, Target("ratio", 0.5), "global", Limits(floor=0.5))
    assert removed == {4, 5, 0, 1}
    removed = choose_channels(TWO, ASCENDING, Target("ratio", 0.25), "global", Limits(floor=0.75))
    assert removed == {4, 0}


def test_one_channel_always_stays() -> None:
    for allocation in ("global", "cost_aware", "uniform"):
        removed = choose_channels(TWO, ASCENDING, Target("macs_left", 0.25), allocation)
        assert set(range(4)) - removed
        assert set(range(4, 8)) - removed


def test_widths_are_rounded() -> None:
    wide = prune_nets.chain([3, 20, 16, 2], [1200, 6400, 640])
    values = {g.index: np.arange(g.size, dtype=np.float64) for g in wide.groups}
    for allocation in ("uniform", "global", "cost_aware"):
        removed = choose_channels(wide, values, Target("macs_left", 0.4), allocation, Limits(round_to=8))
        widths = [sum(c not in removed for c in g.channels) for g in wide.groups]
        assert all(width % 8 == 0 for width in widths)
        assert macs_and_params(wide, removed)[0] <= 0.4 * 8240


def test_a_group_too_narrow_to_round_stays_whole() -> None:
    narrow = prune_nets.chain([3, 6, 32, 2], [100, 5000, 700])
    values = {g.index: np.ones(g.size) for g in narrow.groups}
    removed = choose_channels(narrow, values, Target("ratio", 0.5), "uniform", Limits(round_to=8))
    assert removed == set(range(6, 22))


def test_rounding_may_follow_from_the_width_of_each_group() -> None:
    wide = prune_nets.chain([3, 64, 16, 2], [1200, 6400, 640])
    values = {g.index: np.arange(g.size, dtype=np.float64) for g in wide.groups}
    for allocation in ("uniform", "global", "cost_aware"):
        limits = Limits(round_to=16, largest_share=1 / 8)
        removed = choose_channels(wide, values, Target("macs_left", 0.45), allocation, limits)
        first, second = (sum(c not in removed for c in g.channels) for g in wide.groups)
        assert first % 8 == 0 and second % 2 == 0 and first + second < 80


def test_rounding_that_is_a_wish_gives_way() -> None:
    narrow = prune_nets.chain([3, 12, 2], [100, 100])  # blocks of 4 leave 4 of 12 channels at least
    values = {g.index: np.arange(g.size, dtype=np.float64) for g in narrow.groups}
    wish = Limits(round_to=8, largest_share=0.5)
    target = Target("macs_left", 0.2)
    assert choose_channels(narrow, values, target, "global", wish) == set(range(10))
    with pytest.raises(PassError, match=r"macs_left 0\.2 cannot be met: the least in reach is 0\.3300"):
        choose_channels(narrow, values, target, "global", Limits(round_to=4))
    few = choose_channels(narrow, values, Target("ratio", 0.1), "uniform", wish)
    assert few == {0}


def test_a_budget_out_of_reach_says_the_least_in_reach() -> None:
    """With a channel of each left: 300 + 10 + 20 of 1440 MACs."""
    with pytest.raises(
        PassError, match=r"macs_left 0\.1 cannot be met: the least in reach is 0\.2292 \(330 of 1,440 MACs\)"
    ) as caught:
        choose_channels(TWO, ASCENDING, Target("macs_left", 0.1), "global")
    assert "ask for macs_left = 0.23 or more (--prune-macs 0.77 or less)" in caught.value.hint
    choose_channels(TWO, ASCENDING, Target("macs_left", 0.23), "global")
    with pytest.raises(PassError, match=r"params_left 0\.05 cannot be met: the least in reach is 0\.1667"):
        choose_channels(TWO, ASCENDING, Target("params_left", 0.05), "uniform")
    with pytest.raises(PassError, match=r"size_mb 0\.001 cannot be met: the least in reach is 0\.003 MB"):
        choose_channels(TWO, ASCENDING, Target("size_mb", 0.001, 1.0, num_nodes=10), "uniform")


def test_a_ratio_out_of_reach_says_the_largest_in_reach() -> None:
    with pytest.raises(
        PassError, match=r"removes 7 of 8 channels, but floors and rounding let only 6 go"
    ) as caught:
        choose_channels(TWO, ASCENDING, Target("ratio", 0.9), "global")
    assert caught.value.hint == "the largest ratio in reach is 0.75"


def test_file_size_counts_weights_and_nodes() -> None:
    """36 weights: 12 + 16 + 8; at 4 bytes and one node of 300 bytes 444 bytes."""
    assert Target("size_mb", 1.0, 4.0, 1).amount(0, 36) == pytest.approx(444e-6)
    removed = choose_channels(TWO, ASCENDING, Target("size_mb", 400e-6, 4.0, 1), "uniform")
    assert 0 < macs_and_params(TWO, removed)[1] * 4 + 300 <= 400


def test_int8_counts_every_output_channel() -> None:
    """Layers of 4, 4 and 2 output channels: 36 weights, 10 channels at 30 bytes, one node of 300."""
    target = Target("size_mb", 1.0, 1.0, 1)
    made = sum(len(layer.output_channels) for layer in TWO.layers)
    assert target.spent(TWO) == pytest.approx((36 + 30 * made + 300) / 1e6)
    first = TWO.layers[0].output_channels[0]
    left = macs_and_params(TWO, {first})[1]
    assert target.spent(TWO, frozenset({first})) == pytest.approx((left + 30 * (made - 1) + 300) / 1e6)


def test_nothing_prunable_says_why() -> None:
    model = nets.model("multi_output")
    with pytest.raises(PassError, match=r"nothing in this network can be pruned: .*output of the network"):
        choose_channels(couple_channels(model), {}, Target("ratio", 0.5))


def test_the_lower_hull_of_a_curve_never_falls_in_slope() -> None:
    shares, damage = hull(Curve(0, "a", (0.25, 0.5, 0.75), (0.4, 0.4, 0.9)))
    np.testing.assert_allclose(shares, [0, 0.5, 1])
    np.testing.assert_allclose(damage, [0, 0.4, 1.4])


def test_sensitivity_gives_each_channel_the_slope_at_its_place() -> None:
    curve = Curve(0, "a", (0.5, 1.0), (0.2, 1.0))
    found = sensitivity_scores([curve], scores([5.0, 1.0, 9.0, 2.0]))
    np.testing.assert_allclose(found[0], [0.4, 0.1, 0.4, 0.1], atol=1e-12)
    assert found[0].argsort().tolist() == [1, 3, 0, 2]  # of equal slopes the order of the scores
