"""Copying traced blocks, on a two-block graph with markers."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.graphs import ops, parse

from rotexport.export.replicate import InseparableBlocksError, replicate

# Two blocks as the tracer leaves them, with dots spelled `__`: block 0 adds, block 1 multiplies its weight.
TRACED = """
traced (int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
    int64[batch, sequence] position_ids,
    float[2] past_key_values__0__key, float[2] past_key_values__0__value,
    float[2] past_key_values__1__key, float[2] past_key_values__1__value,
    float[9, 2] table, float[2] layers__0__weight, float[2] layers__1__weight)
    => (float[batch, sequence, 2] logits, float[2] present__0__key, float[2] present__0__value,
        float[2] present__1__key, float[2] present__1__value)
<float two = {2.0}>
{
    angle = Cast<to = 1>(position_ids)
    embedded = Gather(table, input_ids)
    s0 = rotexport.Boundary<index = -1>(embedded)
    present__0__key = Neg(past_key_values__0__key)
    present__0__value = Identity(past_key_values__0__value)
    a = Add(s0, layers__0__weight)
    s1 = rotexport.Boundary<index = 0>(a)
    present__1__key = Neg(past_key_values__1__key)
    present__1__value = Identity(past_key_values__1__value)
    doubled = Mul(layers__1__weight, two)
    b = Mul(OPERAND, doubled)
    s2 = rotexport.Boundary<index = 1>(b)
    logits = Sqrt(s2)
}"""


def traced(operand: str = "s1") -> gs.Graph:
    return parse(TRACED.replace("OPERAND", operand))


def test_blocks_follow_the_given_order_with_weights_and_cache_of_their_layer() -> None:
    graph = replicate(traced(), (0, 1, 1), "layers")
    adding = ["Neg", "Identity", "Add"]
    scaling = ["Neg", "Identity", "Mul", "Mul"]
    assert [op for op in ops(graph) if op != "Cast"] == ["Gather", *adding, *scaling, *scaling, "Sqrt"]
    products = {
        node.outputs[0].name: [t.name for t in node.inputs] for node in graph.nodes if node.op == "Mul"
    }
    assert products["block.1.output"] == ["block.0.output", "block.1/weights/Mul_0"]
    assert products["block.2/weights/Mul_0"] == ["layers.2.weight", "constant.0"]
    assert products["block.2.output"] == ["block.1.output", "block.2/weights/Mul_0"]
    assert [tensor.name for tensor in graph.outputs][-2:] == ["present.2.key", "present.2.value"]
    negated = {node.inputs[0].name: node.outputs[0].name for node in graph.nodes if node.op == "Neg"}
    assert negated["past_key_values.2.key"] == "present.2.key"


def test_weights_come_after_the_declared_inputs() -> None:
    graph = replicate(traced(), (0, 1, 1), "layers")
    names = [tensor.name for tensor in graph.inputs]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert names[9:] == ["table", "layers.0.weight", "layers.1.weight", "layers.2.weight"]


def test_a_block_that_reads_another_block_is_not_copied() -> None:
    with pytest.raises(InseparableBlocksError, match="block 1 reads values of block 0"):
        replicate(traced(operand="a"), (0, 1, 0, 1), "layers")


def test_a_whole_trace_keeps_such_a_connection() -> None:
    graph = replicate(traced(operand="s0"), (0, 1), "layers")
    product = next(node for node in graph.nodes if node.outputs[0].name == "block.1.output")
    assert product.inputs[0].name == "block.0.input"


def test_equal_constants_are_one() -> None:
    graph = replicate(traced(), (0, 1, 1), "layers")
    (constant,) = [t for t in graph.tensors().values() if isinstance(t, gs.Constant)]
    np.testing.assert_array_equal(constant.values, 2.0)
