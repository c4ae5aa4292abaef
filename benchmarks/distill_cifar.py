"""What a teacher is worth: CIFAR ResNet-20 from scratch with and without ResNet-56, and without labels.

    python -m benchmarks.distill_cifar [--out FILE] [--method ...] [--teacher original tuned] [--epochs 15]
        [--seed 0] [--threads 2] [--list] [--table]

Everybody trains 15 epochs on the 50,000 JPEG images (SGD 0.1 with Nesterov momentum, half an epoch of
warm-up, cosine, batch 128, weight decay 5e-4, flip and crop), judged on the 5,000 JPEG test images. Methods:

    labels               labels alone
    logits, dkd          labels and the teacher's outputs, half and half
    feature, attention   labels and the teacher's outputs and inner values
    label_free           the teacher's outputs alone, on the training images without their labels
    synthetic            the teacher's outputs alone, on images made up from its BatchNorm statistics

--teacher original is the published network, which was trained on images without JPEG artefacts; tuned was
then trained for 4 epochs on these (`benchmarks.prune_accuracy --method unpruned` makes it, and so does this).
One JSON line per run in --out; a run that is there already is skipped. Needs ../shared/data.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import prune_accuracy, runs
from benchmarks.cifar_jpeg import open_jpeg_cifar
from edgecnn.data import split_indices
from edgecnn.distill.distill import Distill
from edgecnn.distill.synthetic import synthesize_images
from edgecnn.load import LoadOptions, load_model
from edgecnn.model import Model
from edgecnn.pipeline import Pass, PassContext, SilentProgress
from edgecnn.train.fine_tune import FineTune

PROTOCOL: dict[str, Any] = {**prune_accuracy.PROTOCOL, "learning_rate": 0.1, "warmup_epochs": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "labels": {},
    "logits": {"methods": ("logits",)},
    "dkd": {"methods": ("dkd",)},
    "feature": {"methods": ("logits", "feature")},
    "attention": {"methods": ("logits", "attention")},
    "label_free": {"methods": ("logits",), "hard_labels": False},
    "synthetic": {"methods": ("logits",), "hard_labels": False},
}
TEACHERS = ("none", "original", "tuned")


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    teacher: str
    epochs: float
    seed: int = 0
    train_images: int = 50_000
    test_images: int = 5_000
    synthetic_images: int = 0


def find_teacher(job: Job, cache: Path) -> Model:
    if job.teacher == "original":
        return prune_accuracy.load("resnet56")
    tuning = prune_accuracy.Job(
        "resnet56", "unpruned", 1.0, "none", 4.0, job.seed, job.train_images, job.test_images
    )
    path = prune_accuracy.tuned_path(tuning, cache)
    if not path.is_file():
        prune_accuracy.run(tuning, cache)
    return load_model(path)


def step_of(job: Job) -> Pass:
    if job.method == "labels":
        return FineTune(epochs=job.epochs, **PROTOCOL)
    return Distill(epochs=job.epochs, **PROTOCOL, **METHODS[job.method])


def run(job: Job, cache: Path) -> dict[str, Any]:
    """Do one run and return its figures."""
    options = LoadOptions(input_shape=(3, 32, 32), seed=job.seed)
    student = load_model("benchmarks.cifar_resnet:resnet20", options)
    train: Any = open_jpeg_cifar("train", student, cache)
    test = open_jpeg_cifar("test", student, cache)
    teacher = None if job.teacher == "none" else find_teacher(job, cache)
    started = time.perf_counter()
    count = job.train_images
    if job.method == "synthetic" and teacher is not None:
        train = synthesize_images(teacher, job.synthetic_images, job.seed, SilentProgress())
        count = len(train)
    synthesis_seconds = time.perf_counter() - started
    order = split_indices(train, count, 0, job.seed).calibration
    step = step_of(job)
    started = time.perf_counter()
    trained = step.run(student, PassContext(seed=job.seed, train=train, train_indices=order, teacher=teacher))
    seconds = time.perf_counter() - started
    step.ensures(student, trained)
    return {
        **asdict(job),
        "accuracy_before": prune_accuracy.accuracy(student, test, job.test_images),
        "accuracy": prune_accuracy.accuracy(trained, test, job.test_images),
        "teacher_accuracy": teacher and prune_accuracy.accuracy(teacher, test, job.test_images),
        "images": count,
        "synthesis_seconds": synthesis_seconds,
        "train_seconds": seconds,
        "warnings": list(trained.warnings),
    }


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """Yield the runs."""
    for seed in arguments.seed:
        for method in arguments.method:
            for teacher in ("none",) if method == "labels" else arguments.teacher:
                made_up = arguments.synthetic_images if method == "synthetic" else 0
                # as many steps as the others take, since made-up images are few
                share = arguments.train_images / made_up if made_up else 1.0
                epochs = arguments.epochs * min(share, arguments.most_synthetic_epochs / arguments.epochs)
                yield Job(
                    method,
                    teacher,
                    epochs if made_up else arguments.epochs,
                    seed,
                    arguments.train_images,
                    arguments.test_images,
                    made_up,
                )


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the runs as Markdown, with the points gained over labels alone of the same seed and length."""
    print("\n| method | teacher | teacher's accuracy | epochs | images | seed | accuracy | gain |")
    print("|---|---|---|---|---|---|---|---|")
    plain = {(row["seed"], row["train_images"]): row["accuracy"] for row in rows if row["method"] == "labels"}
    for row in sorted(rows, key=lambda r: (list(METHODS).index(r["method"]), r["teacher"], r["seed"])):
        base = plain.get((row["seed"], row["train_images"]))
        theirs = "-" if row["teacher_accuracy"] is None else f"{row['teacher_accuracy']:.2f}"
        gain = "-" if base is None else f"{row['accuracy'] - base:+.2f}"
        print(
            f"| {row['method']} | {row['teacher']} | {theirs} | {row['epochs']:g} | {row['images']} | "
            f"{row['seed']} | {row['accuracy']:.2f} | {gain} |"
        )


def main() -> None:
    parser = runs.argument_parser(__doc__, "distill_cifar.jsonl", epochs=15.0)
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=[*METHODS])
    parser.add_argument("--teacher", nargs="+", default=["original", "tuned"], choices=TEACHERS[1:])
    parser.add_argument("--synthetic-images", type=int, default=1024)
    parser.add_argument("--most-synthetic-epochs", type=float, default=300.0)
    arguments = parser.parse_args()
    if arguments.job:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(run(Job(**json.loads(arguments.job)), arguments.cache)))
        return
    runs.carry_out("benchmarks.distill_cifar", arguments, [asdict(job) for job in jobs(arguments)], table)


if __name__ == "__main__":
    main()
