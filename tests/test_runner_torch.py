"""Exported PyTorch graphs in the runner: on the CPU, and on a stand-in for a GPU or a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecnn.runner.failure import MissingRuntimeFailure, ModelLoadFailure, RequestFailure
from edgecnn.runner.request import parse_request
from edgecnn.runner.session import SessionOptions, open_session, open_with
from edgecnn.runner.tasks import execute

torch = pytest.importorskip("torch")


class Scale(torch.nn.Module):  # type: ignore[misc, name-defined]
    """y = 2 x + 1 through a 1x1 convolution, and the mean of y over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 1)
        torch.nn.init.constant_(self.conv.weight, 2.0)
        torch.nn.init.constant_(self.conv.bias, 1.0)

    def forward(self, image: Any) -> Any:
        y = self.conv(image)
        return y, y.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torch") / "scale.pt2"
    dynamic = ({0: torch.export.Dim("n")},)
    program = torch.export.export(Scale().eval(), (torch.zeros(2, 1, 2, 3),), dynamic_shapes=dynamic)
    torch.export.save(program, str(path))
    return path


def images(n: int) -> np.ndarray[Any, Any]:
    return np.arange(n * 6, dtype=np.float32).reshape(n, 1, 2, 3)


@pytest.mark.parametrize("half", [False, True])
def test_the_cpu_takes_float32_and_gives_float32(model: Path, half: bool) -> None:
    with open_with(model, None, SessionOptions(half=half)) as session:
        assert [info.name for info in session.inputs] == ["image"]
        assert session.inputs[0].shape == (None, 1, 2, 3)
        for n in (1, 3):
            outputs = list(session.run({"image": images(n)}).values())
            np.testing.assert_array_equal(outputs[0], 2 * images(n) + 1)
            np.testing.assert_array_equal(outputs[1], (2 * images(n) + 1).mean((2, 3)))
            assert outputs[0].dtype == np.float32
        assert session.on_cpu
        assert session.device_memory_bytes() is None


def test_latency_and_profile(model: Path) -> None:
    values = {
        "task": "latency",
        "artifacts": [{"key": "a", "path": str(model)}],
        "min_runs": 16,
        "min_seconds": 0.01,
        "profile": True,
    }
    result = execute(parse_request(values))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    entry = result["artifacts"]["a"]
    assert entry["runtime"] == "torch"
    assert entry["num_samples"] >= 16
    assert any("conv" in row["op"] for row in entry["profile"])
    assert sum(row["share"] for row in entry["profile"]) == pytest.approx(1.0)


def test_what_cannot_be_done_is_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestFailure, match="provider is 'xnnpack', torch has cpu, cuda"):
        open_session(model, provider="xnnpack")
    with pytest.raises(RequestFailure, match="cuda_graph needs provider cuda, the request has 'cpu'"):
        open_with(model, None, SessionOptions(cuda_graph=True))
    (tmp_path / "broken.pt2").write_bytes(b"no archive")
    with pytest.raises(ModelLoadFailure, match=r"torch .* cannot load .*broken\.pt2") as caught:
        open_session(tmp_path / "broken.pt2")
    assert "the torch that wrote it" in str(caught.value.hint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_error_names_the_cpu(model: Path) -> None:
    with pytest.raises(MissingRuntimeFailure, match="finds no CUDA GPU here, only cpu is available"):
        open_session(model, provider="cuda")


class Calls:
    """What a GPU was asked for."""

    def __init__(self) -> None:
        self.synchronized = self.replayed = self.recorded = 0


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Let the CPU play the GPU, with a recorded graph that runs the module again on its static inputs."""
    from edgecnn.runner.torch_session import TorchSession

    calls = Calls()
    real_to = torch.Tensor.to

    class Graph:
        def __init__(self) -> None:
            calls.recorded += 1

        def replay(self) -> None:
            calls.replayed += 1
            session = opened[-1]
            with torch.inference_mode():
                for kept, fresh in zip(session._last, session._module(*session._arguments), strict=True):
                    kept.copy_(fresh)

    class Context:
        def __init__(self, *arguments: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *arguments: object) -> None:
            pass

        def wait_stream(self, other: Any) -> None:
            pass

    opened: list[Any] = []
    real_init = TorchSession.__init__

    def remember(self: Any, *arguments: Any) -> None:
        opened.append(self)
        real_init(self, *arguments)

    def synchronize() -> None:
        calls.synchronized += 1

    monkeypatch.setattr(TorchSession, "__init__", remember)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, where: x if where == "cuda" else real_to(x, where))
    monkeypatch.setattr("torch.export.passes.move_to_device_pass", lambda program, where: program)
    for name, value in {
        "is_available": lambda: True,
        "init": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 123,
        "synchronize": synchronize,
        "Stream": Context,
        "current_stream": Context,
        "stream": Context,
        "graph": Context,
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return calls


def test_a_gpu_is_waited_for_and_its_memory_is_said(model: Path, stand_in: Calls) -> None:
    with open_session(model, provider="cuda") as session:
        outputs = list(session.run({"image": images(2)}).values())
        assert (stand_in.synchronized, stand_in.recorded) == (1, 0)
        assert (session.on_cpu, session.device_memory_bytes()) == (False, 123)
    np.testing.assert_array_equal(outputs[0], 2 * images(2) + 1)


def test_a_recorded_graph_is_replayed_with_new_inputs(model: Path, stand_in: Calls) -> None:
    with open_with(model, None, SessionOptions("cuda", cuda_graph=True)) as session:
        for n, offset in ((2, 0), (2, 5), (1, 7)):  # the batch of one needs a recording of its own
            outputs = list(session.run({"image": images(n) + offset}).values())
            np.testing.assert_array_equal(outputs[0], 2 * (images(n) + offset) + 1)
    assert (stand_in.recorded, stand_in.replayed, stand_in.synchronized) == (2, 3, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_real_gpu_agrees_with_the_cpu(model: Path, half: bool, cuda_graph: bool) -> None:
    with open_with(model, None, SessionOptions("cuda", half=half, cuda_graph=cuda_graph)) as session:
        for n, offset in ((2, 0), (2, 5), (1, 7)):
            outputs = list(session.run({"image": images(n) + offset}).values())
            np.testing.assert_allclose(outputs[0], 2 * (images(n) + offset) + 1, rtol=1e-3)
        assert (session.device_memory_bytes() or 0) > 0
