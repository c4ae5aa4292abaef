"""The training loop: it learns, repeats itself, leaves its input alone and says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import training
from torch import Tensor, nn
from training import PLAIN, SETTINGS, make_model, same, train_data, weights

from edgecnn.data import ArrayDataset
from edgecnn.errors import PassError
from edgecnn.load import LoadOptions, load_model
from edgecnn.runner.preprocess import Preprocess
from edgecnn.train.data import TrainData, choose_augmentation
from edgecnn.train.loop import Batch, TrainResult, train
from edgecnn.train.optimize import learning_rate, make_optimizer, update_average
from edgecnn.train.settings import TrainSettings

GRAY = Preprocess((12, 12), channel_order="gray", mean=(0.0,), std=(1.0,))


def fit(settings: TrainSettings = PLAIN, **changes: object) -> TrainResult:
    return train(make_model(), train_data(), replace(settings, **changes), seed=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw", "learning_rate": 0.01},
        {"nesterov": False, "momentum": 0.5},
        {"ema_decay": 0.8, "clip_norm": 1.0, "label_smoothing": 0.1, "batch_norm_batches": 3},
        {"loss": "focal"},
        {"loss": "bce", "learning_rate": 0.2},
        {"loss": "mse", "learning_rate": 0.02},
        {"loss": "mae", "learning_rate": 0.02},
        {"loss": "huber", "learning_rate": 0.02},
        {"precision": "bfloat16"},
        {"augment": ("crop", "noise"), "mixup": 0.2},
        {"cutmix": 0.5, "patience": 3},
    ],
    ids=str,
)
def test_it_learns_repeats_itself_and_leaves_the_model_alone(changes: dict[str, object]) -> None:
    model = make_model()
    before = weights(model)
    settings = replace(PLAIN, **changes)
    first = train(model, train_data(), settings, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert first.curves.validation_accuracy[0] < 0.7
    assert max(first.curves.validation_accuracy) == 1.0
    assert same(first.model, train(model, train_data(), settings, seed=0).model)
    json.dumps(first.curves.to_dict())


def test_another_seed_goes_another_way() -> None:
    assert not same(
        fit(epochs=1).model, train(make_model(), train_data(), replace(PLAIN, epochs=1), seed=1).model
    )


def test_the_result_is_a_model_like_the_one_given() -> None:
    model = make_model()
    result = fit().model
    assert result.spec == model.spec
    assert [n.name for n in result.graph.graph.nodes] == [n.name for n in model.graph.graph.nodes]
    x = torch.randn(3, 3, 12, 12)
    assert result.graph(x).shape == (3, 4)
    assert all(tensor.is_contiguous() for tensor in weights(result).values())
    assert torch.equal(result.graph(x), result.graph(x))


def test_steps_are_those_of_plain_pytorch() -> None:
    """Three steps of SGD with Nesterov momentum on the same batches, written out with nn.Module."""
    settings = replace(PLAIN, max_steps=3, weight_decay=0.01)
    result = train(make_model(), train_data(validation=0), settings, seed=0)
    net = training.network().train()
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    data = train_data(validation=0)
    from edgecnn.train.seeds import stream

    order = stream(0, "order", 0).permutation(96)
    for step in range(3):
        chosen = order[16 * step : 16 * step + 16]
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(
            settings, step, 3, 0
        )
        optimizer.zero_grad()
        labels = torch.from_numpy(data.dataset.labels[chosen])  # type: ignore[index]
        nn.functional.cross_entropy(net(torch.from_numpy(data.dataset.inputs(chosen))), labels).backward()
        optimizer.step()
    expected = net.state_dict()
    for name, value in weights(result.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_norms_and_biases_have_no_weight_decay() -> None:
    named = list(training.network().named_parameters())
    groups = make_optimizer(named, TrainSettings(weight_decay=0.1)).param_groups
    assert {p.ndim for p in groups[0]["params"]} == {2, 4}
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_learning_rate_rises_and_falls() -> None:
    settings = TrainSettings(learning_rate=2.0)
    rates = [learning_rate(settings, step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01


def test_the_average_of_weights() -> None:
    average = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    update_average(average, {"w": torch.tensor([3.0, 2.0]), "n": torch.tensor(5)}, 0.75)
    assert average["w"].tolist() == [1.5, 2.0]
    assert int(average["n"]) == 5


def test_curves() -> None:
    curves = fit().curves
    assert curves.steps == tuple(range(1, 31))
    assert curves.epochs == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert len(curves.loss) == len(curves.learning_rate) == 30
    assert len(curves.validation_loss) == len(curves.validation_accuracy) == 7
    assert curves.loss[-1] < 0.5 * curves.loss[0]
    assert curves.seconds > 0
    assert curves.images_per_second is not None


def test_early_stopping_keeps_the_best_weights() -> None:
    settings = replace(PLAIN, epochs=30, learning_rate=0.1, patience=2)
    result = train(make_model(), train_data(), settings, seed=0)
    accuracy, loss = result.curves.validation_accuracy, result.curves.validation_loss
    assert len(accuracy) < 31
    assert "training stopped at step" in result.warnings[0]
    best = max(range(len(loss)), key=lambda i: (accuracy[i], -loss[i]))
    assert best == len(loss) - 3, "two validations without a gain, then the end"
    data = train_data()
    x = torch.from_numpy(data.dataset.inputs(data.validation))
    labels = torch.from_numpy(data.dataset.labels[list(data.validation)])  # type: ignore[index]
    with torch.no_grad():
        found = float(nn.functional.cross_entropy(result.model.graph(x), labels))
    assert found == pytest.approx(loss[best], rel=1e-4)


def test_validation_images_are_set_aside() -> None:
    result = train(make_model(), train_data(validation=0), replace(PLAIN, validation_fraction=0.25), seed=0)
    assert len(result.curves.validation_accuracy) == 7
    assert result.curves.steps[-1] == 6 * (72 // 16)


class Progress:
    def __init__(self) -> None:
        self.titles: list[tuple[str, int | None]] = []
        self.done = 0

    def start(self, title: str, total: int | None) -> None:
        self.titles.append((title, total))

    def advance(self, n: int = 1) -> None:
        self.done += n

    def finish(self) -> None:
        pass


def test_progress_counts_the_steps() -> None:
    progress = Progress()
    train(make_model(), train_data(), PLAIN, seed=0, progress=progress)
    assert progress.titles == [("train 6 epochs, batch 16, float32 on cpu", 30)]
    assert progress.done == 30


class Distance:
    """An objective with a tap and parameters of its own."""

    def __init__(self, tap: str) -> None:
        self.taps = (tap,)
        torch.manual_seed(5)
        self.regressor = nn.Conv2d(8, 2, 1)
        self.seen: list[Batch] = []

    def modules(self) -> nn.Module | None:
        return self.regressor

    def __call__(self, outputs: tuple[Tensor, ...], batch: Batch, tapped: Mapping[str, Tensor]) -> Tensor:
        self.seen.append(batch)
        return outputs[0].square().mean() + (self.regressor(tapped[self.taps[0]]) - 1.0).square().mean()


def test_an_objective_with_taps_and_parameters_of_its_own() -> None:
    model = make_model()
    tap = next(node.name for node in model.graph.graph.nodes if "relu" in node.name)
    objective = Distance(tap)
    before = {k: v.clone() for k, v in objective.regressor.state_dict().items()}
    result = train(model, train_data(labels=False), PLAIN, seed=0, objective=objective)
    assert result.curves.loss[-1] < 0.5 * result.curves.loss[0]
    assert result.curves.validation_accuracy == ()
    assert result.curves.validation_loss[-1] < result.curves.validation_loss[0]
    assert not torch.equal(before["weight"], objective.regressor.weight)
    training_batches = [batch for batch in objective.seen if batch.step >= 0]
    assert [batch.step for batch in training_batches] == list(range(30))
    assert all(batch.targets is None and not batch.augmented for batch in objective.seen)
    batch = training_batches[0]
    expected = train_data().dataset.inputs(batch.indices.tolist())
    assert np.array_equal(batch.inputs.numpy(), expected)


def test_a_penalty_on_weights() -> None:
    def penalty(graph: torch.fx.GraphModule) -> Tensor:
        return 3.0 * graph.get_parameter("4.weight").square().sum()

    model = make_model(norm=False)
    norms = [
        float(result.model.graph.get_parameter("4.weight").norm())
        for result in (
            train(model, train_data(), PLAIN, seed=0),
            train(model, train_data(), PLAIN, seed=0, penalty=penalty),
        )
    ]
    assert norms[1] < 0.3 * norms[0]


def test_settings_that_are_fine() -> None:
    SETTINGS.check()
    TrainSettings().check()
    assert TrainSettings(epochs=0.5, batch_size=10).steps(100) == 5
    assert TrainSettings(epochs=1e-9).steps(1000) == 1
    assert TrainSettings(max_steps=7).steps(10**6) == 7


def test_what_is_done_to_images_by_default() -> None:
    colour, gray = make_model().spec, replace(make_model().spec, preprocess=GRAY)
    data = train_data()
    assert choose_augmentation(TrainSettings(), data, colour) == ("flip", "crop")
    assert choose_augmentation(TrainSettings(), data, gray) == ("crop",)
    assert choose_augmentation(TrainSettings(augment=("noise", "auto")), data, gray) == ("crop", "noise")
    assert choose_augmentation(TrainSettings(augment=("crop", "flip")), data, gray) == ("flip", "crop")
    assert choose_augmentation(TrainSettings(augment=()), data, colour) == ()


def test_labels_per_pixel() -> None:
    """A dataset from Python may have labels per pixel; the loss and the accuracy are then per pixel."""
    images = training.dataset(32)
    masks = ArrayDataset("masks", images._images, training.PREPROCESS)
    masks.labels = (images._images[..., 0] > 100).astype(np.int64)  # (n, h, w)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model = load_model(net, LoadOptions(input_shape=(3, 12, 12)))
    model = replace(model, spec=replace(model.spec, preprocess=training.PREPROCESS))
    assert model.spec.task == "segmentation"
    data = TrainData(masks, tuple(range(24)), tuple(range(24, 32)))
    result = train(model, data, replace(PLAIN, epochs=40, learning_rate=0.2, batch_size=8), seed=0)
    assert result.curves.validation_accuracy[-1] > 0.95
    with pytest.raises(PassError, match=r"masks: crop moves images.*set augment ="):
        train(model, data, replace(PLAIN, augment=("noise", "crop")), seed=0)
    assert choose_augmentation(TrainSettings(), data, model.spec) == ()
