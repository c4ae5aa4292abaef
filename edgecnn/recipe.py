"""Recipes: a TOML file, or Python, that names the passes to run and their parameters.

    name = "static_wi8_ai8"
    seed = 0

    [[passes]]
    pass = "quantize_static"
    observer = "mse"

A recipe is a flat list: no inheritance, no conditions. Everything in it is checked before any work starts,
and every message says which pass of which file it is about.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import itertools
import json
import math
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecnn.errors import EdgeCNNError, RecipeError
from edgecnn.pipeline import Pass, parameters

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PASSES: Mapping[str, str] = {
    "prune_channels": "edgecnn.prune.prune_channels:PruneChannels",
    "fine_tune": "edgecnn.train.fine_tune:FineTune",
    "sparsify": "edgecnn.prune.sparsity:Sparsify",
    "distill": "edgecnn.distill.distill:Distill",
    "fold_batch_norm": "edgecnn.graph.folding:FoldBatchNorm",
    "equalize": "edgecnn.quantize.equalize:Equalize",
    "averages_to_convolutions": "edgecnn.lower.averages:AveragesToConvolutions",
    "decompose_activations": "edgecnn.lower.activations:DecomposeActivations",
    "store_weights": "edgecnn.quantize.weights:StoreWeights",
    "quantize_dynamic": "edgecnn.quantize.dynamic:QuantizeDynamic",
    "quantize_static": "edgecnn.quantize.static:QuantizeStatic",
    "widen_activations": "edgecnn.quantize.widen:WidenActivations",
    "quantize_aware_training": "edgecnn.qat.quantize_aware_training:QuantizeAwareTraining",
}
"""Every pass by name: "module:Class", imported when a recipe uses it."""

_RECIPE_KEYS = ("name", "seed", "passes")


@dataclass(frozen=True)
class Recipe:
    """Passes to run, in order.

    Attributes:
        name: for the report.
        passes: frozen dataclasses that follow `edgecnn.pipeline.Pass`.
        seed: each pass draws from its own stream derived from it.
    """

    name: str
    passes: tuple[Pass, ...]
    seed: int = 0

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """Read and check a recipe.

        Args:
            name_or_path: a TOML file, or the name of a recipe in ./recipes or shipped with edgecnn.

        Raises:
            RecipeError: if there is no such recipe, or it says something that cannot be done.
        """
        path = find_recipe(name_or_path)
        try:
            return cls.from_toml(path.read_text(encoding="utf-8"), source=path.name)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"recipe '{path}': cannot be read ({error})", hint="expected a UTF-8 TOML file"
            ) from error

    @classmethod
    def from_toml(cls, text: str, source: str = "recipe") -> Recipe:
        """Build a recipe from TOML text; `source` names it in messages.

        Raises:
            RecipeError: if the text is not TOML, or says something that cannot be done.
        """
        where = f"recipe '{source}'"
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(
                f"{where}: not valid TOML: {error}",
                hint="strings need quotes; each pass starts with [[passes]]",
            ) from error
        _reject_unknown(values, _RECIPE_KEYS, where, "key")
        steps = values.get("passes", [])
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise RecipeError(
                f"{where}: passes is {steps!r}, expected tables", hint="write each pass as [[passes]]"
            )
        passes = tuple(_build_pass(step, f"{where}, pass {index}") for index, step in enumerate(steps, 1))
        recipe = cls(values.get("name", Path(source).stem), passes, values.get("seed", 0))
        recipe.check(where)
        return recipe

    def check(self, where: str | None = None) -> None:
        """Check the whole recipe, also one put together in Python.

        Args:
            where: what to call it in messages, by default its name.

        Raises:
            RecipeError: if name, seed or a pass cannot be used.
        """
        where = where or f"recipe '{self.name}'"
        if not isinstance(self.name, str) or not self.name:
            raise RecipeError(f"{where}: name is {self.name!r}, expected a text that is not empty")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise RecipeError(f"{where}: seed is {self.seed!r}, expected an integer >= 0")
        if not self.passes:
            raise RecipeError(
                f"{where}: has no passes, expected at least one", hint="add [[passes]] with pass = NAME"
            )
        for index, step in enumerate(self.passes, 1):
            name = getattr(step, "name", None)
            if not dataclasses.is_dataclass(step) or name not in PASSES:
                raise RecipeError(f"{where}, pass {index}: is {step!r}, expected one of {', '.join(PASSES)}")
            _check_pass(step, f"{where}, pass {index} ({name})")

    def to_toml(self) -> str:
        """Return TOML with every parameter written out, the inverse of `from_toml`.

        Raises:
            RecipeError: if a parameter has no place in TOML.
        """
        lines = [f"name = {_toml_value(self.name)}", f"seed = {self.seed}"]
        for step in self.passes:
            lines += ["", "[[passes]]", f"pass = {_toml_value(step.name)}"]
            lines += [
                f"{key} = {_toml_value(value)}"
                for key, value in parameters(step).items()
                if value is not None
            ]
        return "\n".join(lines) + "\n"


def list_recipes() -> dict[str, Path]:
    """Return every recipe that can be loaded by name; ./recipes hides a shipped one of the same name."""
    found: dict[str, Path] = {}
    for directory in _recipe_directories():
        for path in sorted(directory.glob("*.toml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def describe_recipe(path: Path) -> str:
    """Return the first sentence of the comment that a recipe's file opens with, empty if it has none."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
    text = " ".join(line.lstrip("# ") for line in lines)
    return text.partition(". ")[0].removesuffix(".")


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the file of a recipe: a path, then ./recipes, then the ones shipped with edgecnn.

    Raises:
        RecipeError: if there is none; the hint names what is near.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = list_recipes()
    if str(name_or_path).removesuffix(".toml") in known:
        return known[str(name_or_path).removesuffix(".toml")]
    message = f"recipe '{name_or_path}': no such file, and no recipe of that name in ./recipes or in edgecnn"
    raise RecipeError(message, hint=_suggest(path.stem, known))


def load_pass(name: str, where: str = "recipe") -> type[Pass]:
    """Import the class of a pass by its name in PASSES.

    Raises:
        RecipeError: if there is no such pass.
    """
    if not isinstance(name, str) or name not in PASSES:
        raise RecipeError(f"{where}: unknown pass {name!r}", hint=_suggest(str(name), PASSES))
    module, _, attribute = PASSES[name].partition(":")
    found: type[Pass] = getattr(importlib.import_module(module), attribute)
    return found


def _recipe_directories() -> tuple[Path, ...]:
    """Return where recipes are looked up by name: the wheel's copy, or the checkout's own."""
    package = Path(__file__).parent
    shipped = package / "_recipes"
    return Path("recipes"), shipped if shipped.is_dir() else package.parent / "recipes"


def _build_pass(values: dict[str, Any], where: str) -> Pass:
    """Make one pass from its TOML table."""
    if "pass" not in values:
        raise RecipeError(f"{where}: has no key 'pass'", hint=f"add pass = NAME, one of {', '.join(PASSES)}")
    kind = load_pass(values["pass"], where)
    where = f"{where} ({kind.name})"
    given = {key: value for key, value in values.items() if key != "pass"}
    _reject_unknown(given, [parameter.name for parameter in _fields(kind)], where, "parameter")
    missing = [
        parameter.name
        for parameter in _fields(kind)
        if _is_required(parameter) and parameter.name not in given
    ]
    if missing:
        raise RecipeError(f"{where}: {', '.join(missing)} is missing", hint="it has no default")
    with _located(where):
        return kind(**_check_types(kind, given, where))


def _check_pass(step: Pass, where: str) -> None:
    """Check the types of a pass's parameters, then what the pass itself says about their ranges."""
    _check_types(type(step), parameters(step), where)
    check_ranges = getattr(step, "check", None)
    if check_ranges is not None:
        with _located(where):
            check_ranges()


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Say where in front of what a pass says about its parameters."""
    try:
        yield
    except EdgeCNNError as error:
        if error.message.startswith(where):
            raise
        raise RecipeError(f"{where}: {error.message}", hint=error.hint) from error
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def _fields(kind: type[Pass]) -> tuple[dataclasses.Field[Any], ...]:
    """Return the parameters of a pass class."""
    return dataclasses.fields(typing.cast(Any, kind))


def _is_required(parameter: dataclasses.Field[Any]) -> bool:
    """Return whether a parameter has no default."""
    return parameter.default is dataclasses.MISSING and parameter.default_factory is dataclasses.MISSING


def _reject_unknown(values: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    """Raise for the first key that is not known."""
    for key in values:
        if key not in known:
            raise RecipeError(f"{where}: unknown {what} '{key}'", hint=_suggest(key, known))


def _suggest(found: str, known: Iterable[str]) -> str:
    """Return "did you mean ..." for what is near, or everything there is."""
    near = difflib.get_close_matches(found, list(known), n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known) or 'none'}"


def _check_types(kind: type[Pass], values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the parameters with TOML's types made the pass's own; raise if one does not fit."""
    hints = typing.get_type_hints(kind)
    return {name: _convert(value, hints[name], f"{where}: {name}") for name, value in values.items()}


def _convert(value: Any, expected: Any, where: str) -> Any:
    """Return `value` as type `expected`: an int where a float is wanted, a list where a tuple is."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        return _convert(value, options[0] if len(options) == 1 else typing.Any, where)
    if origin is typing.Literal:
        if value not in arguments:
            choices = ", ".join(map(repr, arguments))
            raise RecipeError(
                f"{where} is {value!r}, expected one of {choices}",
                hint=_suggest(str(value), [str(choice) for choice in arguments]),
            )
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        of = arguments if arguments[-1] is not ... else (arguments[0],) * len(value)
        if len(of) == len(value):
            return tuple(
                _convert(item, kind, f"{where}[{i}]")
                for i, (item, kind) in enumerate(zip(value, of, strict=True))
            )
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected in (int, float, bool, str) and type(value) is expected:
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{where} is {value}, expected a finite number")
        return value
    if expected in (int, float, bool, str) or origin is tuple:
        name = expected.__name__ if origin is None else str(expected)
        raise RecipeError(f"{where} is {value!r}, expected {name}")
    return value


def _toml_value(value: Any) -> str:
    """Return a value as TOML text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    raise RecipeError(f"{value!r} has no place in TOML, expected a text, a number, a bool or a list of them")
