"""A linear layer whose input ONNX Runtime quantizes itself: DynamicQuantizeLinear and MatMulInteger.

    x_q, s, z = DynamicQuantizeLinear(x)      y = MatMulInteger(x_q, w_q, z) (s s_w) + b

which ONNX Runtime fuses into one DynamicQuantizeMatMul. The range is that of all values given: of the batch.

Source: ONNX, DynamicQuantizeLinear (opset 11) and MatMulInteger (opset 10).
"""

from __future__ import annotations

import numpy as np
import onnx

from edgecnn.errors import ExportError
from edgecnn.export.onnx_graph import GraphBuilder
from edgecnn.graph.program import Op


def write_dynamic_linear(graph: GraphBuilder, op: Op) -> None:
    """Append the nodes of a dynamic linear layer.

    Raises:
        ExportError: its weight is not int8.
    """
    x, w = graph.tensor(op.inputs[0]), graph.tensor(op.inputs[1])
    if w.data is None or w.quant is None:
        raise ExportError(f"{op.layer or op.output}: the weight '{w.name}' is {w.dtype}, expected int8")
    q, scale, zero_point = (graph.unique(f"{op.output}/{what}") for what in ("q", "scale", "zero_point"))
    graph.split_node(op, "DynamicQuantizeLinear", [graph.value(x.name)], [q, scale, zero_point])
    weight = graph.constant(f"{w.name}/columns", np.ascontiguousarray(w.data.T))
    acc = graph.node(op, "MatMulInteger", [q, weight, zero_point])
    real = graph.node(op, "Cast", [acc], None, {"to": int(onnx.TensorProto.FLOAT)})
    weight_scale = graph.constant(f"{w.name}/scale", np.asarray(w.quant.scale, np.float32))
    product = graph.node(op, "Mul", [scale, weight_scale], graph.unique(f"{op.output}/step"))
    if len(op.inputs) == 2:
        graph.store(op, "Mul", [real, product])
        return
    scaled = graph.node(op, "Mul", [real, product])
    graph.store(op, "Add", [scaled, graph.real_parameter(op, graph.tensor(op.inputs[2]))])
