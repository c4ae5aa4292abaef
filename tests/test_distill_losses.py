"""The losses of distillation against numbers worked out by hand from the papers' equations."""

from __future__ import annotations

from math import log, sqrt

import pytest

torch = pytest.importorskip("torch")

from edgecnn.distill.losses import (  # noqa: E402
    attention_loss,
    attention_map,
    decoupled_loss,
    hint_loss,
    logits_loss,
    value_loss,
)

# p_t = (1/2, 1/4, 1/4) and p_s = (1/4, 1/2, 1/4) at T = 1; the right class is 0
TEACHER = torch.tensor([[log(2.0), 0.0, 0.0]])
STUDENT = torch.tensor([[0.0, log(2.0), 0.0]])
RIGHT = torch.tensor([0])
TARGET_PART = 0.5 * log(4 / 3)  # KL((1/2, 1/2) || (1/4, 3/4))
OTHER_PART = 0.5 * log(9 / 8)  # KL((1/2, 1/2) || (2/3, 1/3))


def test_logits_is_the_divergence_of_hinton() -> None:
    # 1/2 log 2 + 1/4 log(1/2) + 1/4 log 1
    assert float(logits_loss(STUDENT, TEACHER, 1.0)) == pytest.approx(0.25 * log(2.0), rel=1e-6)


@pytest.mark.parametrize("temperature", [2.0, 4.0, 10.0])
def test_the_temperature_softens_and_its_square_rescales(temperature: float) -> None:
    # logits T times as large have the probabilities of T = 1
    found = logits_loss(temperature * STUDENT, temperature * TEACHER, temperature)
    assert float(found) == pytest.approx(temperature**2 * 0.25 * log(2.0), rel=1e-5)


def test_the_gradient_of_logits_keeps_its_size_at_high_temperature() -> None:
    # for T >> 1 the gradient is (z_s - z_t) / classes for logits of zero mean: section 2.1 of the paper
    student = torch.tensor([[1.0, -1.0]], requires_grad=True)
    logits_loss(student, torch.tensor([[0.5, -0.5]]), 1000.0).backward()
    assert student.grad is not None
    assert student.grad.tolist()[0] == pytest.approx([0.25, -0.25], rel=1e-2)


@pytest.mark.parametrize("beta", [1.0, 2.0, 8.0])
def test_decoupled_is_two_divergences(beta: float) -> None:
    found = decoupled_loss(STUDENT, TEACHER, RIGHT, 1.0, beta)
    assert float(found) == pytest.approx(TARGET_PART + beta * OTHER_PART, rel=1e-5)


def test_decoupled_takes_the_temperature_squared() -> None:
    found = decoupled_loss(3 * STUDENT, 3 * TEACHER, RIGHT, 3.0, 2.0)
    assert float(found) == pytest.approx(9 * (TARGET_PART + 2 * OTHER_PART), rel=1e-5)


def test_decoupled_with_the_teachers_own_weight_is_logits() -> None:
    """Equation 5 of the paper: KD = TCKD + (1 - p_t[y]) NCKD, for one image."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        student, teacher = torch.randn(2, 1, 6, generator=generator)
        label = torch.randint(6, (1,), generator=generator)
        weight = 1.0 - float(teacher.div(4.0).softmax(1)[0, label])
        plain = float(logits_loss(student, teacher, 4.0))
        assert float(decoupled_loss(student, teacher, label, 4.0, weight)) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
def test_decoupled_stays_finite_for_large_logits(scale: float) -> None:
    student = (scale * STUDENT).requires_grad_(True)
    loss = decoupled_loss(student, scale * TEACHER, RIGHT, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_outputs_per_pixel_are_the_mean_over_pixels() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 2, 5, 3, 4, generator=generator)  # (n, classes, h, w)
    labels = torch.randint(5, (2, 3, 4), generator=generator)
    flat = [z.permute(0, 2, 3, 1).reshape(-1, 5) for z in (student, teacher)]  # (n h w, classes)
    assert float(logits_loss(student, teacher)) == pytest.approx(float(logits_loss(*flat)), rel=1e-5)
    assert float(decoupled_loss(student, teacher, labels)) == pytest.approx(
        float(decoupled_loss(*flat, labels.reshape(-1))), rel=1e-5
    )


def test_hint_is_half_the_relative_square_distance() -> None:
    teacher = torch.tensor([1.0, 2.0, 2.0, 1.0]).reshape(1, 1, 2, 2)
    # differences 1, 0, 2, 0: mean square 5/4; of the teacher 10/4
    assert float(hint_loss(torch.tensor([2.0, 2.0, 0.0, 1.0]).reshape(1, 1, 2, 2), teacher)) == 0.25


def test_values_do_not_depend_on_their_unit() -> None:
    student, teacher = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])
    assert float(value_loss(student, teacher)) == 0.25
    assert float(value_loss(1000 * student, 1000 * teacher)) == pytest.approx(0.25)
    assert float(value_loss(student, torch.zeros(2))) > 1e6, "a teacher of zeros gives no division by zero"


def test_an_attention_map_is_the_mean_square_over_channels_at_length_1() -> None:
    feature = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).reshape(
        1, 2, 1, 2
    )  # squares 9, 0 and 0, 16: means 4.5, 8
    length = sqrt(4.5**2 + 8**2)
    assert attention_map(feature).tolist()[0] == pytest.approx([4.5 / length, 8 / length])
    assert attention_map(torch.zeros(1, 2, 1, 2)).tolist() == [[0.0, 0.0]]


def test_attention_compares_maps_of_any_channel_count() -> None:
    student = attention_map(torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 2))
    teacher = attention_map(torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat(3, 1).reshape(1, 3, 2, 2))
    assert float(attention_loss(student, teacher)) == 2.0  # two pixels differ by 1
    halved = torch.cat((student, teacher))
    assert float(attention_loss(halved, torch.cat((teacher, teacher)))) == 1.0, "mean over images"
    assert float(attention_loss(teacher, teacher)) == 0.0


@pytest.mark.parametrize("loss", [logits_loss, value_loss, hint_loss])
def test_nothing_flows_into_the_teacher(loss: object) -> None:
    student, teacher = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    loss(student, teacher).backward()  # type: ignore[operator]
    assert teacher.grad is None
    assert student.grad is not None


def test_low_precision_is_computed_in_float32() -> None:
    loss = logits_loss(STUDENT.bfloat16(), TEACHER.bfloat16(), 1.0)
    assert loss.dtype == torch.float32
