"""Quantized weights in a graph, against a model in NumPy."""

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.graphs import graph_of, ops, run

from rotexport.errors import GraphError
from rotexport.graph.weights import Cast, InMemory, set_weight, weight_of
from rotexport.passes.quantize_weights import QuantizeWeights
from rotexport.quant.plan import SitePlan
from rotexport.quant.scheme import ActivationScheme, WeightScheme

K, N = 32, 6
DYNAMIC = ActivationScheme("int8", "dynamic")


def linear(dtype="float"):
    graph = graph_of(f"linear ({dtype}[batch, seq, {K}] x, {dtype}[{K}, {N}] W) => ({dtype}[batch, seq, {N}] y) "
                     "{ y = MatMul(x, W) }")  # fmt: skip
    return graph, graph.nodes[0].inputs[1].values


def site(weights, activations=None, graph=None):
    node = graph.nodes[0].name if graph is not None else "y"
    return SitePlan("0.down", node, K, weights, activations or ActivationScheme())


def rounded(weight, name, group, lowest, highest):
    """Round to nearest with the scale of each group's largest magnitude, in float64."""
    groups = weight.astype(np.float64).reshape(-1, group, N)
    scale = np.abs(groups).max(axis=1, keepdims=True) / highest
    if name == "fp8":
        codes = (groups / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        codes = np.clip(np.rint(groups / scale), lowest, highest)
    return (codes * scale).reshape(weight.shape)


@pytest.mark.parametrize(
    ("name", "lowest", "highest"), [("int8", -127, 127), ("int4", -8, 7), ("fp8", -448, 448)]
)
@pytest.mark.parametrize("group", [None, 8])
def test_the_graph_multiplies_by_rounded_weights(name, lowest, highest, group):
    graph, weight = linear()
    report = QuantizeWeights([site(WeightScheme(name, group, method="rtn"))]).run(graph)
    x = np.random.default_rng(0).standard_normal((2, 3, K)).astype(np.float32)
    expected = x.astype(np.float64) @ rounded(weight, name, group or K, lowest, highest)
    # Equal but for float32 sums of 32 products.
    assert np.allclose(run(graph, x=x)[0], expected, rtol=1e-5, atol=1e-5)
    assert ops(graph) == ["DequantizeLinear", "MatMul"]
    assert report.changed == 1
    attributes = graph.nodes[0].attrs
    assert attributes == ({"axis": 1} if group is None else {"axis": 0, "block_size": 8})


@pytest.mark.parametrize(("name", "lowest", "highest"), [("int8", -128, 127), ("int4", -8, 7)])
@pytest.mark.parametrize("group", [None, 8])
def test_asymmetric_weights_have_zero_points(name, lowest, highest, group):
    graph, weight = linear()
    weight += np.float32(0.5)  # in place: leaning to one side
    QuantizeWeights([site(WeightScheme(name, group, symmetric=False, method="rtn"))]).run(graph)
    x = np.random.default_rng(0).standard_normal((2, 3, K)).astype(np.float32)
    groups = weight.astype(np.float64).reshape(-1, group or K, N)
    least = np.minimum(groups.min(axis=1, keepdims=True), 0)
    scale = (np.maximum(groups.max(axis=1, keepdims=True), 0) - least) / (highest - lowest)
    zero = np.clip(np.rint(lowest - least / scale), lowest, highest)
    steps = np.clip(np.rint(groups / scale), lowest - zero, highest - zero)
    expected = x.astype(np.float64) @ (steps * scale).reshape(weight.shape)
    assert np.allclose(run(graph, x=x)[0], expected, rtol=1e-5, atol=1e-5)
    assert ops(graph) == ["DequantizeLinear", "MatMul"]
    codes, scales, zeros = graph.nodes[0].inputs
    assert zeros.dtype == codes.dtype and zeros.shape == scales.shape
    assert (weight_of(zeros).read().astype(int) != 0).any()


def test_the_matmul_keeps_its_name():
    graph, _ = linear()
    name = graph.nodes[0].name
    QuantizeWeights([site(WeightScheme("int4", 8))]).run(graph)
    assert [node.name for node in graph.nodes] == ["0.down.weight.dequantized", name]


def test_groups_behind_quantized_activations_become_two_level():
    graph, weight = linear()
    QuantizeWeights([site(WeightScheme("int4", 8), DYNAMIC)]).run(graph)
    assert ops(graph) == ["DequantizeLinear", "Clip", "QuantizeLinear", "DequantizeLinear", "MatMul"]
    eye = np.eye(K, dtype=np.float32)[None]
    matrix = run(graph, x=eye)[0][0]
    assert np.linalg.norm(matrix - weight) < 0.12 * np.linalg.norm(weight)
    # One float scale per output channel; everything else is an integer of at most 127.
    scales = weight_of(graph.nodes[3].inputs[1]).read()
    assert scales.shape == (N,)
    integers = matrix / scales
    assert np.allclose(integers, np.rint(integers), atol=1e-3)
    assert np.abs(integers).max() <= 127.001


@pytest.mark.parametrize("method", ["rtn", "search"])
def test_zero_points_of_two_level_weights_are_offsets_of_their_integers(method):
    graph, weight = linear()
    weight += np.float32(0.5)  # in place: leaning to one side
    QuantizeWeights([site(WeightScheme("int4", 8, symmetric=False, method=method), DYNAMIC)]).run(graph)
    assert ops(graph) == [
        "DequantizeLinear", "DequantizeLinear", "Add", "Reshape",
        "Clip", "QuantizeLinear", "DequantizeLinear", "MatMul",
    ]  # fmt: skip
    assert all(len(node.inputs) == 2 for node in graph.nodes if node.op == "DequantizeLinear")
    codes, factors = (weight_of(tensor).read() for tensor in graph.nodes[0].inputs)
    offsets = weight_of(graph.nodes[1].inputs[0]).read()
    scales = weight_of(graph.nodes[6].inputs[1]).read()
    assert offsets.dtype == np.int8 and offsets.any() and scales.shape == (N,)
    integers = codes.astype(np.float64) * factors + offsets
    assert np.abs(integers).max() <= 127
    assert np.array_equal(offsets / factors, np.rint(offsets / factors))  # a zero point is a code
    eye = np.eye(K, dtype=np.float32)[None]
    assert np.allclose(run(graph, x=eye)[0][0], integers.reshape(K, N) * scales, rtol=1e-6, atol=0)
    symmetric, _ = linear()
    symmetric.nodes[0].inputs[1].values += np.float32(0.5)
    QuantizeWeights([site(WeightScheme("int4", 8, method=method), DYNAMIC)]).run(symmetric)
    error, wider = (np.linalg.norm(run(which, x=eye)[0][0] - weight) for which in (graph, symmetric))
    assert error < 0.9 * wider


def test_the_grouped_form_means_the_same_as_blocked_weights():
    activations = ActivationScheme("int8", "dynamic", group=8)
    x = np.random.default_rng(0).standard_normal((1, 4, K)).astype(np.float32)
    for group in (8, None):
        grouped, _ = linear()
        QuantizeWeights([site(WeightScheme("int4", group), activations)]).run(grouped)
        plain, _ = linear()
        QuantizeWeights([site(WeightScheme("int4", group))]).run(plain)
        assert ops(grouped) == ["DequantizeLinear", "Reshape", "MatMul"]
        assert np.array_equal(run(grouped, x=x)[0], run(plain, x=x)[0])


@pytest.mark.parametrize("group", [None, 8])
def test_weight_only_scales_have_the_activations_type(group):
    graph, _ = linear("float16")
    QuantizeWeights([site(WeightScheme("int4", group))]).run(graph)
    assert ops(graph) == ["DequantizeLinear", "MatMul"]
    assert graph.nodes[0].inputs[1].dtype == np.float16
    x = np.random.default_rng(0).standard_normal((1, 3, K)).astype(np.float16)
    assert run(graph, x=x)[0].dtype == np.float16


def test_scales_of_integer_products_stay_in_float32():
    graph, _ = linear("float16")
    QuantizeWeights([site(WeightScheme("int8"), DYNAMIC)]).run(graph)
    assert ops(graph) == ["DequantizeLinear", "Cast", "MatMul"]
    assert graph.nodes[0].inputs[1].dtype == np.float32


def test_codes_are_made_from_the_weight_before_it_was_narrowed():
    graph, _ = linear("float16")
    exact = InMemory(np.random.default_rng(5).standard_normal((K, N)).astype(np.float32))
    set_weight(graph.nodes[0].inputs[1], Cast(exact, np.dtype(np.float16)))
    QuantizeWeights([site(WeightScheme("int8", method="rtn"), DYNAMIC)]).run(graph)
    scales = weight_of(graph.nodes[0].inputs[1]).read()
    assert np.array_equal(scales, np.abs(exact.read()).max(axis=0) / np.float32(127))


def test_nothing_is_read_until_the_graph_is_written(monkeypatch):
    graph, _ = linear()
    monkeypatch.setattr(InMemory, "read", lambda self: pytest.fail("a pass read a weight"))
    QuantizeWeights([site(WeightScheme("int4", 8))]).run(graph)
    assert isinstance(graph.nodes[0].inputs[0], gs.Constant)
    assert graph.nodes[0].inputs[0].dtype == ml_dtypes.int4
    assert tuple(graph.nodes[0].inputs[0].shape) == (K, N)


def test_sites_without_a_format_are_left_alone():
    graph, _ = linear()
    report = QuantizeWeights([site(WeightScheme())]).run(graph)
    assert report.changed == 0
    assert ops(graph) == ["MatMul"]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            SitePlan("0.up", "elsewhere", K, WeightScheme("int8"), ActivationScheme()),
            "no MatMul named 'elsewhere'",
        ),
        (
            SitePlan("0.up", "y", 2 * K, WeightScheme("int8"), ActivationScheme()),
            r"constant weight \[64, N\]",
        ),
    ],
)
def test_a_plan_for_another_graph_is_refused_before_anything_changes(plan, words):
    graph, _ = linear()
    with pytest.raises(GraphError, match=words):
        QuantizeWeights([site(WeightScheme("int8")), plan]).run(graph)
    assert ops(graph) == ["MatMul"]
