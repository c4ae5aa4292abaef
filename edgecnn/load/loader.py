"""The sentence "load": a source and options become a Model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch.export import ExportedProgram

from edgecnn.errors import LoadError
from edgecnn.load.arch import Architecture, build_architecture, is_arch_spec
from edgecnn.load.detect import PT2, detect_format
from edgecnn.load.export import ExportedGraph, export_module
from edgecnn.load.options import LoadOptions
from edgecnn.load.preprocess import choose_preprocess, timm_preprocess
from edgecnn.load.pt2 import graph_of_program, read_pt2
from edgecnn.load.state_dict import fit_state_dict, infer_num_classes, read_checkpoint
from edgecnn.model import Model, ModelSpec, PassRecord
from edgecnn.runner.preprocess import Preprocess

_SHOWN = 5


@dataclass(frozen=True)
class _Known:
    """What a source says beside its graph."""

    name: str
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] | None = None
    task: str | None = None
    history: tuple[PassRecord, ...] = ()
    warnings: tuple[str, ...] = ()


def load_model(
    source: str | Path | torch.nn.Module | ExportedProgram | Model, options: LoadOptions | None = None
) -> Model:
    """Load a trained network.

    Args:
        source: path of a .pt2, checkpoint or .safetensors file; torchvision:NAME, timm:NAME or
            package.module:factory; an nn.Module, ExportedProgram or Model.
        options: what the source does not say itself.

    Returns:
        The Model, with a dynamic batch wherever the network allows one.

    Raises:
        LoadError: saying what is wrong with the source and what to do.
        UntrustedPickleError: if the file wants to run code and options.trust is not set.
        StateDictMismatchError: if the weights do not fit the architecture.
        MissingDependencyError: if the architecture's package is not installed.
    """
    options = options or LoadOptions()
    _check_shape(options.input_shape)
    if isinstance(source, Model):
        return source
    if isinstance(source, ExportedProgram):
        return _finish(graph_of_program(source, options.input_shape), _Known("model"), options)
    if isinstance(source, torch.nn.Module):
        return _from_module(source, _Known(type(source).__name__.lower()), options, None, copy_weights=True)
    if not isinstance(source, (str, Path)):
        raise LoadError(
            f"the model is {type(source).__name__}, expected a path, spec, nn.Module or ExportedProgram"
        )
    text = str(source)
    if is_arch_spec(text) and not Path(text).exists():
        if options.arch is not None:
            raise LoadError(
                f"the model is already an architecture, {text}; arch is {options.arch} too",
                hint="give the weights file as the model with --arch, or an architecture with --weights",
            )
        return _from_architecture(text, options.weights, options)
    return _from_file(Path(text), options)


def _check_shape(shape: tuple[int, int, int] | None) -> None:
    if shape is None:
        return
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise LoadError(f"input shape is {shape}, expected channels x height x width, such as 3x224x224")


def _from_file(path: Path, options: LoadOptions) -> Model:
    check_is_file(path)
    kind = detect_format(path)
    if options.weights is not None:
        raise LoadError(
            f"weights {options.weights} beside the model file {path}",
            hint="give the architecture as the model, with --weights; or the file alone with --arch",
        )
    if kind == PT2:
        if options.arch is not None:
            raise LoadError(f"{path}: a .pt2 file holds its own network", hint="leave out --arch")
        program, stored = read_pt2(path, trust=options.trust)
        graph = graph_of_program(program, options.input_shape)
        known = _Known(
            stored.name or path.stem, stored.preprocess, stored.labels, stored.task, stored.history
        )
        return _finish(graph, known, options)
    if options.arch is not None:
        return _from_architecture(options.arch, path, options)
    content = read_checkpoint(path, kind, trust=options.trust)
    if isinstance(content, torch.nn.Module):
        return _from_module(content.to("cpu").float(), _Known(path.stem), options, None)
    raise LoadError(
        f"{path}: a state dict holds weights but no network",
        hint="name the architecture: --arch torchvision:NAME, timm:NAME or package.module:factory",
    )


def check_is_file(path: Path) -> None:
    """Check that `path` is a file.

    Raises:
        LoadError: with similar names of its folder when it is missing.
    """
    if path.is_dir():
        raise LoadError(f"{path} is a directory, expected a model file")
    if path.exists():
        return
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, names, n=3, cutoff=0.6)
    hint = (
        f"did you mean {', '.join(close)}?"
        if close
        else "give a path, torchvision:NAME, timm:NAME or package.module:factory"
    )
    raise LoadError(f"{path}: no such file", hint=hint)


def _from_architecture(spec: str, weights: str | Path | None, options: LoadOptions) -> Model:
    if weights is None:
        architecture = build_architecture(spec, options.seed)
        untrained = f"{spec} has random, untrained weights (seed {options.seed}); give --weights FILE"
        own = f"{spec}: the weights are what the factory returned; if it loads none, give --weights FILE"
        warnings: tuple[str, ...] = (untrained if spec.startswith(("torchvision:", "timm:")) else own,)
    else:
        architecture, warnings = _with_weights(spec, Path(weights), options)
    config = architecture.timm_config
    shape = options.input_shape or architecture.input_shape
    stored = timm_preprocess(config, shape) if config and shape else None
    labels = architecture.categories if weights is not None else None
    known = _Known(architecture.name, stored, labels, warnings=warnings)
    return _from_module(architecture.module, known, options, architecture.input_shape)


def _with_weights(spec: str, path: Path, options: LoadOptions) -> tuple[Architecture, tuple[str, ...]]:
    check_is_file(path)
    kind = detect_format(path)
    if kind == PT2:
        raise LoadError(
            f"{path}: a .pt2 file holds its own network", hint="give it as the model, without --arch"
        )
    state = read_checkpoint(path, kind, trust=options.trust)
    if isinstance(state, torch.nn.Module):
        state = state.state_dict()
    architecture = build_architecture(spec, options.seed, state_keys=frozenset(state))
    packaged = spec.startswith(("torchvision:", "timm:"))
    if packaged and (classes := infer_num_classes(architecture.module, state)) is not None:
        architecture = build_architecture(spec, options.seed, classes, frozenset(state))
    return architecture, fit_state_dict(architecture.module, state, str(path))


def _from_module(
    module: torch.nn.Module,
    known: _Known,
    options: LoadOptions,
    default_shape: tuple[int, int, int] | None,
    *,
    copy_weights: bool = False,
) -> Model:
    check_finite(module)
    shape = options.input_shape or default_shape
    if shape is None:
        channels = _first_channels(module)
        what = f"{channels or 'C'}x{'HxW'}"
        raise LoadError(
            f"{known.name}: the size of the input image is not known",
            hint=f"give --input-shape {what}" + (f", such as {channels}x224x224" if channels else ""),
        )
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "cpu" or tensor.dtype in (torch.float16, torch.bfloat16, torch.float64):
            raise LoadError(
                f"{known.name}: weights are {tensor.dtype} on {tensor.device}, expected float32 on the CPU",
                hint="pass net.cpu().float()",
            )
    exported = export_module(module, shape, copy_weights=copy_weights)
    return _finish(exported, known, options)


def _first_channels(module: torch.nn.Module) -> int | None:
    """Return the input channels of the first convolution, in order of definition."""
    for child in module.modules():
        if isinstance(child, torch.nn.Conv2d):
            return child.in_channels
    return None


def check_finite(module: torch.nn.Module) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        LoadError: naming the first such tensors.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    bad = []
    for name, tensor in named:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            nans = int(tensor.isnan().sum())
            bad.append(f"{name} ({nans} NaN, {int(tensor.isinf().sum())} infinite of {tensor.numel()})")
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise LoadError(
            f"weights are not finite: {', '.join(bad[:_SHOWN])}{more}",
            hint="the training diverged, or the file is damaged; use an earlier checkpoint",
        )


def _finish(exported: ExportedGraph, known: _Known, options: LoadOptions) -> Model:
    check_finite(exported.graph)
    _, channels, height, width = exported.inputs[0].shape
    shape = (int(channels or 0), int(height or 0), int(width or 0))
    stored = known.preprocess if known.preprocess and tuple(known.preprocess.size) == shape[1:] else None
    labels, warnings = known.labels, (*known.warnings, *exported.warnings)
    classes = exported.outputs[0].shape[1] if len(exported.outputs[0].shape) > 1 else None
    if labels is not None and len(labels) != classes:
        labels = None
    spec = ModelSpec(
        name=re.sub(r"[^\w.-]+", "_", known.name) or "model",
        inputs=exported.inputs,
        outputs=exported.outputs,
        task=known.task or _task(exported),
        labels=labels,
        preprocess=choose_preprocess(shape, options, stored),
    )
    return Model(exported.graph, spec, known.history, exported.fixed_batch, warnings)


def _task(exported: ExportedGraph) -> str:
    ranks = [len(output.shape) for output in exported.outputs]
    scores = ranks[0] in (2, 4) and exported.outputs[0].shape[1] != 1  # one score is no choice of a class
    if ranks == [2] and scores:
        return "classification"
    return "segmentation" if ranks[0] == 4 and scores else "other"
