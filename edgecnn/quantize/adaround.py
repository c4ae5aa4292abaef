"""AdaRound: learn for each weight whether to round it up or down, layer by layer.

    W~ = s clamp(floor(W / s) + h(V), -q_max, q_max)
    h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
    min over V   |f(W x + b) - f(W~ x~ + b~)|^2 / D + lambda sum (1 - |2 h(V) - 1|^beta)

x is the layer's input in float, x~ in the quantized network whose earlier layers are rounded already
(asymmetric reconstruction), f the clamp that is part of the layer. beta falls from 20 to 2, which lets h
move freely at first and drives it to 0 or 1 in the end. D = mean(s^2) mean(x~^2), about what one step of one
weight costs, makes lambda mean the same in all layers. b~ is learned along, in place of a bias correction.

The paper takes 10,000 steps on whole images; here a layer is a matrix product over sampled positions
(`columns`), and a few hundred steps at a larger rate do. A transposed convolution stays rounded to nearest,
and so does a linear layer with more inputs than there are images: it would learn the images by heart.

Source: Nagel et al. 2020, arXiv:2004.10568, equations 21 to 25.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edgecnn.graph.nodes import argument, aten, copy_graph, fetch
from edgecnn.model import Model
from edgecnn.pipeline import Progress
from edgecnn.quantize.columns import Columns, is_columnar, sample_columns
from edgecnn.quantize.lockstep import LayerPair, Stepper, layer_pairs
from edgecnn.quantize.parameters import quantize_bias

GAMMA, ZETA = -0.1, 1.1
FIRST_BETA, LAST_BETA = 20.0, 2.0
WARM_UP = 0.2
"""Share of the steps without the regularizer."""
STRENGTH = 3.0
"""Lambda. On ResNet-20 with 4 bits: 0.01 gave 16.7 dB, 0.1 17.4, 1 18.6, 3 19.3, 10 19.3."""
LEARNING_RATE = 0.03
NUM_COLUMNS, BATCH_COLUMNS = 8192, 256


def rectified_sigmoid(v: torch.Tensor) -> torch.Tensor:
    """Return h(V), in [0, 1] and exactly 0 or 1 at its ends.

    Example:
        >>> rectified_sigmoid(torch.tensor([-3.0, 0.0, 3.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    return torch.clamp(torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def inverse_rectified_sigmoid(h: torch.Tensor) -> torch.Tensor:
    """Return V with h(V) = h, for h in [0, 1].

    Example:
        >>> inverse_rectified_sigmoid(torch.tensor([0.5])).abs().item() < 1e-6
        True
    """
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1.0)


def regularizer(h: torch.Tensor, beta: float) -> torch.Tensor:
    """Return sum (1 - |2 h - 1|^beta), 0 where all are decided.

    Example:
        >>> regularizer(torch.tensor([0.0, 1.0, 0.5, 0.75]), 2.0).item()
        1.75
    """
    return (1.0 - (2.0 * h - 1.0).abs() ** beta).sum()


def annealed_beta(step: int, steps: int) -> float | None:
    """Return beta at a step, None in the warm-up.

    Example:
        >>> annealed_beta(0, 10), annealed_beta(2, 10), annealed_beta(6, 10)
        (None, 20.0, 11.0)
    """
    start = WARM_UP * steps
    if step < start:
        return None
    share = (step - start) / max(steps - start, 1e-9)
    return LAST_BETA + 0.5 * (FIRST_BETA - LAST_BETA) * (1.0 + math.cos(math.pi * share))


class SoftWeight:
    """A layer's weight while it is undecided between two integers.

    Attributes:
        v: what is learned, of the weight's shape.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, num_bits: int) -> None:
        """Start from the float weight.

        Args:
            weight: float32, output channels first.
            scale: float32 (c_out,).
            num_bits: of the integers.
        """
        self.scale = scale.reshape(-1, *([1] * (weight.dim() - 1)))
        self._floor = torch.floor(weight / self.scale)
        self._q_max = 2 ** (num_bits - 1) - 1
        self.v = inverse_rectified_sigmoid(weight / self.scale - self._floor).requires_grad_(True)

    def undecided(self) -> torch.Tensor:
        """Return h(V), differentiable."""
        return rectified_sigmoid(self.v)

    def weight(self, h: torch.Tensor) -> torch.Tensor:
        """Return the real weight for given h."""
        return self.scale * torch.clamp(self._floor + h, -self._q_max, self._q_max)

    def integers(self) -> torch.Tensor:
        """Return the decided integers, int8."""
        up = (self.v.detach() >= 0).to(self._floor.dtype)
        return torch.clamp(self._floor + up, -self._q_max, self._q_max).to(torch.int8)


@dataclass(frozen=True)
class RoundingOptions:
    """How rounding is learned.

    Attributes:
        num_bits: of the weights.
        iterations: optimization steps per layer or block.
        seed: of the samples drawn.
    """

    num_bits: int = 8
    iterations: int = 500
    seed: int = 0


def learn_rounding(
    soft: SoftWeight,
    bias: torch.Tensor,
    columns: Columns,
    clamp: tuple[float | None, float | None],
    iterations: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Learn V of one layer, in place, and return the learned bias (c_out,).

    Args:
        soft: the layer's weight, (c_out, ...).
        bias: float32 (c_out,).
        columns: inputs of the quantized network and outputs of the float one.
        clamp: what the layer ends with.
        iterations: steps.
        generator: of the samples.
    """
    groups, samples, k = columns.x.shape
    has_clamp = clamp != (None, None)
    step = float(soft.scale.mean())
    learned = bias.clone().requires_grad_(True)
    unit = max(float((soft.scale**2).mean() * (columns.x**2).mean()), 1e-30)
    parameters: list[dict[str, Any]] = [
        {"params": [soft.v], "lr": LEARNING_RATE},
        {"params": [learned], "lr": LEARNING_RATE * step},
    ]
    optimizer = torch.optim.Adam(parameters)
    for index in range(iterations):
        chosen = torch.randint(samples, (BATCH_COLUMNS,), generator=generator)
        h = soft.undecided()
        rows = soft.weight(h).reshape(groups, -1, k)  # (g, c_out/g, k)
        y = columns.x[:, chosen] @ rows.transpose(1, 2) + learned.reshape(groups, 1, -1)
        if has_clamp:
            y = torch.clamp(y, *clamp)
        loss = (y - columns.y[:, chosen]).square().sum() / (BATCH_COLUMNS * unit)
        beta = annealed_beta(index, iterations)
        if beta is not None:
            loss = loss + STRENGTH * regularizer(h, beta)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return learned.detach()


def adaround(
    float_model: Model,
    quantized: Model,
    batches: Sequence[torch.Tensor],
    options: RoundingOptions,
    progress: Progress,
) -> Model:
    """Return the quantized network with the integers of its weights and biases learned.

    Args:
        float_model: what was quantized, its node names unchanged.
        quantized: by `quantize_static`; scales and zero points stay.
        batches: calibration images, float32 (n, c, h, w) each.
        options: bits, steps, seed.
        progress: told about every layer.
    """
    after = quantized.with_graph(copy_graph(quantized.graph))
    generator = torch.Generator().manual_seed(options.seed)
    float_side, side = Stepper(float_model.graph, batches), Stepper(after.graph, batches)
    pairs = layer_pairs(float_model.graph, after.graph)
    progress.start("learn the rounding of weights (adaround), layers", len(pairs))
    for pair in pairs:
        side.run_until(pair.node)
        wanted = float_side.run_through(pair.float_end)
        round_layer(pair, float_side, side, wanted, options, generator)
        progress.advance()
    progress.finish()
    return after


def round_layer(
    pair: LayerPair,
    float_side: Stepper,
    side: Stepper,
    wanted: Sequence[torch.Tensor],
    options: RoundingOptions,
    generator: torch.Generator,
) -> None:
    """Learn one layer, unless it stays as it is, and write its integers into the quantized graph."""
    num_images = sum(len(batch) for batch in wanted)
    if not is_columnar(pair.node) or not has_enough(pair, float_side.graph, num_images):
        return
    soft, bias = soften(pair, float_side.graph, side.graph, options.num_bits)
    inputs = side.value(pair.node.all_input_nodes[0])
    columns = sample_columns(pair.node, soft.v.detach(), inputs, wanted, NUM_COLUMNS, generator)
    learned = learn_rounding(soft, bias, columns, pair.clamp, options.iterations, generator)
    write_layer(side.graph, pair.node, soft.integers(), learned)


def has_enough(pair: LayerPair, float_graph: fx.GraphModule, num_images: int) -> bool:
    """Whether there are images enough to learn a layer from: a linear one sees each of them once."""
    weight = fetch(float_graph, argument(pair.float_node, 1, "weight"))
    return pair.node.target is not aten.linear.default or num_images >= weight.shape[1]


def soften(
    pair: LayerPair, float_graph: fx.GraphModule, graph: fx.GraphModule, num_bits: int
) -> tuple[SoftWeight, torch.Tensor]:
    """Return a layer's float weight on the quantized layer's grid, and its float bias (c_out,)."""
    weight = fetch(float_graph, argument(pair.float_node, 1, "weight")).float()
    bias_node = argument(pair.float_node, 2, "bias")
    bias = torch.zeros(len(weight)) if bias_node is None else fetch(float_graph, bias_node).float()
    return SoftWeight(weight, fetch(graph, pair.node.args[1].args[1]), num_bits), bias  # type: ignore[union-attr,arg-type]


def write_layer(
    graph: fx.GraphModule, node: fx.Node, integers: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Write a layer's int8 weight and, where it has one, its int32 bias into the quantized graph, in place.

    Args:
        graph: quantized.
        node: the layer, which reads dequantize nodes.
        integers: int8, of the weight's shape.
        bias: float32 (c_out,), None to leave it.
    """
    weight_node, bias_node = node.args[1], argument(node, 2, "bias")
    fetch(graph, weight_node.args[0]).copy_(integers)  # type: ignore[union-attr,arg-type]
    if bias is None or bias_node is None:
        return
    stored, scale = (fetch(graph, bias_node.args[i]) for i in (0, 1))
    stored.copy_(torch.from_numpy(quantize_bias(bias.numpy(), scale.numpy())))
