"""Quantized activations in a graph, against a model in NumPy that multiplies int64."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import graph_of, ops, run

from rotexport.errors import GraphError
from rotexport.graph.weights import weight_of
from rotexport.passes.quantize_activations import QuantizeActivations
from rotexport.passes.quantize_weights import QuantizeWeights, quantizer_of
from rotexport.quant.calibrate import InputStatistics
from rotexport.quant.plan import SitePlan
from rotexport.quant.scheme import ActivationScheme, WeightScheme

K, N = 32, 6
LARGEST = 4.0
STATISTICS = InputStatistics(
    np.array([1.0, LARGEST], np.float32), np.ones(K, np.float32), 3.0, np.ones(1, np.int64)
)


def linear(dtype="float", inputs=K, outputs=N):
    graph = graph_of(f"linear ({dtype}[batch, seq, {inputs}] x, {dtype}[{inputs}, {outputs}] W) "
                     f"=> ({dtype}[batch, seq, {outputs}] y) {{ y = MatMul(x, W) }}")  # fmt: skip
    return graph, graph.nodes[0].inputs[1].values


def quantize(graph, weights, activations, inputs=K):
    plan = SitePlan("0.down", "y", inputs, weights, activations)
    QuantizeWeights([plan]).run(graph)
    report = QuantizeActivations([plan], {"0.down": STATISTICS}).run(graph)
    return plan, report


def inputs_of(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x[0, 0] = 0  # a row of zeros must stay zero, not become 0 / 0
    return x


def integer_model(x, weight, plan):
    """Quantize and multiply per group in int64; scale and add the groups in float64."""
    scheme = plan.activations
    lowest, highest = {"int8": (-128, 127), "int4": (-7, 7)}[scheme.format]
    rows = x.reshape(-1, plan.inputs // plan.activation_group, plan.activation_group)
    if scheme.mode == "static":
        scale = np.full((*rows.shape[:2], 1), np.float32(LARGEST * scheme.clip / highest))
    else:
        step = np.float32(scheme.clip / highest)
        scale = np.maximum(np.abs(rows).max(axis=-1, keepdims=True) * step, np.float32(1e-10))
    if not scheme.symmetric:
        least = np.minimum(rows.min(axis=-1, keepdims=True), 0)
        span = np.maximum(rows.max(axis=-1, keepdims=True), 0) - least
        scale = np.maximum(span * np.float32(scheme.clip / 15), np.float32(1e-10))
        lowest = np.rint(least * np.float32(scheme.clip) / scale)
        highest = lowest + 15
    codes = np.clip(np.rint(rows / scale), lowest, highest).astype(np.int64).reshape(len(rows), -1)
    row_scale = np.repeat(scale[..., 0], plan.activation_group, axis=1)
    quantized = quantizer_of(plan).quantize(weight.astype(np.float32))
    weight_codes = quantized.codes.astype(np.int64)
    if quantized.zeros is not None:
        weight_codes -= np.repeat(quantized.zeros.astype(np.int64), plan.weight_group, axis=0)
    if quantized.factors is not None:
        weight_codes *= np.repeat(quantized.factors, plan.weight_group, axis=0).astype(np.int64)
    weight_scale = np.repeat(quantized.scales, plan.inputs // len(quantized.scales), axis=0).astype(
        np.float64
    )
    total = np.zeros((len(rows), weight.shape[1]))
    for start in range(0, plan.inputs, plan.product_group):
        part = slice(start, start + plan.product_group)
        total += codes[:, part] @ weight_codes[part] * row_scale[:, [start]] * weight_scale[start]
    return total.reshape(*x.shape[:-1], -1)


SCHEMES = [
    (WeightScheme("int8"), ActivationScheme("int8")),
    (WeightScheme("int8"), ActivationScheme("int8", clip=0.5)),
    (WeightScheme("int8"), ActivationScheme("int4")),
    (WeightScheme("int4"), ActivationScheme("int8", "dynamic")),
    (WeightScheme("int8"), ActivationScheme("int8", "dynamic", clip=0.7)),
    (WeightScheme("int4"), ActivationScheme("int4", "dynamic", clip=0.9)),
    (WeightScheme("int4", 8), ActivationScheme("int8", "dynamic")),
    (WeightScheme("int4", 8), ActivationScheme("int8")),
    (WeightScheme("int8", 8), ActivationScheme("int8", "dynamic")),
    (WeightScheme("int8", 8), ActivationScheme("int8")),
    (WeightScheme("int4", 8), ActivationScheme("int4", "dynamic", group=8)),
    (WeightScheme("int8", 8), ActivationScheme("int8", "dynamic", group=8, clip=0.8)),
    (WeightScheme("int4"), ActivationScheme("int4", "dynamic", group=16)),
    (WeightScheme("int4"), ActivationScheme("int4", "dynamic", symmetric=False)),
    (WeightScheme("int4", 8), ActivationScheme("int4", "dynamic", clip=0.9, symmetric=False)),
    (WeightScheme("int4", 8), ActivationScheme("int4", "dynamic", group=8, clip=0.9, symmetric=False)),
    (WeightScheme("int4", symmetric=False), ActivationScheme("int8", "dynamic")),
    (WeightScheme("int8", symmetric=False), ActivationScheme("int8")),
    (WeightScheme("int4", 8, symmetric=False), ActivationScheme("int8", "dynamic")),
    (WeightScheme("int8", 8, symmetric=False), ActivationScheme("int8")),
    (WeightScheme("int4", 8, symmetric=False), ActivationScheme("int4", "dynamic", group=8)),
    (WeightScheme("int4", symmetric=False), ActivationScheme("int4", "dynamic", group=16)),
]


@pytest.mark.parametrize(("weights", "activations"), SCHEMES)
def test_the_graph_computes_the_integer_product(weights, activations):
    graph, weight = linear()
    plan, _ = quantize(graph, weights, activations)
    x = inputs_of(2, 5, K)
    expected = integer_model(x, weight, plan)
    # The integer sums are exact; only the scaling is rounded to float32.
    assert np.allclose(run(graph, x=x)[0], expected, rtol=3e-6, atol=3e-6)
    assert np.array_equal(run(graph, x=x)[0][0, 0], np.zeros(N))


@settings(deadline=None, max_examples=20)
@given(
    shape=st.tuples(st.integers(2, 5), st.integers(1, 9), st.integers(1, 7), st.integers(1, 4)),
    per_group=st.booleans(), weights=st.sampled_from(["int8", "int4"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_grouped_products_of_odd_shapes(shape, per_group, weights, seed):
    groups, group, outputs, rows = shape
    inputs = groups * group
    graph, weight = linear(inputs=inputs, outputs=outputs)
    activations = ActivationScheme("int8", "dynamic", group=group if per_group else None)
    plan, _ = quantize(graph, WeightScheme(weights, group), activations, inputs)
    x = inputs_of(1, rows, inputs, seed=seed)
    assert np.allclose(run(graph, x=x)[0], integer_model(x, weight, plan), rtol=3e-6, atol=3e-6)


def test_integer_sums_of_a_grouped_product_are_exact():
    """Unit scales leave bare integers: the largest sums that int8 and groups of 1,024 can make."""
    inputs = 2048
    graph, _ = linear(inputs=inputs, outputs=3)
    node = graph.nodes[0]
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (inputs, 3))
    codes[::1024], codes[:, 1] = 127, 127
    node.inputs[1].values = codes.astype(np.float32)
    plan, _ = quantize(
        graph, WeightScheme("int8", 1024, method="rtn"), ActivationScheme("int8", "dynamic"), inputs
    )
    assert plan.product_group == 1024
    x = rng.integers(-127, 128, (1, 4, inputs)).astype(np.float32)
    x[..., 0], x[0, 0] = 127, 127
    product = next(n for n in graph.nodes if n.op == "MatMul").outputs[0]
    graph.outputs.append(product)
    sums = run(graph, x=x)[1]
    expected = np.einsum(
        "bmgk,gkn->gmn", x.astype(np.int64).reshape(1, 4, 2, 1024), codes.reshape(2, 1024, 3)
    )
    assert expected.max() == 127 * 127 * 1024
    assert np.array_equal(sums.astype(np.int64), expected)


def test_scales_per_group_never_stay_in_one_dequantize_behind_quantized_activations():
    for weights, activations in SCHEMES:
        graph, _ = linear()
        quantize(graph, weights, activations)
        product = next(node for node in graph.nodes if node.op == "MatMul")
        dequantize = product.inputs[1].inputs[0]
        assert dequantize.op == "DequantizeLinear"
        if weights.symmetric or weights.format == "int4":
            assert "block_size" not in dequantize.attrs
        elif "block_size" in dequantize.attrs:  # zero points need blocks; the scales stay behind the product
            assert (weight_of(dequantize.inputs[1]).read() == 1).all()


def test_int4_weights_in_groups_leave_no_zero_points():
    for weights, activations in SCHEMES:
        if weights.format == "int4" and (weights.group or activations.group):
            graph, _ = linear()
            quantize(graph, weights, activations)
            assert all(len(node.inputs) == 2 for node in graph.nodes if node.op == "DequantizeLinear")


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_fp8_products(mode, dtype):
    graph, weight = linear(dtype)
    quantize(graph, WeightScheme("fp8", method="rtn"), ActivationScheme("fp8", mode))
    x = np.clip(inputs_of(1, 4, K), -LARGEST, LARGEST)
    scale = (
        LARGEST / 448 if mode == "static" else np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-9) / 448
    )

    def fp8(values):
        return values.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)

    weight_scale = np.abs(weight.astype(np.float64)).max(axis=0) / 448
    expected = (fp8(x / scale) * scale) @ (fp8(weight / weight_scale) * weight_scale)
    tolerance = (
        1e-5 if dtype == "float" else 0.05
    )  # x is rounded to half before: a tie or two falls otherwise
    result = run(graph, x=x.astype(np.float32 if dtype == "float" else np.float16))[0]
    assert np.abs(result - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("weights", "activations"), SCHEMES)
def test_half_precision_graphs_scale_in_float32(weights, activations):
    graph, weight = linear("float16")
    plan, _ = quantize(graph, weights, activations)
    x = inputs_of(2, 3, K).astype(np.float16)
    result = run(graph, x=x)[0]
    assert result.dtype == np.float16
    expected = integer_model(x.astype(np.float32), weight, plan)
    assert np.allclose(result, expected, rtol=2e-3, atol=1e-3)  # the result is rounded to half, nothing else
    for node in graph.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[1].dtype == np.float32
    assert (ops(graph).count("Cast"), ops(graph)[-1]) == (2, "Cast")


QKV = f"""attention (float[batch, seq, {K}] x, float[{K}, {N}] Wq, float[{K}, {N}] Wk, float[{K}, 4] Wv, float[4] Bv)
    => (float[batch, seq, {N}] q, float[batch, seq, {N}] k, float[batch, seq, 4] v)
    {{ q = MatMul(x, Wq)
       k = MatMul(x, Wk)
       vm = MatMul(x, Wv)
       v = Add(vm, Bv) }}"""


def qkv(*schemes):
    names = ("q", "k", "vm")
    return [SitePlan(f"0.{n}", n, K, *scheme) for n, scheme in zip(names, schemes, strict=True)]


def test_matmuls_that_read_one_tensor_share_its_quantizer():
    scheme = (WeightScheme("int8"), ActivationScheme("int8", "dynamic"))
    graph = graph_of(QKV)
    plan = qkv(scheme, scheme, scheme)
    weights = [node.inputs[1].values for node in graph.nodes[:3]]
    bias = graph.nodes[3].inputs[1].values
    QuantizeWeights(plan).run(graph)
    report = QuantizeActivations(plan, {}).run(graph)
    assert ops(graph).count("QuantizeLinear") == 1
    assert report.changed == 3
    x = inputs_of(1, 4, K)
    for result, site, weight, add in zip(run(graph, x=x), plan, weights, (0, 0, bias), strict=True):
        assert np.allclose(result, integer_model(x, weight, site) + add, rtol=3e-6, atol=1e-5)


def test_other_schemes_get_quantizers_of_their_own():
    one = (WeightScheme("int8"), ActivationScheme("int8", "dynamic"))
    other = (WeightScheme("int8"), ActivationScheme("int8", "dynamic", clip=0.9))
    grouped = (WeightScheme("int8", 8), ActivationScheme("int8", "dynamic"))
    graph = graph_of(QKV)
    plan = qkv(one, other, grouped)
    QuantizeWeights(plan).run(graph)
    QuantizeActivations(plan, {}).run(graph)
    assert ops(graph).count("QuantizeLinear") == 3


def test_a_shared_quantizer_stands_before_its_first_reader_whatever_the_plans_order():
    scheme = (WeightScheme("int4", 8), ActivationScheme("int4", "dynamic", group=8))
    graph = graph_of(QKV)
    plan = qkv(scheme, scheme, scheme)[::-1]
    QuantizeWeights(plan).run(graph)
    QuantizeActivations(plan, {}).run(graph)
    written = {tensor.name for tensor in graph.inputs}
    for node in graph.nodes:
        assert all(t.name in written for t in node.inputs if t.inputs)
        written |= {tensor.name for tensor in node.outputs}
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)


def test_matmuls_keep_their_names_and_their_results():
    graph, _ = linear()
    quantize(graph, WeightScheme("int4", 8), ActivationScheme("int8", "dynamic", group=8))
    assert [node.name for node in graph.nodes if node.op == "MatMul"] == ["y"]
    assert [tensor.name for tensor in graph.outputs] == ["y"]


def test_static_activations_add_three_nodes_only():
    graph, _ = linear()
    quantize(graph, WeightScheme("int8"), ActivationScheme("int8"))
    assert ops(graph) == ["DequantizeLinear", "Mul", "QuantizeLinear", "DequantizeLinear", "MatMul"]


def test_a_static_scale_is_no_literal_that_layers_could_not_share():
    graph, _ = linear()
    quantize(graph, WeightScheme("int8"), ActivationScheme("int8"))
    multiply, quantizer = graph.nodes[1:3]
    assert multiply.inputs[1].shape == (K,)
    assert quantizer.inputs[1].values == 1


def test_sites_without_a_format_are_left_alone():
    graph, _ = linear()
    _, report = quantize(graph, WeightScheme(), ActivationScheme())
    assert report.changed == 0
    assert ops(graph) == ["MatMul"]


def test_static_sites_must_be_calibrated():
    graph, _ = linear()
    plan = [SitePlan("0.down", "y", K, WeightScheme("int8"), ActivationScheme("int8"))]
    QuantizeWeights(plan).run(graph)
    before = ops(graph)
    with pytest.raises(GraphError, match=r"0\.down: static activations were not calibrated"):
        QuantizeActivations(plan, {}).run(graph)
    assert ops(graph) == before


def test_weights_come_first():
    graph, _ = linear()
    plan = [SitePlan("0.down", "y", K, WeightScheme("int8", 8), ActivationScheme("int8", "dynamic"))]
    with pytest.raises(GraphError, match="weights must be quantized before"):
        QuantizeActivations(plan, {}).run(graph)


def test_asymmetric_activations_use_all_16_levels_of_a_row_that_leans_to_one_side():
    graph, weight = linear()
    quantize(graph, WeightScheme("int8"), ActivationScheme("int4", "dynamic", symmetric=False))
    symmetric, _ = linear()
    quantize(symmetric, WeightScheme("int8"), ActivationScheme("int4", "dynamic"))
    x = np.abs(inputs_of(2, 5, K))
    exact = x @ weight
    error, symmetric_error = (
        np.linalg.norm(run(which, x=x)[0] - exact) / np.linalg.norm(exact) for which in (graph, symmetric)
    )
    assert error < 0.6 * symmetric_error  # 15 steps to the largest value instead of 7
    codes = next(node for node in graph.nodes if node.op == "QuantizeLinear").outputs[0]
    graph.outputs.append(codes)
    assert set(np.unique(run(graph, x=x)[1])) <= set(range(16))
