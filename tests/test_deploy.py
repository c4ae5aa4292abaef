"""Requests on a board: what goes there, what comes back, what is left, and every fault."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecnn.devices import board as board_module
from edgecnn.devices import deploy, workspace
from edgecnn.devices.board import BoardExecutor
from edgecnn.devices.deploy import LocalExecutor, open_executor
from edgecnn.devices.fake import FakeTransport, Fault
from edgecnn.devices.local import run_local
from edgecnn.devices.profile import Device, load_device
from edgecnn.devices.transport import Completed
from edgecnn.devices.workspace import REMOVE, open_workspace, owner_is_dead, owner_name
from edgecnn.errors import DeviceError, EdgeCNNError, RunnerError, TransportError

DEVICE = Device(
    name="fake", transport="ssh", runtime="onnxruntime", isa="x86-64", host="fake", python=sys.executable
)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "RETRY_AFTER_S", 0.0)
    monkeypatch.setattr(deploy, "RETRY_AFTER_S", 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = 2 x over (n, 3, 4, 4), as an ONNX file with a sidecar."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "two"], ["y"])],
        "double",
        [helper.make_tensor_value_info("x", float32, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", float32, ["n", 3, 4, 4])],
        [helper.make_tensor("two", float32, [1], [2.0])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path_factory.mktemp("model") / "double it.onnx"
    onnx.save(made, str(path))
    path.with_name(path.name + ".json").write_text(
        json.dumps({"schema_version": 1, "format": "onnx", "name": "double", "preprocess": None})
    )
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "inputs.npy"
    np.save(path, np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32))
    return path


def latency(model: Path) -> dict[str, Any]:
    return {
        "task": "latency",
        "artifacts": [{"key": "double", "path": str(model)}],
        "min_runs": 8,
        "min_seconds": 0.01,
        "max_seconds": 5.0,
    }


def outputs(model: Path, images: Path, target: Path) -> dict[str, Any]:
    artifacts = [{"key": "double", "path": str(model)}]
    return {"task": "outputs", "artifacts": artifacts, "inputs": str(images), "outputs": str(target)}


def test_latency_on_a_board_and_nothing_is_left(model: Path, tmp_path: Path) -> None:
    transport = FakeTransport(tmp_path)
    with open_executor(DEVICE, transport) as executor:
        result = executor.run_request(latency(model), 60)
        environment = executor.environment()
        assert len(transport.left_over()) == 2  # the folder and the lock
    assert result["artifacts"]["double"]["median_ms"] > 0
    assert len(result["artifacts"]["double"]["samples_ns"]) >= 8
    assert "warnings" not in result
    assert environment["python"].startswith("3.")
    assert transport.left_over() == []
    assert transport.closed


def test_outputs_are_those_of_a_local_run(model: Path, images: Path, tmp_path: Path) -> None:
    with open_executor(DEVICE, FakeTransport(tmp_path / "board")) as executor:
        there = executor.run_request(outputs(model, images, tmp_path / "there"), 60)
        single = executor.run_request(outputs(model, images, tmp_path / "there.npz"), 60)
    here = run_local(outputs(model, images, tmp_path / "here"), 60)
    assert there["outputs"] == str(tmp_path / "there")
    assert there["artifacts"] == here["artifacts"]
    name = here["artifacts"]["double"]["outputs"][0]["array"]
    np.testing.assert_array_equal(np.load(tmp_path / "there" / name), 2 * np.load(images))
    np.testing.assert_array_equal(np.load(single["outputs"])["double/y"], 2 * np.load(images))
    assert sorted(entry.name for entry in (tmp_path / "there").iterdir()) == [name]


def test_each_file_goes_there_once(model: Path, images: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / model.name
    copy.parent.mkdir()
    for source in (model, model.with_name(model.name + ".json")):
        (copy.parent / source.name).write_bytes(source.read_bytes())
    transport = FakeTransport(tmp_path / "board")
    with open_executor(DEVICE, transport) as executor:
        for path in (model, copy, model):
            executor.run_request(outputs(path, images, tmp_path / "out"), 60)
    pushed = [text.rpartition("/")[2] for method, text in transport.calls if method == "push"]
    assert [name for name in pushed if not name.endswith("request.json")] == [
        "edgecnn_runner.pyz",
        "inputs.npy",
        model.name,
        f"{model.name}.json",
    ]


def test_inputs_that_take_much_room_do_not_stay(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board_module, "KEPT_INPUT_BYTES", 100)
    transport = FakeTransport(tmp_path / "board")
    with open_executor(DEVICE, transport) as executor:
        executor.run_request(outputs(model, images, tmp_path / "out"), 60)
        assert list(transport.folder.rglob("*.npy")) == []
        assert len(list(transport.folder.rglob("*.onnx"))) == 1


def test_a_failure_of_the_runner_keeps_its_words(model: Path, tmp_path: Path) -> None:
    transport = FakeTransport(tmp_path)
    with (
        pytest.raises(RunnerError, match=r"fake: .*threads is 0"),
        open_executor(DEVICE, transport) as executor,
    ):
        executor.run_request({**latency(model), "threads": 0}, 60)
    assert transport.left_over() == []


def test_a_file_that_is_not_there_is_not_sent(tmp_path: Path) -> None:
    with (
        open_executor(DEVICE, FakeTransport(tmp_path)) as executor,
        pytest.raises(DeviceError, match=r"none.onnx does not exist, so it cannot be sent to fake"),
    ):
        executor.run_request(latency(tmp_path / "none.onnx"), 60)


RUN_CALL = "request.json"  # in the words of the run itself, and in the push before it


@pytest.mark.parametrize(
    "fault",
    [
        Fault("drop", on="run", matching="edgecnn.lock"),
        Fault("drop", on="push", matching="edgecnn_runner.pyz"),
        Fault("drop", on="push", matching=".onnx"),
        Fault("drop", on="run", matching=RUN_CALL),
        Fault("drop", on="run", matching="cat /"),
    ],
    ids=["lock", "runner", "model", "run", "result"],
)
def test_a_transient_drop_is_retried_once_and_said(fault: Fault, model: Path, tmp_path: Path) -> None:
    transport = FakeTransport(tmp_path, [fault])
    with open_executor(DEVICE, transport) as executor:
        result = executor.run_request(latency(model), 60)
    assert result["artifacts"]["double"]["median_ms"] > 0
    assert result["warnings"] == ["fake: the connection was lost: Broken pipe; tried once more"]
    assert transport.left_over() == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("unreachable"), "fake cannot be reached"),
        (Fault("no_python", matching="sys.version_info"), "fake has no Python"),
        (Fault("disk_full", on="push", matching=".pyz"), "no space left for .*edgecnn_runner.pyz.*workdir"),
        (Fault("disk_full", on="push", matching=".onnx"), "no space left for .*double it.onnx"),
        (Fault("disk_full", on="run", matching="mktemp"), "no folder could be made on fake"),
        (
            Fault("killed", on="run", matching=RUN_CALL),
            "fake: the runner was killed by SIGKILL.*out of memory",
        ),
        (
            Fault("exit_255", on="run", matching=RUN_CALL),
            "fake: the runner ended with exit code 255 and no result",
        ),
        (Fault("garbage", on="run", matching="cat /"), "fake: the runner's result is not JSON"),
        (Fault("slow", on="run", matching=RUN_CALL), "took longer than 60 s on fake and was stopped"),
        (
            Fault("drop", on="run", matching=RUN_CALL, times=2),
            "fake went away during the run and did not come",
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_a_broken_run_gives_an_error_and_no_number(
    fault: Fault, message: str, model: Path, tmp_path: Path
) -> None:
    transport = FakeTransport(tmp_path, [fault])
    with pytest.raises(EdgeCNNError, match=message), open_executor(DEVICE, transport) as executor:
        executor.run_request(latency(model), 60)
    assert transport.left_over() == []
    assert transport.closed


def test_a_board_that_is_gone_is_said_with_what_it_keeps(model: Path, tmp_path: Path) -> None:
    transport = FakeTransport(tmp_path, [Fault("gone", on="run", matching=RUN_CALL)])
    with pytest.raises(TransportError) as caught, open_executor(DEVICE, transport) as executor:
        executor.run_request(latency(model), 60)
    assert "fake went away during the run and did not come back" in caught.value.message
    assert caught.value.hint is not None
    assert f"{tmp_path}/tmp/edgecnn." in caught.value.hint
    assert caught.value.hint.endswith("may be left on fake")


def test_ctrl_c_removes_everything(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = FakeTransport(tmp_path)

    def interrupted(self: BoardExecutor, request: object, timeout_s: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BoardExecutor, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt), open_executor(DEVICE, transport) as executor:
        executor.run_request(latency(model), 60)
    assert transport.left_over() == []


class ImpatientTransport(FakeTransport):
    """Ctrl-C as soon as the board is being cleaned up."""

    def run(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes | None = None) -> Completed:
        if REMOVE in argv:
            os.kill(os.getpid(), signal.SIGINT)
        return super().run(argv, timeout_s=timeout_s, stdin=stdin)


@pytest.mark.parametrize("first", [None, KeyboardInterrupt, DeviceError("gone")])
def test_ctrl_c_while_the_board_is_cleaned_up(first: BaseException | None, tmp_path: Path) -> None:
    transport = ImpatientTransport(tmp_path)
    expected = DeviceError if isinstance(first, DeviceError) else KeyboardInterrupt
    with pytest.raises((expected, KeyboardInterrupt)), open_executor(DEVICE, transport):
        if first is not None:
            raise first
    assert transport.left_over() == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class InterruptedTransport(FakeTransport):
    """Ctrl-C while the first answer is on its way."""

    def run(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes | None = None) -> Completed:
        found = super().run(argv, timeout_s=timeout_s, stdin=stdin)
        if len(self.calls) == 1:
            raise KeyboardInterrupt
        return found


def test_ctrl_c_while_the_folder_is_made(tmp_path: Path) -> None:
    transport = InterruptedTransport(tmp_path)
    with pytest.raises(KeyboardInterrupt), open_executor(DEVICE, transport):
        pytest.fail("opened")
    assert len(transport.calls) == 2
    assert transport.left_over() == []


def test_a_run_that_takes_too_long_is_ended_there(model: Path, tmp_path: Path) -> None:
    transport = FakeTransport(tmp_path)
    request = {**latency(model), "min_seconds": 30.0, "max_seconds": 30.0}
    with open_executor(DEVICE, transport) as executor:
        with pytest.raises(RunnerError, match=r"took longer than 2 s on fake and was stopped"):
            executor.run_request(request, 2)
        assert list(transport.folder.rglob("pid")) == []
        assert executor.run_request(latency(model), 60)["ok"] is True


@pytest.mark.parametrize("said", ["2.7", "3.8"])
def test_a_python_that_is_too_old(said: str, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho {said}\n")
    script.chmod(0o755)
    device = Device(
        name="old", transport="ssh", runtime="litert", isa="aarch64", host="old", python=str(script)
    )
    transport = FakeTransport(tmp_path / "board", name="old")
    with (
        pytest.raises(DeviceError, match=f"old has Python {said}, expected 3.9 or newer"),
        open_executor(device, transport),
    ):
        pytest.fail("opened")
    assert transport.left_over() == []


def test_a_result_cannot_name_files_outside_its_folder(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = {"artifacts": {"double": {"outputs": [{"array": "../../x.npy"}]}}}
    monkeypatch.setattr(BoardExecutor, "_run", lambda self, request, timeout_s: evil)
    with (
        open_executor(DEVICE, FakeTransport(tmp_path / "board")) as executor,
        pytest.raises(RunnerError, match=r"the result names the file '../../x.npy'"),
    ):
        executor.run_request(outputs(model, images, tmp_path / "out"), 60)


def test_the_second_bench_on_a_board_is_told_who_holds_it(model: Path, tmp_path: Path) -> None:
    with open_executor(DEVICE, FakeTransport(tmp_path)) as executor:
        second = FakeTransport(tmp_path)
        with (
            pytest.raises(DeviceError, match=f"fake is in use by .*process {os.getpid()}, and two benches"),
            open_executor(DEVICE, second),
        ):
            pytest.fail("opened")
        assert second.closed
        assert executor.run_request(latency(model), 60)["ok"] is True
    assert FakeTransport(tmp_path).left_over() == []


def test_what_a_dead_owner_left_is_removed(tmp_path: Path) -> None:
    transport = FakeTransport(tmp_path)
    left = open_workspace(transport, "")
    user, _, rest = left.owner.partition(":")
    token = rest.rpartition(":")[2]
    lock = Path(left.lock)
    lock.unlink()
    lock.symlink_to(f"{user}:{2**22 + 1}:1:{token}")  # no process has that number
    with open_executor(DEVICE, FakeTransport(tmp_path)):
        assert not Path(left.folder).exists()
    assert transport.left_over() == []


def test_another_machines_lock_holds_until_it_is_old(tmp_path: Path) -> None:
    transport = FakeTransport(tmp_path)
    lock = tmp_path / "tmp" / "edgecnn.lock"
    lock.symlink_to("ada@elsewhere:17:5:ab12")
    with pytest.raises(DeviceError, match=r"in use by ada@elsewhere, process 17.*edgecnn.lock on the board"):
        open_workspace(transport, "")
    old = lock.lstat().st_mtime - 60 * (workspace.STALE_MINUTES + 5)
    os.utime(lock, (old, old), follow_symlinks=False)
    assert open_workspace(transport, "").lock == str(lock)


def test_a_reused_process_number_is_not_the_owner() -> None:
    owner = owner_name()
    assert not owner_is_dead(owner)
    head, start, token = owner.rsplit(":", 2)
    if start == "0":
        pytest.skip("needs /proc/PID/stat")
    assert owner_is_dead(f"{head}:{int(start) + 1}:{token}")
    assert not owner_is_dead("whatever")


def test_a_workdir_of_its_own_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    transport = FakeTransport(tmp_path)
    made = open_workspace(transport, "my files/work")
    assert made.folder.startswith(f"{tmp_path}/my files/work/edgecnn.")
    assert Path(made.folder).stat().st_mode & 0o777 == 0o700
    Path(made.lock).unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match=r"file/x could not be transferred|file/x on fake could not"):
        open_workspace(transport, "file/x")


def test_a_board_that_does_not_describe_itself(tmp_path: Path) -> None:
    transport = FakeTransport(tmp_path, [Fault("garbage", on="run", matching="describe_environment")])
    with (
        open_executor(DEVICE, transport) as executor,
        pytest.raises(DeviceError, match=r"fake cannot describe itself"),
    ):
        executor.environment()


def test_this_machine_needs_no_transport(model: Path) -> None:
    with open_executor(load_device("local_cpu")) as executor:
        assert isinstance(executor, LocalExecutor)
        assert executor.run_request(latency(model), 60)["ok"] is True
        assert executor.environment()["python"].startswith("3.")


def test_the_fake_board_names_its_faults(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"fault is 'flood', expected one of drop, gone"):
        FakeTransport(tmp_path, [Fault("flood")])
    transport = FakeTransport(tmp_path, [Fault("drop", on="run", after=1)])
    assert transport.run(["echo", "a"], timeout_s=5) == Completed(0, b"a\n", b"")
    with pytest.raises(TransportError):
        transport.run(["echo", "a"], timeout_s=5)
    assert transport.run(["echo", "$HOME"], timeout_s=5).text == "$HOME"
