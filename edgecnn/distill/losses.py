"""What a student loses by differing from its teacher, after the papers.

z are logits, p = softmax(z / T), index t the teacher's, s the student's, y the right class, n the batch:

    logits      T^2 KL(p_t || p_s)                                                          (Hinton et al.)
    decoupled   T^2 (KL(b_t || b_s) + beta KL(q_t || q_s))                                  (Zhao et al.)
                b = (p[y], 1 - p[y]);   q = softmax of z / T over the classes other than y
    hint        1/2 mean((u_t - r(u_s))^2) / mean(u_t^2)                                    (Romero et al.)
                u: a feature, r: a trainable 1x1 convolution
    attention   |a_t - a_s|_2^2,       a = Q / |Q|_2,  Q[h, w] = mean over channels of u^2  (Zagoruyko et al.)

T^2 keeps the size of the gradient while T changes. Every loss is a mean over images, and over pixels where
the outputs are (n, classes, h, w). All of it is computed in float32, whatever the network ran in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_TINY = 1e-7


def logits_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Return T^2 KL(p_t || p_s), mean over images and pixels.

    Args:
        student: logits (n, classes) or (n, classes, h, w).
        teacher: the same shape; no gradient goes into it.
        temperature: T; above 1 it shows how the teacher ranks the wrong classes.

    Returns:
        A scalar, 0 where both are equal.

    Example:
        >>> from math import log
        >>> equal = logits_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        >>> half = logits_loss(torch.tensor([[log(3.0), 0.0]]), torch.zeros(1, 2), temperature=1.0)
        >>> float(equal), round(float(half), 4), round(log(2 / 3**0.5), 4)
        (0.0, 0.1438, 0.1438)

    **Source**: G. Hinton, O. Vinyals, J. Dean, Distilling the Knowledge in a Neural Network, 2015,
    arXiv:1503.02531, section 2.
    """
    log_student = functional.log_softmax(student.float() / temperature, dim=1)
    log_teacher = functional.log_softmax(teacher.detach().float() / temperature, dim=1)
    per_position = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
    return temperature**2 * per_position.mean()


def decoupled_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0, beta: float = 2.0
) -> Tensor:
    """Return T^2 (KL(b_t || b_s) + beta KL(q_t || q_s)), mean over images and pixels (DKD).

    Plain distillation weighs the second part with 1 - p_t[y], so that the images the teacher is surest of
    say least about the other classes; here the weight is beta for all.

    Args:
        student: logits (n, classes) or (n, classes, h, w), at least 2 classes.
        teacher: the same shape; no gradient goes into it.
        labels: y, int64 (n,) or (n, h, w); the right classes, or the teacher's own where none are known.
        temperature: T.
        beta: weight of the part about the other classes; the paper takes 1 to 8, 2 for ResNets of one kind.

    Returns:
        A scalar, 0 where both are equal.

    **Source**: B. Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, arXiv:2203.08679, equation 7,
    with its alpha at 1 as in all of its experiments.
    """
    is_target = functional.one_hot(labels, student.shape[1]).movedim(-1, 1).bool()  # (n, classes, ...)
    scaled = [student.float() / temperature, teacher.detach().float() / temperature]
    target, other = [], []
    for z in scaled:
        target_probability = functional.softmax(z, dim=1).masked_fill(~is_target, 0.0).sum(1)  # (n, ...)
        pair = torch.stack((target_probability, 1.0 - target_probability), 1)
        target.append(pair.clamp(min=_TINY))
        other.append(
            functional.log_softmax(z.masked_fill(is_target, float("-inf")), dim=1).masked_fill(is_target, 0)
        )
    target_part = (target[1] * (target[1].log() - target[0].log())).sum(1)
    weight = other[1].exp().masked_fill(is_target, 0.0)
    other_part = (weight * (other[1] - other[0])).sum(1)
    return temperature**2 * (target_part + beta * other_part).mean()


def value_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return mean((z_t - z_s)^2) / mean(z_t^2), for outputs that are no scores of classes.

    Args:
        student: outputs of any shape.
        teacher: the same shape; no gradient goes into it.

    Returns:
        A scalar; 1 for a student that gives zeros.

    Example:
        >>> float(value_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])))
        2.0

    **Source**: J. Ba, R. Caruana, Do Deep Nets Really Need to be Deep?, NeurIPS 2014, arXiv:1312.6184,
    equation 1, divided by the mean square so that it does not depend on the unit of the output.
    """
    expected = teacher.detach().float()
    return (student.float() - expected).square().mean() / expected.square().mean().clamp(min=_TINY)


def hint_loss(adapted: Tensor, teacher: Tensor) -> Tensor:
    """Return 1/2 mean((u_t - r(u_s))^2) / mean(u_t^2).

    Args:
        adapted: r(u_s), the student's feature through its regressor, (n, c, h, w).
        teacher: u_t, the same shape; no gradient goes into it.

    Returns:
        A scalar; 1/2 for a regressor that gives zeros.

    Example:
        >>> float(hint_loss(torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)))
        0.5

    **Source**: A. Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv:1412.6550, equation 3;
    a relative mean in place of its sum, so that one weight fits layers of any size and range.
    """
    return 0.5 * value_loss(adapted, teacher)


def attention_map(feature: Tensor) -> Tensor:
    """Return a = Q / |Q|_2 with Q the mean of squares over the channels.

    Args:
        feature: u, (n, c, h, w).

    Returns:
        (n, h * w), each row of length 1 (0 for a feature of zeros).

    Example:
        >>> attention_map(torch.tensor([[[[3.0**0.5, 2.0]]]])).tolist()
        [[0.6000000238418579, 0.800000011920929]]

    **Source**: S. Zagoruyko, N. Komodakis, Paying More Attention to Attention, ICLR 2017,
    arXiv:1612.03928, section 3.1, F_sum^2.
    """
    return functional.normalize(feature.float().square().mean(1).flatten(1), dim=1)  # (n, h, w) -> (n, h * w)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return |a_t - a_s|_2^2 of two attention maps, mean over images.

    Args:
        student: a_s of `attention_map`, (n, h * w).
        teacher: a_t, the same shape; no gradient goes into it.

    Returns:
        A scalar; 0 for maps that are equal, 2 for maps that share no pixel.

    Example:
        >>> float(attention_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])))
        2.0

    **Source**: arXiv:1612.03928, equation 2, with the square of the norm as in the authors' program; summed
    over pixels where that averages, so that one weight fits maps of any size.
    """
    return (student - teacher.detach().float()).square().sum(1).mean()
