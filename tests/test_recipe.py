"""Recipes: looked up, checked with the place in every message, and written back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from edgecnn import recipe as recipe_module
from edgecnn.errors import RecipeError
from edgecnn.pipeline import Need
from edgecnn.recipe import PASSES, Recipe, find_recipe, list_recipes, load_pass


@dataclass(frozen=True)
class Example:
    """Every type of parameter that a recipe can hold."""

    ratio: float
    count: int = 3
    on: bool = True
    label: str = "a"
    mode: Literal["fast", "small"] = "fast"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.5, 1.0)
    limit: float | None = None

    name: ClassVar[str] = "example"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def check(self) -> None:
        if not 0 <= self.ratio < 1:
            raise RecipeError(f"ratio is {self.ratio}, expected 0 <= ratio < 1", hint="use 0.5")


@dataclass(frozen=True)
class Picky:
    """Checks its range when it is made."""

    steps: int = 1
    name: ClassVar[str] = "picky"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")


@pytest.fixture(autouse=True)
def _passes(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**PASSES, "example": f"{__name__}:Example", "picky": f"{__name__}:Picky"}
    monkeypatch.setattr(recipe_module, "PASSES", known)


def toml(*lines: str, name: str = "example") -> str:
    return "\n".join(['name = "x"', "seed = 5", "[[passes]]", f'pass = "{name}"', *lines])


HERE = "recipe 'x.toml', pass 1 (example): "


def message(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_toml(text, source="x.toml")
    return str(caught.value)


def test_a_recipe_becomes_checked_passes() -> None:
    recipe = Recipe.from_toml(toml("ratio = 0.25", "sizes = [4, 5, 6]", 'mode = "small"', "limit = 2"))
    assert recipe == Recipe("x", (Example(0.25, sizes=(4, 5, 6), mode="small", limit=2.0),), seed=5)  # type: ignore[arg-type]


def test_an_integer_is_taken_where_a_float_is_wanted() -> None:
    (step,) = Recipe.from_toml(toml("ratio = 0")).passes
    assert step == Example(0.0)
    assert isinstance(step.ratio, float)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (toml("ratio = 0.1", "coutn = 1"), HERE + "unknown parameter 'coutn' (hint: did you mean 'count'?)"),
        (toml("ratio = 1.3"), HERE + "ratio is 1.3, expected 0 <= ratio < 1 (hint: use 0.5)"),
        (toml("steps = 0", name="picky"), "recipe 'x.toml', pass 1 (picky): steps is 0, expected at least 1"),
        (toml(), HERE + "ratio is missing (hint: it has no default)"),
        (toml('ratio = "half"'), HERE + "ratio is 'half', expected float"),
        (toml("ratio = true"), HERE + "ratio is True, expected float"),
        (toml("ratio = nan"), HERE + "ratio is nan, expected a finite number"),
        (toml("ratio = 0.1", "count = 1.5"), HERE + "count is 1.5, expected int"),
        (toml("ratio = 0.1", "count = true"), HERE + "count is True, expected int"),
        (toml("ratio = 0.1", "on = 1"), HERE + "on is 1, expected bool"),
        (toml("ratio = 0.1", "label = 1"), HERE + "label is 1, expected str"),
        (
            toml("ratio = 0.1", 'mode = "fasst"'),
            "mode is 'fasst', expected one of 'fast', 'small' (hint: did you mean",
        ),
        (toml("ratio = 0.1", 'sizes = [1, "b"]'), HERE + "sizes[1] is 'b', expected int"),
        (toml("ratio = 0.1", "sizes = 3"), "sizes is 3, expected tuple[int, ...]"),
        (toml("ratio = 0.1", "pair = [1]"), "pair is [1], expected tuple[float, float]"),
        (
            toml(name="exampel"),
            "recipe 'x.toml', pass 1: unknown pass 'exampel' (hint: did you mean 'example'?)",
        ),
        (
            toml(name="zzz"),
            "unknown pass 'zzz' (hint: expected one of prune_channels, ",
        ),
        ("[[passes]]\nratio = 1", "recipe 'x.toml', pass 1: has no key 'pass'"),
        ("[[passes]]\npass = [1]", "recipe 'x.toml', pass 1: unknown pass [1]"),
        ("[[passes]]\npass = 3", "recipe 'x.toml', pass 1: unknown pass 3"),
        ("sed = 1\npasses = []", "recipe 'x.toml': unknown key 'sed' (hint: did you mean 'seed'?)"),
        ("seed = -1\n[[passes]]\npass = 'picky'", "recipe 'x.toml': seed is -1, expected an integer >= 0"),
        ("seed = 1.5\n[[passes]]\npass = 'picky'", "seed is 1.5, expected an integer >= 0"),
        ("name = ''\n[[passes]]\npass = 'picky'", "name is '', expected a text that is not empty"),
        ("name = 'x'", "recipe 'x.toml': has no passes, expected at least one"),
        ("passes = 3", "recipe 'x.toml': passes is 3, expected tables (hint: write each pass as [[passes]])"),
        ("passes = [1]", "recipe 'x.toml': passes is [1], expected tables"),
        ("name = x", "recipe 'x.toml': not valid TOML: "),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, expected: str) -> None:
    assert expected in message(text)


def test_the_second_pass_is_called_the_second() -> None:
    text = toml("ratio = 0.1") + "\n[[passes]]\npass = 'picky'\nsteps = 'x'"
    assert message(text) == "recipe 'x.toml', pass 2 (picky): steps is 'x', expected int"


def test_toml_round_trip() -> None:
    step: Any = Example(0.1, 4, False, 'quote " and \\ and é\n', "small", (), (1e-20, 3.0), None)
    recipe = Recipe("näme", (step, Picky(2)), seed=9)  # type: ignore[arg-type]
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_a_recipe_made_in_python_is_checked_too() -> None:
    step: Any = Example(2.0)
    with pytest.raises(
        RecipeError, match=r"recipe 'mine', pass 1 \(example\): ratio is 2.0, expected 0 <= ratio"
    ):
        Recipe("mine", (step,)).check()
    stranger: Any = "prune"
    with pytest.raises(
        RecipeError, match="recipe 'mine', pass 1: is 'prune', expected one of prune_channels"
    ):
        Recipe("mine", (stranger,)).check()


def test_a_path_goes_ahead_of_recipes_and_recipes_ahead_of_the_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = find_recipe("static_wi8_ai8")
    assert shipped.is_absolute()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "static_wi8_ai8.toml").write_text(toml("ratio = 0.5"))
    assert find_recipe("static_wi8_ai8") == Path("recipes/static_wi8_ai8.toml")
    assert find_recipe("static_wi8_ai8.toml") == Path("recipes/static_wi8_ai8.toml")
    (tmp_path / "static_wi8_ai8").write_text(toml("ratio = 0.75"))
    assert Recipe.load("static_wi8_ai8").passes == (Example(0.75),)


def test_a_recipe_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recipe 'static_wi8_a8': no such file") as caught:
        Recipe.load("static_wi8_a8")
    assert caught.value.hint == "did you mean 'static_wi8_ai8'?"


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"cannot be read.*expected a UTF-8 TOML file"):
        Recipe.load(path)


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_shipped_recipe_loads_and_round_trips(name: str) -> None:
    pytest.importorskip("torch", reason="the passes need PyTorch")
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_is_known_by_its_own_name(name: str) -> None:
    pytest.importorskip("torch", reason="the passes need PyTorch")
    assert load_pass(name).name == name
