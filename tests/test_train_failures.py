"""What training says and keeps when something is wrong: NaN, memory, images and settings that do not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training
from torch import Tensor
from training import PLAIN, make_model, same, train_data, weights

from edgecnn.errors import DataError, PassError
from edgecnn.load import load_model
from edgecnn.train.checkpoint import Checkpoint
from edgecnn.train.data import TrainData
from edgecnn.train.failures import DivergedError
from edgecnn.train.loop import Batch, train
from edgecnn.train.state import LastGood


class Poisoned:
    """An objective that is NaN or infinite at one step, in its value or in its gradient alone."""

    taps: tuple[str, ...] = ()

    def __init__(self, step: int, poison: Callable[[Tensor], Tensor]) -> None:
        self.step = step
        self.poison = poison

    def modules(self) -> None:
        return None

    def __call__(self, outputs: tuple[Tensor, ...], batch: Batch, tapped: Mapping[str, Tensor]) -> Tensor:
        loss = outputs[0].square().mean()
        return self.poison(loss) if batch.step == self.step else loss


@pytest.mark.parametrize(
    ("poison", "what"),
    [
        (lambda loss: loss * float("nan"), "the loss is nan"),
        (lambda loss: loss * float("inf"), "the loss is inf"),
        (lambda loss: loss + (loss - loss.detach()).abs().sqrt(), "its gradient not finite"),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(
    poison: Callable[[Tensor], Tensor], what: str
) -> None:
    settings = replace(PLAIN, ema_decay=None)
    with pytest.raises(DivergedError, match=f"{what}.* at step 18 of 30 .*lower the learning rate") as caught:
        train(make_model(), train_data(), settings, seed=0, objective=Poisoned(17, poison))
    error = caught.value
    assert (error.step, error.good_step) == (18, 16), "step 17 made what failed in step 18"
    assert all(bool(value.isfinite().all()) for value in weights(error.model).values())
    objective = Poisoned(-5, poison)
    reached: dict[int, dict[str, Tensor]] = {}

    def remember(graph: torch.fx.GraphModule) -> Tensor:
        reached[len(reached)] = {k: v.detach().clone() for k, v in graph.named_parameters()}
        return torch.zeros(())

    train(make_model(), train_data(validation=16), settings, seed=0, objective=objective, penalty=remember)
    for name, value in error.model.graph.named_parameters():
        assert torch.equal(value, reached[16][name])


def test_the_last_good_state_is_kept_beside_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run" / "a.checkpoint")
    objective = Poisoned(17, lambda loss: loss * float("nan"))
    expected = r"step 18 of 30 .*the network as it was after step 16 is in .*run/a.last_good.pt2 \(hint"
    with pytest.raises(DivergedError, match=expected) as caught:
        train(make_model(), train_data(), PLAIN, seed=0, objective=objective, checkpoint=checkpoint)
    assert same(load_model(tmp_path / "run" / "a.last_good.pt2"), caught.value.model)


def test_a_learning_rate_that_is_too_high_is_noticed() -> None:
    settings = replace(PLAIN, learning_rate=1e6, epochs=20, momentum=0.99)
    with pytest.raises(DivergedError, match=r"lower the learning rate .learning_rate = 0.02") as caught:
        train(make_model(norm=False), train_data(), settings, seed=0)
    assert caught.value.good_step < caught.value.step


def test_a_copy_is_good_once_the_next_steps_show_it() -> None:
    """The loss of a step is that of the weights ahead of it: 1e28 in step 2 is the fault of step 1."""
    good = LastGood({"w": torch.tensor(0.0)}, total=5)
    for step, loss, kept in ((1, 2.0, 0), (2, 1e28, 0), (3, 2.1, 2), (4, 2.0, 3), (5, 2.0, 4)):
        good.note(step, loss, lambda step=step: {"w": torch.tensor(float(step))})
        assert (good.step, float(good.tensors["w"])) == (kept, kept), step


class Hungry:
    """An objective that runs out of memory with more than `limit` images."""

    taps: tuple[str, ...] = ()

    def __init__(self, limit: int, error: Exception) -> None:
        self.limit = limit
        self.error = error

    def modules(self) -> None:
        return None

    def __call__(self, outputs: tuple[Tensor, ...], batch: Batch, tapped: Mapping[str, Tensor]) -> Tensor:
        if len(batch.inputs) > self.limit and batch.step != 0:
            raise self.error
        return outputs[0].square().mean()


OOM = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


@pytest.mark.parametrize(
    "error", [OOM, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=repr
)
def test_out_of_memory_says_what_fits(error: Exception) -> None:
    expected = r"out of memory at step 2 with 16 images in a batch; 4 fit .*set batch_size = 4"
    with pytest.raises(PassError, match=expected):
        train(make_model(), train_data(validation=0), PLAIN, seed=0, objective=Hungry(7, error))
    with pytest.raises(PassError, match="not even 1 image fits"):
        train(make_model(), train_data(validation=0), PLAIN, seed=0, objective=Hungry(0, error))


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="something else"):
        objective = Hungry(7, RuntimeError("something else"))
        train(make_model(), train_data(validation=0), PLAIN, seed=0, objective=objective)


def test_labels_beyond_the_head() -> None:
    expected = "found the label 3, expected 0 to 2, as the network .* has 3 classes.*trained for"
    with pytest.raises(DataError, match=expected):
        train(make_model(classes=3), train_data(), PLAIN, seed=0)


def test_unlabelled_images() -> None:
    with pytest.raises(DataError, match=r"fine-tuning needs labels, found 80 images without any.*teacher"):
        train(make_model(), train_data(labels=False), PLAIN, seed=0)


def test_fewer_images_than_a_batch() -> None:
    data = TrainData(training.dataset(10), tuple(range(10)))
    result = train(make_model(), data, replace(PLAIN, epochs=3), seed=0)
    assert result.curves.steps == (1, 2, 3)
    assert "10 training images, fewer than the batch_size of 16" in result.warnings[0]


def test_a_network_that_takes_one_batch_size_only() -> None:
    model = replace(make_model(), fixed_batch=12)
    sizes: set[int] = set()

    class Sizes(Poisoned):
        def __call__(self, outputs: tuple[Tensor, ...], batch: Batch, tapped: Mapping[str, Tensor]) -> Tensor:
            sizes.add(len(batch.inputs))
            return outputs[0].square().mean()

    settings = replace(PLAIN, epochs=1, batch_norm_batches=1)
    result = train(model, train_data(), settings, seed=0, objective=Sizes(-5, abs))
    assert sizes == {12}, "16 validation images are judged by 12 of them"
    assert result.warnings[0] == "batch_size is 12, the only one that the exported graph takes"
    with pytest.raises(PassError, match="found 16 validation images, expected at least 32"):
        train(replace(model, fixed_batch=32), train_data(), settings, seed=0)
    with pytest.raises(PassError, match="found 80 training images, expected at least 90"):
        train(replace(model, fixed_batch=90), train_data(80, 0), settings, seed=0)


def test_no_images_and_images_in_both_parts() -> None:
    data = train_data()
    with pytest.raises(DataError, match="found no training images"):
        train(make_model(), replace(data, indices=()), PLAIN, seed=0)
    with pytest.raises(DataError, match="image 80 is in the training and in the validation part"):
        train(make_model(), replace(data, indices=(1, 80)), PLAIN, seed=0)


def test_patience_without_validation() -> None:
    with pytest.raises(PassError, match="patience is 3, but there are no validation images"):
        train(make_model(), train_data(validation=0), replace(PLAIN, patience=3), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected a number above 0"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, expected a number above 0"),
        ({"momentum": 1.0}, "momentum is 1.0, expected 0 <= momentum < 1"),
        ({"optimizer": "adam"}, "optimizer is 'adam', expected one of sgd, adamw"),
        ({"precision": "int8"}, "precision is 'int8', expected one of auto"),
        ({"loss": "hinge"}, "loss is 'hinge'"),
        ({"augment": ("flip", "shear")}, "augment names 'shear', expected auto or some of flip, crop"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"max_steps": 0}, "max_steps is 0, expected at least 1"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"precision": "float16"}, "precision is float16, expected float32 or bfloat16 on a CPU"),
    ],
    ids=str,
)
def test_settings_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PassError, match=message):
        train(make_model(), train_data(), replace(PLAIN, **changes), seed=0)
