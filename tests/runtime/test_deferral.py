"""Dequantizing late: the same bits, one weight at a time."""

import numpy as np
import onnx
import onnxruntime as ort
from support.graphs import graph_of

from rotexport.graph.io import to_proto
from rotexport.passes.precision import SetPrecision
from rotexport.passes.quantize_activations import QuantizeActivations
from rotexport.passes.quantize_weights import QuantizeWeights
from rotexport.quant.plan import SitePlan
from rotexport.quant.scheme import ActivationScheme, WeightScheme
from rotexport.runtime.deferral import defer_widening

TEXT = """
chain (float[3, 64] x, float[64, 64] W1, float[64, 64] W2) => (float[3, 64] y) {
    z = Abs(x)
    a = MatMul(z, W1)
    r = Relu(a)
    y = MatMul(r, W2)
}"""


def quantized(weights: WeightScheme, activations: ActivationScheme) -> onnx.ModelProto:
    graph = graph_of(TEXT)
    plan = [SitePlan(f"0.{name}", name, 64, weights, activations) for name in ("a", "y")]
    QuantizeWeights(plan).run(graph)
    QuantizeActivations(plan, {}).run(graph)
    for tensor in graph.tensors().values():
        if hasattr(tensor, "_values"):
            values = tensor.values
            tensor.values = values.astype(np.int8) if values.dtype.name == "int4" else values
    return to_proto(graph)


def test_the_result_is_the_same_to_the_bit() -> None:
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for weights in (WeightScheme("int8"), WeightScheme("int4", 16)):
        for activations in (
            ActivationScheme(),
            ActivationScheme("int8", "dynamic"),
            ActivationScheme("int8", "dynamic", group=16),
        ):
            if activations.group and weights.format == "int8":
                continue
            model = quantized(weights, activations)
            before = run(model, x)
            assert defer_widening(model) == 2
            onnx.checker.check_model(model)
            np.testing.assert_array_equal(run(model, x), before)


def test_every_weight_waits_for_its_activation() -> None:
    model = quantized(WeightScheme("int8"), ActivationScheme())
    defer_widening(model)
    writers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            assert "x" in ancestors(node.input[1], writers)


def test_float32_weights_are_left_alone() -> None:
    model = to_proto(graph_of(TEXT))
    assert defer_widening(model) == 0


def test_half_precision_weights_wait_too() -> None:
    graph = graph_of(TEXT)
    SetPrecision(np.dtype(np.float16)).run(graph)
    for tensor in graph.tensors().values():
        if hasattr(tensor, "_values"):
            tensor.values = tensor.values
    model = to_proto(graph)
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float16)
    before = run(model, x)
    assert defer_widening(model) == 2
    onnx.checker.check_model(model)
    np.testing.assert_array_equal(run(model, x), before)
    writers = {output: node for node in model.graph.node for output in node.output}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert all("x" in ancestors(node.input[1], writers) for node in products)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]


def ancestors(name: str, writers: dict[str, onnx.NodeProto]) -> set[str]:
    found = {name}
    for source in writers[name].input if name in writers else ():
        found |= ancestors(source, writers)
    return found
