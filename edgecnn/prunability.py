"""What could be pruned of a network: its groups of channels, and how much each of them matters.

    agreement_g(r) = fraction of images with the network's own answer once a share r of group g is silent
    sqnr_g(r)      = 10 log10(sum y^2 / sum (y - y_g)^2)

Source: Li et al. 2017, arXiv:1608.08710, section 3.2 (sensitivity of single layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from edgecnn.data import Dataset
from edgecnn.errors import PassError
from edgecnn.export.parity import sqnr_db
from edgecnn.graph.channels import Coupling, Group, couple_channels, macs_and_params
from edgecnn.graph.nodes import copy_graph
from edgecnn.graph.program import Array
from edgecnn.images import open_or_make_up
from edgecnn.load import LoadOptions, load_model
from edgecnn.model import Model
from edgecnn.pipeline import Progress, SilentProgress
from edgecnn.preflight import refuse_quantized
from edgecnn.prune.groups import cuttable
from edgecnn.prune.importance import IMPORTANCES, Question, score_channels
from edgecnn.prune.samples import Samples
from edgecnn.prune.sensitivity import silenced

SHARES = (0.25, 0.5, 0.75)
"""Shares of a group that are silenced on trial."""

NUM_IMAGES = 128
BATCH_SIZE = 32
MADE_UP = 16

MAX_MACS = 4e12
"""All trials together may cost about this; fewer images are used for it."""

MIN_IMAGES = 16


def inspect_groups(source: Any, options: LoadOptions | None = None) -> dict[str, Any]:
    """Describe which channels of a network can be pruned, and which stand and fall together.

    Args:
        source: whatever `load_model` takes.
        options: how to load it.

    Returns:
        JSON-ready: name, params, macs, prunable_fraction, frozen_reasons (reason -> params) and groups: name,
        channels, frozen (why it cannot be cut, or None), macs and params (what goes with all of it) and
        members (layer, tensor, dim, role).

    Raises:
        PassError: if the network is quantized already.
    """
    return _describe(*_load(source, options))


def inspect_sensitivity(
    source: Any,
    options: LoadOptions | None = None,
    *,
    data: Any = None,
    importance: str = "l2",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Describe the groups, and measure what silencing the least important part of each alone does.

    Args:
        source: whatever `load_model` takes.
        options: how to load it.
        data: whatever `edgecnn.data.open_dataset` takes; None makes a few images up.
        importance: what a channel is worth; decides which go first.
        progress: told about every group.

    Returns:
        What `inspect_groups` gives, with "sensitivity": source, num_samples, labelled, top1 (of the whole
        network, or None), importance and groups: name, shares, top1 (None without labels), agreement (None
        where the network does not classify) and sqnr_db, one for each share.

    Raises:
        PassError: if the network is quantized already, or the importance is unknown or does not apply.
        DataError: if the images do not fit.
    """
    if importance not in IMPORTANCES:
        known = ", ".join(IMPORTANCES)
        raise PassError(f"importance {importance!r} is unknown, expected one of {known}")
    progress = progress or SilentProgress()
    progress.start("load and export the graph", None)
    model, coupling = _load(source, options)
    progress.finish()
    dataset = open_or_make_up(model, data, MADE_UP, progress)
    groups = cuttable(coupling)
    trials = 1 + len(groups) * len(SHARES)
    macs = max(sum(layer.macs for layer in coupling.layers), 1)
    most = int(np.clip(MAX_MACS / (trials * macs), MIN_IMAGES, NUM_IMAGES))
    order = np.random.default_rng(0).permutation(len(dataset))[:most]
    indices = tuple(int(index) for index in order)
    samples = Samples(dataset, indices, dataset.labels is not None, 0, progress)
    scores = score_channels(Question(model, coupling, samples), importance)
    measured = [group for group in groups if group.index in scores]
    found = _Trials(model, dataset, indices).measure(measured, scores, progress)
    return {**_describe(model, coupling), "sensitivity": {"importance": importance, **found}}


def _load(source: Any, options: LoadOptions | None) -> tuple[Model, Coupling]:
    model = load_model(source, options or LoadOptions())
    refuse_quantized(model)
    return model, couple_channels(model)


def _describe(model: Model, coupling: Coupling) -> dict[str, Any]:
    """Return what a network's groups are, JSON-ready."""
    macs, params = macs_and_params(coupling, frozenset())
    return {
        "name": model.spec.name,
        "params": params,
        "macs": macs,
        "prunable_fraction": coupling.prunable_fraction,
        "frozen_reasons": dict(coupling.frozen_reasons),
        "layers": [_path(layer.layer) for layer in coupling.layers],
        "groups": [_describe_group(coupling, group, (macs, params)) for group in coupling.groups],
        "warnings": list(model.warnings),
    }


def _describe_group(coupling: Coupling, group: Group, whole: tuple[int, int]) -> dict[str, Any]:
    left = macs_and_params(coupling, frozenset(group.channels))
    return {
        "name": group.name,
        "channels": group.size,
        "frozen": group.frozen,
        "macs": whole[0] - left[0],
        "params": whole[1] - left[1],
        "members": [
            {"layer": _path(m.layer), "tensor": m.tensor, "dim": m.dim, "role": m.role} for m in group.members
        ],
    }


def _path(layer: str) -> str:
    """Return a layer's path without its operator."""
    return layer.partition(" (")[0]


class _Trials:
    """Silences parts of groups and compares the answers with the whole network's."""

    def __init__(self, model: Model, dataset: Dataset, indices: Sequence[int]) -> None:
        self._graph = copy_graph(model.graph)
        self._dataset = dataset
        self._batch_size = model.fixed_batch or BATCH_SIZE
        usable = len(indices) - len(indices) % self._batch_size if model.fixed_batch else len(indices)
        self._inputs = torch.from_numpy(dataset.inputs(indices[:usable]))
        is_classifier = model.spec.task == "classification"
        labels = dataset.labels
        self._labels = labels[list(indices[:usable])] if labels is not None and is_classifier else None
        self._is_classifier = is_classifier
        self._whole = self._run()

    def measure(self, groups: Sequence[Group], scores: Any, progress: Progress) -> dict[str, Any]:
        """Return the figures of each group at each share."""
        progress.start("sensitivity, groups", len(groups))
        found = []
        for group in groups:
            order = np.argsort(scores[group.index], kind="stable")
            trials = []
            for share in SHARES:
                count = min(max(round(share * len(order)), 1), len(order))
                with silenced(self._graph, group, [int(i) for i in order[:count]]):
                    trials.append(self._judge(self._run()))
            figures = {key: [trial[key] for trial in trials] for key in trials[0]}
            found.append({"name": group.name, "shares": list(SHARES), **figures})
            progress.advance()
        progress.finish()
        return {
            "source": self._dataset.name,
            "num_samples": len(self._inputs),
            "labelled": self._labels is not None,
            "top1": self._judge(self._whole)["top1"],
            "groups": found,
        }

    def _run(self) -> Array:
        """Return the first output of every image, float32."""
        with torch.inference_mode():
            outputs = [
                pytree.tree_leaves(self._graph(batch))[0].numpy()
                for batch in torch.split(self._inputs, self._batch_size)
            ]
        return np.concatenate(outputs)

    def _judge(self, outputs: Array) -> dict[str, float | None]:
        """Return accuracy, agreement and SQNR of outputs, as far as they mean something."""
        answers = outputs.argmax(1) if self._is_classifier else None
        right = None if answers is None or self._labels is None else float((answers == self._labels).mean())
        same = None if answers is None else float((answers == self._whole.argmax(1)).mean())
        return {"top1": right, "agreement": same, "sqnr_db": sqnr_db(self._whole, outputs)}
