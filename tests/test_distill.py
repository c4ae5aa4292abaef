"""The pass `distill`: it learns, with labels and without, resumes to the bit, and refuses what cannot be."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import nets
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import small_networks  # noqa: E402

from edgecnn.composition import RecipeFlags, recipe_from_flags  # noqa: E402
from edgecnn.data.arrays import InputsDataset  # noqa: E402
from edgecnn.distill.distill import Distill  # noqa: E402
from edgecnn.distill.objective import DistillationLoss, Terms  # noqa: E402
from edgecnn.distill.pairing import pair_stages  # noqa: E402
from edgecnn.distill.synthetic import JoinedImages, synthesize_images  # noqa: E402
from edgecnn.distill.teacher import Answers, Teacher  # noqa: E402
from edgecnn.errors import DataError, PassError  # noqa: E402
from edgecnn.images import Sources, choose_images  # noqa: E402
from edgecnn.model import Model  # noqa: E402
from edgecnn.pipeline import Need, PassContext, SilentProgress, run_passes  # noqa: E402
from edgecnn.recipe import Recipe  # noqa: E402
from edgecnn.train.checkpoint import Checkpoint, Checkpoints  # noqa: E402
from edgecnn.train.fine_tune import FineTune  # noqa: E402
from edgecnn.train.objective import Batch  # noqa: E402

NUM_IMAGES = 96
QUICK: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 32,
    "learning_rate": 0.05,
    "precision": "float32",
    "augment": (),
}


def shaken(model: Model, seed: int = 0) -> Model:
    """Return the model with its weights disturbed: a student that has something to learn."""
    generator = torch.Generator().manual_seed(seed)
    graph = copy.deepcopy(model.graph)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.add_(
                0.3 * parameter.std().nan_to_num(0.0) * torch.randn(parameter.shape, generator=generator)
            )
    return model.with_graph(graph)


def dataset(model: Model, labelled: bool) -> InputsDataset:
    inputs = nets.images(NUM_IMAGES, 5)
    labels = nets.outputs_of(model.graph, inputs)[0].argmax(1) if labelled else None
    return InputsDataset("images", inputs, model.spec.preprocess, labels=labels)


def context(teacher: Model, labelled: bool = True, **changes: Any) -> PassContext:
    images = dataset(teacher, labelled)
    found = PassContext(train=images, train_indices=tuple(range(80)), teacher=teacher)
    return dataclasses.replace(found, **{"validation_indices": tuple(range(80, 96)), **changes})


def distance(model: Model, teacher: Model) -> float:
    """Return the mean absolute difference of the outputs on images that neither was trained on."""
    x = nets.held_out(32)
    found, expected = (nets.outputs_of(m.graph, x) for m in (model, teacher))
    return float(np.mean([np.abs(a - b).mean() for a, b in zip(found, expected, strict=True)]))


def weights(model: Model) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.graph.state_dict().items()}


@pytest.mark.parametrize(
    "step",
    [
        Distill(**QUICK),
        Distill(**QUICK, hard_labels=False),
        Distill(**QUICK, methods=("dkd",), hard_labels=False),
        Distill(**QUICK, methods=("feature",), hard_labels=False),
        Distill(**QUICK, methods=("dkd", "attention")),
        Distill(**{**QUICK, "augment": ("flip",)}, mixup=0.2, alpha=0.9),
    ],
    ids=["logits", "label_free", "dkd", "feature", "attention", "augmented"],
)
def test_what_it_minimizes_falls(step: Distill) -> None:
    teacher = nets.model("residual")
    student = shaken(teacher)
    before = weights(student)
    step.requires(student)
    runs = [context(teacher) for _ in range(2)]
    after = step.run(student, runs[0])
    step.ensures(student, after)
    loss = runs[0].records[1]["loss"]
    assert np.mean(loss[-2:]) < 0.95 * loss[0]
    assert weights(student) == before, "the student given stays as it was"
    assert weights(step.run(student, runs[1])) == weights(after), "the same seed, the same bytes"


@pytest.mark.parametrize("method", ["logits", "dkd"])
def test_a_student_without_labels_comes_nearer_to_its_teacher(method: Any) -> None:
    teacher = nets.model("residual")
    student = shaken(teacher)
    after = Distill(**QUICK, methods=(method,), hard_labels=False).run(student, context(teacher))
    assert distance(after, teacher) < 0.5 * distance(student, teacher)


@pytest.mark.parametrize("net", ["unet", "multi_output"])
def test_outputs_per_pixel_and_of_several_heads(net: str) -> None:
    teacher = nets.model(net)
    student = shaken(teacher)
    run = context(teacher, labelled=False)
    Distill(**QUICK).run(student, run)
    loss = run.records[1]["loss"]
    assert np.mean(loss[-2:]) < loss[0]
    assert run.records[0]["labels"] is False
    assert run.records[0]["alpha"] == 1.0


def test_labels_are_not_looked_at_in_label_free_mode() -> None:
    teacher = nets.model("residual")
    student = shaken(teacher)
    step = Distill(**QUICK, hard_labels=False, methods=("dkd",))
    wrong = dataset(teacher, labelled=True)
    wrong.labels = (wrong.labels + 1) % 5
    found = [
        weights(step.run(student, context(teacher, train=images)))
        for images in (wrong, dataset(teacher, labelled=False))
    ]
    assert found[0] == found[1]


def test_answers_computed_once_are_those_of_the_loop() -> None:
    teacher = nets.model("residual")
    student = shaken(teacher)
    step = Distill(**QUICK, methods=("logits", "attention"))
    runs = [context(teacher) for _ in range(2)]
    kept = step.run(student, runs[0])
    asked = dataclasses.replace(step, cache_mb=0).run(student, runs[1])
    assert [run.records[0]["remembered"] for run in runs] == ["float32", None]
    for name, tensor in kept.graph.state_dict().items():
        np.testing.assert_allclose(tensor, asked.graph.state_dict()[name], atol=1e-4, err_msg=name)


def test_augmented_images_are_asked_about_as_they_are() -> None:
    teacher = nets.model("residual")
    run = context(teacher)
    Distill(**{**QUICK, "augment": ("flip",)}).run(shaken(teacher), run)
    assert run.records[0]["remembered"] is None


def test_what_the_report_says() -> None:
    teacher = nets.model("option_a")
    run = context(teacher)
    Distill(**QUICK, methods=("logits", "attention"), alpha=0.25).run(shaken(teacher), run)
    told, curves = run.records
    pairs = pair_stages(teacher, teacher)
    assert told["pass"] == curves["pass"] == "distill"
    assert (told["kind"], curves["kind"]) == ("distillation", "training_curves")
    assert told["methods"] == ["logits", "attention"]
    assert told["alpha"] == 0.25
    assert told["labels"] is True
    assert [pair["student"] for pair in told["pairs"]] == [pair.student.node for pair in pairs]
    assert len(curves["loss"]) == len(curves["steps"]) == 8
    assert len(curves["validation_accuracy"]) == 5


class Stopped(Exception):
    """The power went."""


class Breaking(Checkpoint):
    """A checkpoint after whose n-th saving the run dies."""

    left = 2
    interval_seconds = 0.0  # type: ignore[assignment]

    def save(self, state: dict[str, Any]) -> None:
        super().save(state)
        Breaking.left -= 1
        if Breaking.left == 0:
            raise Stopped


@pytest.mark.parametrize("methods", [("logits",), ("dkd", "feature")])
def test_a_resumed_run_ends_with_the_same_bytes(
    methods: tuple[Any, ...], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The regressors of "feature" are part of the state; the teacher's answers are computed again."""
    teacher = nets.model("residual")
    student = shaken(teacher)
    step = Distill(**QUICK, methods=methods)
    unbroken = step.run(student, context(teacher))
    stages = Checkpoints(tmp_path, {"run": "1"}, interval_seconds=0.0)
    monkeypatch.setattr(Breaking, "left", 3)
    monkeypatch.setattr("edgecnn.train.checkpoint.Checkpoint", Breaking)
    with pytest.raises(Stopped):
        step.run(student, context(teacher, checkpoints=stages))
    resumed_run = context(teacher, checkpoints=stages)
    assert weights(step.run(student, resumed_run)) == weights(unbroken)
    assert resumed_run.records[1]["steps"] == list(range(1, 9))


# --- the objective's arithmetic


def test_the_terms_are_weighed_as_stated() -> None:
    teacher_model = nets.model("option_a")
    pairs = pair_stages(teacher_model, teacher_model)
    taps = tuple(pair.teacher.node for pair in pairs)
    teacher = Teacher(teacher_model, teacher_model, taps)
    x = torch.from_numpy(nets.held_out(4))
    answers = teacher.ask(x)
    zeros = tuple(torch.zeros_like(o) for o in answers.outputs)
    tapped = {p.student.node: f * 2 for p, f in zip(pairs, answers.features, strict=True)}

    class Seven:
        taps: tuple[str, ...] = ()

        def modules(self) -> None:
            return None

        def __call__(self, outputs: Any, batch: Batch, tapped: Any) -> torch.Tensor:
            return torch.tensor(7.0)

    def loss(terms: Terms, hard: Any) -> float:
        objective = DistillationLoss(terms, teacher, teacher_model.spec, hard, pairs)
        return float(
            objective(zeros, Batch(x, torch.zeros(4, dtype=torch.int64), torch.arange(4), 0, True), tapped)
        )

    alone = loss(Terms(("logits",), 1.0), None)
    assert loss(Terms(("logits",), 0.25), Seven()) == pytest.approx(0.75 * 7 + 0.25 * alone, rel=1e-5)
    # twice a feature has the same attention map, so the second method adds nothing here
    assert loss(Terms(("logits", "attention"), 1.0), None) == pytest.approx(alone, rel=1e-4)
    other = {name: torch.zeros_like(value) for name, value in tapped.items()}
    added = DistillationLoss(Terms(("attention",), 1.0), teacher, teacher_model.spec, None, pairs)
    # a map of zeros differs from one of length 1 by 1, in every pair; the weight is 10
    assert float(added.difference(zeros, answers, other)) == pytest.approx(10.0, rel=1e-5)
    hints = DistillationLoss(
        Terms(("feature",), 1.0, feature_weight=3.0), teacher, teacher_model.spec, None, pairs
    )
    assert hints.difference(zeros, answers, other).item() == pytest.approx(1.5, rel=1e-5)
    regressors = hints.modules()
    assert regressors is not None
    assert [tuple(p.shape) for p in regressors.parameters()] == [
        (p.teacher.channels, p.student.channels, 1, 1) for p in pairs
    ]


@functools.cache
def two_heads() -> Model:
    """Five scores and two numbers: no classifier."""
    torch.manual_seed(0)
    return nets.as_model(small_networks.TwoHeads().eval(), small_networks.SIZE)


def test_several_outputs_count_alike() -> None:
    model = two_heads()
    objective = DistillationLoss(Terms(alpha=1.0), Teacher(model, model), model.spec)
    answers = Answers((torch.ones(1, 5), torch.ones(1, 2)))
    outputs = (torch.zeros(1, 5), torch.ones(1, 2))  # the first is off by its own size, the second right
    assert float(objective.difference(outputs, answers, {})) == 0.5


# --- bad input


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"methods": ()},
            r"methods is \(\), expected a list of one or more of logits, dkd, feature, attention",
        ),
        ({"methods": "logits"}, "methods is 'logits', expected a list"),
        ({"methods": ("logit",)}, "methods names 'logit', expected some of logits, dkd, feature, attention"),
        ({"methods": ("dkd", "dkd")}, "expected each one once"),
        ({"methods": ("logits", "dkd")}, "methods names logits and dkd, expected one of the two"),
        ({"alpha": 0.0}, "alpha is 0.0, expected 0 < alpha <= 1"),
        ({"alpha": 1.5}, "alpha is 1.5, expected 0 < alpha <= 1"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a number above 0"),
        ({"beta": float("nan")}, "beta is nan, expected a number above 0"),
        ({"cache_mb": -1.0}, "cache_mb is -1.0, expected 0 or more"),
        ({"synthetic_images": 0}, "synthetic_images is 0, expected at least 1"),
        ({"epochs": 0.0}, "epochs is 0.0, expected a number above 0"),
    ],
)
def test_a_parameter_out_of_range_is_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Distill(**parameters).check()


def test_dkd_needs_classes() -> None:
    with pytest.raises(PassError, match="methods names dkd, which compares scores of classes"):
        Distill(methods=("dkd",)).requires(two_heads())


def test_a_quantized_network_is_refused() -> None:
    with pytest.raises(PassError, match="is quantized"):
        Distill().requires(nets.quantized("residual"))


def test_a_teacher_with_other_outputs_is_refused_in_a_recipe() -> None:
    run = context(nets.model("multi_output"), labelled=False)
    with pytest.raises(
        PassError, match=r"pass 1 of 1 \(distill\): the teacher \w+ gives .* and the student \w+"
    ):
        run_passes(nets.model("residual"), (Distill(**QUICK),), run, lambda model: {})


@pytest.mark.parametrize(
    ("changes", "missing"),
    [({"teacher": None}, "a teacher network"), ({"train_indices": ()}, "training images")],
)
def test_what_is_missing_is_named(changes: dict[str, Any], missing: str) -> None:
    run = dataclasses.replace(context(nets.model("residual")), **changes)
    with pytest.raises(PassError, match=rf"\(distill\): needs {missing}, but this run has none"):
        run_passes(nets.model("residual"), (Distill(),), run, lambda model: {})


def test_labels_are_no_need() -> None:
    assert Distill.needs == {Need.TRAIN_IMAGES, Need.TEACHER}


def test_it_survives_toml() -> None:
    step = Distill(methods=("dkd", "feature"), alpha=0.3, epochs=2.0, augment=())
    recipe = Recipe("round_trip", (step,), seed=7)
    assert Recipe.from_toml(recipe.to_toml()) == recipe


# --- images made up from the teacher


def test_images_are_made_up_where_there_are_none() -> None:
    teacher = nets.model("residual")
    images = synthesize_images(teacher, 8, 0, SilentProgress())
    assert len(images) == 8
    assert images.labels is None
    assert "8 images made up from the BatchNorm statistics of the teacher" in images.warnings[0]
    again = synthesize_images(teacher, 8, 0, SilentProgress())
    assert np.array_equal(images.inputs([0, 7]), again.inputs([0, 7]))
    run = context(teacher, train=images, train_indices=tuple(range(8)), validation_indices=())
    Distill(**QUICK).run(shaken(teacher), run)
    loss = run.records[1]["loss"]
    assert loss[-1] < loss[0]


def test_a_run_without_any_images_makes_some_up_to_train_on() -> None:
    recipe = recipe_from_flags(RecipeFlags(prune=0.5, distill=True))
    step = next(step for step in recipe.passes if isinstance(step, Distill))
    assert (step.epochs, step.batch_size, step.learning_rate) == (40.0, 48, 0.005), "few images, small steps"
    few = dataclasses.replace(step, synthetic_images=4)
    images = choose_images(nets.model("residual"), Sources(), (few,), 0, SilentProgress())
    assert images.synthetic
    assert images.train is not None
    assert images.train.dataset.labels is None
    assert images.train.indices == (0, 1, 2, 3)
    with pytest.raises(DataError, match="the pass fine_tune trains the network, and there are no images"):
        choose_images(nets.model("residual"), Sources(), (FineTune(),), 0, SilentProgress())


def test_without_batch_norm_nothing_can_be_made_up() -> None:
    with pytest.raises(DataError, match="no images to distil on, and no BatchNorm to make some up from"):
        synthesize_images(two_heads(), 4, 0, SilentProgress())


def test_joined_images_keep_their_order() -> None:
    preprocess = nets.model("residual").spec.preprocess
    parts = [InputsDataset("part", nets.images(n, n), preprocess) for n in (3, 2, 4)]
    joined = JoinedImages("all", parts)
    expected = np.concatenate([nets.images(n, n) for n in (3, 2, 4)])
    assert len(joined) == 9
    assert np.array_equal(joined.inputs([8, 0, 3, 4, 2]), expected[[8, 0, 3, 4, 2]])
