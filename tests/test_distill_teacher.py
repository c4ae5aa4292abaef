"""Teachers: whether they fit, what they answer, what is remembered; and which inner values are compared."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import nets
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgecnn.data.arrays import InputsDataset  # noqa: E402
from edgecnn.distill.losses import attention_map  # noqa: E402
from edgecnn.distill.pairing import pair_stages, stage_ends  # noqa: E402
from edgecnn.distill.teacher import Teacher, check_teacher, with_taps  # noqa: E402
from edgecnn.errors import PassError  # noqa: E402
from edgecnn.model import Model  # noqa: E402


class Stages(nn.Module):
    """Blocks with a shortcut, `depth` of them per stage, at 12x12 and 6x6, then `classes` scores."""

    def __init__(self, depth: int, width: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.second = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 3, padding=1) for _ in range(depth))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for layer in self.first:
            x = torch.relu(x + layer(x))
        x = torch.relu(self.down(x))
        for layer in self.second:
            x = torch.relu(x + layer(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@functools.cache
def stages(depth: int, width: int = 4, classes: int = 5, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return nets.as_model(Stages(depth, width, classes).eval())


def with_spec(model: Model, **changes: Any) -> Model:
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, **changes))


def with_preprocess(model: Model, **changes: Any) -> Model:
    return with_spec(model, preprocess=dataclasses.replace(model.spec.preprocess, **changes))


def answers(teacher: Teacher, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return teacher.ask(torch.from_numpy(x)).outputs[0].numpy()


# --- which values are compared


def test_a_stage_ends_where_the_size_changes_and_nothing_jumps_over() -> None:
    ends = stage_ends(stages(2))
    assert [(end.channels, end.size) for end in ends] == [(4, (12, 12)), (8, (6, 6))]
    assert [end.node for end in ends] == ["relu_2", "relu_5"]
    assert [end.depth for end in ends] == [3 / 7, 6 / 7]  # stem, 2, down, 2, head


@pytest.mark.parametrize("net", ["unet", "shuffle", "inception", "multi_output", "mlp"])
def test_stage_ends_of_other_structures_are_narrow_places(net: str) -> None:
    model = nets.model(net)
    x = torch.from_numpy(nets.images(2))
    for end in stage_ends(model):
        graph = with_taps(model.graph, (end.node,))
        value = graph(x)[1][0]
        assert tuple(value.shape) == (2, end.channels, *end.size)
        # what follows depends on this value alone: cut there, no gradient reaches the input by another way
        leaf = x.clone().requires_grad_(True)
        cut = Detached(graph, end.node).run(leaf)[0][0]
        assert not cut.requires_grad or torch.autograd.grad(cut.sum(), leaf, allow_unused=True)[0] is None


class Detached(torch.fx.Interpreter):
    def __init__(self, graph: torch.fx.GraphModule, node: str) -> None:
        super().__init__(graph)
        self.node = node

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        return value.detach() if n.name == self.node or n.op == "get_attr" else value


def test_a_cut_teacher_pairs_by_name() -> None:
    pairs = pair_stages(stages(2, width=3), stages(2))
    assert [(p.student.node, p.teacher.node) for p in pairs] == [("relu_2", "relu_2"), ("relu_5", "relu_5")]
    assert [(p.student.channels, p.teacher.channels) for p in pairs] == [(3, 4), (6, 8)]


def test_another_network_pairs_by_size_though_names_are_alike() -> None:
    pairs = pair_stages(stages(1), stages(3))
    assert [(p.student.node, p.teacher.node) for p in pairs] == [("relu_1", "relu_3"), ("relu_3", "relu_7")]
    assert all(p.student.size == p.teacher.size for p in pairs)


def test_no_common_size_is_said() -> None:
    strided = nets.as_model(nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.Flatten(), nn.Linear(64, 5)))
    with pytest.raises(
        PassError, match=r"student stages .* the teacher \w+: found 12x12, 6x6, expected one of 4x4"
    ):
        pair_stages(stages(1), strided)


# --- whether they fit


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (
            stages(1, classes=7),
            stages(1),
            r"the teacher stages gives \(n, 7\) and the student stages \(n, 5\), expected the same outputs",
        ),
        (
            nets.as_model(Stages(1).eval(), (3, 16, 16)),
            stages(1),
            r"the teacher stages takes \(n, 3, 16, 16\) and the student stages \(n, 3, 12, 12\), expected",
        ),
        (
            with_spec(stages(1), labels=("cat", "dog", "cow", "hen", "pig")),
            with_spec(stages(1), labels=("cat", "cow", "dog", "hen", "pig")),
            "class 1 is 'dog' for the teacher stages and 'cow' for the student stages",
        ),
        (
            nets.model("multi_output"),
            stages(1),
            r"the teacher \w+ gives \(n, .*\), \(n, .*\) and the student stages \(n, 5\)",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_naming_both(
    teacher: Model, student: Model, message: str
) -> None:
    with pytest.raises(PassError, match=message):
        check_teacher(student, teacher)
    with pytest.raises(PassError, match=message):
        Teacher(teacher, student)


def test_another_number_of_channels_is_refused() -> None:
    gray = nets.as_model(
        nn.Sequential(nn.Conv2d(1, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (1, 12, 12)
    )
    with pytest.raises(PassError, match=r"takes \(n, 1, 12, 12\) and the student stages \(n, 3, 12, 12\)"):
        check_teacher(stages(1), gray)


# --- what it answers


def test_it_answers_as_the_network_does() -> None:
    model, x = stages(2), nets.held_out(4)
    np.testing.assert_allclose(
        answers(Teacher(model, stages(1)), x), nets.outputs_of(model.graph, x)[0], atol=1e-5
    )


def test_it_never_changes_and_asks_for_no_gradient() -> None:
    model = nets.model("residual")
    before = {name: tensor.clone() for name, tensor in model.graph.state_dict().items()}
    flags = [p.requires_grad for p in model.graph.parameters()]
    teacher = Teacher(model, model, (stage_ends(model)[0].node,))
    found = teacher.ask(torch.from_numpy(nets.held_out(4)).requires_grad_(True))
    assert not found.outputs[0].requires_grad
    assert not found.features[0].requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.graph.state_dict().items())
    assert [p.requires_grad for p in model.graph.parameters()] == flags, "the model's own stay"


def test_images_are_normalized_anew_for_a_teacher_with_another_preprocess() -> None:
    student = with_preprocess(stages(1), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    teacher = with_preprocess(
        stages(2), channel_order="bgr", scale=1.0, mean=(100.0, 90.0, 80.0), std=(50.0, 60.0, 70.0)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), dtype=np.uint8)
    expected = nets.outputs_of(teacher.graph, teacher.spec.preprocess.apply(pixels))[0]
    found = answers(Teacher(teacher, student), student.spec.preprocess.apply(pixels))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_teacher_of_one_batch_size_answers_any_number() -> None:
    model, x = stages(2), nets.held_out(7)
    fixed = Teacher(dataclasses.replace(model, fixed_batch=3), stages(1), (stage_ends(model)[0].node,))
    whole = Teacher(model, stages(1), (stage_ends(model)[0].node,))
    for found, expected in zip(*(t.ask(torch.from_numpy(x)).features for t in (fixed, whole)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(answers(fixed, x), answers(whole, x), atol=1e-5)


def test_a_node_that_is_not_there_is_named() -> None:
    with pytest.raises(PassError, match="no node 'relu_99'"):
        with_taps(stages(1).graph, ("relu_99",))


# --- what is remembered


@pytest.mark.parametrize(
    ("limit_mb", "kept"), [(1.0, "float32"), (20 * (5 + 36) * 2e-6, "float16"), (0.001, None)]
)
def test_answers_are_kept_as_far_as_memory_goes(limit_mb: float, kept: str | None) -> None:
    model = stages(2)
    dataset = InputsDataset("images", nets.images(30), model.spec.preprocess)
    teacher = Teacher(model, model, ("relu_5",), attention_map)  # 5 scores and 36 attention values per image
    indices = list(range(0, 30, 3)) + list(range(1, 30, 3))
    assert teacher.remember(dataset, indices, limit_mb=limit_mb) is (kept is not None)
    assert teacher.remembers == kept
    asked = torch.tensor([4, 0, 27])
    x = torch.from_numpy(dataset.inputs(asked.tolist()))
    fresh, known = Teacher(model, model, ("relu_5",), attention_map).ask(x), teacher.ask(x, asked)
    assert known.outputs[0].dtype == torch.float32
    tolerance = 1e-2 if kept == "float16" else 1e-5
    np.testing.assert_allclose(known.outputs[0], fresh.outputs[0], atol=tolerance)
    np.testing.assert_allclose(known.features[0], fresh.features[0], atol=tolerance)


def test_remembered_answers_are_looked_up_and_others_computed() -> None:
    model = stages(1)
    dataset = InputsDataset("images", nets.images(8), model.spec.preprocess)
    teacher = Teacher(model, model)
    teacher.remember(dataset, [0, 1, 2, 3], limit_mb=1.0)
    other = torch.zeros(2, 3, 12, 12)
    assert torch.equal(teacher.ask(other, torch.tensor([3, 1])).outputs[0][0], teacher._known.outputs[0][3])  # type: ignore[union-attr]
    computed = teacher.ask(other).outputs[0]
    assert torch.equal(teacher.ask(other, torch.tensor([3, 7])).outputs[0], computed), "7 is not remembered"
    assert torch.equal(teacher.ask(other, torch.tensor([900, 1])).outputs[0], computed)
