"""The pass prune_channels: budgets, records, bad input, schedules."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import nets
import numpy as np
import prune_nets
import pytest
import torch
from torch import nn

from edgecnn.errors import PassError, RecipeError
from edgecnn.graph.channels import couple_channels, macs_and_params
from edgecnn.load import LoadOptions, load_model
from edgecnn.pipeline import PassContext
from edgecnn.prune import schedule
from edgecnn.prune.allocate import Limits, Target
from edgecnn.prune.prune_channels import PruneChannels
from edgecnn.prune.schedule import CutSettings, cut_in_steps
from edgecnn.prune.sparse_learning import GroupLasso, shrinkage
from edgecnn.prune.surgery import cut_channels


def training_context(num_images: int = 64) -> PassContext:
    base = nets.context(num_images)
    labels = np.random.default_rng(0).integers(0, 5, num_images)
    data = prune_nets.Labelled(nets.images(num_images, 1), labels)
    return PassContext(
        base.calibration, base.calibration_indices, train=data, train_indices=base.calibration_indices
    )


def figures(model) -> tuple[int, int]:
    return macs_and_params(couple_channels(model), ())


@pytest.mark.parametrize(
    ("step", "index", "budget"),
    [
        (PruneChannels(macs_left=0.5), 0, 0.5),
        (PruneChannels(params_left=0.4), 1, 0.4),
        (PruneChannels(macs_left=0.5, importance="l2", allocation="global"), 0, 0.5),
        (PruneChannels(macs_left=0.5, importance="l1", allocation="sensitivity"), 0, 0.5),
        (PruneChannels(macs_left=0.5, importance="random", schedule="iterative", epochs_between=0), 0, 0.5),
    ],
)
def test_the_network_is_as_small_as_asked_for(step: PruneChannels, index: int, budget: float) -> None:
    model = nets.model("residual")
    context = training_context()
    after = step.run(model, context)
    step.ensures(model, after)
    left = figures(after)[index] / figures(model)[index]
    assert 0.85 * budget < left <= budget  # 8 channels a layer are a coarse grain
    (record,) = context.records
    assert (record["macs"][1], record["params"][1]) == figures(after)
    assert (record["macs"][0], record["params"][0]) == figures(model)
    json.dumps(record)


def test_half_of_every_group_goes_by_default_when_uniform() -> None:
    after = PruneChannels(importance="l2", allocation="uniform").run(nets.model("residual"), nets.context())
    widths = {layer.layer: len(layer.output_channels) for layer in couple_channels(after).layers}
    assert set(widths.values()) == {4, 5}  # 8 channels, and 5 classes


def test_the_record_explains_the_cut() -> None:
    context = training_context()
    PruneChannels(ratio=0.5, importance="taylor").run(nets.model("residual"), context)
    (record,) = context.records
    assert record["pass"] == "prune_channels"
    assert record["kind"] == "pruning"
    assert record["target"] == {"ratio": 0.5}
    assert record["labels_used"] is True
    assert record["frozen_reasons"] == {"is an output of the network": 5}
    head = next(group for group in record["groups"] if group["frozen"])
    assert head["channels"] == head["channels_left"] == 5
    cut = [group for group in record["groups"] if not group["frozen"]]
    assert sum(g["channels"] - g["channels_left"] for g in cut) == sum(g["channels"] for g in cut) // 2
    by_layer = {line["layer"]: line for line in record["layers"]}
    assert all(line["channels_left"] <= line["channels"] for line in by_layer.values())
    assert sum(line["macs_left"] for line in by_layer.values()) == record["macs"][1]


def test_a_cut_is_held_against_the_network_with_those_channels_at_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = training_context()
    PruneChannels(ratio=0.5).run(nets.model("residual"), context)
    (record,) = context.records
    assert record["zeroed_error"] <= 1e-5
    assert record["inexact_reasons"] == []

    def damaged(*arguments: Any) -> Any:
        cut = cut_channels(*arguments)
        with torch.no_grad():
            next(p for p in cut.graph.parameters() if p.dim() == 4).mul_(1.01)
        return cut

    monkeypatch.setattr(schedule, "cut_channels", damaged)
    with pytest.raises(PassError, match=r"differ from the zeroed network's by .* expected at most 1e-05"):
        PruneChannels(ratio=0.5).run(nets.model("residual"), training_context())


def test_where_zero_is_not_absent_the_result_says_so() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Flatten()
    )
    model = load_model(network.eval(), LoadOptions(input_shape=(3, 8, 8), preprocess="unit"))
    context = training_context()
    after = PruneChannels(ratio=0.5, importance="l2").run(model, context)
    (record,) = context.records
    (reason,) = record["inexact_reasons"]
    assert "group_norm" in reason
    assert record["zeroed_error"] > 1e-5
    (warning,) = [text for text in after.warnings if "is not one that is zero" in text]
    assert reason in warning
    assert f"{record['zeroed_error']:.1%} of their range" in warning


def test_the_same_seed_gives_the_same_weights() -> None:
    model = nets.model("residual")
    first, second = (PruneChannels().run(model, nets.context()) for _ in range(2))
    for name, value in first.graph.state_dict().items():
        assert torch.equal(value, second.graph.state_dict()[name])


def test_unlabelled_images_are_enough() -> None:
    context = nets.context()
    PruneChannels(importance="taylor").run(nets.model("residual"), context)
    assert context.records[0]["labels_used"] is False


def test_round_to() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU(), nn.Conv2d(48, 20, 3))
    model = nets.as_model(nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 4)).eval())
    after = PruneChannels(macs_left=0.5, importance="l2", round_to=8).run(model, nets.context())
    widths = [len(layer.output_channels) for layer in couple_channels(after).layers]
    assert [width % 8 for width in widths[:2]] == [0, 0]
    assert widths[2] in (20, 16, 8)
    assert figures(after)[0] <= 0.5 * figures(model)[0]


def test_widths_suit_the_target_by_themselves() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU())
    model = nets.as_model(nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 4)).eval())
    for kernel_width, multiples in ((16, (8, 16)), (8, (8, 8)), (4, (4, 4))):
        context = nets.context()
        step = PruneChannels(macs_left=0.5, importance="l2", kernel_width=kernel_width)
        after = step.run(model, context)
        widths = [len(layer.output_channels) for layer in couple_channels(after).layers][:2]
        assert all(width % multiple == 0 for width, multiple in zip(widths, multiples, strict=True))
        assert figures(after)[0] <= 0.5 * figures(model)[0]
        assert context.records[0]["round_to"] == f"{kernel_width} or less"


def test_steps_end_where_one_shot_does() -> None:
    model = nets.model("residual")
    settings = CutSettings("l2", allocation="uniform", reestimate=False)
    seen: list[tuple[int, tuple[int, int]]] = []

    def retrain(present, step):
        seen.append((step, figures(present)))
        return present

    cuts = cut_in_steps(model, Target("macs_left", 0.4), settings, None, 3, retrain)
    whole = figures(model)[0]
    assert [step for step, _ in seen] == [0, 1]
    assert figures(cuts[-1].model)[0] <= 0.4 * whole
    lefts = [cut.macs[1] / whole for cut in cuts]
    assert lefts[0] == pytest.approx(0.4 ** (1 / 3), abs=0.1)
    assert lefts[1] == pytest.approx(0.4 ** (2 / 3), abs=0.1)
    ratio = cut_in_steps(
        model, Target("ratio", 0.5), CutSettings("l2", allocation="global", reestimate=False), None, 2, None
    )
    total = sum(g.size for g in couple_channels(model).groups if g.frozen is None)
    assert sum(len(cut.removed) for cut in ratio) == pytest.approx(total / 2, abs=1)


def test_iterative_trains_between_the_cuts() -> None:
    step = PruneChannels(macs_left=0.5, schedule="iterative", steps=2, epochs_between=2)
    context = training_context()
    after = step.run(nets.model("residual"), context)
    assert figures(after)[0] <= 0.5 * figures(nets.model("residual"))[0]
    untrained = dataclasses.replace(step, epochs_between=0).run(nets.model("residual"), training_context())
    assert not torch.equal(next(after.graph.parameters()), next(untrained.graph.parameters()))


def test_sparse_learning_trains_with_the_penalty_then_cuts() -> None:
    step = PruneChannels(macs_left=0.5, importance="l2", schedule="sparse_learning", epochs_between=1)
    context = training_context()
    after = step.run(nets.model("residual"), context)
    assert figures(after)[0] <= 0.5 * figures(nets.model("residual"))[0]


def test_group_lasso_by_hand() -> None:
    """Channels of squared norm 1 + 4 and 9 + 16 in one group: a is 16 and 1."""
    model = prune_nets.two_layers([1.0, 3.0], [[2.0, 4.0], [0.0, 0.0]])
    penalty = GroupLasso(model, couple_channels(model), 0.5)
    assert float(penalty(model.graph)) == pytest.approx(0.5 * (16 * 5 + 25), rel=1e-5)
    weight = next(model.graph.parameters())
    weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(penalty(model.graph), [weight])
    weight.requires_grad_(False)
    assert gradient.flatten().tolist() == pytest.approx([0.5 * 16 * 2 * 1, 0.5 * 2 * 3], rel=1e-5)


def test_equal_channels_shrink_alike() -> None:
    assert shrinkage(torch.tensor([2.0, 2.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            PruneChannels(ratio=1.0),
            r"ratio is 1, expected 0 <= ratio < 1 \(hint: a ratio of 1 leaves nothing\)",
        ),
        (PruneChannels(ratio=1.3), r"ratio is 1\.3, expected 0 <= ratio < 1"),
        (PruneChannels(ratio=0.5, macs_left=0.5), r"ratio and macs_left are given, expected one of them"),
        (PruneChannels(macs_left=0.0), r"macs_left is 0, expected 0 < macs_left <= 1"),
        (
            PruneChannels(params_left=2.1),
            r"params_left is 2\.1, expected .* \(hint: it is the share that remains\)",
        ),
        (PruneChannels(floor=1.0), r"floor is 1\.0, expected 0 <= floor < 1"),
        (PruneChannels(round_to=-1), r"round_to is -1, expected at least 1, or 0"),
        (PruneChannels(kernel_width=0), r"kernel_width is 0, expected at least 1"),
        (PruneChannels(size_mb=0.0), r"size_mb is 0\.0, expected a number above 0"),
        (PruneChannels(steps=0), r"steps is 0, expected at least 1"),
        (PruneChannels(num_samples=0), r"num_samples is 0, expected at least 1"),
    ],
)
def test_parameters_out_of_range(step: PruneChannels, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        step.check()


def test_what_cannot_be_pruned_is_refused() -> None:
    step = PruneChannels()
    with pytest.raises(PassError, match=r"is quantized .*put prune_channels ahead of quantize_static"):
        step.requires(nets.quantized("residual"))
    with pytest.raises(
        PassError, match=r"nothing in this network can be pruned: .* \(is an output of the network\)"
    ):
        step.requires(nets.model("multi_output"))
    with pytest.raises(PassError, match=r"needs calibration images, found none"):
        step.run(nets.model("residual"), PassContext())
    with pytest.raises(PassError, match=r"macs_left 0\.001 cannot be met: the least in reach is 0\.\d+"):
        PruneChannels(macs_left=0.001).run(nets.model("residual"), nets.context())


@pytest.mark.parametrize("schedule", ["iterative", "sparse_learning"])
def test_training_needs_training_images(schedule: Any) -> None:
    with pytest.raises(PassError, match=r"training needs labelled training images, found none"):
        PruneChannels(schedule=schedule).run(nets.model("residual"), nets.context())


def test_limits_are_shared_out_over_steps() -> None:
    """A floor of 1/4 in two steps is 1/2 in each: no layer ends below a quarter."""
    settings = CutSettings("random", allocation="global", limits=Limits(0.25), reestimate=False)
    cuts = cut_in_steps(nets.model("residual"), Target("ratio", 0.6), settings, None, 2, None)
    widths = [len(layer.output_channels) for layer in couple_channels(cuts[-1].model).layers]
    assert min(widths) >= 2
