"""Importances, with numbers worked out by hand."""

from __future__ import annotations

import math

import nets
import numpy as np
import prune_nets
import pytest
import torch

from edgecnn.errors import DataError, PassError
from edgecnn.graph.channels import couple_channels
from edgecnn.graph.nodes import copy_graph
from edgecnn.prune.groups import cuttable
from edgecnn.prune.importance import DATA_DRIVEN, IMPORTANCES, Question, normalize, score_channels
from edgecnn.prune.samples import Samples, batches, output_loss

LOG3 = math.log(3.0)


def score(model, importance: str, samples: Samples | None = None, normalization: str = "none") -> list[float]:
    question = Question(model, couple_channels(model), samples)
    scores = score_channels(question, importance, normalization)
    assert len(scores) == 1
    return next(iter(scores.values())).tolist()


@pytest.fixture(scope="module")
def normed():
    """Channel 0: made by 3, scaled by 2, read by (0.5, 0); channel 1: by -1, by 1, by (4, 1)."""
    return prune_nets.two_layers([3.0, -1.0], [[0.5, 4.0], [0.0, 1.0]], [2.0, 1.0])


@pytest.fixture(scope="module")
def scored():
    """Scores (log 3 + 1, 1) for the pixel 1: probabilities 3/4 and 1/4."""
    return prune_nets.two_layers([LOG3 + 1, 1.0], [[1.0, 0.0], [0.0, 1.0]])


def test_l1_adds_all_slices_of_a_channel(normed) -> None:
    assert score(normed, "l1") == pytest.approx([3 + 2 + 0.5, 1 + 1 + 4 + 1])


def test_l2_is_the_norm_of_all_slices_together(normed) -> None:
    assert score(normed, "l2") == pytest.approx([math.sqrt(9 + 4 + 0.25), math.sqrt(1 + 1 + 16 + 1)])


def test_bn_scale_is_gamma(normed) -> None:
    assert score(normed, "bn_scale") == pytest.approx([2.0, 1.0])


def test_lamp_divides_by_what_is_left(normed) -> None:
    assert score(normed, "lamp") == pytest.approx([13.25 / (13.25 + 19), 1.0])


def test_fpgm_is_the_distance_to_the_others() -> None:
    model = prune_nets.two_layers([0.0, 3.0, 3.0], [[0.0, 4.0, 0.0]] * 2)
    # from 0: to 1 sqrt(9 + 2 * 16), to 2 sqrt(9); between 1 and 2 sqrt(2 * 16)
    a, b, c = math.sqrt(41), 3.0, math.sqrt(32)
    assert score(model, "fpgm") == pytest.approx([a + b, a + c, b + c])


def test_taylor_is_the_squared_gradient_of_the_gate(scored) -> None:
    """dL/dz_k = (p_k - y_k) a_k: -1/4 (log 3 + 1) and 1/4 for the pixel 1, 0 for the pixel 0."""
    one = [(0.25 * (LOG3 + 1)) ** 2, 0.25**2]
    assert score(scored, "taylor", prune_nets.samples([1.0], [0])) == pytest.approx(one, rel=1e-5)
    # squared image by image, then averaged
    halved = [value / 2 for value in one]
    assert score(scored, "taylor", prune_nets.samples([1.0, 0.0], [0, 0])) == pytest.approx(halved, rel=1e-5)


def test_taylor_counts_a_layer_that_reads_a_channel_twice_once_each() -> None:
    """Gates ahead of both readers of the residual stream add up; a depthwise convolution is no reader."""
    for name in ("residual", "depthwise", "preactivation"):
        model = nets.model(name)
        coupling = couple_channels(model)
        context = nets.context(8)
        question = Question(model, coupling, Samples(context.calibration, (3,), seed=1))
        scores = score_channels(question, "taylor", "none")
        graph = copy_graph(model.graph)
        group = next(g for g in cuttable(coupling) if g.index in scores)
        for parameter in graph.parameters():
            parameter.requires_grad_(True)
        # the gate's gradient is the sum of g * w over the weights that read the channel
        generator = torch.Generator().manual_seed(1)
        images, _ = next(iter(batches(model, question.samples)))
        loss = output_loss(graph(images), None, "classification", generator)
        depthwise = {layer.weight for layer in coupling.layers if layer.groups > 1}
        readers = [m for m in group.members if m.role == "in" and m.tensor not in depthwise]
        weights = [dict(graph.named_parameters())[m.tensor] for m in readers]
        gradients = torch.autograd.grad(loss, weights)
        expected = np.zeros(group.size)
        for member, weight, gradient in zip(readers, weights, gradients, strict=True):
            product = (weight * gradient).detach().movedim(member.dim, 0).flatten(1).sum(1)
            expected += [float(product[list(p)].sum()) for p in member.positions]
        np.testing.assert_allclose(scores[group.index], expected**2, rtol=1e-3, atol=1e-12)


def test_obd_is_half_the_fisher_information_times_the_square(scored) -> None:
    """E[(p - t)^2] = 3/16 for both scores: 1/2 (3/16 a_k^2 + 3/16 w_k^2) = 3/16 w_k^2, as a_k = w_k."""
    found = score(scored, "obd", prune_nets.samples([1.0] * 8192))
    assert found == pytest.approx([3 / 16 * (LOG3 + 1) ** 2, 3 / 16], rel=0.2)
    assert found[0] / found[1] == pytest.approx((LOG3 + 1) ** 2, rel=1e-5)


def test_obd_and_unlabelled_taylor_ask_for_no_labels(scored) -> None:
    with_labels, without = prune_nets.samples([1.0, 2.0], [0, 1]), prune_nets.samples([1.0, 2.0])
    assert score(scored, "obd", with_labels) == score(scored, "obd", without)
    assert score(scored, "taylor", with_labels) != score(scored, "taylor", without)
    assert min(score(scored, "taylor", without)) > 0


def test_activation_is_the_mean_magnitude(scored) -> None:
    assert score(scored, "activation", prune_nets.samples([1.0, -3.0])) == pytest.approx(
        [2 * (LOG3 + 1), 2.0], rel=1e-5
    )


def test_random_follows_the_seed() -> None:
    model = nets.model("residual")
    coupling = couple_channels(model)
    first, second, third = (IMPORTANCES["random"](Question(model, coupling, None, s)) for s in (1, 1, 2))
    for index in first:
        np.testing.assert_array_equal(first[index], second[index])
        assert (first[index] != third[index]).any()


@pytest.mark.parametrize("importance", sorted(IMPORTANCES))
@pytest.mark.parametrize("name", ["residual", "option_a", "depthwise", "grouped", "se_conv", "mlp"])
def test_every_importance_scores_every_channel(name: str, importance: str) -> None:
    model, context = nets.model(name), nets.context(16)
    samples = Samples(context.calibration, context.calibration_indices)
    coupling = couple_channels(model)
    try:
        scores = score_channels(Question(model, coupling, samples), importance)
    except PassError as error:
        assert importance == "bn_scale"
        assert "can score none" in error.message
        return
    sizes = {group.index: group.size for group in cuttable(coupling)}
    if importance != "bn_scale":
        assert set(scores) == set(sizes)
    for index, values in scores.items():
        assert values.dtype == np.float64
        assert values.shape == (sizes[index],)
        assert (values >= 0).all()


def test_scores_do_not_depend_on_how_weights_are_scaled_between_groups() -> None:
    assert normalize(np.array([2.0, 6.0]), "mean").tolist() == [0.5, 1.5]
    assert normalize(np.array([0.0, 0.0]), "mean").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("importance", sorted(DATA_DRIVEN))
def test_missing_images_are_named(scored, importance: str) -> None:
    with pytest.raises(PassError, match=rf"importance '{importance}' needs images, found none"):
        score(scored, importance)


def test_bad_images_are_refused(scored) -> None:
    with pytest.raises(DataError, match=r"hold NaN or infinite values"):
        score(scored, "activation", prune_nets.samples([float("nan")]))
    with pytest.raises(DataError, match=r"no images to judge channels by"):
        score(scored, "taylor", prune_nets.samples([]))


def test_broken_weights_are_named(normed) -> None:
    graph = copy_graph(normed.graph)
    with torch.no_grad():
        next(graph.parameters()).fill_(float("inf"))
    with pytest.raises(PassError, match=r"importance 'l1' of group 0 is not finite"):
        score(normed.with_graph(graph), "l1")


def test_networks_without_class_scores_are_judged_by_their_output() -> None:
    """A regression has no classes to draw: its output is shaken with noise instead."""
    generator = torch.Generator().manual_seed(0)
    output = torch.tensor([[3.0], [4.0]], requires_grad=True)
    output_loss(output, None, "other", generator).backward()
    noise = torch.randn(2, 1, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(output.grad, noise / math.sqrt(12.5), rtol=1e-6)
