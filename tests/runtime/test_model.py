"""A graph in ONNX Runtime: feeds from the graph's own contract, caches carried over, exact products."""

import builtins

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rotexport.errors import TargetError, ValidationError
from rotexport.progress import anonymous_bytes
from rotexport.runtime.model import OnnxModel, next_past, unpacked_bytes
from rotexport.runtime.opening import open_graph

VOCAB, WIDTH = 11, 4

# A decoder without attention: each token adds up the embeddings of all tokens so far, which needs the cache.
RUNNING_SUM = """
<ir_version: 11, opset_import: ["" : 23]>
decoder (int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
         int64[batch, sequence] position_ids, CACHE[batch, past, WIDTH] past_key_values_0_key,
         float[1, 1, WIDTH] past_key_values_0_scale)
    => (float[batch, sequence, VOCAB] logits, CACHE[batch, total, WIDTH] present_0_key,
        float[1, 1, WIDTH] present_0_scale)
<int64[1] one = {1}, int64[1] end = {1000000}>
{
    hidden = Gather(table, input_ids)
    now = Cast<to = CODE>(hidden)
    present_0_key = Concat<axis = 1>(past_key_values_0_key, now)
    present_0_scale = Identity(past_key_values_0_scale)
    floats = Cast<to = 1>(present_0_key)
    sums = CumSum(floats, one)
    last = Shape<start = 1, end = 2>(input_ids)
    start = Neg(last)
    block_0_output = Slice(sums, start, end, one)
    logits = MatMul(block_0_output, head)
}
"""


def running_sum_decoder(path, cache="float"):
    """Save the decoder and return its float64 meaning: ids [S] -> logits [S, VOCAB]."""
    codes = {"float": TensorProto.FLOAT, "int8": TensorProto.INT8}
    text = RUNNING_SUM.replace("CACHE", cache).replace("CODE", str(codes[cache]))
    text = text.replace("WIDTH", str(WIDTH)).replace("VOCAB", str(VOCAB))
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(1)
    table = random.integers(-3, 4, (VOCAB, WIDTH)).astype(np.float32)  # integers survive an int8 cache
    head = random.standard_normal((WIDTH, VOCAB)).astype(np.float32)
    model.graph.initializer.extend(
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(head, "head")]
    )
    undotted = ["past_key_values_0_key", "past_key_values_0_scale", "present_0_key", "present_0_scale"]
    names = {name: name.replace("_0_", ".0.") for name in [*undotted, "block_0_output"]}
    for value in [*model.graph.input, *model.graph.output]:
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    path.write_bytes(model.SerializeToString())

    def meaning(ids):
        return table.astype(np.float64)[ids].cumsum(axis=0) @ head.astype(np.float64)

    return meaning


@pytest.fixture
def decoder(tmp_path):
    meaning = running_sum_decoder(tmp_path / "model.onnx")
    return OnnxModel(tmp_path / "model.onnx"), meaning


IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def test_the_contract_is_read_from_the_graph(decoder):
    model, _ = decoder
    assert [port.name for port in model.cache_inputs] == ["past_key_values.0.key", "past_key_values.0.scale"]
    assert model.inputs["past_key_values.0.key"].shape == ("batch", "past", WIDTH)
    assert model.outputs == ("logits", "present.0.key", "present.0.scale")


def test_one_call_from_an_empty_cache(decoder):
    model, meaning = decoder
    logits = model.run(IDS)["logits"]
    np.testing.assert_allclose(logits[0], meaning(IDS[0]), rtol=1e-5)


def test_a_batch_gets_a_batch_of_empty_caches(decoder):
    model, meaning = decoder
    batch = np.concatenate([IDS, IDS[:, ::-1]])
    logits = model.run(batch)["logits"]
    np.testing.assert_allclose(logits[1], meaning(IDS[0, ::-1]), rtol=1e-5)


@pytest.mark.parametrize("cache", ["float", "int8"])
def test_the_cache_continues_a_sequence(tmp_path, cache):
    meaning = running_sum_decoder(tmp_path / "model.onnx", cache)
    model = OnnxModel(tmp_path / "model.onnx")
    first = model.run(IDS[:, :5], outputs=["logits", "present.0.key", "present.0.scale"])
    past = next_past({name: value for name, value in first.items() if name != "logits"})
    rest = model.run(IDS[:, 5:], past=past)["logits"]
    np.testing.assert_allclose(rest[0], meaning(IDS[0])[5:], rtol=1e-5)
    forgetful = model.run(IDS[:, 5:])["logits"]
    assert np.abs(forgetful - rest).max() > 0.1


def test_calls_that_share_a_cache_give_what_one_call_gives(decoder):
    model, meaning = decoder
    graph = open_graph(model.path)
    np.testing.assert_allclose(graph.logits(IDS[0], [5, 1, 2]), meaning(IDS[0]), rtol=1e-5)
    assert graph.length == 8
    assert graph.cache_bytes == 4 * (8 * WIDTH + WIDTH)
    with pytest.raises(ValueError, match="do not add up to 8"):
        graph.logits(IDS[0], [5, 1])


def test_a_growing_cache_ends_with_the_context(decoder):
    model, _ = decoder
    (model.path.parent / "config.json").write_text('{"max_position_embeddings": 6}')
    graph = open_graph(model.path)
    graph.logits(IDS[0, :6])
    with pytest.raises(ValidationError, match=r"6 \+ 1 tokens pass 5.*attention\.kind: streaming"):
        graph.call(IDS[0, 6:7], [0])


def test_windows_start_afresh(decoder):
    model, meaning = decoder
    results = [result["logits"][0] for result in model.forward_many([IDS[0], IDS[0, :3]])]
    np.testing.assert_allclose(results[1], meaning(IDS[0, :3]), rtol=1e-5)


def test_positions_count_real_tokens_only(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Cast", ["position_ids"], ["logits"], to=TensorProto.FLOAT)],
        "echo",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length])
            for name, length in (("input_ids", "s"), ("attention_mask", "t"), ("position_ids", "s"))
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "s"])],
    )
    path = tmp_path / "echo.onnx"
    onnx.save(helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", 23)]), path)
    left_padded = np.array([[0, 0, 1, 1, 1]])
    positions = OnnxModel(path).run(np.ones((1, 5), np.int64), attention_mask=left_padded)["logits"]
    assert positions.tolist() == [[0, 0, 0, 1, 2]]


def test_inner_tensors_can_be_observed(decoder, tmp_path):
    model, _ = decoder
    with pytest.raises(ValidationError, match=r"no output 'block\.0\.output'"):
        model.run(IDS, outputs=["block.0.output"])
    observed = OnnxModel(model.path, extra_outputs=["block.0.output"])
    hidden = observed.run(IDS, outputs=["block.0.output"])["block.0.output"]
    assert hidden.shape == (1, 8, WIDTH)
    with pytest.raises(ValidationError, match=r"no tensor 'block\.7\.output'"):
        OnnxModel(model.path, extra_outputs=["block.7.output"])


@pytest.mark.parametrize("low_memory", [False, True])
def test_external_weights_are_found_while_observing(tmp_path, low_memory):
    meaning = running_sum_decoder(tmp_path / "inline.onnx")
    path = tmp_path / "model.onnx"
    model = onnx.load(tmp_path / "inline.onnx")
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    observed = OnnxModel(path, low_memory=low_memory, extra_outputs=["block.0.output"])
    np.testing.assert_allclose(observed.run(IDS)["logits"][0], meaning(IDS[0]), rtol=1e-5)


@pytest.mark.skipif(anonymous_bytes() is None, reason="this system does not tell its memory")
@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.INT4])
def test_low_memory_leaves_narrow_weights_in_the_file(tmp_path, kind):
    path, unpacked = narrow_weights(tmp_path, kind), 4 * 2048 * 8192
    assert unpacked <= unpacked_bytes(path) < 1.1 * unpacked
    grown = {}
    for low_memory in (True, False):
        before = anonymous_bytes()
        model = OnnxModel(path, low_memory=low_memory)
        grown[low_memory] = anonymous_bytes() - before
        del model
    assert grown[True] < unpacked / 4
    assert grown[False] > unpacked * 3 / 4


def narrow_weights(directory, kind):
    """Save a model whose one matrix [2048, 8192] is stored in fp16, or in int4 with a scale per column."""
    half = kind == TensorProto.FLOAT16
    shape, element = (2048, 8192), TensorProto.FLOAT16 if half else TensorProto.FLOAT
    stored = helper.make_tensor("stored", kind, shape, bytes(2048 * 8192 * (4 if half else 1) // 2), raw=True)
    dequantize = helper.make_node("DequantizeLinear", ["stored", "scales"], ["matrix"], axis=1)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
        *([] if half else [dequantize]),
        helper.make_node("MatMul", ["hidden", "stored" if half else "matrix"], ["logits"]),
    ]
    kinds = np.float16 if half else np.float32
    graph = helper.make_graph(
        nodes,
        "narrow",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", element, ["batch", "sequence", 8192])],
        [
            stored,
            numpy_helper.from_array(np.ones((2, 2048), kinds), "table"),
            numpy_helper.from_array(np.ones(8192, kinds), "scales"),
        ],
    )
    model = helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", 23)])
    path = directory / "narrow.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    return path


def test_int4_weights_are_multiplied_in_float(tmp_path):
    """ONNX Runtime's default computes such products in int8, which costs 0.5 to 1 %."""
    random = np.random.default_rng(2)
    table = random.standard_normal((VOCAB, 128)).astype(np.float32)
    codes = random.integers(-8, 8, (128, 64))
    scales = random.uniform(0.01, 0.02, (4, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], axis=0, block_size=32),
        helper.make_node("MatMul", ["hidden", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "int4",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 64])],
        [
            numpy_helper.from_array(table, "table"),
            helper.make_tensor("codes", TensorProto.INT4, (128, 64), codes.reshape(-1)),
            numpy_helper.from_array(scales, "scales"),
        ],
    )
    path = tmp_path / "int4.onnx"
    onnx.save(helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", 23)]), path)
    logits = OnnxModel(path).run(IDS)["logits"][0]
    exact = table[IDS[0]].astype(np.float64) @ (codes * np.repeat(scales, 32, axis=0).astype(np.float64))
    assert np.abs(logits - exact).max() < 1e-5 * np.abs(exact).max()


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(TargetError, match=r"no model at '.*gone\.onnx'"):
        OnnxModel(tmp_path / "gone.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(TargetError, match=r"broken\.onnx"):
        OnnxModel(broken)


def test_truncated_weights_are_refused(tmp_path):
    running_sum_decoder(tmp_path / "inline.onnx")
    path = tmp_path / "model.onnx"
    model = onnx.load(tmp_path / "inline.onnx")
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").write_bytes(b"\0" * 8)
    with pytest.raises(TargetError, match=r"model\.onnx"):
        OnnxModel(path)


def test_an_unknown_input_is_refused(tmp_path):
    running_sum_decoder(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.input.append(helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, ["batch"]))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(TargetError, match="'token_type_ids'"):
        OnnxModel(tmp_path / "odd.onnx").run(IDS)


def test_without_onnx_runtime_the_extra_is_named(decoder, monkeypatch):
    real_import = builtins.__import__

    def without_onnxruntime(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnxruntime)
    with pytest.raises(TargetError, match="'cpu' extra"):
        OnnxModel(decoder[0].path)
