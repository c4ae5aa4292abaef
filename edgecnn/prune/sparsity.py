"""The pass `sparsify`: single weights are zero; the network's shapes stay.

    unstructured   the smallest |w| of all layers together are set to zero
    N:M            of every M weights that follow each other along the input channels, the N largest |w| stay

Sparsity is not pruning: ONNX Runtime and LiteRT store and multiply the zeros like any other weight. What is
won is the size of a compressed (gzip) file, not speed and not the size of the file itself. The pass says so.
Zeros survive int8, whose weights are symmetric: 0 is the integer 0.

Source: Han et al. 2015, arXiv:1506.02626, section 3 (magnitude); Mishra et al. 2021, arXiv:2104.08378,
section 3 (N:M).
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from edgecnn.errors import PassError, RecipeError
from edgecnn.graph.nodes import argument, aten, copy_graph, is_constant, layer_name
from edgecnn.model import Model
from edgecnn.pipeline import Need, PassContext
from edgecnn.prune.compensate import reestimate
from edgecnn.prune.retrain import Retraining
from edgecnn.prune.samples import Samples

_INPUT_AXIS = {
    aten.conv2d.default: 1,
    aten.conv2d.padding: 1,
    aten.linear.default: 1,
    aten.conv_transpose2d.input: 0,
}
"""Axis of the input channels in the weight."""

_PATTERN = re.compile(r"(\d+):(\d+)")

HONEST = (
    "sparsify: {zeros:.0%} of the weights are zero. ONNX Runtime and LiteRT gain neither speed nor file size "
    "from that; gzip takes the int8 weights from {before:,} to {after:,} bytes"
)


@dataclass(frozen=True)
class Sparsify:
    """Pass: set weights to zero, one by one or N of every M.

    Passes that train would move the zeros; `epochs` trains here, with the zeros held.

    Attributes:
        sparsity: share of zeros over all layers, 0 <= sparsity < 1; for the unstructured pattern.
        pattern: "unstructured", or "N:M" such as "2:4", which has a sparsity of its own.
        skip_ends: leave the first and the last layer dense (unstructured only).
        epochs: of training with labels in which the zeros stay; 0 for none.
        learning_rate: of that training.
        reestimate: count batch-norm statistics again, where nothing is trained.
        num_samples: images for that, at most.

    Source: Han et al. 2015, arXiv:1506.02626; Mishra et al. 2021, arXiv:2104.08378.
    """

    sparsity: float = 0.5
    pattern: str = "unstructured"
    skip_ends: bool = True
    epochs: float = 0.0
    learning_rate: float = 0.01
    reestimate: bool = True
    num_samples: int = 256

    name: ClassVar[str] = "sparsify"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CALIBRATION})

    def check(self) -> None:
        """Check the parameters.

        Raises:
            RecipeError: naming the parameter, what was found and what was expected.
        """
        if not 0 <= self.sparsity < 1:
            raise RecipeError(f"sparsity is {self.sparsity:g}, expected 0 <= sparsity < 1")
        if self.num_samples < 1:
            raise RecipeError(f"num_samples is {self.num_samples}, expected at least 1")
        if self.epochs < 0:
            raise RecipeError(f"epochs is {self.epochs:g}, expected 0 or more")
        if self.learning_rate <= 0:
            raise RecipeError(f"learning_rate is {self.learning_rate:g}, expected a number above 0")
        parse_pattern(self.pattern)

    def requires(self, model: Model) -> None:
        """Refuse a quantized graph and one without weights."""
        for node in model.graph.graph.nodes:
            if "quantized_decomposed" in str(node.target):
                raise PassError(
                    f"{layer_name(node)} is quantized", hint="put sparsify ahead of quantize_static"
                )
        if not _weights(model.graph):
            raise PassError("the network has no convolution or linear layer to make sparse")

    def run(self, model: Model, context: PassContext) -> Model:
        """Return the network with zeros; appends a record to `context.records`."""
        self.check()
        graph = copy_graph(model.graph)
        weights = _weights(graph)
        before = gzip_bytes([weight for weight, _ in weights.values()])
        parsed = parse_pattern(self.pattern)
        dense: list[str] = []
        with torch.no_grad():
            if parsed is None:
                names = list(weights)
                chosen = names[1:-1] if self.skip_ends and len(names) > 2 else names
                keep_largest([weights[name][0] for name in chosen], self.sparsity)
                dense = [name for name in names if name not in chosen]
            else:
                for name, (weight, axis) in weights.items():
                    if weight.shape[axis] % parsed[1]:
                        dense.append(name)
                    else:
                        weight.mul_(n_of_m_mask(weight, axis, *parsed))
        sparse = self._settle(model.with_graph(graph), context, set(weights) - set(dense))
        tensors = [weight for weight, _ in _weights(sparse.graph).values()]
        zeros = sum(int((w == 0).sum()) for w in tensors) / sum(w.numel() for w in tensors)
        after = gzip_bytes(tensors)
        context.records.append(
            {
                "pass": self.name,
                "kind": "sparsity",
                "pattern": self.pattern,
                "zeros": zeros,
                "gzip_bytes": [before, after],
                "dense": dense,
            }
        )
        return sparse.with_warning(HONEST.format(zeros=zeros, before=before, after=after))

    def ensures(self, before: Model, after: Model) -> None:
        """Check that shapes are as they were."""
        shapes = [{n: tuple(p.shape) for n, p in m.graph.named_parameters()} for m in (before, after)]
        if shapes[0] != shapes[1]:
            raise PassError("sparsify changed the shape of a parameter")

    def _settle(self, model: Model, context: PassContext, sparse: set[str]) -> Model:
        """Return the network after training, or with batch-norm statistics counted again."""
        if self.epochs > 0:
            return Retraining(context, self.epochs, self.learning_rate, self.name).masked(model, sparse)
        if not self.reestimate or context.calibration is None:
            return model
        indices = context.calibration_indices[: self.num_samples]
        return reestimate(model, Samples(context.calibration, indices, progress=context.progress))


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return (N, M) of "N:M", None for "unstructured".

    Raises:
        RecipeError: for anything else.

    Example:
        >>> parse_pattern("2:4"), parse_pattern("unstructured")
        ((2, 4), None)
    """
    if pattern == "unstructured":
        return None
    match = _PATTERN.fullmatch(pattern)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise RecipeError(
            f"pattern is {pattern!r}, expected 'unstructured' or 'N:M' with 0 < N < M, such as '2:4'"
        )
    return int(match[1]), int(match[2])


def n_of_m_mask(weight: torch.Tensor, axis: int, n: int, m: int) -> torch.Tensor:
    """Return 1 for the n largest |w| of every m along `axis`, else 0; of equals the first stays.

    Args:
        weight: its size along `axis` is a multiple of m.
        axis: of the input channels.
        n: weights that stay.
        m: weights looked at together.

    Example:
        >>> n_of_m_mask(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), 1, 2, 4).tolist()
        [[0.0, 1.0, 1.0, 0.0]]
    """
    last = weight.movedim(axis, -1)
    blocks = last.reshape(-1, m)  # (blocks, m)
    order = blocks.abs().argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(blocks).scatter_(1, order[:, :n], 1.0)
    return mask.reshape(last.shape).movedim(-1, axis)


def keep_largest(weights: list[torch.Tensor], sparsity: float) -> None:
    """Set the share `sparsity` of all weights together to zero, the smallest |w| first, in place.

    Example:
        >>> w = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
        >>> keep_largest([w], 0.5)
        >>> w.tolist()
        [[0.0, -3.0], [2.0, 0.0]]
    """
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    count = int(sparsity * len(magnitudes))
    gone = torch.zeros(len(magnitudes), dtype=torch.bool)
    gone[magnitudes.argsort(stable=True)[:count]] = True
    start = 0
    for weight in weights:
        weight.masked_fill_(gone[start : start + weight.numel()].reshape(weight.shape), 0.0)
        start += weight.numel()


def gzip_bytes(weights: list[torch.Tensor]) -> int:
    """Return the bytes of the weights as int8 (symmetric per first dimension) after compression."""
    data = b""
    for weight in weights:
        flat = weight.detach().reshape(weight.shape[0], -1)
        scale = flat.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
        data += (flat / scale).round().to(torch.int8).numpy().tobytes()
    return len(zlib.compress(data, 6))


def _weights(graph: fx.GraphModule) -> dict[str, tuple[torch.Tensor, int]]:
    """Return name -> (weight, axis of its input channels) of every layer with weights, in order."""
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    found = {}
    for node in graph.graph.nodes:
        if node.target in _INPUT_AXIS:
            weight = argument(node, 1, "weight")
            if is_constant(weight):
                found[str(weight.target)] = (tensors[str(weight.target)], _INPUT_AXIS[node.target])
    return found
