"""The channel groups of edgecnn against those of Torch-Pruning, dimension by dimension.

    PYTHON_WITH_TORCH_PRUNING -m benchmarks.prune_groups [NET ...]

A group is compared as the set of (layer, in|out) dimensions of convolutions and linear layers whose channels
go together; the head's outputs are left out on both sides, since neither cuts them.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from benchmarks.prune_nets import build, side_of
from edgecnn.graph.channels import couple_channels
from edgecnn.load import LoadOptions, load_model

NETS = [
    f"torchvision:{name}"
    for name in (
        "resnet18",
        "resnet50",
        "vgg11_bn",
        "densenet121",
        "squeezenet1_1",
        "googlenet",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "regnet_y_400mf",
        "resnext50_32x4d",
    )
]

Dimension = tuple[str, str]
Groups = dict[frozenset[Dimension], int]


def our_groups(net: nn.Module, side: int) -> tuple[Groups, dict[str, str]]:
    """Return set of dimensions -> number of units, and what is frozen."""
    coupling = couple_channels(load_model(net, LoadOptions(input_shape=(3, side, side))))
    weighted = {layer.weight: layer.kind for layer in coupling.layers}
    found: Groups = {}
    frozen: dict[str, str] = {}
    for group in coupling.groups:
        dims = set[Dimension]()
        for member in group.members:
            if member.tensor in weighted:
                transposed = weighted[member.tensor] == "conv_transpose2d"
                side_name = "out" if (member.dim == 0) is not transposed else "in"
                dims.add((member.tensor.removesuffix(".weight"), side_name))
        if group.frozen:
            frozen[group.name] = group.frozen
        elif dims:
            found[frozenset(dims)] = found.get(frozenset(dims), 0) + group.size
    return found, frozen


def their_groups(net: nn.Module, side: int) -> Groups:
    """Return set of dimensions -> number of channels, of Torch-Pruning's dependency graph."""
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, side, side))
    names = {module: name for name, module in net.named_modules()}
    heads = [
        m for m in net.modules() if 1000 in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))
    ]
    found: Groups = {}
    for group in graph.get_all_groups(ignored_layers=heads, root_module_types=[nn.Conv2d, nn.Linear]):
        dims = set[Dimension]()
        for dependency, _ in group:
            module = dependency.target.module
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                out = graph.is_out_channel_pruning_fn(dependency.handler)
                depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
                dims.add((names[module], "out" if out or depthwise else "in"))
        found[frozenset(dims)] = len(group[0][1])
    return found


def compare(name: str) -> None:
    """Print how many groups are the same, and every one that is not."""
    side = side_of(name)
    net = build(name)
    ours, frozen = our_groups(net, side)
    theirs = their_groups(build(name), side)
    same = set(ours) & set(theirs)
    sizes = [k for k in same if ours[k] != theirs[k]]
    print(
        f"{name}: ours {len(ours)}, Torch-Pruning {len(theirs)}, same {len(same)}, frozen {frozen}",
        flush=True,
    )
    for key in sizes:
        print(
            f"  same dimensions, other number of units: ours {ours[key]}, theirs {theirs[key]}: {_spell(key)}"
        )
    for title, one, other in (("ours", ours, theirs), ("theirs", theirs, ours)):
        for key in one:
            if key not in other:
                print(f"  only {title} ({one[key]}): {_spell(key)}")


def _spell(key: frozenset[Dimension]) -> str:
    listed = [f"{name}:{side}" for name, side in sorted(key)]
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nets", nargs="*", default=NETS)
    torch.set_num_threads(1)
    for name in parser.parse_args().nets or NETS:
        compare(name)


if __name__ == "__main__":
    main()
