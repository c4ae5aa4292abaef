"""The teacher: what it says about a batch, in the loop or remembered.

Where no image is ever changed by augmentation the teacher sees each one once: its outputs are computed
before training and kept in memory, as float32 or, where that takes too much, as float16. Otherwise it runs in
the loop, in evaluation mode and without gradients, in the precision that the student trains in.

    x_teacher = ((x_student * std_s + mean_s) / scale_s * scale_t - mean_t) / std_t

takes one network's input to the other's, where the two normalize differently; channels swap places between
RGB and BGR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from edgecnn.data import Dataset
from edgecnn.errors import DataError, PassError
from edgecnn.graph.nodes import aten, copy_graph
from edgecnn.model import Model
from edgecnn.pipeline import Progress, SilentProgress
from edgecnn.train.precision import autocast

MB = 1_000_000
CHUNK = 256
"""Images that the teacher sees at once while its answers are remembered."""


@dataclass(frozen=True)
class Answers:
    """What the teacher says about n images.

    Attributes:
        outputs: its outputs, each (n, ...).
        features: the values of the tapped nodes, each (n, ...).
    """

    outputs: tuple[Tensor, ...]
    features: tuple[Tensor, ...] = ()

    def take(self, rows: Tensor, device: torch.device) -> Answers:
        """Return the answers about some of the images, on a device, in float32."""
        outputs, features = (
            tuple(tensor[rows].to(device, torch.float32) for tensor in tensors)
            for tensors in (self.outputs, self.features)
        )
        return Answers(outputs, features)


def check_teacher(student: Model, teacher: Model) -> None:
    """Check that two networks take the same images and give the same outputs.

    Args:
        student: the network to train.
        teacher: the network to learn from; its inner layers may be anything.

    Raises:
        PassError: naming both and what differs.
    """
    names = f"the teacher {teacher.spec.name}", f"the student {student.spec.name}"
    wanted, found = student.spec.inputs[0].shape, teacher.spec.inputs[0].shape
    if wanted[1:] != found[1:]:
        raise PassError(
            f"{names[0]} takes {_shape(found)} and {names[1]} {_shape(wanted)}, expected the same input",
            hint="load the teacher with --input-shape, or take one made for the same images",
        )
    outputs = [[_shape(o.shape) for o in model.spec.outputs] for model in (teacher, student)]
    if outputs[0] != outputs[1]:
        raise PassError(
            f"{names[0]} gives {', '.join(outputs[0])} and {names[1]} {', '.join(outputs[1])}, "
            "expected the same outputs",
            hint="the teacher must have been trained for the same classes",
        )
    orders = student.spec.preprocess.channel_order, teacher.spec.preprocess.channel_order
    if "gray" in orders and orders[0] != orders[1]:
        raise PassError(
            f"{names[0]} takes {orders[1]} images and {names[1]} {orders[0]}, expected the same colours"
        )
    theirs, ours = teacher.spec.labels, student.spec.labels
    for index, (their, our) in enumerate(zip(theirs or (), ours or (), strict=False)):
        if their != our:
            raise PassError(
                f"class {index} is {their!r} for {names[0]} and {our!r} for {names[1]}, expected the same"
            )


def _shape(shape: Sequence[int | None]) -> str:
    """Return "(n, 3, 32, 32)"."""
    return f"({', '.join('n' if d is None else str(d) for d in shape)})"


class Teacher:
    """A network that answers, and never changes.

    Args:
        model: the teacher.
        student: whose inputs it is shown.
        taps: names of its nodes whose values are wanted too.
        reduce: what is made of each such value before it is kept, an attention map for instance.
        dtype: of its convolutions and matrix products.
        device: where it runs.

    Raises:
        PassError: if the two networks do not fit, see `check_teacher`.
    """

    def __init__(
        self,
        model: Model,
        student: Model,
        taps: Sequence[str] = (),
        reduce: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        check_teacher(student, model)
        self.name = model.spec.name
        self._dtype, self._device = dtype, device or torch.device("cpu")
        self._graph = with_taps(model.graph, taps).to(self._device).requires_grad_(False)
        for tensor in (*self._graph.parameters(), *self._graph.buffers()):
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        self._fixed_batch = model.fixed_batch
        self._convert = _conversion(student, model)
        self._reduce = reduce or (lambda value: value)
        self._known: Answers | None = None
        self._rows: Tensor | None = None

    @property
    def remembers(self) -> str | None:
        """Type of the answers that are kept, "float32" or "float16"; None where they are not kept."""
        return None if self._known is None else str(self._known.outputs[0].dtype).removeprefix("torch.")

    def ask(self, inputs: Tensor, indices: Tensor | None = None) -> Answers:
        """Return the answers about some images, in float32.

        Args:
            inputs: of the student, (n, c, h, w), on the teacher's device.
            indices: of the images in their dataset, int64 (n,) on the CPU, if the images are as they are
                there: the answers are looked up where they are remembered.
        """
        if self._known is not None and self._rows is not None and indices is not None:
            known = indices[indices < len(self._rows)]
            rows = self._rows[known]
            if len(known) == len(indices) and bool((rows >= 0).all()):
                return self._known.take(rows, inputs.device)
        with torch.no_grad(), autocast(self._dtype, self._device):
            outputs, values = self._run(self._convert(inputs))
        return Answers(
            tuple(output.float() for output in outputs),
            tuple(self._reduce(value.float()) for value in values),
        )

    def _run(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Run the graph, in pieces where it takes one batch size only; the last piece is filled up."""
        size = self._fixed_batch
        if size is None or len(x) == size:
            return self._graph(x)  # type: ignore[no-any-return]
        pieces = []
        for start in range(0, len(x), size):
            piece = x[start : start + size]
            filled = torch.cat((piece, piece[-1:].expand(size - len(piece), *piece.shape[1:])))
            outputs, values = self._graph(filled)
            pieces.append([tensor[: len(piece)] for tensor in (*outputs, *values)])
        joined = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        return tuple(joined[: len(outputs)]), tuple(joined[len(outputs) :])

    def remember(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        *,
        limit_mb: float,
        progress: Progress | None = None,
    ) -> bool:
        """Compute the answers about a set of images once and keep them, if they fit into memory.

        The images go through in a fixed order and in batches of one size, so a run that is resumed
        computes the same answers.

        Args:
            dataset: of the student's inputs.
            indices: the images that will be asked about.
            limit_mb: memory that may be used, 1 MB = 1,000,000 bytes.
            progress: told about the images.

        Returns:
            Whether the answers are kept. Else, or if an image cannot be read, they are computed when asked.
        """
        progress = progress or SilentProgress()
        order = sorted({int(index) for index in indices})
        try:
            first = self._chunk(dataset, order[:1])
            kept = self._answer_all(dataset, order, first, limit_mb, progress)
        except DataError:  # an unreadable image, which the training loop leaves out or speaks about
            return False
        if kept is None:
            return False
        self._rows = torch.full((order[-1] + 1,), -1, dtype=torch.int64)
        self._rows[torch.tensor(order)] = torch.arange(len(order))
        count = len(first.outputs)
        self._known = Answers(tuple(kept[:count]), tuple(kept[count:]))
        return True

    def _answer_all(
        self, dataset: Dataset, order: list[int], first: Answers, limit_mb: float, progress: Progress
    ) -> list[Tensor] | None:
        """Return outputs and features of all images in one list, or None if they take too much memory."""
        like = (*first.outputs, *first.features)
        values = sum(tensor[0].numel() for tensor in like) * len(order)
        dtype = next(
            (d for d in (torch.float32, torch.float16) if values * d.itemsize <= limit_mb * MB), None
        )
        if dtype is None:
            return None
        kept = [torch.empty(len(order), *tensor.shape[1:], dtype=dtype) for tensor in like]
        largest = torch.finfo(dtype).max
        progress.start(f"ask the teacher {self.name} once, images", len(order))
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            answers = self._chunk(dataset, chunk)
            for rows, tensor in zip(kept, (*answers.outputs, *answers.features), strict=True):
                rows[start : start + len(chunk)] = tensor.clamp(-largest, largest).cpu()
            progress.advance(len(chunk))
        progress.finish()
        return kept

    def _chunk(self, dataset: Dataset, indices: Sequence[int]) -> Answers:
        inputs = torch.from_numpy(dataset.inputs(indices)).to(self._device)
        return self.ask(inputs.contiguous(memory_format=torch.channels_last))


def with_taps(graph: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """Return a copy of a graph that gives (outputs, values of the named nodes), both tuples of tensors.

    Args:
        graph: left as it is.
        names: of its nodes.

    Raises:
        PassError: if there is no such node.
    """
    changed = copy_graph(graph)
    nodes = {node.name: node for node in changed.graph.nodes}
    missing = [name for name in names if name not in nodes]
    if missing:
        raise PassError(f"the graph has no node {missing[0]!r}, so its value cannot be read")
    output = next(node for node in changed.graph.nodes if node.op == "output")
    outputs = [leaf for leaf in pytree.tree_leaves(output.args[0]) if isinstance(leaf, fx.Node)]
    output.args = ((tuple(outputs), tuple(nodes[name] for name in names)),)
    for node in changed.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # a channels_last value has no view as a flat one
    changed.graph.set_codegen(fx.graph.CodeGen())
    changed.graph.lint()
    changed.recompile()
    return changed


def _conversion(student: Model, teacher: Model) -> Callable[[Tensor], Tensor]:
    """Return what takes the student's input to the teacher's."""
    s, t = student.spec.preprocess, teacher.spec.preprocess
    flips = s.channel_order != t.channel_order
    same = (s.scale, s.mean, s.std) == (t.scale, t.mean, t.std)
    if same and not flips:
        return lambda x: x
    mean_s, std_s, mean_t, std_t = (
        torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)
        for values in (s.mean, s.std, t.mean, t.std)
    )

    def convert(x: Tensor) -> Tensor:
        pixels = (x.float() * std_s.to(x.device) + mean_s.to(x.device)) * (t.scale / s.scale)
        if flips:
            pixels = pixels.flip(1)
        return (pixels - mean_t.to(x.device)) / std_t.to(x.device)

    return convert
