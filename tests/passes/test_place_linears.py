"""QuantizedLinear operators in a graph: where they go, where they do not, and that they compute the same."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from support.graphs import graph_of, ops, run

from rotexport.errors import GraphError
from rotexport.graph.edit import sort
from rotexport.graph.twin import float32_twin
from rotexport.passes.place_linears import PlaceLinears
from rotexport.passes.precision import SetPrecision
from rotexport.passes.quantize_activations import QuantizeActivations
from rotexport.passes.quantize_weights import QuantizeWeights
from rotexport.quant.operators import LinearOperator, linear_operator, with_operators
from rotexport.quant.plan import SitePlan
from rotexport.quant.scheme import ActivationScheme, WeightScheme
from rotexport.recipe import load_recipe
from rotexport.transforms.transform import Hadamard

K, N = 128, 24
TOKENS = ActivationScheme("int8", "dynamic")
INT8, INT4 = (WeightScheme(name, method="rtn") for name in ("int8", "int4"))
TWO_LEVEL = WeightScheme("int4", 32, method="rtn")
ZERO_POINTS = WeightScheme("int4", 32, symmetric=False, method="rtn")

# Each with the operator it becomes.
SCHEMES = [
    (INT8, TOKENS, "QuantizedLinearW8A8"),
    (WeightScheme("int8", 64, method="rtn"), TOKENS, "QuantizedLinearW8A8"),
    (INT4, ActivationScheme("int8", "dynamic", clip=0.9), "QuantizedLinearW4A8"),
    (TWO_LEVEL, TOKENS, "QuantizedLinearW4A8TwoLevel"),
    (ZERO_POINTS, TOKENS, "QuantizedLinearW4A8TwoLevel"),
    (ZERO_POINTS, ActivationScheme("int4", "dynamic"), "QuantizedLinearW4A4TwoLevel"),
    (INT4, ActivationScheme("int4", "dynamic"), "QuantizedLinearW4A4"),
    (TWO_LEVEL, ActivationScheme("int4", "dynamic"), "QuantizedLinearW4A4TwoLevel"),
    (TWO_LEVEL, ActivationScheme("int4", "dynamic", group=32), "QuantizedLinearW4A4"),
    (TWO_LEVEL, ActivationScheme("int8", "dynamic", group=32), "QuantizedLinearW4A8"),
]


def one_linear(dtype: str = "float"):
    return graph_of(f"""g ({dtype}[batch, seq, {K}] x, {dtype}[{K}, {N}] W) => ({dtype}[batch, seq, {N}] y)
        {{ y = MatMul(x, W) }}""")


def site(name: str, weights: WeightScheme, activations: ActivationScheme, inputs: int = K) -> SitePlan:
    return SitePlan(name, name, inputs, weights, activations)


def place(graph, plan):
    QuantizeWeights(plan).run(graph)
    report = PlaceLinears(with_operators(plan)).run(graph)
    sort(graph)
    return report


def without(graph, plan):
    """The lowering of other targets."""
    QuantizeWeights(plan).run(graph)
    QuantizeActivations(plan, {}).run(graph)
    return graph


def rows(*shape: int) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    x[0, 0] = 0
    return x


@pytest.mark.parametrize(("weights", "activations", "operator"), SCHEMES)
def test_operators_compute_what_other_targets_do(
    weights: WeightScheme, activations: ActivationScheme, operator: str
) -> None:
    plan = [site("y", weights, activations)]
    graph, x = one_linear(), rows(2, 3, K)
    report = place(graph, plan)
    assert [op for op in ops(graph) if op != "Reshape"] == [
        f"FastHadamardInt{activations.format[3]}",
        operator,
    ]
    assert report.notes == [f"1 products are {operator}"]
    expected = run(without(one_linear(), plan), x=x)[0]
    # Integer sums are the same; scales are multiplied and added up in another order.
    np.testing.assert_allclose(run(graph, x=x)[0], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_half_precision_stays_outside() -> None:
    plan = [site("y", TWO_LEVEL, TOKENS)]
    graph = one_linear("float16")
    place(graph, plan)
    x = rows(2, 3, K).astype(np.float16)
    expected = run(without(one_linear("float16"), plan), x=x)[0]
    y = run(graph, x=x)[0]
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_bfloat16_graphs_run_as_their_float32_twin() -> None:
    """Where ONNX Runtime has no bfloat16, results widen with everything else."""
    plan, x = [site("y", TWO_LEVEL, TOKENS)], rows(2, 3, K)
    graph, plain = one_linear(), one_linear()
    for one in (graph, plain):
        SetPrecision(np.dtype(ml_dtypes.bfloat16)).run(one)
    place(graph, plan)
    without(plain, plan)
    y, expected = (run(float32_twin(one), x=x)[0] for one in (graph, plain))
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


MLP = f"""g (float[batch, seq, {K}] x, float[{K}, {N}] Wq, float[{N}] Bq, float[{K}, {K}] Wg, float[{K}, {K}] Wu,
           float[{K}, {K}] Wd) => (float[batch, seq, {N}] q, float[batch, seq, {K}] y) {{
    query = MatMul(x, Wq)
    q = Add(query, Bq)
    gate = MatMul(x, Wg)
    opening = Sigmoid(gate)
    silu = Mul(gate, opening)
    up = MatMul(x, Wu)
    gated = Mul(silu, up)
    down = MatMul(gated, Wd)
    y = Add(x, down)
}}"""


def mlp_plan() -> list[SitePlan]:
    return [site(name, TWO_LEVEL, TOKENS) for name in ("query", "gate", "up", "down")]


def test_inputs_are_quantized_once_and_endings_absorbed() -> None:
    graph, x = graph_of(MLP), rows(2, 3, K)
    report = place(graph, mlp_plan())
    name = "QuantizedLinearW4A8TwoLevel"
    assert sorted(ops(graph)) == sorted(
        ["FastHadamardInt8"] * 2 + [name] * 2 + [f"{name}Gated", f"{name}Residual"]
    )
    assert report.notes == [
        f"2 products are {name}",
        f"1 products are {name}Gated",
        f"1 products are {name}Residual",
    ]
    for y, expected in zip(run(graph, x=x), run(without(graph_of(MLP), mlp_plan()), x=x), strict=True):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "body",
    [
        "{ m = MatMul(x, W) y = Add(m, R) z = Relu(m) }",  # somebody else reads the product
        "{ m = MatMul(x, W) y = Sub(R, m) z = Relu(R) }",  # not an addition
        "{ m = MatMul(x, W) y = Mul(m, R) z = Relu(R) }",  # not a gate
        "{ m = MatMul(x, W) s = Sigmoid(m) y = Mul(m, s) z = Relu(R) }",  # a gate of its own
        "{ m = MatMul(x, W) y = Add(m, m) z = Relu(R) }",
        "{ m = MatMul(x, W) y = Add(m, Row) z = Relu(R) }",  # broadcast
    ],
)
def test_what_is_no_ending_stays(body: str) -> None:
    text = f"""g (float[1, 2, {K}] x, float[{K}, {N}] W, float[1, 2, {N}] R2, float[1, 1, {N}] Row)
        => (float[1, 2, {N}] y, float[1, 2, {N}] z) {body.replace("R)", "r)").replace("(R,", "(r,")}"""
    text = text.replace("{ m =", "{ r = Relu(R2) m =")
    graph, x = graph_of(text), rows(1, 2, K)
    place(graph, [site("m", INT8, TOKENS)])
    assert "QuantizedLinearW8A8" in ops(graph)
    plain = without(graph_of(text), [site("m", INT8, TOKENS)])
    for y, expected in zip(run(graph, x=x), run(plain, x=x), strict=True):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def rotated(readers: str):
    graph = graph_of(f"""g (float[batch, seq, {K}] x, float[{K}, {N}] W) => (float[batch, seq, {N}] y, float[batch, seq, {K}] z)
        {{ h = Relu(x) y = MatMul(h, W) z = {readers} }}""")
    x = graph.nodes[0].outputs[0]
    nodes, h = Hadamard(K, 64, seed=1).online_nodes("rotated", x)
    for node in graph.nodes[1:]:
        node.inputs[0] = h
    graph.nodes[1:1] = nodes
    return graph


def test_a_hadamard_in_front_is_fused_with_its_quantizer() -> None:
    graph = rotated("Neg(h)")
    graph.nodes.pop().inputs.clear()  # nobody but the product reads the transform
    graph.outputs.pop()
    plan, x = [site("y", INT8, TOKENS)], rows(1, 2, K)
    expected = run(without(graph.copy(), plan), x=x)[0]
    place(graph, plan)
    assert ops(graph) == ["Relu", "FastHadamardInt8", "QuantizedLinearW8A8"]
    np.testing.assert_allclose(run(graph, x=x)[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_hadamard_that_others_read_stays() -> None:
    graph = rotated("Neg(h)")
    place(graph, [site("y", INT8, TOKENS)])
    assert sorted(ops(graph)) == ["FastHadamard", "FastHadamardInt8", "Neg", "QuantizedLinearW8A8", "Relu"]


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (site("y", INT8, ActivationScheme("int8", "static")), "its activations are not scaled as they come"),
        (site("y", INT8, ActivationScheme()), "its activations are not scaled as they come"),
        (site("y", WeightScheme("fp8"), ActivationScheme("fp8", "dynamic")), "no kernel for fp8 weights"),
        (site("y", INT8, ActivationScheme("int4", "dynamic")), "no kernel for int8 weights and int4"),
        (site("y", WeightScheme("int4", symmetric=False), TOKENS), "its weights have zero points"),
        (site("y", WeightScheme("int4", 16), TOKENS), "groups of 16 are no multiple of 32"),
        (site("y", WeightScheme("int8", 512), TOKENS, 1024), "groups of 512 are above 256"),
        (site("y", INT8, ActivationScheme("int8", "dynamic", group=32)), "need the same groups of weights"),
        (site("y", INT8, TOKENS, 100), "rows of 100 int8 activations are no multiple of 16 bytes"),
        (site("y", INT8, TOKENS, 2**17), "sums of 131072 products pass 32 bits"),
    ],
)
def test_a_site_without_a_kernel_says_why(plan: SitePlan, reason: str) -> None:
    found = linear_operator(plan)
    assert isinstance(found, str) and reason in found


def test_sites_without_a_kernel_are_left_alone_and_named() -> None:
    plan = [site("y", WeightScheme("int4", 16), TOKENS)]
    graph = one_linear()
    report = place(graph, plan)
    assert "MatMul" in ops(graph) and report.changed == 0
    assert report.notes == ["1 stay standard nodes: groups of 16 are no multiple of 32"]


def test_a_short_row_is_padded_to_whole_slices() -> None:
    operator = linear_operator(site("y", INT4, TOKENS, 48))
    assert isinstance(operator, LinearOperator)
    assert (operator.group, operator.length, operator.groups) == (64, 64, 1)


def test_weights_must_be_quantized_first() -> None:
    with pytest.raises(GraphError, match="site y: its weights must be quantized before"):
        PlaceLinears(with_operators([site("y", INT8, TOKENS)])).run(one_linear())


def test_an_input_without_a_shape_is_refused() -> None:
    plan, graph = [site("y", INT8, TOKENS)], one_linear()
    QuantizeWeights(plan).run(graph)
    graph.inputs[0].shape = None
    with pytest.raises(GraphError, match="site y: 'x' has no known shape"):
        PlaceLinears(with_operators(plan)).run(graph)


@pytest.mark.parametrize(
    ("recipe", "operator"),
    [
        ("quarot-w4a8", "QuantizedLinearW4A8TwoLevel"),
        ("quarot-w4a4kv4", "QuantizedLinearW4A4"),
        ("w8a8-dynamic", "QuantizedLinearW8A8"),
    ],
)
def test_dynamic_recipes_have_operators_everywhere(recipe: str, operator: str) -> None:
    loaded = load_recipe(recipe)
    for width in (4096, 8192, 11008, 14336, 28672):
        found = linear_operator(SitePlan("0.up", "y", width, *loaded.schemes("0.up")))
        assert isinstance(found, LinearOperator) and found.name == operator
