"""Expanding function bodies: the same function, tables computed once, equal expressions shared."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from rotexport.targets.inlining import inline

MODEL = """<ir_version: 11, opset_import: ["": 23, "rotexport": 1]>
g (float16[M, 4] x, float16[M, 4] z) => (float16[M, 4] y)
<int8[2, 2] table = {1, 2, 3, 4}, int8[2, 2] other = {1, 0, 0, 1}> {
  [first] a = rotexport.Mix(x, table)
  [second] b = rotexport.Mix(z, table)
  [third] c = rotexport.Mix(x, table)
  [fourth] d = rotexport.Mix(x, other)
  [sum1] ab = Add(a, b)
  [sum2] cd = Add(c, d)
  [sum3] y = Add(ab, cd)
}
<domain: "rotexport", opset_import: ["": 23]>
Mix (x, table) => (y) {
  one = Constant<value_float = 1.0>()
  float_table = DequantizeLinear(table, one)
  matrix = CastLike(float_table, x)
  rows = Constant<value_ints = [-1, 2]>()
  pairs = Reshape(x, rows)
  mixed = MatMul(pairs, matrix)
  shape = Shape(x)
  y = Reshape(mixed, shape)
}"""


@pytest.fixture(scope="module")
def inlined(tmp_path_factory):
    return inline(onnx.parser.parse_model(MODEL), tmp_path_factory.mktemp("model"))


def test_the_function_is_the_same(inlined):
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((3, 4)).astype(np.float16) for name in "xz"}
    want, got = (
        ort.InferenceSession(m.SerializeToString()).run(None, feeds)[0]
        for m in (onnx.parser.parse_model(MODEL), inlined)
    )
    np.testing.assert_array_equal(got, want)


def test_no_function_is_left_and_names_are_unique(inlined):
    onnx.checker.check_model(inlined)
    assert not inlined.functions
    names = [node.name for node in inlined.graph.node]
    assert max(Counter(names).values()) == 1
    assert {"sum1", "sum2", "sum3"} <= set(names)


def test_tables_are_computed_and_equal_calls_shared(inlined):
    """`third` equals `first`; `fourth` shares its pairs with `first` and multiplies by another table."""
    assert Counter(node.op_type for node in inlined.graph.node) == {
        "MatMul": 3,
        "Reshape": 5,
        "Shape": 2,
        "Add": 3,
    }
    tables = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in inlined.graph.initializer}
    read = {node.input[1] for node in inlined.graph.node if node.op_type == "MatMul"}
    assert sorted(tables[name].astype(int).tolist() for name in read) == [[[1, 0], [0, 1]], [[1, 2], [3, 4]]]
    assert {tables[name].dtype for name in read} == {np.dtype(np.float16)}


def test_equal_expressions_of_the_models_own_graph_stay():
    model = onnx.parser.parse_model("""<ir_version: 11, opset_import: ["": 23, "rotexport": 1]>
        g (float[2] x) => (float[2] y) { a = Neg(x)  b = Neg(x)  c = Add(a, b)  y = rotexport.Same(c) }
        <domain: "rotexport", opset_import: ["": 23]> Same (x) => (y) { y = Identity(x) }""")
    assert [node.op_type for node in inline(model, None).graph.node] == ["Neg", "Neg", "Add", "Identity"]


def stored_apart(values, location="model.data"):
    """Return a model whose `table` lies in an external file."""
    model = onnx.parser.parse_model(MODEL)
    table = onnx.numpy_helper.from_array(values, "table")
    onnx.external_data_helper.set_external_data(table, location)
    table.ClearField("raw_data")
    model.graph.initializer[0].CopyFrom(table)
    return model


def test_a_weight_too_large_for_a_table_is_not_read(tmp_path):
    """Its data is missing, so reading it would fail."""
    model = stored_apart(np.zeros((2, 1 << 20), np.int8), "missing.data")
    assert "DequantizeLinear" in [node.op_type for node in inline(model, tmp_path).graph.node]


def test_a_small_table_is_read_from_the_models_folder(tmp_path):
    (tmp_path / "model.data").write_bytes(bytes([1, 2, 3, 4]))
    model = stored_apart(np.array([[1, 2], [3, 4]], np.int8))
    assert "DequantizeLinear" not in [node.op_type for node in inline(model, tmp_path).graph.node]


def test_named_nodes_stay_and_other_calls_of_their_operator_do_not(tmp_path):
    """A body that calls the same operator is expanded to the ground, too: nested calls have no kernels."""
    text = MODEL.replace("[fourth] d = rotexport.Mix(x, other)", "[fourth] d = rotexport.Outer(x, other)")
    text += """
    <domain: "rotexport", opset_import: ["": 23, "rotexport": 1]>
    Outer (x, table) => (y) { y = rotexport.Mix(x, table) }"""
    model = onnx.parser.parse_model(text)
    kept = inline(model, tmp_path, {"first", "third"})
    calls = [(node.name, node.op_type) for node in kept.graph.node if node.domain == "rotexport"]
    assert calls == [("first", "Mix"), ("third", "Mix")], "equal calls that stay are not shared"
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float16)
    want, got = (
        ort.InferenceSession(m.SerializeToString()).run(None, {"x": x, "z": x})[0] for m in (model, kept)
    )
    np.testing.assert_array_equal(got, want)


def test_shapes_that_the_model_states_are_tables_and_others_are_not():
    """Of x [M, 4] the last size is known; the whole shape is not."""
    text = """<ir_version: 11, opset_import: ["": 23, "rotexport": 1]>
    g (float16[M, 4] x) => (int64[1] width, int64[2] all) {
      width, all = rotexport.Sizes(x)
    }
    <domain: "rotexport", opset_import: ["": 23]>
    Sizes (x) => (width, all) {
      last = Shape<start = 1, end = 2>(x)
      one = Constant<value_ints = [1]>()
      width = Mul(last, one)
      whole = Shape(x)
      all = Mul(whole, one)
    }"""
    model = inline(onnx.parser.parse_model(text), Path())
    assert [len(node.attribute) for node in model.graph.node if node.op_type == "Shape"] == [0]
    x = np.zeros((3, 4), np.float16)
    found = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    assert [values.tolist() for values in found] == [[4], [3, 4]]


CAPPED = """<ir_version: 11, opset_import: ["": 23, "rotexport": 1]>
g (float[M, 3] x) => (float[M, 3] y) <int8[1, 1] factor = {1}> {
  z = rotexport.Cap <cap = CAP> (x, factor)
  y = Neg(z)
}
<domain: "rotexport", opset_import: ["": 23]>
Cap <cap> (x, factor) => (y) {
  one = Constant<value_float = 1.0>()
  none = Constant<value_float = 0.0>()
  table = DequantizeLinear(factor, one)
  rest = Constant<value_ints = [-1, 1, 3]>()
  rows = Reshape(x, rest)
  same = MatMul(table, rows)
  limit = Constant<value_float: float = @cap>()
  capped = Greater(limit, none)
  divisor = Where(capped, limit, one)
  ratio = Div(same, divisor)
  squashed = Tanh(ratio)
  bounded = Mul(squashed, divisor)
  chosen = Where(capped, bounded, same)
  shape = Shape(x)
  y = Reshape(chosen, shape)
}"""


@pytest.mark.parametrize(("cap", "nodes"), [(0.0, []), (2.0, ["Div", "Tanh", "Mul"])])
def test_what_constants_decide_is_not_computed(cap, nodes, tmp_path):
    """A soft cap of 0 and a product with [[1]] cost nothing; a real cap stays."""
    model = onnx.parser.parse_model(CAPPED.replace("CAP", str(cap), 1))
    expanded = inline(model, tmp_path)
    assert [n.op_type for n in expanded.graph.node] == ["Reshape", *nodes, "Shape", "Reshape", "Neg"]
    feeds = {"x": np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)}
    want, got = (ort.InferenceSession(m.SerializeToString()).run(None, feeds)[0] for m in (model, expanded))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("choice", ["Where(wide, x, row)", "Where(yes, x, row)", "MatMul(two, x)"])
def test_what_changes_shapes_or_numbers_stays(choice, tmp_path):
    """[1, 3] chosen in place of [M, 3] would be another shape; 2 is not 1."""
    model = onnx.parser.parse_model(f"""<ir_version: 11, opset_import: ["": 23, "rotexport": 1]>
        g (float[1, 3] x, float[M, 3] row) => (float[N, 3] y) {{ z = rotexport.Choose(x, row)  y = Neg(z) }}
        <domain: "rotexport", opset_import: ["": 23]> Choose (x, row) => (z) {{
          yes = Constant<value = bool {{1}}>()
          wide = Constant<value = bool[2, 1] {{1, 1}}>()
          two = Constant<value = float[1, 1] {{2.0}}>()
          z = {choice}
        }}""")
    assert [node.op_type for node in inline(model, tmp_path).graph.node] == [choice.split("(")[0], "Neg"]


ROWS = """<ir_version: 11, opset_import: ["": 23, "rotexport": 1]>
g (float16[B, 3, S, WIDTH] x) => (float16[B, 3, S, WIDTH] y) <int8[4, 4] table = {1, 1, 1, 1, 1, -1, 1, -1, 1, 1, -1, -1, 1, -1, -1, 1}> {
  z = rotexport.Turn(x, table)
  y = Neg(z)
}
<domain: "rotexport", opset_import: ["": 23]>
Turn (x, table) => (y) {
  one = Constant<value_float = 1.0>()
  signs = Constant<value_floats = [1.0, -1.0, SIGNS 1.0, 1.0]>()
  matrix_float = DequantizeLinear(table, one)
  matrix = CastLike(matrix_float, x)
  x_float = Cast<to = 1>(x)
  signed_float = Mul(x_float, signs)
  signed = CastLike(signed_float, x)
  shape_of_rows = Constant<value_ints = [-1, 1, 4]>()
  rows = Reshape(signed, shape_of_rows)
  mixed = MatMul(rows, matrix)
  shape = Shape(x)
  y = Reshape(mixed, shape)
}"""


@pytest.mark.parametrize(("width", "reshapes"), [(4, 0), (8, 2)])
def test_a_product_of_whole_rows_needs_no_reshape(width, reshapes, tmp_path):
    """Blocks of 4 in rows of 8 are rows of another shape: there the reshapes stay."""
    signs = "1.0, 1.0, -1.0, -1.0," if width == 8 else ""
    model = onnx.parser.parse_model(ROWS.replace("WIDTH", str(width)).replace("SIGNS", signs))
    expanded = inline(model, tmp_path)
    assert [n.op_type for n in expanded.graph.node].count("Reshape") == reshapes
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 5, width)).astype(np.float16)}
    want, got = (ort.InferenceSession(m.SerializeToString()).run(None, feeds)[0] for m in (model, expanded))
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)  # a few roundings of float16
