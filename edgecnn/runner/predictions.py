"""Predictions over any number of images, counted as they come; no output is kept.

top1 = share of images whose largest output is the label          (first one on ties)
agreement = share of images (segmentation: pixels) with the same largest output as the reference
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import numpy as np

from .failure import InputFailure
from .inputs import Images, read_labels
from .request import Request
from .session import Session

TOP_K = 5
IGNORED_LABEL = 255
"""Pixels with this label count for nothing, as in PASCAL VOC and Cityscapes."""


@dataclass
class Counts:
    """Running counts of one artifact; the unit is an image, or a pixel of a 4-D output."""

    num_classes: int = 0
    num_labelled: int = 0
    num_top1: int = 0
    num_top5: int = 0
    num_compared: int = 0
    num_agreed: int = 0
    num_nonfinite: int = 0
    predictions: List[int] = field(default_factory=list)


def run_predictions(request: Request, sessions: Dict[str, Session], images: Images) -> Dict[str, Any]:
    """Run every artifact on every batch and count.

    Returns:
        `num_samples`, `kind` ("classification" or "segmentation") and per artifact `top1`, `top5` (fractions,
        None without labels or below 6 classes), `agreement` with the reference (None for none), and for
        classification `predictions`, the class of each image.

    Raises:
        InputFailure: if an output is not (n, classes) or (n, classes, h, w), or labels do not fit it.
    """
    labels = None if request.labels is None else read_labels(request.labels, len(images))
    keys = list(sessions)
    if request.reference is not None:
        keys.sort(key=lambda key: key != request.reference)
    counts = {key: Counts() for key in keys}
    kind = ""
    for start, stop in images.batches(request.batch_size):
        expected: Optional["np.ndarray[Any, Any]"] = None
        truth = None if labels is None else np.asarray(labels[start:stop])
        for key in keys:
            session = sessions[key]
            scores = _scores(session, images, start, stop)
            kind = "segmentation" if scores.ndim == 4 else "classification"
            classes = scores.argmax(axis=1)  # (n,) or (n, h, w)
            _count(counts[key], scores, classes, truth, session)
            if request.reference is not None and key == request.reference:
                expected = classes
            elif expected is not None:
                _count_agreement(counts[key], classes, expected, session)
    return {
        "num_samples": len(images),
        "kind": kind,
        "reference": request.reference,
        "artifacts": {key: _describe(sessions[key], counts[key]) for key in sessions},
    }


def _scores(session: Session, images: Images, start: int, stop: int) -> "np.ndarray[Any, Any]":
    """Return the first output as float32 (n, classes) or (n, classes, h, w)."""
    session.prepare(images.feeds(session, start, stop))
    session.invoke()
    scores = session.collect()[session.outputs[0].name]
    if scores.ndim == 4 and scores.shape[2:] == (1, 1):
        scores = scores[:, :, 0, 0]  # (n, classes, 1, 1) -> (n, classes)
    if scores.ndim not in (2, 4) or scores.shape[0] != stop - start:
        raise InputFailure(
            f"output '{session.outputs[0].name}' of {session.path.name} has shape {scores.shape}, "
            f"expected ({stop - start}, classes) or ({stop - start}, classes, h, w)"
        )
    return scores


def _count(
    counts: Counts,
    scores: "np.ndarray[Any, Any]",
    classes: "np.ndarray[Any, Any]",
    truth: Optional["np.ndarray[Any, Any]"],
    session: Session,
) -> None:
    counts.num_classes = scores.shape[1]
    counts.num_nonfinite += int(scores.size - np.count_nonzero(np.isfinite(scores)))
    if classes.ndim == 1:
        counts.predictions.extend(int(value) for value in classes)
    if truth is None:
        return
    if truth.shape != classes.shape:
        raise InputFailure(
            f"labels of a batch have shape {truth.shape}, the predictions of {session.path.name} "
            f"{classes.shape}"
        )
    counted = truth != IGNORED_LABEL if truth.ndim == 3 else np.ones(truth.shape, bool)
    wrong = counted & ((truth < 0) | (truth >= counts.num_classes))
    if wrong.any():
        raise InputFailure(
            f"labels hold {int(truth[wrong][0])}, "
            f"{session.path.name} has classes 0 to {counts.num_classes - 1}"
        )
    counts.num_labelled += int(counted.sum())
    counts.num_top1 += int((counted & (classes == truth)).sum())
    if truth.ndim == 1 and counts.num_classes > TOP_K:
        best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP_K]
        counts.num_top5 += int((best == truth[:, None]).any(axis=1).sum())


def _count_agreement(
    counts: Counts, classes: "np.ndarray[Any, Any]", expected: "np.ndarray[Any, Any]", session: Session
) -> None:
    if classes.shape != expected.shape:
        raise InputFailure(
            f"predictions of {session.path.name} have shape {classes.shape}, the reference's {expected.shape}"
        )
    counts.num_compared += classes.size
    counts.num_agreed += int((classes == expected).sum())


def _describe(session: Session, counts: Counts) -> Dict[str, Any]:
    labelled, compared = counts.num_labelled, counts.num_compared
    has_top5 = bool(labelled) and bool(counts.predictions) and counts.num_classes > TOP_K
    warnings = []
    if counts.num_nonfinite:
        warnings.append(f"{counts.num_nonfinite} output values are NaN or infinite")
    return {
        "runtime": session.runtime,
        "runtime_package": session.runtime_package,
        "runtime_version": session.runtime_version,
        "num_classes": counts.num_classes,
        "top1": counts.num_top1 / labelled if labelled else None,
        "top5": counts.num_top5 / labelled if has_top5 else None,
        "num_labelled": labelled,
        "agreement": counts.num_agreed / compared if compared else None,
        "predictions": counts.predictions or None,
        "warnings": warnings,
    }
