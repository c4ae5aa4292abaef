"""Cut channels out of a network: index_select along every dimension whose channels went, and every literal
size read off what is left.

    cut_channels    the smaller network, run and counted before it is handed out
    zero_channels   the same network with those channels zero, which must compute the same
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgecnn.errors import PassError
from edgecnn.graph.channels import Coupling, macs_and_params
from edgecnn.graph.nodes import copy_graph
from edgecnn.model import Model
from edgecnn.prune.groups import emptiable_values
from edgecnn.prune.surgery_check import batch_sizes, count_macs, run_outputs
from edgecnn.prune.surgery_sizes import Kept, Mask, rewrite_sizes

EXACT = 1e-5
"""How far outputs of the zeroed and the cut network may be apart, relative to the output's range."""


def cut_channels(model: Model, coupling: Coupling, removed: Collection[int]) -> Model:
    """Return a copy of `model` without these channels.

    Args:
        model: the network that `coupling` describes, left as it is.
        coupling: `couple_channels(model)`.
        removed: channel ids, out of `Group.channels` of groups that are not frozen.

    Returns:
        The smaller network: it runs at several batch sizes with outputs of the same shapes, and its
        multiply-accumulates and parameters are those of `macs_and_params`.

    Raises:
        PassError: if a channel cannot be cut, a layer would be left without channels, or a check fails.
    """
    _check_removable(coupling, removed)
    kept = Kept(coupling, removed)
    graph = copy_graph(model.graph)
    rewrite_sizes(graph, kept)
    _each_tensor(graph, coupling, kept, _select)
    for node in graph.graph.nodes:
        node.meta.pop("val", None)
    graph.graph.lint()
    graph.recompile()
    cut = model.with_graph(graph)
    _check(model, coupling, removed, cut)
    return cut


def zero_channels(model: Model, coupling: Coupling, removed: Collection[int]) -> Model:
    """Return a copy of `model` whose weights, statistics and constants are zero for these channels.

    Args:
        model: the network that `coupling` describes, left as it is.
        coupling: `couple_channels(model)`.
        removed: channel ids.
    """
    _check_removable(coupling, removed)
    graph = copy_graph(model.graph)
    _each_tensor(graph, coupling, Kept(coupling, removed), _zero)
    return model.with_graph(graph)


def verify_cut(model: Model, coupling: Coupling, removed: Collection[int], cut: Model) -> float:
    """Return how far the cut network's outputs are from those of the zeroed one, relative to the output's
    range.

    Args:
        model: the uncut network.
        coupling: of `model`.
        removed: the channels that `cut` lacks.
        cut: `cut_channels(model, coupling, removed)`.

    Returns:
        max |zeroed - cut| / max |zeroed|, over all outputs.

    Raises:
        PassError: if it is more than EXACT although no operator sees how many channels there are.
    """
    zeroed, batch = zero_channels(model, coupling, removed), batch_sizes(model)[0]
    error = _difference(zeroed, cut, batch, torch.float32)
    if error > EXACT and not inexact_reasons(coupling, removed):
        error = _difference(zeroed, cut, batch, torch.float64)  # a deep network's float32 rounding adds up
    if error > EXACT and not inexact_reasons(coupling, removed):
        raise PassError(
            f"the cut network's outputs differ from the zeroed network's by {error:.2g} of their range, "
            f"expected at most {EXACT:g}",
            hint="this is a bug in the channel coupling; please report the network",
        )
    return error


def _difference(zeroed: Model, cut: Model, batch: int, dtype: torch.dtype) -> float:
    """Return the largest difference of two networks' outputs, relative to the range of the first's."""
    error = 0.0
    expected, found = run_outputs(zeroed, batch, dtype), run_outputs(cut, batch, dtype)
    for a, b in zip(expected, found, strict=True):
        error = max(error, float((a - b).abs().max()) / max(float(a.abs().max()), 1e-12))
    return error


def inexact_reasons(coupling: Coupling, removed: Collection[int]) -> tuple[str, ...]:
    """Return why a zeroed channel is not the same as an absent one under this cut; () where it is."""
    gone = set(removed)
    return tuple(dict.fromkeys(reason for _, reason, ids in coupling.inexact if ids & gone))


def _check_removable(coupling: Coupling, removed: Collection[int]) -> None:
    groups = {c: g for g in coupling.groups for c in g.channels}
    for channel in sorted(removed):
        group = groups.get(channel)
        if group is None:
            raise PassError(f"channel {channel} is in no group of this network, expected ids of its groups")
        if group.frozen is not None:
            raise PassError(f"channel {channel} of {group.name} cannot be cut: it {group.frozen}")
    gone = np.asarray(sorted(removed), np.int64)
    for name, tensor in coupling.tensors.items():
        for ids in tensor.channels.values():
            if len(ids) and np.isin(ids, gone).all():
                raise PassError(
                    f"the cut leaves nothing of {name}", hint="keep at least one channel of each group"
                )
    lost = set(removed)
    for name, channels in emptiable_values(coupling).items():
        if channels <= lost:
            raise PassError(
                f"the cut leaves nothing of the value {name}", hint=f"keep one of {sorted(channels)[:8]}"
            )


def _each_tensor(
    graph: fx.GraphModule, coupling: Coupling, kept: Kept, change: Callable[[Tensor, dict[int, Mask]], Tensor]
) -> None:
    """Replace every parameter and buffer of which something goes."""
    for name in coupling.tensors:
        masks = kept.along_tensor(name)
        path, _, leaf = name.rpartition(".")
        if not masks or not coupling.tensors[name].shape:
            continue
        owner = graph.get_submodule(path) if path else graph
        old = getattr(owner, leaf)
        new = change(old.detach(), masks)
        if isinstance(old, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            setattr(owner, leaf, new)


def _select(tensor: Tensor, masks: dict[int, Mask]) -> Tensor:
    for dim, keep in masks.items():
        tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(keep)).to(tensor.device))
    return tensor.contiguous()


def _zero(tensor: Tensor, masks: dict[int, Mask]) -> Tensor:
    tensor = tensor.clone()
    for dim, keep in masks.items():
        tensor.index_fill_(dim, torch.from_numpy(np.flatnonzero(~keep)).to(tensor.device), 0)
    return tensor


def _check(model: Model, coupling: Coupling, removed: Collection[int], cut: Model) -> None:
    """Run the cut network without data and with, and count what it costs."""
    weighted = frozenset(layer.node for layer in coupling.layers)
    macs, params = macs_and_params(coupling, removed)
    found_params = sum(p.numel() for p in cut.graph.parameters())
    for batch in batch_sizes(model):
        found, shapes = count_macs(cut, weighted, batch)
        expected = tuple((batch, *(int(s or 0) for s in spec.shape[1:])) for spec in model.spec.outputs)
        if shapes != expected:
            raise PassError(f"the cut network gives shapes {shapes}, expected {expected}")
        if (found, found_params) != (macs, params):
            raise PassError(
                f"the cut network has {found} MACs and {found_params} parameters, "
                f"predicted {macs} and {params}",
                hint="this is a bug in the channel coupling; please report the network",
            )
        for output in run_outputs(cut, batch):
            if not bool(torch.isfinite(output).all()):
                raise PassError("the cut network gives values that are not finite")
