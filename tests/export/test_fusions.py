"""Fusions of traced chains, on ONNX text."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from rotexport.export.fusions import fuse

GELU = """
gelu (float[2, 3, 8] x) => (float[2, 3, 8] y)
<float half = {0.5}, float one = {1.0}, float three = {3.0}, float cubic = {CUBIC}, float root = {0.7978845608}>
{
    cube = Pow(x, three)
    weighted = Mul(cubic, cube)
    sum = Add(x, weighted)
    inner = Mul(root, sum)
    bend = Tanh(inner)
    gate = Add(bend, one)
    small = Mul(half, x)
    y = Mul(small, gate)
}"""

HEADER = '<ir_version: 11, opset_import: ["": 23]>\n'

RMS = """
rms (float[2, 3, 8] x, float[8] gamma) => (float[2, 3, 8] y)
<float two = {2.0}, int64[1] axes = {AXIS}, float epsilon = {1e-6}>
{
    square = Pow(x, two)
    mean = ReduceMean<keepdims = 1>(square, axes)
    shifted = Add(mean, epsilon)
    root = Sqrt(shifted)
    inverse = Reciprocal(root)
    normal = Mul(x, inverse)
    y = Mul(gamma, normal)
}"""

ROTATION = """
rotation (float[2, 4, 3, 8] x, float[2, 3, 4] angle) => (float[2, 4, 3, 8] y)
<int64[1] zero = {0}, int64[1] middle = {MIDDLE}, int64[1] end = {1000}, int64[1] last = {3},
 int64[1] one = {1}, float half = {0.5}>
{
    doubled = Concat<axis = -1>(angle, angle)
    cosine = Cos(doubled)
    sine = Sin(doubled)
    scaled_cosine = Mul(cosine, half)
    scaled_sine = Mul(half, sine)
    cos = Unsqueeze(scaled_cosine, one)
    sin = Unsqueeze(scaled_sine, one)
    first = Slice(x, zero, middle, last, one)
    second = Slice(x, middle, end, last, one)
    minus = Neg(second)
    turned = Concat<axis = -1>(minus, first)
    straight = Mul(x, cos)
    crossed = Mul(turned, sin)
    y = Add(straight, crossed)
}"""

PARTIAL = """
partial (float[2, 4, 3, 8] x, float[2, 3, 2] cos, float[2, 3, 2] sin) => (float[2, 4, 3, 8] y)
<int64[1] zero = {0}, int64[1] split = {4}, int64[1] rest = {REST}, int64[1] end = {8}, int64[1] last = {3},
 int64[1] one = {1}>
{
    front = Slice(x, zero, split, last, one)
    back = Slice(x, rest, end, last, one)
    turned = RotaryEmbedding(front, cos, sin)
    y = Concat<axis = -1>(turned, back)
}"""


def fused(text: str, **values: float) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return a model before and after."""
    for name, value in values.items():
        text = text.replace(f"{{{name.upper()}}}", f"{{{value}}}")
    before = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEADER + text), data_prop=True)
    model = ir.from_proto(before)
    fuse(model)
    return before, ir.to_proto(model)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def assert_same_function(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    rng = np.random.default_rng(0)
    feeds = {
        tensor.name: rng.standard_normal([dim.dim_value for dim in tensor.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for tensor in before.graph.input
    }
    expected, ours = (ReferenceEvaluator(model).run(None, feeds)[0] for model in (before, after))
    np.testing.assert_allclose(ours, expected, atol=1e-6)  # float32, numbers of order one


@pytest.mark.parametrize("axis", [-1, 2])
def test_an_rms_norm_over_the_last_axis_is_one_node(axis: int) -> None:
    before, after = fused(RMS, axis=axis)
    assert operators(after) == ["RMSNormalization"]
    assert_same_function(before, after)


def test_a_norm_over_tokens_is_not_an_rms_norm() -> None:
    before, after = fused(RMS, axis=1)
    assert operators(after) == operators(before)


def test_the_tanh_formula_is_a_gelu() -> None:
    before, after = fused(GELU, cubic=0.044715)
    assert operators(after) == ["Gelu"]
    assert_same_function(before, after)


def test_another_cubic_is_no_gelu() -> None:
    before, after = fused(GELU, cubic=0.05)
    assert operators(after) == operators(before)


def test_a_rotation_is_one_node_on_undoubled_scaled_angles() -> None:
    before, after = fused(ROTATION, middle=4)
    assert sorted(operators(after)) == ["Cos", "Mul", "Mul", "RotaryEmbedding", "Sin"]
    assert_same_function(before, after)


def test_unequal_parts_are_no_rotation() -> None:
    _, after = fused(ROTATION, middle=3)
    assert "RotaryEmbedding" not in operators(after)


def test_a_rotation_of_the_first_channels_takes_the_rest_along() -> None:
    before, after = fused(PARTIAL, rest=4)
    assert operators(after) == ["RotaryEmbedding"]
    assert after.graph.node[0].attribute[0].name == "rotary_embedding_dim"
    assert_same_function(before, after)


def test_channels_repeated_in_the_rest_stay_a_concatenation() -> None:
    _, after = fused(PARTIAL.replace("float[2, 4, 3, 8] y", "float[2, 4, 3, 9] y"), rest=3)
    assert operators(after).count("Concat") == 1
