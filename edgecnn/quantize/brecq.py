"""BRECQ: learn how weights are rounded, block by block.

    min over all V of a block   |g(x; W, b) - g~(x~; W~(V), b~)|^2 / D + lambda sum (1 - |2 h(V) - 1|^beta)

g is a whole residual block, so that its last layer can make up for what its first does. A block ends where
a single value carries everything that follows needs; where none does for long (DenseNet, U-Net) the layers
are learned one by one. h, lambda and beta are AdaRound's. Activations are quantized as they will be, with the
straight-through gradient. Errors of all outputs weigh the same, as in the paper's own code for weights; its
Fisher weighting is left out, it needs gradients of a loss.

D is 12 / (weights of the block) times the squared error that rounding to nearest causes at the block's end,
which for one layer is what AdaRound divides by.

Source: Li et al. 2021, arXiv:2102.05426, section 3.3 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (registers torch.ops.quantized_decomposed)

from edgecnn.graph.nodes import copy_graph
from edgecnn.model import Model
from edgecnn.pipeline import Progress
from edgecnn.quantize.adaround import (
    LEARNING_RATE,
    STRENGTH,
    RoundingOptions,
    SoftWeight,
    annealed_beta,
    has_enough,
    regularizer,
    round_layer,
    soften,
    write_layer,
)
from edgecnn.quantize.annotate import fuses_into_clamp
from edgecnn.quantize.columns import is_columnar
from edgecnn.quantize.lockstep import LayerPair, Stepper, layer_pairs

qd = torch.ops.quantized_decomposed

BATCH_IMAGES = 16
MAX_BLOCK_LAYERS = 8


@dataclass(frozen=True)
class Block:
    """Consecutive nodes of the quantized graph that end in one value.

    Attributes:
        nodes: in execution order.
        pairs: the layers among them.
        end: the last node, which the float graph has too; None for the rest behind the last such node.
    """

    nodes: tuple[fx.Node, ...]
    pairs: tuple[LayerPair, ...]
    end: fx.Node | None


def find_blocks(graph: fx.GraphModule, pairs: Sequence[LayerPair]) -> list[Block]:
    """Return the graph cut wherever a single value carries all that follows needs.

    Args:
        graph: quantized.
        pairs: its layers, whose float nodes tell which of its nodes the float graph has.
    """
    names = {node.name for node in pairs[0].float_node.graph.nodes} if pairs else set()
    by_node = {pair.node: pair for pair in pairs}
    blocks: list[Block] = []
    nodes: list[fx.Node] = []
    last_use = {source: node for node in graph.graph.nodes for source in node.all_input_nodes}
    live: set[fx.Node] = set()
    for node in graph.graph.nodes:
        ended = [source for source in node.all_input_nodes if last_use[source] is node]
        if node.op == "call_function" and any(source in live for source in node.all_input_nodes):
            nodes.append(node)
            live.add(node)
        elif node.op == "placeholder":
            live.add(node)
        live -= set(ended)
        is_cut = nodes and nodes[-1] is node and live == {node} and not fuses_into_clamp(node)
        is_cut = is_cut and node.name in names
        if is_cut and any(n in by_node for n in nodes):
            blocks.append(_block(nodes, by_node, node))
            nodes = []
    if any(node in by_node for node in nodes):
        blocks.append(_block(nodes, by_node, None))
    return blocks


def _block(nodes: Sequence[fx.Node], by_node: Mapping[fx.Node, LayerPair], end: fx.Node | None) -> Block:
    return Block(tuple(nodes), tuple(by_node[node] for node in nodes if node in by_node), end)


class _SoftBlock:
    """A block whose weights are undecided, run with gradients."""

    def __init__(self, block: Block, side: Stepper, soft: Mapping[fx.Node, tuple[SoftWeight, torch.Tensor]]):
        self.block = block
        self.soft = soft
        inside = set(block.nodes)
        outside = [n for node in block.nodes for n in node.all_input_nodes if n not in inside]
        self.inputs = {n: torch.cat(side.value(n)) for n in dict.fromkeys(outside) if side.has(n)}
        self.constants = {n: side.constant(n) for n in dict.fromkeys(outside) if n not in self.inputs}

    def run(self, chosen: torch.Tensor, weights: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
        """Return the block's end for the chosen images, with the given weight of each layer."""
        values: dict[fx.Node, Any] = {n: v[chosen] for n, v in self.inputs.items()}
        values.update(self.constants)
        for node in self.block.nodes:
            arguments: Any = fx.map_arg(node.args, lambda n: values[n])
            if node in self.soft:
                arguments = (arguments[0], weights[node], self.soft[node][1], *arguments[3:])
            if node.target is qd.quantize_per_tensor.default:
                x, scale, zero_point, low, high, _ = arguments
                values[node] = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
            elif node.target is qd.dequantize_per_tensor.default and node.args[0] in self.block.nodes:
                values[node] = arguments[0]
            else:
                values[node] = node.target(*arguments, **node.kwargs)  # type: ignore[operator]
        result: torch.Tensor = values[self.block.nodes[-1]]
        return result


def brecq(
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
        progress: told about every block.
    """
    after = quantized.with_graph(copy_graph(quantized.graph))
    generator = torch.Generator().manual_seed(options.seed)
    float_side, side = Stepper(float_model.graph, batches), Stepper(after.graph, batches)
    float_nodes = {node.name: node for node in float_model.graph.graph.nodes}
    blocks = find_blocks(after.graph, layer_pairs(float_model.graph, after.graph))
    batch = float_model.fixed_batch or BATCH_IMAGES
    num_images = sum(len(images) for images in batches)
    progress.start("learn the rounding of weights (brecq), blocks", len(blocks))
    for block in blocks:
        if block.end is not None and _is_learnable(block, float_model.graph, num_images):
            side.run_until(block.nodes[0])
            wanted = torch.cat(float_side.run_through(float_nodes[block.end.name]))
            _learn_block(block, side, float_model.graph, wanted, options, generator, batch)
        else:
            _learn_layers(block, float_side, side, options, generator)
        progress.advance()
    progress.finish()
    return after


def _is_learnable(block: Block, float_graph: fx.GraphModule, num_images: int) -> bool:
    """Whether the layers of a block are learned together."""
    if len(block.pairs) > MAX_BLOCK_LAYERS:
        return False
    return all(is_columnar(p.node) and has_enough(p, float_graph, num_images) for p in block.pairs)


def _learn_layers(
    block: Block, float_side: Stepper, side: Stepper, options: RoundingOptions, generator: torch.Generator
) -> None:
    """Learn the layers of a block one by one."""
    for pair in block.pairs:
        side.run_until(pair.node)
        wanted = float_side.run_through(pair.float_end)
        round_layer(pair, float_side, side, wanted, options, generator)


def _learn_block(
    block: Block,
    side: Stepper,
    float_graph: fx.GraphModule,
    wanted: torch.Tensor,
    options: RoundingOptions,
    generator: torch.Generator,
    batch: int,
) -> None:
    """Learn all layers of a block at once and write their integers into the quantized graph."""
    soft = {}
    for pair in block.pairs:
        weight, bias = soften(pair, float_graph, side.graph, options.num_bits)
        soft[pair.node] = (weight, bias.requires_grad_(True))
    running = _SoftBlock(block, side, soft)
    unit = _unit(running, len(wanted), batch)
    parameters: list[dict[str, Any]] = [
        {"params": [weight.v for weight, _ in soft.values()], "lr": LEARNING_RATE},
        *({"params": [b], "lr": LEARNING_RATE * float(w.scale.mean())} for w, b in soft.values()),
    ]
    optimizer = torch.optim.Adam(parameters)
    for step in range(options.iterations):
        chosen = torch.randint(len(wanted), (batch,), generator=generator)
        undecided = {node: weight.undecided() for node, (weight, _) in soft.items()}
        y = running.run(chosen, {node: soft[node][0].weight(h) for node, h in undecided.items()})
        loss = squared_error(y, wanted[chosen]) / unit
        beta = annealed_beta(step, options.iterations)
        if beta is not None:
            loss = loss + STRENGTH * torch.stack([regularizer(h, beta) for h in undecided.values()]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for node, (weight, bias) in soft.items():
        write_layer(side.graph, node, weight.integers(), bias.detach())


def squared_error(y: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the squared error of (n, c, ...), summed over channels, mean over all else.

    Example:
        >>> squared_error(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)).item()
        3.0
    """
    return (y - wanted).square().mean() * y.shape[1]


def _unit(running: _SoftBlock, num_images: int, batch: int) -> float:
    """Return D: what one step of one weight costs at the block's end, about."""
    chosen = torch.arange(min(num_images, batch))
    with torch.no_grad():
        exact = running.run(chosen, {n: w.weight(w.undecided()) for n, (w, _) in running.soft.items()})
        nearest = running.run(chosen, {n: w.weight((w.v >= 0).float()) for n, (w, _) in running.soft.items()})
    count = sum(weight.v.numel() for weight, _ in running.soft.values())
    return max(12.0 * float(squared_error(nearest, exact)) / count, 1e-30)
