"""Patterns that TensorRT builds and then runs wrongly are refused; their right forms pass."""

import onnx
import pytest

from rotexport.errors import TargetError
from rotexport.targets.lint import lint


def model(text):
    return onnx.parser.parse_model('<ir_version: 11, opset_import: ["": 23, "rotexport": 1]>\n' + text)


HALF_ONES = "{15360, 15360}"  # the text form takes bits


def product(
    scale_type="float", scales="{0.1, 0.1}", weight_attributes="axis = 1", quantizer="<output_dtype = 3>"
):
    shape = "[1, 2]" if "block_size" in weight_attributes else "[2]"
    return model(f"""g (float[M, 2] x) => (float[M, 2] y)
        <float one = {{1.0}}, int8[2, 2] W = {{1, 2, 3, 4}}, {scale_type}{shape} s = {scales}> {{
          q = QuantizeLinear{quantizer}(x, one)
          a = DequantizeLinear(q, one)
          w = DequantizeLinear<{weight_attributes}>(W, s)
          [product] y = MatMul(a, w)
        }}""")


def test_channel_scales_in_float32_pass():
    lint(product())


def test_block_scales_behind_quantized_activations_are_refused():
    with pytest.raises(TargetError, match="product: of a quantized product's block scales only the first"):
        lint(product(weight_attributes="axis = 0, block_size = 2"))


def test_block_scales_behind_float_activations_pass():
    lint(
        model("""g (float16[M, 2] x) => (float16[M, 2] y)
        <int4[2, 2] W = {1, 2, 3, 4}, float16[1, 2] s = {15360, 15360}> {
          w = DequantizeLinear<axis = 0, block_size = 2>(W, s)
          y = MatMul(x, w)
        }""")
    )


def test_half_precision_scales_of_integer_products_are_refused():
    with pytest.raises(TargetError, match="half-precision scale 's' overflows"):
        lint(product("float16", HALF_ONES))


def test_an_unstated_quantized_type_is_refused():
    with pytest.raises(TargetError, match="without output_dtype ONNX quantizes to uint8"):
        lint(product(quantizer=""))


def test_zero_points_are_refused():
    with pytest.raises(TargetError, match="no zero points"):
        lint(
            model("""g (float[M, 2] x) => (int8[M, 2] y) <float one = {1.0}, int8 zero = {3}> {
              y = QuantizeLinear(x, one, zero)
            }""")
        )


ATTENTION = """g (float16[B, 2, S, 8] q, float16[B, 2, T, 8] k, float16[B, 2, T, 8] v, float16[B, 1, S, T] m)
    => (float16[B, 2, S, 8] y) { [attend] y = Attention%s(q, k, v%s) }"""


def test_attention_with_an_additive_mask_passes():
    lint(model(ATTENTION % ("", ", m")))


@pytest.mark.parametrize(
    ("attributes", "inputs", "words"),
    [("<is_causal = 1>", "", "upper left corner"), ("", ", m, k, v", "inputs after the mask")],
)
def test_attention_that_loses_its_cache_is_refused(attributes, inputs, words):
    with pytest.raises(TargetError, match=f"attend: .*{words}"):
        lint(model(ATTENTION % (attributes, inputs)))


def test_a_quantized_table_must_be_dequantized():
    text = """g (float[M, 2] x) => (float[M, 2] y) <int8[2, 2] H = {1, 1, 1, -1}, float one = {1.0}> {
        h = %s
        y = MatMul(x, h)
    }"""
    lint(model(text % "DequantizeLinear(H, one)"))
    lint(model(text % "rotexport.Dequantize(H)"))  # a plugin's: others are expanded before
    with pytest.raises(TargetError, match="'H' may only feed DequantizeLinear"):
        lint(model(text % "Cast<to = 1>(H)"))
