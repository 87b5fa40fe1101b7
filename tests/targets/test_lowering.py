"""What the builder reads differs from the portable model only where it must, and means the same."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from rotexport.errors import TargetError
from rotexport.targets.lowering import lower

TEXT = """<ir_version: 11, opset_import: ["": 23]>
g (float[batch, 4, sequence, 8] q, float[batch, 2, total, 8] k, float[batch, 2, total, 6] v,
   float[batch, 1, sequence, total] m) => (float[batch, 4, sequence, 6] y)
{ [attend] y = Attention<scale = 0.5%s>(q, k, v, m) }"""


def attention(q, k, v, m, *, scale, cap):
    """softmax(c tanh(s q kᵀ / c) + m) v in float64, every group of query heads on its key head."""
    query, key, value, mask = (a.astype(np.float64) for a in (q, k, v, m))
    key, value = (np.repeat(a, 2, axis=1) for a in (key, value))
    logits = cap * np.tanh(scale * query @ key.swapaxes(-1, -2) / cap) + mask
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value


def test_plain_attention_is_only_marked():
    model = onnx.parser.parse_model(TEXT % "")
    lowered = lower(model)
    (node,) = lowered.graph.node
    assert [a.name for a in node.attribute] == ["scale", "TRT_decomposable"]
    assert [a.name for a in model.graph.node[0].attribute] == ["scale"]
    del node.attribute[1]
    assert lowered == model


def test_a_soft_cap_is_spelled_out():
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 4, 3, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 6)}
    feeds = {name: 3 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feeds["m"] = np.triu(np.full((2, 1, 3, 5), -3e4, np.float32), 3)
    lowered = lower(onnx.parser.parse_model(TEXT % ", softcap = 5.0"))
    onnx.checker.check_model(lowered)
    assert "Attention" not in [node.op_type for node in lowered.graph.node]
    (got,) = ort.InferenceSession(lowered.SerializeToString()).run(None, feeds)
    np.testing.assert_allclose(got, attention(**feeds, scale=0.5, cap=5.0), atol=1e-5)


SELECTION = """<ir_version: 11, opset_import: ["": 23]>
g (%s[batch, total] x) => (%s[batch, k] values, int64[batch, k] indices)
<int64[1] k = {%d}>
{ [choose] values, indices = TopK<axis = -1, largest = %d, sorted = 1>(x, k) }"""


@pytest.mark.parametrize(("kind", "largest"), [("float", 1), ("int64", 0)])
def test_a_selection_of_many_is_made_in_steps(kind: str, largest: int):
    dtype = {"float": np.float32, "int64": np.int64}[kind]
    x = np.random.default_rng(0).integers(-50, 50, (2, 9000)).astype(dtype)  # with many equals
    lowered = lower(onnx.parser.parse_model(SELECTION % (kind, kind, 8000, largest)))
    onnx.checker.check_model(lowered)
    steps = [node for node in lowered.graph.node if node.op_type == "TopK"]
    assert len(steps) == 3, "of at most 3,840 each"
    values, indices = ort.InferenceSession(lowered.SerializeToString()).run(None, {"x": x})
    expected = np.argsort(-x if largest else x, axis=-1, kind="stable")[:, :8000]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, -1))


def test_a_selection_that_the_builder_makes_itself_stays():
    model = onnx.parser.parse_model(SELECTION % ("float", "float", 3840, 1))
    assert lower(model) == model


def test_a_soft_cap_without_known_heads_is_refused():
    model = onnx.parser.parse_model((TEXT % ", softcap = 5.0").replace("[batch, 4,", "[batch, heads,"))
    with pytest.raises(TargetError, match="'attend': axis 1 of 'q' has no fixed size"):
        lower(model)
