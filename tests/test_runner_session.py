"""Sessions over real runtimes and tiny files made here: layout, integers, batches, and clear failures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecnn.runner.failure import (
    InferenceFailure,
    InputFailure,
    MissingRuntimeFailure,
    ModelLoadFailure,
    RequestFailure,
)
from edgecnn.runner.runtimes import import_runtime
from edgecnn.runner.session import open_session
from edgecnn.runner.tensors import TensorInfo, apply_sidecar, from_stored, to_stored

WEIGHT = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], np.float32)  # (3, 2): y0 = x0, y1 = x1, y2 = x0 - x1


def images(n: int = 1) -> np.ndarray[Any, Any]:
    """Float32 (n, 2, 4, 6), every value different and none negative."""
    return np.arange(n * 48, dtype=np.float32).reshape(n, 2, 4, 6)


def expected(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.einsum("oc,nchw->nohw", WEIGHT, x)


def write_onnx(path: Path, batch: int | None = None, opset: int = 17) -> Path:
    """A 1x1 convolution with the weights above, input "image" and output "out"."""
    onnx = pytest.importorskip("onnx")
    helper, float_type = onnx.helper, onnx.TensorProto.FLOAT
    size = "n" if batch is None else batch
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "w"], ["out"])],
        "tiny",
        [helper.make_tensor_value_info("image", float_type, [size, 2, 4, 6])],
        [helper.make_tensor_value_info("out", float_type, [size, 3, 4, 6])],
        [onnx.numpy_helper.from_array(WEIGHT.reshape(3, 2, 1, 1), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def write_onnx_int8(path: Path) -> Path:
    """int8 in, int8 out: y = max(x, 0) on the stored integers."""
    onnx = pytest.importorskip("onnx")
    helper, int8 = onnx.helper, onnx.TensorProto.INT8
    graph = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["out"])],
        "tiny",
        [helper.make_tensor_value_info("image", int8, ["n", 3])],
        [helper.make_tensor_value_info("out", int8, ["n", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def write_sidecar(path: Path, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
    values = {"schema_version": 1, "inputs": inputs, "outputs": outputs}
    path.with_name(path.name + ".json").write_text(json.dumps(values))


def write_tflite(path: Path, io: str = "float32") -> Path:
    """The convolution as float TFLite; with io int8, clamp(x, 0, None) with scale 0.5 and zero point -28."""
    pytest.importorskip("ai_edge_litert")
    from edgecnn.export.tflite import TfliteOptions, to_tflite
    from edgecnn.graph.program import BATCH, Op, Program, QuantParams, Tensor

    if io == "float32":
        tensors = {
            "image": Tensor("image", (BATCH, 2, 4, 6)),
            "w": Tensor("w", (3, 2, 1, 1), data=WEIGHT.reshape(3, 2, 1, 1)),
            "y": Tensor("y", (BATCH, 3, 4, 6)),
        }
        attributes = {
            "stride": (1, 1),
            "padding": (0, 0, 0, 0),
            "dilation": (1, 1),
            "groups": 1,
            "clamp": (None, None),
        }
        ops: tuple[Op, ...] = (Op("conv2d", ("image", "w"), "y", attributes),)
    else:
        quant = QuantParams(np.float32(0.5), zero_point=-28)
        tensors = {
            "image": Tensor("image", (BATCH, 2, 4, 6)),
            "q": Tensor("q", (BATCH, 2, 4, 6), "int8", quant),
            "r": Tensor("r", (BATCH, 2, 4, 6), "int8", quant),
            "y": Tensor("y", (BATCH, 2, 4, 6)),
        }
        ops = (
            Op("quantize", ("image",), "q"),
            Op("clamp", ("q",), "r", {"clamp": (0.0, None)}),
            Op("dequantize", ("r",), "y"),
        )
    file = to_tflite(Program("tiny", ("image",), (("out", "y"),), tensors, ops), TfliteOptions(io=io))  # type: ignore[arg-type]
    path.write_bytes(file.data)
    return path


@pytest.fixture(params=["onnxruntime", "litert"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The convolution in each runtime's format."""
    if request.param == "onnxruntime":
        return write_onnx(tmp_path / "tiny.onnx")
    return write_tflite(tmp_path / "tiny.tflite")


@pytest.mark.parametrize("n", [1, 3])
def test_both_runtimes_take_and_give_nchw(model: Path, n: int) -> None:
    with open_session(model) as session:
        out = session.run({"image": images(n)})
        assert [info.name for info in session.inputs] == ["image"]
        assert list(out) == ["out"]
        assert out["out"].dtype == np.float32
        np.testing.assert_array_equal(out["out"], expected(images(n)))
        assert session.load_ms > 0
        assert session.runtime_version[0].isdigit()


def test_a_session_runs_batches_of_changing_size(model: Path) -> None:
    with open_session(model) as session:
        for n in (2, 1, 3, 1):
            np.testing.assert_array_equal(session.run({"image": images(n)})["out"], expected(images(n)))


def test_without_optimizations_the_values_are_the_same(model: Path) -> None:
    with open_session(model, optimize=False) as session:
        np.testing.assert_array_equal(session.run({"image": images()})["out"], expected(images()))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_fixed_batch_of_two_runs_any_number_in_pieces(tmp_path: Path, n: int) -> None:
    with open_session(write_onnx(tmp_path / "two.onnx", batch=2)) as session:
        np.testing.assert_array_equal(session.run({"image": images(n)})["out"], expected(images(n)))


def test_integer_tflite_quantizes_and_dequantizes_with_the_files_own_scale(tmp_path: Path) -> None:
    path = write_tflite(tmp_path / "int8.tflite", io="int8")
    x = images() - 5.0
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0.25, 0.75  # 0.5 and 1.5 steps: round half to even gives 0 and 2
    with open_session(path) as session:
        assert session.inputs[0].dtype == "int8"
        assert session.inputs[0].nchw_shape[1:] == (2, 4, 6)
        real, raw = session.run({"image": x})["out"], session.run_raw({"image": x})["out"]
    assert raw.dtype == np.int8
    assert real[0, 0, 0, :2].tolist() == [0.0, 1.0]
    assert raw[0, 0, 0, :2].tolist() == [-28, -26]
    np.testing.assert_array_equal(real[0, 1], x[0, 1])
    np.testing.assert_array_equal(real, (raw.astype(np.float32) + 28) * 0.5)


def test_integer_onnx_takes_its_scale_from_the_sidecar(tmp_path: Path) -> None:
    path = write_onnx_int8(tmp_path / "int8.onnx")
    entry = {"name": "image", "dtype": "int8", "layout": "nchw", "scale": 0.5, "zero_point": 0}
    write_sidecar(path, [entry], [{**entry, "name": "out"}])
    with open_session(path) as session:
        x = np.array([[-1.0, 1.0, 1000.0]], np.float32)
        assert session.run({"image": x})["out"].tolist() == [[0.0, 1.0, 63.5]]
        assert session.run_raw({"image": x})["out"].tolist() == [[0, 2, 127]]
        assert session.run_raw({"image": np.array([[-3, 4, 5]], np.int8)})["out"].tolist() == [[0, 4, 5]]
        with pytest.raises(InputFailure, match="NaN or infinity"):
            session.run({"image": np.array([[0, np.nan, 0]], np.float32)})


def test_integer_onnx_without_a_sidecar_says_that_the_scale_is_unknown(tmp_path: Path) -> None:
    with open_session(write_onnx_int8(tmp_path / "int8.onnx")) as session:
        with pytest.raises(InputFailure, match="input 'image' is int8 and its scale is unknown"):
            session.run({"image": np.zeros((1, 3), np.float32)})
        with pytest.raises(InputFailure, match="output 'out' is int8 and its scale is unknown"):
            session.run({"image": np.zeros((1, 3), np.int8)})


def test_a_sidecar_of_another_export_is_refused(tmp_path: Path) -> None:
    path = write_onnx_int8(tmp_path / "int8.onnx")
    write_sidecar(path, [{"name": "image", "dtype": "float32"}], [])
    with pytest.raises(ModelLoadFailure, match="says tensor 'image' is float32, the file stores int8"):
        open_session(path)
    path.with_name("int8.onnx.json").write_text('{"schema_version": 9}')
    with pytest.raises(ModelLoadFailure, match="schema_version 9, expected 1"):
        open_session(path)


def test_sidecar_entries_match_by_name_then_by_position() -> None:
    infos = [TensorInfo("a", (1, 4, 6, 2)), TensorInfo("b", (1, 4, 6, 2))]
    named = apply_sidecar(infos, [{"name": "b", "layout": "nhwc"}])
    assert [info.layout for info in named] == ["nchw", "nhwc"]
    placed = apply_sidecar(infos, [{"name": "p", "layout": "nhwc"}, {"name": "q", "layout": "nchw"}])
    assert [info.layout for info in placed] == ["nhwc", "nchw"]


def test_nhwc_storage_round_trips() -> None:
    info = TensorInfo("x", (None, 4, 6, 2), layout="nhwc")
    stored = to_stored(images(2), info)
    assert stored.shape == (2, 4, 6, 2)
    assert stored.flags.c_contiguous
    np.testing.assert_array_equal(from_stored(stored, info, raw=False), images(2))


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        (
            {"image": np.zeros((1, 4, 6, 2), np.float32)},
            r"shape \(1, 4, 6, 2\), expected \(\w, 2, 4, 6\) in NCHW",
        ),
        ({"image": np.zeros((0, 2, 4, 6), np.float32)}, r"shape \(0, 2, 4, 6\)"),
        ({"image": np.zeros((1, 2, 4, 6), np.uint8)}, "are uint8, expected float32"),
        (
            {"picture": np.zeros((1, 2, 4, 6), np.float32)},
            r"given are \['picture'\], tiny.\w+ takes \['image'\]",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(model: Path, feeds: dict[str, Any], message: str) -> None:
    with open_session(model) as session, pytest.raises(InputFailure, match=message):
        session.run(feeds)


def test_invoke_before_prepare_is_an_error(model: Path) -> None:
    with open_session(model) as session, pytest.raises(InferenceFailure, match="before inputs were prepared"):
        session.invoke()


@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
def test_damaged_files_are_load_failures(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("onnxruntime" if suffix == ".onnx" else "ai_edge_litert")
    path = tmp_path / f"bad{suffix}"
    with pytest.raises(ModelLoadFailure, match="does not exist"):
        open_session(path)
    path.write_bytes(b"")
    with pytest.raises(ModelLoadFailure, match="is empty"):
        open_session(path)
    path.write_bytes(b"certainly no model, whatever the suffix says")
    with pytest.raises(ModelLoadFailure, match="cannot load"):
        open_session(path)


def test_a_file_newer_than_the_runtime_hints_at_the_device(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = write_onnx(tmp_path / "new.onnx")
    proto = onnx.load(path)
    proto.opset_import[0].version = 99
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelLoadFailure, match=r"[Oo]pset 99") as caught:
        open_session(path)
    assert "/onnxruntime_src" not in caught.value.message
    assert caught.value.hint is not None
    assert "newer than this onnxruntime" in caught.value.hint


def test_unknown_runtime_provider_and_threads_are_request_failures(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "tiny.onnx")
    with pytest.raises(RequestFailure, match="runtime is 'tvm', expected one of onnxruntime, litert"):
        open_session(path, runtime="tvm")
    with pytest.raises(RequestFailure, match=r"suffix '\.bin'"):
        open_session(tmp_path / "x.bin")
    with pytest.raises(RequestFailure, match="provider is 'npu'"):
        open_session(path, provider="npu")
    with pytest.raises(RequestFailure, match="threads is 0, expected 1 or more"):
        open_session(path, threads=0)
    with pytest.raises(MissingRuntimeFailure, match="no TensorrtExecutionProvider"):
        open_session(path, provider="tensorrt")


def test_a_missing_runtime_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "ai_edge_litert", "tflite_runtime", "tensorflow"):
        for module in [key for key in sys.modules if key == name or key.startswith(name + ".")]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(MissingRuntimeFailure, match="onnxruntime is not installed") as caught:
        import_runtime("onnxruntime")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("pip install onnxruntime")
    with pytest.raises(MissingRuntimeFailure, match="tried ai_edge_litert") as caught:
        import_runtime("litert")
    assert "pip install ai-edge-litert" in str(caught.value.hint)


def test_a_broken_runtime_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('built for numpy 1')")
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingRuntimeFailure, match=r"cannot be imported \(onnxruntime: built for numpy 1\)"):
        import_runtime("onnxruntime")
