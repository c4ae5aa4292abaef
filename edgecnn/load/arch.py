"""Build a network from an architecture spec: torchvision:NAME, timm:NAME or package.module:factory.

Never downloads: weights come from the user's file only.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from edgecnn.errors import LoadError, MissingDependencyError
from edgecnn.load.export import first_line

_SPEC = re.compile(r"^(torchvision|timm|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_][\w.]*)$")


@dataclass(frozen=True)
class Architecture:
    """A network built from a spec, with what its package says about it.

    Attributes:
        spec: as given.
        name: NAME, or the factory's name.
        module: on the CPU, with random weights.
        input_shape: (c, h, w), or None where only the user knows.
        timm_config: timm's pretrained_cfg, or None.
        categories: class names of the package's own weights, or None.
    """

    spec: str
    name: str
    module: torch.nn.Module
    input_shape: tuple[int, int, int] | None = None
    timm_config: dict[str, Any] | None = None
    categories: tuple[str, ...] | None = None


def is_arch_spec(text: str) -> bool:
    """Tell whether `text` has the form of an architecture spec.

    Example:
        >>> is_arch_spec("torchvision:resnet18"), is_arch_spec("net.pt")
        (True, False)
    """
    return _SPEC.match(text) is not None


def build_architecture(
    spec: str, seed: int, num_classes: int | None = None, state_keys: frozenset[str] = frozenset()
) -> Architecture:
    """Build the network that `spec` names, with random weights.

    Args:
        spec: torchvision:NAME, timm:NAME or package.module:factory.
        seed: of the random weights.
        num_classes: replaces the package's own number of classes (torchvision and timm).
        state_keys: keys of the state dict to come, which tell whether there is an auxiliary head.

    Raises:
        LoadError: for a spec that is malformed or unknown, or a factory that fails.
        MissingDependencyError: if the package is not installed.
    """
    match = _SPEC.match(spec)
    if match is None:
        raise LoadError(
            f"architecture {spec!r} is not a spec",
            hint="expected torchvision:NAME, timm:NAME or package.module:factory",
        )
    package, name = match.groups()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if package == "torchvision":
            found = _from_torchvision(spec, name, num_classes, state_keys)
        elif package == "timm":
            found = _from_timm(spec, name, num_classes)
        else:
            found = _from_factory(spec, package, name)
    try:
        return replace(found, module=found.module.to("cpu").float())
    except Exception as error:
        raise LoadError(
            f"architecture {spec}: cannot be moved to the CPU in float32 ({first_line(error)})"
        ) from error


def _suggest(name: str, names: list[str]) -> str | None:
    close = get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {', '.join(close)}?" if close else None


def _from_torchvision(
    spec: str, name: str, num_classes: int | None, state_keys: frozenset[str]
) -> Architecture:
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingDependencyError(
            f"architecture {spec}: torchvision is not installed", hint="pip install torchvision"
        ) from error
    except RuntimeError as error:
        raise MissingDependencyError(
            f"architecture {spec}: torchvision does not fit the installed PyTorch ({first_line(error)})",
            hint="install the torchvision built for it, from the index PyTorch came from",
        ) from error
    names = models.list_models()
    if name not in names:
        raise LoadError(f"architecture {spec}: torchvision has no model {name!r}", hint=_suggest(name, names))
    builder = models.get_model_builder(name)
    arguments: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        arguments["weights_backbone"] = None
        if any(key.startswith("aux_classifier.") for key in state_keys):
            arguments["aux_loss"] = True
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
        if state_keys and not any(key.startswith(("aux1.", "AuxLogits.")) for key in state_keys):
            arguments["aux_logits"] = False
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    module = _call(spec, builder, arguments)
    size = 299 if name == "inception_v3" else 224
    return Architecture(spec, name, module, (3, size, size), categories=_categories(models, name))


def _categories(models: Any, name: str) -> tuple[str, ...] | None:
    try:
        weights = next(iter(models.get_model_weights(name)))
    except (StopIteration, ValueError):
        return None
    return tuple(weights.meta.get("categories", ())) or None


def _from_timm(spec: str, name: str, num_classes: int | None) -> Architecture:
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError(
            f"architecture {spec}: timm is not installed", hint="pip install timm"
        ) from error
    if not timm.is_model(name):
        hint = _suggest(name.split(".")[0], timm.list_models())
        raise LoadError(f"architecture {spec}: timm has no model {name!r}", hint=hint)
    arguments: dict[str, Any] = {"model_name": name, "pretrained": False}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    module = _call(spec, timm.create_model, arguments)
    config = dict(getattr(module, "pretrained_cfg", None) or {})
    size = config.get("input_size")
    shape = (int(size[0]), int(size[1]), int(size[2])) if size and len(size) == 3 else None
    return Architecture(spec, name, module, shape, config, tuple(config.get("label_names") or ()) or None)


def _call(spec: str, factory: Any, arguments: dict[str, Any]) -> torch.nn.Module:
    try:
        made = factory(**arguments)
    except Exception as error:
        raise LoadError(f"architecture {spec}: the factory raised {first_line(error)}") from error
    if not isinstance(made, torch.nn.Module):
        raise LoadError(
            f"architecture {spec}: the factory returned {type(made).__name__}, expected a torch.nn.Module",
            hint="name a function or class that returns the network",
        )
    return made


@contextmanager
def _current_directory_on_path() -> Iterator[None]:
    """Let package.module be found beside the user, as `python -m` would."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _from_factory(spec: str, package: str, name: str) -> Architecture:
    with _current_directory_on_path():
        try:
            found: Any = importlib.import_module(package)
        except ModuleNotFoundError as error:
            missing = error.name or package
            if package == missing or package.startswith(f"{missing}."):
                raise LoadError(
                    f"architecture {spec}: no module {package!r} in {Path.cwd()} or the installed packages",
                    hint="expected torchvision:NAME, timm:NAME or package.module:factory",
                ) from error
            raise MissingDependencyError(
                f"architecture {spec}: {package} needs {missing!r}, which is not installed",
                hint=f"pip install {missing}",
            ) from error
        except Exception as error:
            raise LoadError(f"architecture {spec}: importing {package} raised {first_line(error)}") from error
        for part in name.split("."):
            if not hasattr(found, part):
                hint = _suggest(part, [key for key in vars(found) if not key.startswith("_")])
                raise LoadError(f"architecture {spec}: {package} has no {name!r}", hint=hint)
            found = getattr(found, part)
        if isinstance(found, torch.nn.Module):
            return Architecture(spec, name, found)
        if not callable(found):
            raise LoadError(
                f"architecture {spec}: {name} is {type(found).__name__}, expected a function or class"
            )
        module = _call(spec, found, {})
    return Architecture(spec, name, module)
