"""run_passes: the order of the checks, the records, the seeds and what an error says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from edgecnn.errors import PassError, UnsupportedOpError
from edgecnn.model import Model, ModelSpec, TensorSpec
from edgecnn.pipeline import Need, PassContext, SilentProgress, pass_seed, run_passes
from edgecnn.runner.preprocess import Preprocess


def make_model() -> Model:
    spec = ModelSpec("net", (TensorSpec("x", (None, 1, 2, 2)),), (), "other", None, Preprocess(size=(2, 2)))
    return Model(graph=[], spec=spec)  # type: ignore[arg-type]  # the pipeline never looks inside


@dataclass(frozen=True)
class Append:
    """Appends `value` to the graph, a list here; `calls` and `seeds` are shared on purpose."""

    value: int = 1
    fails_in: str = ""
    with_error: Exception = field(default_factory=lambda: PassError("the reason", hint="the way out"))

    name: ClassVar[str] = "append"
    needs: ClassVar[frozenset[Need]] = frozenset()
    calls: ClassVar[list[str]] = []
    seeds: ClassVar[list[int]] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fails_in == name:
            raise self.with_error

    def requires(self, model: Model) -> None:
        self._call("requires")

    def run(self, model: Model, context: PassContext) -> Model:
        self._call("run")
        self.seeds.append(context.seed)
        return model.with_graph([*model.graph, self.value])  # type: ignore[arg-type]

    def ensures(self, before: Model, after: Model) -> None:
        self._call("ensures")
        if len(after.graph) != len(before.graph) + 1:
            raise PassError("nothing was appended")


@dataclass(frozen=True)
class NeedsImages(Append):
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CALIBRATION})


@dataclass(frozen=True)
class NeedsTeacher(Append):
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TEACHER, Need.TRAIN})


class Images:
    """A Dataset, as far as the pipeline looks at one."""


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Append.calls.clear()
    Append.seeds.clear()


def summarize(model: Model) -> dict[str, Any]:
    return {"length": len(model.graph)}


def test_passes_run_in_order_between_their_checks() -> None:
    model = make_model()
    after = run_passes(model, [Append(1), Append(2)], PassContext(), summarize)
    assert after.graph == [1, 2]
    assert Append.calls == ["requires", "run", "ensures"] * 2
    assert model.graph == []
    assert model.history == ()


def test_each_pass_leaves_a_record_with_figures_and_time() -> None:
    after = run_passes(make_model(), [Append(1), Append(2)], PassContext(), summarize)
    first, second = after.history
    assert (first.name, first.parameters["value"], first.before, first.after) == (
        "append", 1, {"length": 0}, {"length": 1},
    )  # fmt: skip
    assert (second.before, second.after) == ({"length": 1}, {"length": 2})
    assert first.seconds >= 0


def test_no_passes_leave_the_model_as_it_is() -> None:
    model = make_model()
    assert run_passes(model, [], PassContext(), summarize) is model


def test_each_pass_has_its_own_seed_that_later_passes_do_not_change() -> None:
    run_passes(make_model(), [Append(), Append()], PassContext(seed=7), summarize)
    run_passes(make_model(), [Append()], PassContext(seed=7), summarize)
    first, second, alone = Append.seeds
    assert first != second
    assert alone == first == pass_seed(7, 0)
    assert pass_seed(7, 0) != pass_seed(8, 0)


def test_a_seed_fits_every_generator() -> None:
    assert all(0 <= pass_seed(seed, 3) < 2**32 for seed in (0, 1, 2**63))
    np.random.default_rng(pass_seed(0, 0))


@pytest.mark.parametrize("stage", ["requires", "run", "ensures"])
def test_a_failure_says_which_pass_of_how_many(stage: str) -> None:
    with pytest.raises(PassError) as caught:
        run_passes(make_model(), [Append(), Append(fails_in=stage)], PassContext(), summarize)
    assert str(caught.value) == "pass 2 of 2 (append): the reason (hint: the way out)"


def test_a_failure_keeps_its_class() -> None:
    failing = Append(fails_in="run", with_error=UnsupportedOpError("no lowering for aten.foo"))
    with pytest.raises(UnsupportedOpError, match=r"^pass 1 of 1 \(append\): no lowering for aten.foo$"):
        run_passes(make_model(), [failing], PassContext(), summarize)


def test_a_bug_in_a_pass_becomes_a_pass_error_with_its_cause() -> None:
    failing = Append(fails_in="run", with_error=KeyError("weight"))
    with pytest.raises(PassError, match=r"pass 1 of 1 \(append\): failed with KeyError: 'weight'") as caught:
        run_passes(make_model(), [failing], PassContext(), summarize)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "EDGECNN_DEBUG=1" in str(caught.value.hint)


def test_ctrl_c_is_not_turned_into_an_error() -> None:
    failing = Append(fails_in="run", with_error=KeyboardInterrupt())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        run_passes(make_model(), [failing], PassContext(), summarize)


def test_a_need_that_the_run_cannot_meet_is_said_before_the_pass_runs() -> None:
    with pytest.raises(
        PassError, match=r"pass 1 of 1 \(append\): needs calibration images, but this run has"
    ):
        run_passes(make_model(), [NeedsImages()], PassContext(), summarize)
    with pytest.raises(PassError, match="needs a teacher network and labelled training images"):
        run_passes(make_model(), [NeedsTeacher()], PassContext(), summarize)
    assert Append.calls == []


def test_calibration_images_without_any_index_are_none() -> None:
    images: Any = Images()
    assert PassContext(calibration=images, calibration_indices=(0,)).has(Need.CALIBRATION)
    assert not PassContext(calibration=images).has(Need.CALIBRATION)


def test_what_training_needs() -> None:
    images: Any = Images()
    images.labels = None
    context = PassContext(train=images, train_indices=(0, 1), validation_indices=(2,))
    assert context.has(Need.TRAIN_IMAGES)
    assert not context.has(Need.TRAIN) and not context.has(Need.EVAL) and not context.has(Need.TEACHER)
    images.labels = np.zeros(3, np.int64)
    assert context.has(Need.TRAIN) and context.has(Need.EVAL)
    assert PassContext(teacher=make_model()).has(Need.TEACHER)
    assert not PassContext(train=images).has(Need.TRAIN_IMAGES)


def test_no_two_passes_share_a_stage() -> None:
    asked: list[str] = []

    class Kept:
        def stage(self, name: str) -> str:
            asked.append(name)
            return name

    class Trains(Append):
        def run(self, model: Model, context: PassContext) -> Model:
            assert context.checkpoints is not None
            context.checkpoints.stage("train")
            context.records.append({"pass": self.name, "kind": "note"})
            return super().run(model, context)

    context = PassContext(checkpoints=Kept())
    run_passes(make_model(), [Trains(), Append(), Trains()], context, summarize)
    assert asked == ["01_append_train", "03_append_train"]
    assert len(context.records) == 2


def test_progress_hears_of_every_pass() -> None:
    heard: list[str] = []

    class Listener(SilentProgress):
        def start(self, title: str, total: int | None) -> None:
            heard.append(title)

        def finish(self) -> None:
            heard.append("done")

    run_passes(make_model(), [Append(), Append()], PassContext(progress=Listener()), summarize)
    assert heard == ["pass 1 of 2 (append)", "done", "pass 2 of 2 (append)", "done"]
