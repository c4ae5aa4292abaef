"""Accuracy of CIFAR-10 ResNets after pruning and 4 epochs of training, ours beside Torch-Pruning 1.6.1.

    python -m benchmarks.prune_accuracy [--out FILE] [--net resnet56 resnet20] [--method ...] [--macs 2.1 4]
        [--distill none original tuned larger] [--epochs 4] [--seed 0] [--threads 2] [--list] [--table]

Every run loads the published weights, prunes to so many times fewer MACs, trains on the 50,000 JPEG images
like all the others (SGD 0.02 with Nesterov momentum, cosine, batch 128, flip and crop) and is judged on all
5,000 JPEG test images before and after. Methods: unpruned; the criteria random, l1, taylor, fpgm, bn_scale in
their plain form (scores compared over the whole network, nothing compensated); best, the pass
`prune_channels` by single channels, and default, as it comes, in widths that suit the target; torch_pruning,
GroupMagnitudeImportance (L2), global, on the inner channels of each block only, since it cuts the option-A
shortcut into a network that does not run.

--distill: none trains on labels alone (the pass `fine_tune`), original on labels and the network as it was
loaded (the pass `distill`), tuned on labels and the unpruned network trained the same way, larger on labels
and the unpruned ResNet-56 trained the same way.

One JSON line per run in --out; a run that is there already is skipped, so a killed benchmark goes on where it
was. Each run is a process of its own. Needs ../shared/data and `pip install --no-deps torch-pruning==1.6.1`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import cifar_resnet, runs
from benchmarks.cifar_jpeg import DATA, open_jpeg_cifar
from edgecnn.data import Dataset, split_indices
from edgecnn.distill.distill import Distill
from edgecnn.graph.build import build_program
from edgecnn.graph.cost import layer_costs
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.load import LoadOptions, load_model, save_pt2
from edgecnn.model import Model
from edgecnn.pipeline import Pass, PassContext
from edgecnn.prune.prune_channels import PruneChannels
from edgecnn.train.fine_tune import FineTune

WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
PLAIN: dict[str, Any] = {
    "allocation": "global",
    "compensation": "none",
    "reestimate": False,
    "round_to": 1,
}
OURS: dict[str, dict[str, Any]] = {
    "best": {"round_to": 1},
    "default": {},
    "random": {"importance": "random", **PLAIN},
    "l1": {"importance": "l1", **PLAIN},
    "taylor": {"importance": "taylor", **PLAIN},
    "fpgm": {"importance": "fpgm", **PLAIN},
    "bn_scale": {"importance": "bn_scale", **PLAIN},
}
"""Parameters of `prune_channels` by method."""
TEACHERS = ("none", "original", "tuned", "larger")
TUNED = ("tuned", "larger")
LARGER = "resnet56"
METHODS = ("unpruned", "best", "torch_pruning", *[name for name in OURS if name != "best"])
PROTOCOL: dict[str, Any] = {"learning_rate": 0.02, "batch_size": 128, "augment": ("flip", "crop")}
"""Everybody trains so; the rest is the default: momentum 0.9, weight decay 5e-4, warm-up of 0.1 epochs."""
CHUNK = 250


@dataclass(frozen=True)
class Job:
    """One run; two runs that agree in all of it are the same."""

    net: str
    method: str
    macs: float
    distill: str
    epochs: float
    seed: int = 0
    train_images: int = 50_000
    test_images: int = 5_000


def load(net: str) -> Model:
    options = LoadOptions(arch=f"benchmarks.cifar_resnet:{net}", input_shape=(3, 32, 32))
    return load_model(DATA / "weights" / WEIGHTS[net], options)


def accuracy(model: Model, dataset: Dataset, count: int) -> float:
    """Return top-1 in percent over `count` images spread evenly, so that every class counts alike."""
    indices = [int(i * len(dataset) / count) for i in range(count)]
    labels = torch.from_numpy(dataset.labels)
    hits = 0
    with torch.no_grad():
        for start in range(0, count, CHUNK):
            chunk = indices[start : start + CHUNK]
            scores = model.graph(torch.from_numpy(dataset.inputs(chunk)))
            hits += int((scores.argmax(1) == labels[chunk]).sum())
    return 100 * hits / count


def size(model: Model) -> tuple[int, int]:
    """Return (MACs of one image, parameters)."""
    program = build_program(FoldBatchNorm().run(model, PassContext()))
    macs = sum(cost.macs for cost in layer_costs(program))
    return macs, sum(parameter.numel() for parameter in model.graph.parameters())


def prune_with_peer(net: str, factor: float) -> Model:
    """Prune the module with Torch-Pruning and load what is left."""
    import torch_pruning

    module = getattr(cifar_resnet, net)()
    checkpoint = torch.load(DATA / "weights" / WEIGHTS[net], map_location="cpu", weights_only=True)
    module.load_state_dict({k.removeprefix("module."): v for k, v in checkpoint["state_dict"].items()})
    module.eval()
    kept = [module.conv1, module.linear]
    kept += [m.conv2 for m in module.modules() if isinstance(m, cifar_resnet.BasicBlock)]
    example = torch.randn(1, 3, 32, 32)
    pruner = torch_pruning.pruner.MagnitudePruner(
        module,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,
        iterative_steps=400,
        ignored_layers=kept,
    )
    before = torch_pruning.utils.count_ops_and_params(module, example)[0]
    for _ in range(400):
        pruner.step()
        if before / torch_pruning.utils.count_ops_and_params(module, example)[0] >= factor:
            break
    return load_model(module, LoadOptions(input_shape=(3, 32, 32)))


def prune(job: Job, model: Model, context: PassContext) -> Model:
    if job.method == "unpruned":
        return model
    if job.method == "torch_pruning":
        return prune_with_peer(job.net, job.macs)
    step = PruneChannels(macs_left=1 / job.macs, **OURS[job.method])
    step.check()
    step.requires(model)
    return step.run(model, context)


def tuned_path(job: Job, cache: Path) -> Path:
    """Return where the unpruned network, trained the same way, is kept for its students."""
    net = LARGER if job.distill == "larger" else job.net
    return cache / f"unpruned-{net}-{job.epochs:g}-{job.train_images}-{job.seed}.pt2"


def trainer(job: Job, cache: Path, original: Model) -> tuple[Pass, Model]:
    """Return what trains the pruned network, and the teacher."""
    if job.distill == "none":
        return FineTune(epochs=job.epochs, **PROTOCOL), original
    teacher = load_model(tuned_path(job, cache)) if job.distill in TUNED else original
    return Distill(epochs=job.epochs, **PROTOCOL), teacher


def run(job: Job, cache: Path) -> dict[str, Any]:
    """Do one run and return its figures."""
    original = load(job.net)
    train = open_jpeg_cifar("train", original, cache)
    test = open_jpeg_cifar("test", original, cache)
    order = split_indices(train, job.train_images, 0, job.seed).calibration
    step, teacher = trainer(job, cache, original)
    context = PassContext(train, order[:512], job.seed, train=train, train_indices=order, teacher=teacher)
    clock = [time.perf_counter()]
    pruned = prune(job, original, context)
    clock.append(time.perf_counter())
    before = accuracy(pruned, test, job.test_images)
    clock.append(time.perf_counter())
    trained = step.run(pruned, context)
    step.ensures(pruned, trained)
    clock.append(time.perf_counter())
    if job.method == "unpruned" and job.distill == "none":
        save_pt2(trained, tuned_path(job, cache))
    (macs_before, params_before), (macs, params) = size(original), size(trained)
    return {
        **asdict(job),
        "accuracy_before": before,
        "accuracy": accuracy(trained, test, job.test_images),
        "macs_count": macs,
        "macs_factor": macs_before / macs,
        "params": params,
        "params_left": params / params_before,
        "prune_seconds": clock[1] - clock[0],
        "train_seconds": clock[3] - clock[2],
        "warnings": list(trained.warnings),
    }


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """Yield the runs, the unpruned ones first: their networks are the teachers of `tuned`."""
    grid = itertools.product(
        arguments.seed, arguments.net, arguments.macs, arguments.method, arguments.distill
    )
    found = {
        Job(
            net,
            method,
            1.0 if method == "unpruned" else macs,
            distill,
            arguments.epochs,
            seed,
            arguments.train_images,
            arguments.test_images,
        )
        for seed, net, macs, method, distill in grid
    }
    teachers = {
        replace(
            job,
            net=LARGER if job.distill == "larger" else job.net,
            method="unpruned",
            macs=1.0,
            distill="none",
        )
        for job in found
        if job.distill in TUNED
    }
    known = {"seed": arguments.seed, "net": [*arguments.net, LARGER], "macs": [1.0, *arguments.macs]}

    def rank(job: Job) -> tuple[int, ...]:
        places = [known[name].index(getattr(job, name)) for name in ("seed", "net", "macs")]
        is_teacher = job.method == "unpruned" and job.distill == "none"
        return (not is_teacher, *places, METHODS.index(job.method), TEACHERS.index(job.distill))

    yield from sorted(found | teachers, key=rank)


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the runs as Markdown, the mean over seeds."""
    print(
        "\n| net | method | MACs / | params left | untuned | labels | + original | + tuned "
        "| + tuned ResNet-56 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    groups: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        group = groups.setdefault((row["net"], row["macs"], row["method"]), {})
        group.setdefault(row["distill"], []).append(row)
    for (net, _, method), cells in sorted(
        groups.items(), key=lambda item: (item[0][0], item[0][1], METHODS.index(item[0][2]))
    ):
        every = [row for found in cells.values() for row in found]
        means = [
            f"{sum(r['accuracy'] for r in cells[d]) / len(cells[d]):.2f}" if d in cells else "-"
            for d in TEACHERS
        ]
        print(
            f"| {net} | {method} | {every[0]['macs_factor']:.2f} | {100 * every[0]['params_left']:.1f} % | "
            f"{sum(r['accuracy_before'] for r in every) / len(every):.2f} | {' | '.join(means)} |"
        )


def main() -> None:
    parser = runs.argument_parser(__doc__, "prune_accuracy.jsonl", epochs=4.0)
    parser.add_argument("--net", nargs="+", default=["resnet56", "resnet20"], choices=[*WEIGHTS])
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--macs", nargs="+", type=float, default=[2.1, 4.0], help="times fewer MACs")
    parser.add_argument("--distill", nargs="+", default=["none", "original"], choices=TEACHERS)
    arguments = parser.parse_args()
    if arguments.job:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(run(Job(**json.loads(arguments.job)), arguments.cache)))
        return
    runs.carry_out("benchmarks.prune_accuracy", arguments, [asdict(job) for job in jobs(arguments)], table)


if __name__ == "__main__":
    main()
