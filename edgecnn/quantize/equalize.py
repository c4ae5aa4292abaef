"""Cross-layer equalization and high-bias absorption, on the folded float graph, without data.

    W1' = W1 / s    b1' = b1 / s    W2' = W2 s      s_i = sqrt(r1_i r2_i) / r2_i = sqrt(r1_i / r2_i)

for each channel i between two layers, with r1_i the largest weight that makes the channel and r2_i the
largest that reads it: both become sqrt(r1_i r2_i). The network computes what it did, since f(s x) = s f(x),
s > 0, holds of relu, leaky_relu, pools and means. Weights here have a scale per output channel, so what gains
are the input channels of the second layer and the activation between, whose channels share one scale.

    b1' = b1 - c    b2' = b2 + sum W2 c             c_i = max(0, beta_i - 3 gamma_i)

takes out of an activation the offset that practically all its values have (Gaussian with the batch norm's
beta and gamma). It is right but for the values below c, and only of a second layer that pads nothing.

A clamp at 6 is not homogeneous: relu6(s x) / s = min(relu(x), 6 / s) has a bound per channel, which no int8
kernel has. Such a pair is left as it is, unless `relu6` says to make the clamp a relu, as the paper does;
that changes what the network computes.

Source: Nagel et al. 2019, arXiv:1906.04721, equations 6 to 16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from edgecnn.errors import PassError
from edgecnn.graph.folding import STATISTICS
from edgecnn.graph.nodes import (
    add_constant,
    argument,
    aten,
    copy_graph,
    fetch,
    finish,
    is_constant,
    layer_name,
)
from edgecnn.graph.nodes import pair as both
from edgecnn.graph.same_outputs import refuse_changed_outputs
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model
from edgecnn.quantize.columns import is_columnar, layer_groups
from edgecnn.quantize.lockstep import clamp_bounds

MAX_SWEEPS = 20
MAX_FACTOR = 1e4
CONVERGED = 1e-3

_HOMOGENEOUS = frozenset(
    {
        aten.relu.default,
        aten.leaky_relu.default,
        aten.max_pool2d.default,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_max_pool2d.default,
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_bilinear2d.vec,
        aten.mean.dim,
        aten.flatten.using_ints,
        aten.view.default,
        aten.reshape.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
    }
)
"""f(s x) = s f(x) for a positive s per channel, where they keep the channels in dimension 1."""


@dataclass
class LayerPair:
    """A layer and all that read its channels, through operators that are homogeneous.

    Attributes:
        first: makes the channels.
        readers: layers that read them; nothing else does.
        bounded: clamps in between that are not homogeneous.
        is_direct: whether the readers read a relu that reads `first`, with nothing else in between.
    """

    first: fx.Node
    readers: list[fx.Node] = field(default_factory=list)
    bounded: list[fx.Node] = field(default_factory=list)
    is_direct: bool = True


@dataclass
class _Constants:
    """A layer's weight and bias while they change, float64."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Equalize:
    """Pass: balance channel ranges between neighbouring layers; put it after fold_batch_norm.

    Attributes:
        absorb: also move offsets of activations into the next layer's bias, which is nearly exact.
        relu6: "keep" leaves pairs with a clamp at 6 between them alone, "relu" makes such clamps relu.

    Source: arXiv:1906.04721, sections 4.1 and 4.1.3.
    """

    absorb: bool = False
    relu6: Literal["keep", "relu"] = "keep"

    name: ClassVar[str] = "equalize"
    needs: ClassVar[frozenset[Any]] = frozenset()

    def requires(self, model: Model) -> None:
        """Refuse a graph that is quantized or still has batch norms."""
        for node in model.graph.graph.nodes:
            if "quantized_decomposed" in str(node.target):
                raise PassError(
                    "the model is quantized already", hint="put equalize ahead of quantize_static"
                )
            if node.target is aten.batch_norm.default:
                raise PassError(
                    f"{layer_name(node)} is not folded", hint="put fold_batch_norm ahead of equalize"
                )

    def run(self, model: Model, context: Any) -> Model:  # noqa: ARG002 (the Pass protocol's signature)
        """Return the model with weights and biases rescaled."""
        graph = copy_graph(model.graph)
        work = model.with_graph(graph)
        pairs = find_pairs(work)
        kept = [pair for pair in pairs if not pair.bounded or self.relu6 == "relu"]
        for node in {clamp for pair in kept for clamp in pair.bounded}:
            node.target, node.args = aten.relu.default, node.args[:1]
        constants = _read_constants(graph, kept)
        scales = equalize_pairs(kept, constants)
        absorbed = 0
        for pair in kept:
            _scale_statistics(pair.first, scales[pair.first])
            if self.absorb:
                absorbed += _absorb(pair, constants)
        for node, values in constants.items():
            _write(graph, node, values)
        after = model.with_graph(finish(graph))
        if self.absorb and not absorbed:
            after = after.with_warning(
                f"equalize absorbed no offset in {len(kept)} pairs of layers: that takes a batch norm whose "
                "values are practically all above 0, nothing but a relu behind it, and a next layer that "
                "pads nothing"
            )
        skipped = len(pairs) - len(kept)
        if skipped:
            after = after.with_warning(
                f"equalize left {skipped} of {len(pairs)} pairs of layers alone: a clamp at 6 between them "
                'cannot be scaled per channel (relu6 = "relu" makes it a relu)'
            )
        return after

    def ensures(self, before: Model, after: Model) -> None:
        """Check that noise gives the same outputs, where only what is exact was done."""
        if self.relu6 != "relu" and not self.absorb:
            refuse_changed_outputs(before, after, self.name)


def find_pairs(model: Model) -> list[LayerPair]:
    """Return every layer whose output channels are read by layers alone, in execution order."""
    shapes = infer_shapes(model)
    pairs = []
    for node in model.graph.graph.nodes:
        if _is_layer(node) and len(shapes[node.name]) == (2 if node.target is aten.linear.default else 4):
            pair = LayerPair(node)
            if _follow(node, pair, shapes) and pair.readers:
                pairs.append(pair)
    return pairs


def _is_layer(node: fx.Node) -> bool:
    return node.op == "call_function" and is_columnar(node) and is_constant(argument(node, 1, "weight"))


def _follow(node: fx.Node, pair: LayerPair, shapes: dict[str, Any]) -> bool:
    """Collect what reads a value; False if the channels cannot be followed to layers only."""
    for user in node.users:
        if "sym_size" in str(user.target):
            continue
        if _is_layer(user):
            if argument(user, 0, "input") is not node or argument(user, 1, "weight") is node:
                return False
            if user.target is aten.linear.default and len(shapes[node.name]) != 2:
                return False
            pair.is_direct = (
                pair.is_direct and node.target is aten.relu.default and node.args[0] is pair.first
            )
            pair.readers.append(user)
            continue
        low, high = clamp_bounds(user)
        if low == 0.0 and high is not None:
            pair.bounded.append(user)
        elif (low, high) != (0.0, None) and not _keeps_channels(node, user, shapes):
            return False
        if not _follow(user, pair, shapes):
            return False
    return bool(node.users)


def _keeps_channels(node: fx.Node, user: fx.Node, shapes: dict[str, Any]) -> bool:
    """Whether an operator is homogeneous and leaves channels where they are."""
    x, y = shapes.get(node.name), shapes.get(user.name)
    if user.target not in _HOMOGENEOUS or not isinstance(x, tuple) or not isinstance(y, tuple):
        return False
    if len(y) < 2 or x[1] != y[1]:
        return False
    if user.target is aten.mean.dim:
        return 1 not in [int(d) % len(x) for d in argument(user, 1, "dim")]
    if user.target in (aten.flatten.using_ints, aten.view.default, aten.reshape.default):
        return all(d == 1 for d in (*x[2:], *y[2:]))
    return True


def _read_constants(graph: fx.GraphModule, pairs: list[LayerPair]) -> dict[fx.Node, _Constants]:
    found = {}
    for node in dict.fromkeys(n for pair in pairs for n in (pair.first, *pair.readers)):
        bias = argument(node, 2, "bias")
        found[node] = _Constants(
            fetch(graph, argument(node, 1, "weight")).double(),
            None if bias is None else fetch(graph, bias).double(),
        )
    return found


def equalize_pairs(
    pairs: list[LayerPair], constants: dict[fx.Node, _Constants]
) -> dict[fx.Node, torch.Tensor]:
    """Balance all pairs, in turn, until nothing moves any more.

    Args:
        pairs: of layers.
        constants: changed in place.

    Returns:
        First layer -> by how much each of its output channels was divided, float64 (c,).
    """
    total = {pair.first: torch.ones(len(constants[pair.first].weight)).double() for pair in pairs}
    for _ in range(MAX_SWEEPS):
        largest = 0.0
        for pair in pairs:
            first = constants[pair.first]
            r1 = first.weight.flatten(1).abs().amax(1)
            r2 = torch.stack([input_reach(constants[n].weight, layer_groups(n)) for n in pair.readers]).amax(
                0
            )
            s = balance(r1, r2)
            first.weight = first.weight / s.reshape(-1, *([1] * (first.weight.dim() - 1)))
            first.bias = None if first.bias is None else first.bias / s
            for reader in pair.readers:
                constants[reader].weight = scale_inputs(constants[reader].weight, s, layer_groups(reader))
            total[pair.first] = total[pair.first] * s
            largest = max(largest, float((s.log()).abs().max()))
        if largest < CONVERGED:
            break
    return total


def balance(r1: torch.Tensor, r2: torch.Tensor) -> torch.Tensor:
    """Return s = sqrt(r1 / r2) per channel, 1 where a channel is dead.

    Example: a channel of weights up to 8 read by weights up to 2 is halved; both then reach 4.
        >>> balance(torch.tensor([8.0, 0.0]), torch.tensor([2.0, 1.0])).tolist()
        [2.0, 1.0]
    """
    alive = (r1 > 0) & (r2 > 0)
    s = torch.sqrt(torch.where(alive, r1, 1.0) / torch.where(alive, r2, 1.0))
    return torch.clamp(s, 1.0 / MAX_FACTOR, MAX_FACTOR)


def input_reach(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the largest weight that reads each input channel, (c_in,).

    Example:
        >>> input_reach(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), 1).tolist()
        [2.0, 3.0]
    """
    by_group = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel())  # (g, c_out/g, c_in/g, k)
    return by_group.abs().amax((1, 3)).reshape(-1)


def scale_inputs(weight: torch.Tensor, s: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the weight with each input channel multiplied by s (c_in,)."""
    by_group = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
    return (by_group * s.reshape(groups, 1, -1, 1)).reshape(weight.shape)


def _scale_statistics(node: fx.Node, s: torch.Tensor) -> None:
    """Keep what is known of a layer's output true."""
    if STATISTICS in node.meta:
        mean, std = node.meta[STATISTICS]
        node.meta[STATISTICS] = (mean / s, std / s)


def _absorb(pair: LayerPair, constants: dict[fx.Node, _Constants]) -> bool:
    """Move the offset that nearly all values of an activation have into the bias of what reads it.

    Returns:
        Whether there was one that could be moved.
    """
    first = constants[pair.first]
    if STATISTICS not in pair.first.meta or first.bias is None or not pair.is_direct:
        return False
    if pair.bounded or any(_pads(reader) for reader in pair.readers):
        return False
    mean, std = pair.first.meta[STATISTICS]
    offset = torch.clamp(mean - 3.0 * std, min=0.0)
    first.bias = first.bias - offset
    pair.first.meta[STATISTICS] = (mean - offset, std)
    for reader in pair.readers:
        values, groups = constants[reader], layer_groups(reader)
        moved = scale_inputs(values.weight, offset, groups).flatten(1).sum(1)
        values.bias = moved if values.bias is None else values.bias + moved
    return bool((offset > 0).any())


def _pads(node: fx.Node) -> bool:
    """Whether a layer puts zeros around its input, which have no offset to be made up for."""
    if node.target is aten.linear.default:
        return False
    padding = argument(node, 4, "padding", 0)
    return padding == "same" or (padding != "valid" and both(padding) != (0, 0))


def _write(graph: fx.GraphModule, node: fx.Node, values: _Constants) -> None:
    """Give a layer new constants of its own; others may read the old ones."""
    name = str(argument(node, 1, "weight").target)
    weight = add_constant(graph, node, name, values.weight.float())
    bias = None
    if values.bias is not None:
        bias = add_constant(graph, node, f"{node.name}_bias", values.bias.float())
    node.args = (argument(node, 0, "input"), weight, bias, *node.args[3:])
    node.kwargs = {key: value for key, value in node.kwargs.items() if key not in ("input", "weight", "bias")}
