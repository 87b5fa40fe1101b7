"""Queries and keys rotated in one product: the same numbers, fewer nodes, in an order that runs."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from rotexport.targets.joining import join_rotations

MODEL = """<ir_version: 11, opset_import: ["": 23, "rotexport": 1]>
g (float[B, 2, S, 4] q, float[B, 1, S, 4] k) => (float[B, 2, S, 4] y, float[B, 2, S, 4] z)
<float[4] signs = {1, -1, 1, 1}, float[4] same = {1, -1, 1, 1}, float[4] other = {1, 1, -1, 1}> {
  [late] sink = Neg(q)
  [first] turned = rotexport.FastHadamard(q, signs)
  [reader] z = Exp(turned)
  [second] turned_sink = rotexport.FastHadamard(sink, signs)
  [key] past = Abs(k)
  [third] turned_key = rotexport.FastHadamard(past, KEY)
  [attention] y = rotexport.SinkWindowAttentionInt4 <query_heads = 2, kv_heads = 1> (
    q, turned, turned_sink, turned_key)
}
<domain: "rotexport", opset_import: ["": 23]>
FastHadamard (x, signs) => (y) { y = Mul(x, signs) }
<domain: "rotexport", opset_import: ["": 23]>
SinkWindowAttentionInt4 <query_heads, kv_heads> (positions, q, s, k) => (y) {
  heads = Constant<value_int: int = @query_heads>()
  others = Constant<value_int: int = @kv_heads>()
  ratio = Div(heads, others)
  factor = CastLike(ratio, q)
  apart = Sub(q, s)
  scaled = Mul(k, factor)
  y = Mul(apart, scaled)
}"""


def rotations(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type == "FastHadamard"]


@pytest.mark.parametrize(("key", "left"), [("same", 1), ("other", 2)])
def test_equal_rotations_become_one(key: str, left: int, tmp_path: Path) -> None:
    """Equal by what the tables hold; a key that is rotated otherwise keeps its own product."""
    model = onnx.parser.parse_model(MODEL.replace("KEY", key))
    joined = join_rotations(model, tmp_path)
    onnx.checker.check_model(joined)  # sorted, among others
    assert len(rotations(model)) == 3
    assert len(rotations(joined)) == left
    rng = np.random.default_rng(0)
    feeds = {
        "q": rng.standard_normal((3, 2, 5, 4)).astype(np.float32),
        "k": rng.standard_normal((3, 1, 5, 4)).astype(np.float32),
    }
    for want, got in zip(
        *(ort.InferenceSession(m.SerializeToString()).run(None, feeds) for m in (model, joined)), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_queries_that_attention_does_not_share_stay(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(MODEL.replace("KEY", "same").replace("SinkWindowAttentionInt4", "Other"))
    assert rotations(join_rotations(model, tmp_path)) == ["first", "second", "third"]
